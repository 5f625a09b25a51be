"""Samples → packed rows. A row holds whole samples, within budgets of left tokens, right tokens and tiles."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.datasets import Sample, SampleStream

Row = list[Sample]

# A waiting sample is one sortable integer of bit fields: left units, right tokens (from bit 20), number.
LEFT, RIGHT = 44, 20
NUMBER = (1 << RIGHT) - 1  # mask of the number, and of the right tokens after a shift
ACCEPT = 8  # tokens: a row with no more waste is accepted without further search
TAILS = 4  # how many row lengths are tried with a best end
PROBES = 64  # first samples of a pair that are tried
SHORTEST = 6  # how many left units a row may leave empty, in the search of its end
NONE = np.zeros(1, np.int64)
SLANT = 5.0  # maximum ratio between the remaining shares of the two budgets


@dataclass(frozen=True)
class Budget:
    """Capacity of a row, in tokens and tiles."""

    left: int
    right: int
    unit: int = 1  # left lengths are rounded up to multiples of it (image blocks: one tile's tokens)
    tiles: int = 0  # 0: no cap


class Window:
    """Samples that wait for a row.

    A row begins with the oldest samples in their order and ends with the best-fitting pair of all. For some
    samples as the first of a pair, bisection gives the partner that leaves the fewest tokens within both
    budgets. So the order stays random, and a window of 2,000 fills rows to more than 99 % of both budgets
    (`python -m benchmarks.data`), at the cost of a few array operations per row.

        oldest first → [a][b][c][d][e]              remaining: 9 units left, 212 tokens right
        after   [a][b][c][d] 12 units, 401 tokens   best pair leaves 3 tokens
        after [a][b][c][d][e] 9 units, 212 tokens   best pair leaves 0  → taken
    """

    def __init__(self, budget: Budget) -> None:
        self.budget, self.units = budget, budget.left // budget.unit
        # Number → sample, its key (the sortable integer), its tiles; oldest first.
        self.waiting: OrderedDict[int, tuple[Sample, int, int]] = OrderedDict()
        self.number = 0  # of the next sample
        self.sorted = np.empty(0, np.int64)  # keys
        self.unsorted: list[int] = []  # keys that are not yet in `sorted`
        self.removed: list[int] = []  # keys that are still in `sorted`

    def __len__(self) -> int:
        return len(self.waiting)

    def add(self, sample: Sample, number: int | None = None) -> None:
        if number is None:
            number, self.number = self.number, (self.number + 1) & NUMBER
        key = (-(-sample.left_length // self.budget.unit) << LEFT) | (sample.right_length << RIGHT) | number
        self.waiting[number] = sample, key, sample.tile_total
        self.unsorted.append(key)

    def take_row(self) -> Row:
        """Remove one row from a window that is not empty."""
        head, rests = self._oldest()
        self._update(head + self.removed)
        count, end = self._best_end(rests)
        self.unsorted += head[count:]  # these keep waiting
        self.removed = end
        keys = head[:count] + end
        left, right, tiles = rests[count - 1]
        for key in end:
            left, right, tiles = self._minus(key, left, right, tiles)
        if left * self.budget.unit + right > (self.budget.left + self.budget.right) // 50:
            keys += self._fill_up(left, right, tiles)
        return [self.waiting.pop(key & NUMBER)[0] for key in keys]

    def _minus(self, key: int, left: int, right: int, tiles: int) -> tuple[int, int, int]:
        """Subtract a sample from what remains of a row: left units, right tokens, tiles."""
        return (
            left - (key >> LEFT),
            right - (key >> RIGHT & NUMBER),
            tiles - self.waiting[key & NUMBER][2],
        )

    def _oldest(self) -> tuple[list[int], list[tuple[int, int, int]]]:
        """Return the keys of the oldest samples, until the row is almost full, and what remains after each.

        What remains: left units, right tokens, tiles.
        """
        left, right, tiles = self.units, self.budget.right, self.budget.tiles or NUMBER
        little_left, little_right = left // 20, right // 20
        head: list[int] = []
        rests: list[tuple[int, int, int]] = []
        slope = SLANT * right / left if left else 0.0
        for _, key, sample_tiles in self.waiting.values():
            less_left, less_right = left - (key >> LEFT), right - (key >> RIGHT & NUMBER)
            less_tiles = tiles - sample_tiles
            if less_left < 0 or less_right < 0 or less_tiles < 0:
                continue
            if head and (less_left < little_left or less_right < little_right):
                break
            if head and slope and not less_right <= slope * less_left <= SLANT * SLANT * less_right:
                continue
            head.append(key)
            left, right, tiles = less_left, less_right, less_tiles
            rests.append((left, right, tiles))
        return head, rests

    def _update(self, removed: list[int]) -> None:
        """Update `sorted`: add the unsorted keys, take out the removed ones."""
        keys = np.concatenate([self.sorted, np.array(self.unsorted, np.int64)])
        self.unsorted = []
        keys.sort()
        mask = np.ones(len(keys), bool)
        mask[keys.searchsorted(removed)] = False
        self.sorted = keys[mask]

    def _best_end(self, rests: list[tuple[int, int, int]]) -> tuple[int, list[int]]:
        """Return how many of the oldest samples to take, and up to two keys that best fill the rest.

        All row lengths (`rests`) and probes are tried at once: `remaining` is (row lengths, probes), the
        space that is left for the last sample.
        """
        keys, unit = self.sorted, self.budget.unit
        left, right, _ = rests[-1]
        waste, count = left * unit + right, len(rests)
        end: list[int] = []
        if not len(keys):
            return count, end
        first = max(0, len(rests) - TAILS)
        step = max(1, len(keys) // PROBES)
        probes = np.concatenate([NONE, keys[self.number % step :: step]])  # first sample of the pair, or none
        capacity = np.array([(left << LEFT) | (right << RIGHT) | NUMBER for left, right, _ in rests[first:]])
        remaining = capacity[:, None] - (probes & ~NUMBER)
        for short in range(min(SHORTEST, max(left for left, _, _ in rests[first:]) + 1)):  # empty left units
            if waste <= max(ACCEPT, short * unit):
                break
            # Negative right tokens borrow from the left units: then no key with the same left units is close.
            target = remaining - (short << LEFT)
            index = keys.searchsorted(target, "right") - 1
            match = keys[index]
            gap = target - match
            gap[(index < 0) | ((match ^ target) >> LEFT != 0) | (match == probes)] = NUMBER << RIGHT
            for slot in gap.argsort(axis=None)[:16] if self.budget.tiles else (gap.argmin(),):
                row, column = divmod(int(slot), gap.shape[1])
                total = int(gap[row, column] >> RIGHT) + short * unit
                if total >= min(waste, NUMBER):
                    break
                best = [int(match[row, column]), int(probes[column])][: 1 + (column > 0)]
                if not self.budget.tiles or self._tiles(best) <= rests[first + row][2]:
                    waste, count, end = total, first + row + 1, best
                    break
        return count, end

    def _tiles(self, keys: list[int]) -> int:
        return sum(self.waiting[key & NUMBER][2] for key in keys)

    def _fill_up(self, left: int, right: int, tiles: int) -> list[int]:
        """Without a good end: take the longest samples that fit, one after the other."""
        self._update(self.removed)
        self.removed = []
        taken: list[int] = []
        while True:
            lefts, rights = self.sorted >> LEFT, self.sorted >> RIGHT & NUMBER
            fits = (lefts <= left) & (rights <= right)
            if self.budget.tiles:
                fits &= np.array(
                    [self.waiting[key & NUMBER][2] <= tiles for key in self.sorted.tolist()], bool
                )
            if not fits.any():
                return taken
            key = int(self.sorted[np.where(fits, lefts * self.budget.unit + rights, -1).argmax()])
            self._update([key])
            taken.append(key)
            left, right, tiles = self._minus(key, left, right, tiles)


def pack(samples: Iterable[Sample], budget: Budget) -> list[Row]:
    """Pack a finite list of samples."""
    window = Window(budget)
    for sample in samples:
        window.add(sample)
    rows = []
    while len(window):
        rows.append(window.take_row())
    return rows


class RowStream:
    """Endless packed rows. The state is the stream's position and the keys of the waiting samples."""

    def __init__(self, stream: SampleStream, budget: Budget, window: int) -> None:
        self.stream, self.budget, self.window_size = stream, budget, window
        self.window = Window(budget)
        self.pending: Iterator[Sample] = iter(stream)

    def __iter__(self) -> Iterator[Row]:
        while True:
            while len(self.window) < self.window_size:
                self.window.add(next(self.pending))
            yield self.window.take_row()

    def state(self) -> dict[str, Any]:
        """Return the position before the next row, ready for JSON."""
        return self.stream.state() | {
            "window": [
                (number, sample.key, sample.first) for number, (sample, _, _) in self.window.waiting.items()
            ],
            "number": self.window.number,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.stream.load_state(state)
        self.pending = iter(self.stream)
        self.window = Window(self.budget)
        self.window.number = state["number"]
        for number, key, first in state["window"]:
            if (sample := self.stream.sample(tuple(key), first)) is not None:
                self.window.add(sample, number)
