"""Samples → packed rows: a row holds whole samples, within a budget of left tokens, one of right tokens, and a cap on tiles."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.datasets import Sample, SampleStream

Row = list[Sample]

LEFT, RIGHT = (
    44,
    20,
)  # bits: a waiting sample is one integer, left units · right tokens · number, and integers are sorted
NUMBER = (1 << RIGHT) - 1
ACCEPT = 8  # tokens: a row with no more waste is good enough
TAILS, PROBES, SHORTEST = 4, 64, 6
NONE = np.zeros(1, np.int64)
SLANT = 5.0  # what is left of a row's two budgets may differ this much in proportion


@dataclass(frozen=True)
class Budget:
    """What a row may hold. Left lengths count in steps of `unit` (image blocks are multiples of one tile's tokens), rounded up."""

    left: int
    right: int
    unit: int = 1
    tiles: int = 0  # 0: no cap


class Window:
    """Samples that wait for a row. A row begins with the oldest, in their order, and ends with the pair that fits best.

    The pair is looked for among all waiting samples: for some of them as the first, the partner that leaves least is
    found by bisection, where both budgets are met. So order stays random, and a window of 2,000 fills rows to more than
    99 % of both budgets (`python -m benchmarks.data`). Costs a few array operations a row.

        oldest first → [a][b][c][d][e]              remaining: 9 units left, 212 tokens right
        after   [a][b][c][d] 12 units, 401 tokens   best pair leaves 3 tokens
        after [a][b][c][d][e] 9 units, 212 tokens   best pair leaves 0  → taken
    """

    def __init__(self, budget: Budget) -> None:
        self.budget, self.units = budget, budget.left // budget.unit
        self.waiting: OrderedDict[int, tuple[Sample, int, int]] = (
            OrderedDict()
        )  # number → sample, its integer, its tiles; in order
        self.number = 0  # of the next sample
        self.sorted = np.empty(0, np.int64)
        self.unsorted: list[int] = []  # not yet in `sorted`
        self.removed: list[int] = []  # still there

    def __len__(self) -> int:
        return len(self.waiting)

    def add(self, sample: Sample, number: int | None = None) -> None:
        if number is None:
            number, self.number = self.number, (self.number + 1) & NUMBER
        key = (-(-sample.left_length // self.budget.unit) << LEFT) | (sample.right_length << RIGHT) | number
        self.waiting[number] = sample, key, sample.tile_total
        self.unsorted.append(key)

    def take_row(self) -> Row:
        """One row out of a window that is not empty."""
        head, rests = self._oldest()
        self._update(head + self.removed)
        kept, end = self._best_end(rests)
        self.unsorted += head[kept:]  # these wait on
        self.removed = end
        keys = head[:kept] + end
        left, right, tiles = rests[kept - 1]
        for key in end:
            left, right, tiles = (
                left - (key >> LEFT),
                right - (key >> RIGHT & NUMBER),
                tiles - self.waiting[key & NUMBER][2],
            )
        if left * self.budget.unit + right > (self.budget.left + self.budget.right) // 50:
            keys += self._fill_up(left, right, tiles)
        return [self.waiting.pop(key & NUMBER)[0] for key in keys]

    def _oldest(self) -> tuple[list[int], list[tuple[int, int, int]]]:
        """Samples in their order, until little room is left, and what is left after each: left units, right tokens, tiles."""
        left, right, tiles = self.units, self.budget.right, self.budget.tiles or NUMBER
        little_left, little_right = left // 20, right // 20
        head: list[int] = []
        rests: list[tuple[int, int, int]] = []
        slope = SLANT * right / left if left else 0.0
        for _, key, in_it in self.waiting.values():
            less_left, less_right, less_tiles = (
                left - (key >> LEFT),
                right - (key >> RIGHT & NUMBER),
                tiles - in_it,
            )
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
        """Bring `sorted` up to date: what is new goes in, `gone` goes out."""
        keys = np.concatenate([self.sorted, np.array(self.unsorted, np.int64)])
        self.unsorted = []
        keys.sort()
        keep = np.ones(len(keys), bool)
        keep[keys.searchsorted(removed)] = False
        self.sorted = keys[keep]

    def _best_end(self, rests: list[tuple[int, int, int]]) -> tuple[int, list[int]]:
        """How many of the oldest to keep, and the one or two samples that best fill what they leave."""
        keys, unit = self.sorted, self.budget.unit
        left, right, _ = rests[-1]
        waste, kept = left * unit + right, len(rests)
        end: list[int] = []
        if not len(keys):
            return kept, end
        first = max(0, len(rests) - TAILS)
        step = max(1, len(keys) // PROBES)
        probe = np.concatenate(
            [NONE, keys[self.number % step :: step]]
        )  # for a first sample: none, or one of these
        room = np.array([(left << LEFT) | (right << RIGHT) | NUMBER for left, right, _ in rests[first:]])
        whole = room[:, None] - (probe & ~NUMBER)
        for short in range(
            min(SHORTEST, max(left for left, _, _ in rests[first:]) + 1)
        ):  # left units that stay empty
            if waste <= max(ACCEPT, short * unit):
                break
            # Right tokens below 0 borrow from the left units: such a difference is near no key of the same left units.
            wanted = whole - (short << LEFT)
            at = keys.searchsorted(wanted, "right") - 1
            found = keys[at]
            gap = wanted - found
            gap[(at < 0) | ((found ^ wanted) >> LEFT != 0) | (found == probe)] = NUMBER << RIGHT
            for place in gap.argsort(axis=None)[:16] if self.budget.tiles else (gap.argmin(),):
                which, column = divmod(int(place), gap.shape[1])
                total = int(gap[which, column] >> RIGHT) + short * unit
                if total >= min(waste, NUMBER):
                    break
                best = [int(found[which, column]), int(probe[column])][: 1 + (column > 0)]
                if (
                    not self.budget.tiles
                    or sum(self.waiting[key & NUMBER][2] for key in best) <= rests[first + which][2]
                ):
                    waste, kept, end = total, first + which + 1, best
                    break
        return kept, end

    def _fill_up(self, left: int, right: int, tiles: int) -> list[int]:
        """Where no good end was found: the longest that fit, one after the other."""
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
            left, right, tiles = (
                left - (key >> LEFT),
                right - (key >> RIGHT & NUMBER),
                tiles - self.waiting[key & NUMBER][2],
            )


def pack(samples: Iterable[Sample], budget: Budget) -> list[Row]:
    """All of a finite list of samples, packed."""
    window = Window(budget)
    for sample in samples:
        window.add(sample)
    rows = []
    while len(window):
        rows.append(window.take_row())
    return rows


class RowStream:
    """Packed rows without end, with state: the stream's place and the samples that wait in the window."""

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
        """Where the next row starts from; plain JSON once `window` is listed."""
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
