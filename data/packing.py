"""Samples → packed rows: a row holds whole samples, within a budget of left tokens and one of right tokens."""

from collections.abc import Iterator
from typing import Any

from data.datasets import Sample, SampleStream

Row = list[Sample]


def fill_row(window: list[Sample], left_length: int, right_length: int) -> Row:
    """Take one row out of `window`: its oldest sample, then again and again the longest that still fits.

    >>> # right lengths 5 3 4 2 1, budget 10:  5 → 5+4 → 5+4+1, leaving 3 2
    """
    row: Row = []
    left, right = left_length, right_length
    pick: int | None = 0
    while pick is not None:
        sample = window.pop(pick)
        row.append(sample)
        left, right = left - sample.left_length, right - sample.right_length
        fitting = [(s.right_length, -i) for i, s in enumerate(window) if s.left_length <= left and s.right_length <= right]
        pick = -max(fitting)[1] if fitting else None
    return row


def pack(samples: list[Sample], left_length: int, right_length: int) -> list[Row]:
    """All of a finite list of samples, packed."""
    window, rows = list(samples), []
    while window:
        rows.append(fill_row(window, left_length, right_length))
    return rows


class RowStream:
    """Packed rows without end, with state: the stream's place and the samples that wait in the window.

    A window of N samples is filled before each row is taken, so order stays random and rows come out full.
    """

    def __init__(self, stream: SampleStream, left_length: int, right_length: int, window: int) -> None:
        self.stream, self.left_length, self.right_length, self.window_size = stream, left_length, right_length, window
        self.window: list[Sample] = []
        self.pending: Iterator[Sample] = iter(stream)

    def __iter__(self) -> Iterator[Row]:
        while True:
            while len(self.window) < self.window_size:
                self.window.append(next(self.pending))
            yield fill_row(self.window, self.left_length, self.right_length)

    def state(self) -> dict[str, Any]:
        """Where the next row starts from; plain JSON."""
        return {
            "epoch": self.stream.epoch,
            "cursor": self.stream.cursor,
            "part": self.stream.part,
            "window": [list(s.key) for s in self.window],
            "dropped": dict(self.stream.dataset.dropped),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        dataset = self.stream.dataset
        self.stream.epoch, self.stream.cursor, self.stream.part = state["epoch"], state["cursor"], state["part"]
        self.pending = iter(self.stream)
        dataset.dropped.update(state["dropped"])
        self.window = [dataset[index][part] for index, part in state["window"]]
