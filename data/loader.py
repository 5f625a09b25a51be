"""Packed rows → batches, with state. Rows are planned in this process, images decoded by worker processes, or here."""

import math
import re
import signal
import warnings
import weakref
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from configs.errors import UserError
from configs.schema import VisionConfig
from data.collators import Batch, collate
from data.datasets import Sample, by_source, decode
from data.images import ImageError
from data.packing import Row, RowStream

Decoded = tuple[Tensor | None, list[tuple[int, str]]]  # tiles, None where nothing could be decoded; number and reason of the samples that could not
SILENCE = 600  # seconds after which a worker that gives nothing is taken for dead
PREFETCH = 4  # batches that each worker is ahead
SLOTS = PREFETCH + 12  # batches of each worker that can be in shared memory: those ahead, and those that training holds for one step


class Loader:
    """Batches of `size` rows without end.

    What a batch holds depends on the data, the seed and the rank, never on the number of workers: all choices are made
    here, workers only decode. `state()` is the place behind the last batch given out, however far the workers are ahead.
    """

    def __init__(self, rows: RowStream, size: int, padding_id: int, workers: int) -> None:
        self.rows, self.size, self.padding_id, self.workers = rows, size, padding_id, workers
        self.dataset = rows.stream.dataset
        self.planned: deque[tuple[list[Row], dict[str, Any]]] = deque()  # what the workers are at, and the state behind each
        self.damaged: Counter[tuple[str, str]] = Counter()  # found when decoding
        self.last_epoch = 0  # in which there was a batch
        self.behind: dict[str, Any] | None = None
        self.batches: Generator[Batch, None, None] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.batches is None:
            self.batches = self._in_workers() if self.workers else self._here()
        return next(self.batches)

    def close(self) -> None:
        """End the workers now; left to the end of the process they take seconds."""
        if self.batches is not None:
            self.batches.close()

    def dropped(self) -> Counter[tuple[str, str]]:
        """What could not be used so far, by (source, reason)."""
        planned = self.rows.state() if self.behind is None else self.behind
        return self.damaged + Counter({(source, reason): n for source, reason, n in planned["dropped"]})

    def state(self) -> dict[str, Any]:
        """Plain JSON; `load_state` before the first batch goes on from there. Between the two the number of workers may change."""
        state = self.rows.state() if self.behind is None else self.behind
        images = self.dataset.duplicates.first(state["images"]) if self.dataset.duplicates is not None else []
        return state | {"images": images, "damaged": [[*place, n] for place, n in self.damaged.items()]}

    def load_state(self, state: dict[str, Any]) -> None:
        self.rows.load_state(state)
        self.damaged = Counter({(source, reason): n for source, reason, n in state["damaged"]})
        self.last_epoch = state["epoch"]

    def _plans(self) -> Iterator[list[Row]]:
        stream = iter(self.rows)
        while True:
            plan = [next(stream) for _ in range(self.size)]
            self.planned.append((plan, self.rows.state()))
            yield plan

    def _finish(self, tiles: Tensor | None, dropped: list[tuple[int, str]]) -> Batch | None:
        """The batch of the oldest plan without the samples whose images turned out damaged; None where nothing is left."""
        plan, self.behind = self.planned.popleft()
        reasons = dict(dropped)
        samples = iter(enumerate(sample for row in plan for sample in row))
        rows: list[Row] = []
        for row in plan:
            whole = []
            for _ in row:
                number, sample = next(samples)
                if number not in reasons:
                    whole.append(sample)
                elif sample.first and sample.key[2] == 0:  # once a record: all its parts have the same images
                    self.damaged[sample.source, f"image_{reasons[number]}"] += 1
            rows.append(whole)
        if tiles is not None:
            self.last_epoch = self.behind["epoch"]
            return collate(rows, self.padding_id, tiles)
        if self.behind["epoch"] > self.last_epoch + 1:
            raise UserError(f"none of the training images can be used: {by_source(self.dropped())}")
        return None

    def _here(self) -> Generator[Batch, None, None]:
        for plan in self._plans():
            samples, side = list(chain(*plan)), self.dataset.vision.image_size
            tiles = torch.empty(sum(s.tile_total for s in samples), 3, side, side, dtype=torch.uint8)
            if (batch := self._finish(*decode_all(samples, self.dataset.decoded, tiles))) is not None:
                yield batch

    def _in_workers(self) -> Generator[Batch, None, None]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores: the user's choice
            taken = torch.zeros(self.workers, SLOTS, dtype=torch.uint8).share_memory_().numpy()
            loader = self._data_loader(_Decoder(self.dataset.vision, taken))
        with dead_workers_told():
            for slot, (tiles, dropped) in loader:
                if tiles is not None and slot is not None:  # the worker may use the memory again when no tensor does any more
                    pixels = tiles.numpy()
                    weakref.finalize(pixels, taken.__setitem__, slot, 0).atexit = False
                    tiles = torch.from_numpy(pixels)
                if (batch := self._finish(tiles, dropped)) is not None:
                    yield batch

    def _data_loader(self, decoder: Dataset[Any]) -> Any:
        return DataLoader(
            decoder,
            batch_size=None,
            collate_fn=_as_it_is,
            sampler=([replace(sample, documents=[]) for row in plan for sample in row] for plan in self._plans()),  # type: ignore[arg-type]
            num_workers=self.workers,
            prefetch_factor=PREFETCH,
            timeout=SILENCE,
            worker_init_fn=_leave_interrupts,
            generator=torch.Generator(),  # else the global one would be drawn from, and the run depend on `workers`
        )


