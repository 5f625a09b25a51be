"""Which record comes when: sources, how often each is drawn, and an order for every epoch that needs no memory of the last."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np

from utils.errors import UserError

Record = dict[str, Any]
LEAST = 10**6  # records an epoch are kept to one part in as many


class InMemoryRecords(Sequence[Record]):
    """Records that are all in memory."""

    def __init__(self, records: list[Record]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]
        return self.records[index]

    def prefetch(self, index: int) -> None:
        pass

    def order(self, start: int, stop: int, rng: np.random.Generator, part: int, parts: int) -> np.ndarray:
        """Row numbers from `start` to `stop` in an order drawn from `rng`; of `parts` disjoint shares, number `part`."""
        return (start + rng.permutation(stop - start))[part::parts]


@dataclass(frozen=True)
class Source:
    """Records `start` to `stop` of a sequence that is `Listed` or a `TableRecords`."""

    name: str
    records: Any
    start: int
    stop: int
    weight: float = 1.0
    cap: int = 0  # records drawn in an epoch, at most (0: no cap)

    def __len__(self) -> int:
        return self.stop - self.start


class Pick(NamedTuple):
    source: int
    record: int
    first: bool  # seen for the first time


class Mixture:
    """An epoch draws n·weight records of a source of n, each once; with a temperature T, in proportion to n^(1/T)·weight; capped.

    A source that is drawn in part goes on in the next epoch where it stopped: lap by lap, each in an order of its own, so
    every record comes once before any comes again. Parts of a record are carried over: of 2.5, an epoch draws 2, the next 3.
    Of `ranks` disjoint shares this is number `rank`'s.
    """

    def __init__(
        self, sources: list[Source], seed: int, temperature: float = 1.0, rank: int = 0, ranks: int = 1
    ) -> None:
        self.sources, self.seed, self.rank, self.ranks = sources, seed, rank, ranks
        sizes = [len(s) for s in sources]
        tempered = [n ** (1 / temperature) if n else 0.0 for n in sizes]
        scale = sum(sizes) / sum(tempered) if temperature != 1 else 1.0
        wanted = [scale * t * s.weight for t, s in zip(tempered, sources, strict=True)]
        exact = [Fraction(w).limit_denominator(LEAST) or Fraction(w) for w in wanted]  # 0.29 · 100 is 29
        self.drawn = [
            min(x, Fraction(s.cap)) if s.cap else x for x, s in zip(exact, sources, strict=True)
        ]  # records of an epoch, of all ranks
        if sum(self.drawn) < 1:
            raise UserError("data.sources: an epoch of these sources, weights and caps holds no record")

    def epoch(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Source, record and whether it comes for the first time, of every pick of an epoch."""
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
        place = np.argsort(which, kind="stable")  # every source keeps its own order
        record, first = np.empty(len(which), np.int64), np.empty(len(which), bool)
        record[place], first[place] = np.concatenate(records), np.concatenate(firsts)
        return which, record, first

    def is_empty(self) -> bool:
        """Whether this rank has no record at all, whatever the epoch."""
        rng = np.random.default_rng(self.seed)
        return not any(
            len(s.records.order(s.start, s.stop, rng, self.rank, self.ranks))
            for s, drawn in zip(self.sources, self.drawn, strict=True)
            if drawn
        )
