"""The order of records: sources, how often each is drawn, and a stateless order for every epoch."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import Any
from zlib import crc32

import numpy as np

from utils.errors import UserError

Record = dict[str, Any]
MAX_DENOMINATOR = 10**6  # of the fractional number of records that an epoch draws from a source


class InMemoryRecords(Sequence[Record]):
    """Records of a list, or of another sequence that gives each at once."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]
        return self.records[index]

    def prefetch(self, index: int) -> None:
        pass

    def order(self, start: int, stop: int, rng: np.random.Generator, part: int, parts: int) -> np.ndarray:
        """Return share `part` of `parts` of a random order of the records from `start` to `stop`."""
        return (start + rng.permutation(stop - start))[part::parts]


def block_order(
    ends: Sequence[int], start: int, stop: int, rng: np.random.Generator, part: int, parts: int, pool: int
) -> np.ndarray:
    """Return share `part` of `parts` of a random order of the rows from `start` to `stop`, block by block.

    `ends`: where each block of rows ends. Blocks are shuffled, and the rows of each `pool` blocks are mixed.
    Shares are disjoint, and consist of whole blocks if there are at least eight per share.
    """
    by_block = len(ends) >= 8 * parts
    shuffled = rng.permutation(len(ends))
    pool *= parts if by_block else 1
    begins = [0, *ends]
    out = [np.empty(0, np.int64)]
    for first in range(0, len(shuffled), pool):
        rows = [np.arange(max(start, begins[b]), min(stop, ends[b])) for b in shuffled[first : first + pool]]
        seeds = rng.integers(2**63, size=parts)
        rows = rows[part::parts] if by_block else rows
        if rows:
            mixed = np.random.default_rng(seeds[part if by_block else 0])
            out.append(mixed.permutation(np.concatenate(rows)))
    order = np.concatenate(out)
    return order if by_block else order[part::parts]


@dataclass(frozen=True)
class Source:
    """Records `start` to `stop` of a sequence."""

    name: str
    records: Any  # InMemoryRecords or TableRecords
    start: int
    stop: int
    weight: float = 1.0
    cap: int = 0  # maximum of records drawn in an epoch (0: no cap)
    note: str = ""  # for users: which splits are read, and which not

    def __len__(self) -> int:
        return self.stop - self.start


class Mixture:
    """Draws the records of an epoch.

    From a source of n records an epoch draws n·weight, or with a temperature T a number in proportion to
    n^(1/T)·weight, at most the cap. A source that is drawn in part continues in the next epoch: cycle by
    cycle, each in an order of its own, so every record comes once before any repeats. Fractions are carried
    over: of 2.5 records, one epoch draws 2 and the next 3. `rank` is this process's share among `ranks`
    disjoint ones.
    """

    def __init__(
        self, sources: list[Source], seed: int, temperature: float = 1.0, rank: int = 0, ranks: int = 1
    ) -> None:
        self.sources, self.seed, self.rank, self.ranks = sources, seed, rank, ranks
        sizes = [len(s) for s in sources]
        tempered = [n ** (1 / temperature) if n else 0.0 for n in sizes]
        scale = sum(sizes) / sum(tempered) if temperature != 1 else 1.0
        targets = [scale * t * s.weight for t, s in zip(tempered, sources, strict=True)]
        exact = [
            Fraction(x).limit_denominator(MAX_DENOMINATOR) or Fraction(x) for x in targets
        ]  # 0.29·100 = 29
        # Records per epoch from each source, all ranks together.
        self.drawn = [min(x, Fraction(s.cap)) if s.cap else x for x, s in zip(exact, sources, strict=True)]
        if sum(self.drawn) < 1:
            raise UserError("data.sources: an epoch of these sources, weights and caps holds no record")

    def epoch(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return source, record and "first time" of every draw of an epoch: three arrays."""
        records, firsts = [], []
        for source, drawn in zip(self.sources, self.drawn, strict=True):
            share = drawn / len(source) if len(source) else Fraction(0)
            begin, end = number * share, (number + 1) * share
            parts, new = [np.empty(0, np.int64)], 0
            for cycle in range(floor(begin), floor(end) + 1):
                a, b = max(begin, Fraction(cycle)) - cycle, min(end, Fraction(cycle + 1)) - cycle
                if a == b:
                    continue
                rng = np.random.default_rng((self.seed, cycle, crc32(source.name.encode())))
                order = source.records.order(source.start, source.stop, rng, self.rank, self.ranks)
                parts.append(order[floor(a * len(order)) : floor(b * len(order))])
                new += len(parts[-1]) if cycle == 0 else 0
            records.append(np.concatenate(parts))
            firsts.append(np.arange(len(records[-1])) < new)
        rng = np.random.default_rng((self.seed, number, self.rank))
        which = rng.permutation(np.repeat(np.arange(len(records)), [len(r) for r in records]))
        slots = np.argsort(which, kind="stable")  # every source keeps its own order
        record, first = np.empty(len(which), np.int64), np.empty(len(which), bool)
        record[slots], first[slots] = np.concatenate(records), np.concatenate(firsts)
        return which, record, first

    def is_empty(self) -> bool:
        """Return whether this rank has no record in any epoch."""
        rng = np.random.default_rng(self.seed)
        return not any(
            len(s.records.order(s.start, s.stop, rng, self.rank, self.ranks))
            for s, drawn in zip(self.sources, self.drawn, strict=True)
            if drawn
        )
