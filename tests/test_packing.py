"""Packed rows: every sample once, all budgets observed, rows full, order random, state exact."""

import copy
import json
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.datasets import Sample
from data.packing import Budget, RowStream, Window, pack
from data.render import IGNORE, Document


def fake_sample(
    number: int, images: int, lengths: list[int], block: int = 5, vanilla: bool = False
) -> Sample:
    left = [] if vanilla else [7] * block * images
    documents = [Document(left, left, left, [1] * n, list(range(n)), [IGNORE] * n) for n in lengths]
    return Sample((0, number, 0), torch.empty(images, 0), documents)


shapes = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.integers(1, 20), min_size=1, max_size=3)),
    min_size=1,
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(shapes=shapes, unit=st.sampled_from([1, 5, 7]), tiles=st.sampled_from([0, 3]), vanilla=st.booleans())
def test_every_sample_once_and_all_budgets(shapes, unit, tiles, vanilla):
    samples = [fake_sample(i, images, lengths, vanilla=vanilla) for i, (images, lengths) in enumerate(shapes)]
    rows = pack(samples, Budget(0 if vanilla else 21, 60, unit, tiles))
    assert sorted(s.key for row in rows for s in row) == [s.key for s in samples]
    for row in rows:
        assert row and sum(s.left_length for s in row) <= 21 and sum(s.right_length for s in row) <= 60
        assert not tiles or sum(len(s.tiles) for s in row) <= tiles


def cauldron_like(count: int, right: int) -> list[Sample]:
    rng = np.random.default_rng(0)
    text = np.clip(rng.lognormal(4.9, 0.9, count), 16, 3000).astype(int)
    tiles = rng.choice([1, 2, 3, 5, 7, 9, 13, 17], count, p=[0.3, 0.05, 0.1, 0.2, 0.1, 0.15, 0.05, 0.05])
    return [
        fake_sample(i, int(n), [int(t)], 65)
        for i, (n, t) in enumerate(zip(tiles, text, strict=True))
        if t <= right
    ]


class Endless:
    """Stands in for a SampleStream."""

    def __init__(self, samples):
        self.samples, self.at = samples, 0

    def __iter__(self):
        while True:
            self.at += 1
            yield self.samples[(self.at - 1) % len(self.samples)]

    def state(self):
        return {"at": self.at}

    def load_state(self, state):
        self.at = state["at"]

    def sample(self, key, first):
        return next(s for s in self.samples if s.key == key)


def test_rows_are_full_and_no_sample_waits_long():
    samples = cauldron_like(12_000, 1496)
    stream = RowStream(Endless(samples), Budget(2600, 1496, 65), 2000)
    rows = list(islice(stream, 1200))
    used = sum(s.left_length + s.right_length for row in rows for s in row)
    assert used / (len(rows) * 4096) >= 0.99
    order = {s.key[1]: n for n, s in enumerate(samples)}
    waited = [sum(map(len, rows[:i])) - order[s.key[1]] for i, row in enumerate(rows) for s in row]
    assert max(waited) < 1000  # of 2,000 that stand in the window, a sample is never overtaken by more
    assert np.std(waited) > 300  # and order is not the stream's


@pytest.mark.parametrize("stop", [1, 4, 9])
def test_row_stream_resumes_exactly(stop):
    def stream():
        return RowStream(Endless(cauldron_like(1500, 1496)), Budget(2600, 1496, 65, 41), 400)

    whole = [[s.key for s in row] for row in islice(stream(), 30)]
    first = stream()
    list(islice(first, stop))
    again = stream()
    again.load_state(json.loads(json.dumps(first.state())))
    assert [[s.key for s in row] for row in islice(again, 30 - stop)] == whole[stop:]


def test_the_end_is_the_best_pair():
    """Against trying all pairs: what remains after the oldest samples is filled as well as it can be."""
    rng = np.random.default_rng(3)
    for _ in range(30):
        window = Window(Budget(40, 300, 1))
        samples = [
            fake_sample(i, int(n), [int(t)], 1)
            for i, (n, t) in enumerate(zip(rng.integers(1, 12, 60), rng.integers(10, 90, 60), strict=True))
        ]
        for sample in samples:
            window.add(sample)
        head, rests = copy.deepcopy(window)._oldest()
        row = window.take_row()
        waste = 340 - sum(s.left_length + s.right_length for s in row)
        others = [s for i, s in enumerate(samples) if i not in {key & (1 << 20) - 1 for key in head}]
        best = min(
            (left + right - (a.left_length + b.left_length + a.right_length + b.right_length))
            for left, right, _ in rests[-4:]
            for i, a in enumerate(others)
            for b in others[:i]
            if a.left_length + b.left_length <= left and a.right_length + b.right_length <= right
        )
        assert waste <= max(best, 8)
