"""Results equal tests/golden/references.json: ids, labels, rows, batches, data state, tokens."""

import json

import pytest

from models.kernels import use_kernels
from tests.golden import references

STORED = json.loads(references.FILE.read_text())


@pytest.mark.parametrize(
    ("part", "kernels"), [("rendered", "auto"), ("packed", "auto"), ("answers", "auto"), ("answers", "plain")]
)
def test_equals_the_stored_references(part, kernels, restored_kernels):
    use_kernels(kernels)
    actual = json.loads(json.dumps(getattr(references, part)()))
    assert list(actual) == list(STORED[part])
    for name, value in actual.items():
        assert value == STORED[part][name], f"{part}: {name}"


@pytest.mark.parametrize("name", STORED["runs"])
def test_a_run_has_the_stored_rows_and_batches(name):
    title, _, streams = name.rpartition(", streams ")
    actual = json.loads(
        json.dumps(references.run([*references.RUNS[title], *references.SMALL, "--data.streams", streams]))
    )
    assert actual == STORED["runs"][name]
