"""The notebook runs from top to bottom, defines nothing, and is stored with its outputs."""

import ast
import os
import shutil
from pathlib import Path

import pytest

nbclient = pytest.importorskip(
    "nbclient", reason="the notebook is executed with nbclient: install the extra 'dev'"
)
nbformat = pytest.importorskip(
    "nbformat", reason="the notebook is read with nbformat: install the extra 'dev'"
)
pytest.importorskip("ipykernel", reason="the notebook needs a kernel: install the extra 'dev'")

PATH = Path(__file__).parent.parent / "e2e_dual_tower.ipynb"
SMALLER = {  # what the notebook says → less of it, for the test
    '"--data.vocab_size",': '"--data.limit", "60", "--data.validation_images", "20", "--data.vocab_size",',
    '"8000",': '"600", "--rows", "8",',
    '"8",': '"1",',
    "validation.start + 40)": "validation.start + 4)",
}


@pytest.fixture(scope="module")
def code() -> list:
    return [cell for cell in nbformat.read(PATH, as_version=4).cells if cell.cell_type == "code"]


def test_it_defines_nothing(code):
    for cell in code:
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef), cell.source
            assert not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda)), cell.source


def test_it_is_stored_as_executed(code):
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        assert bool(cell.outputs) == any(call in cell.source for call in ("print(", "display(", ".main(")), (
            cell.source
        )
        assert not any(output.output_type == "error" for output in cell.outputs)
    assert PATH.stat().st_size < 1_000_000
    assert not any(folder in PATH.read_text(encoding="utf-8") for folder in ("/home/", "/root/", "/tmp/"))


def test_it_runs(tmp_path, monkeypatch):
    """The notebook runs in an empty folder, with a few steps of training on little data.

    Its output is not compared; a cell that raises fails the test.
    """
    shutil.copy(PATH, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NOTEBOOK_STEPS", "4")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(PATH.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    )
    notebook = nbformat.read(PATH.name, as_version=4)
    for whole, smaller in SMALLER.items():
        (cell,) = (cell for cell in notebook.cells if cell.cell_type == "code" and whole in cell.source)
        cell.source = cell.source.replace(whole, smaller)
    nbclient.NotebookClient(notebook, timeout=180).execute()
    text = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert (
        "all answers equal: True" in text
        and "every tensor equal: True" in text
        and "read back, equal: True" in text
    )