@contextmanager
def dead_workers_told() -> Iterator[None]:
    """A worker's death as a `UserError`. PyTorch raises it wherever the program happens to be, so it belongs around all of training."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        if not re.match(r"DataLoader (worker \(pid|timed out)", reason):
            raise
        raise UserError(f"a data worker died ({reason[:200]}): out of memory? --data.workers takes fewer; --resume auto goes on from the last checkpoint") from error


class _Decoder(Dataset[Any]):
    """What a worker does. Tiles go into slots of shared memory that are used again: new pages and copies would cost a tenth of its time.

    `taken` (workers, SLOTS): a worker sets what it fills, the training process clears what it no longer needs.
    """

    def __init__(self, vision: VisionConfig, taken: Any) -> None:
        self.vision, self.taken = vision, taken
        self.slots: list[Tensor] = [torch.empty(0, dtype=torch.uint8)] * SLOTS

    def __getitem__(self, samples: Any) -> tuple[tuple[int, int] | None, Decoded]:
        worker, side = get_worker_info().id, self.vision.image_size
        free = (self.taken[worker] == 0).nonzero()[0]
        slot = int(free[0]) if len(free) else None
        shape = (sum(s.tile_total for s in samples), 3, side, side)
        if slot is None:
            tiles = torch.empty(shape, dtype=torch.uint8)
        else:
            if self.slots[slot].numel() < math.prod(shape):
                self.slots[slot] = torch.empty(math.prod(shape) * 5 // 4, dtype=torch.uint8).share_memory_()
            tiles = self.slots[slot][: math.prod(shape)].view(shape)
        made = decode_all(samples, lambda sample: decode(sample, self.vision), tiles)
        if slot is None or made[0] is None:
            return None, made
        self.taken[worker, slot] = 1
        return (worker, slot), made


def decode_all(samples: list[Sample], decoded: Callable[[Sample], Sample], tiles: Tensor) -> Decoded:
    """The images of a batch's samples, decoded into `tiles`."""
    dropped: list[tuple[int, str]] = []
    count = 0
    for number, sample in enumerate(samples):
        try:
            tiles[count : count + sample.tile_total] = decoded(sample).tiles
            count += sample.tile_total
        except ImageError as error:
            dropped.append((number, error.reason))
    return (tiles[:count] if len(dropped) < len(samples) else None), dropped


def _as_it_is(made: Any) -> Any:
    return made


def _leave_interrupts(worker: int) -> None:
    """Ctrl-C is the training process's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
