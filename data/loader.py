"""Packed rows → batches, with state. Rows are planned in this process, images decoded by worker processes, or here."""

import math
import signal
import warnings
import weakref
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from itertools import chain
from multiprocessing import active_children
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from threading import current_thread, main_thread
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from configs.model import VisionConfig
from data.collators import Batch, collate
from data.datasets import Sample, by_source, decode
from data.images import ImageError
from data.packing import Row, RowStream
from utils.errors import UserError

Decoded = tuple[
    Tensor | None, list[tuple[int, str]]
]  # tiles, None where nothing could be decoded; number and reason of the samples that could not
SILENCE = 600  # seconds after which workers that give nothing are given up
LOOK = 2  # seconds between two looks at whether they live
DEATH = 1  # seconds that a worker whose connection broke has to be seen dead
PREFETCH = 4  # batches that each worker is ahead
SLOTS = (
    PREFETCH + 12
)  # batches of each worker that can be in shared memory: those ahead, and those that training holds for one step


class Loader:
    """Batches of `size` rows without end; of each `parts` in a row, which are as many ranks', number `part`.

    What a batch holds depends on the data, the seed and the stream, never on the number of workers: all choices are made
    here, workers only decode. `state()` is the place behind the last batch given out and the other ranks' beside it, however
    far the workers are ahead. A batch of which nothing can be used is empty: no rank gets ahead of the others.
    """

    def __init__(
        self, rows: RowStream, size: int, padding_id: int, workers: int, part: int = 0, parts: int = 1
    ) -> None:
        self.rows, self.size, self.padding_id, self.workers = rows, size, padding_id, workers
        self.part, self.parts = part, parts
        self.dataset = rows.stream.dataset
        self.plan: deque[tuple[list[Row], dict[str, Any]]] = (
            deque()
        )  # what the workers are at, and the state behind each
        self.damaged: Counter[tuple[str, str]] = Counter()  # found when decoding
        self.last_epoch = 0  # in which there was a batch
        self.consecutive_empty = 0  # records since, none of which could be decoded
        self.behind: dict[str, Any] | None = None
        self.batches: Generator[Batch, None, None] | None = None
        self.failure: UserError | None = None
        self.last: list[str] = []

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.failure is not None:  # a generator that failed would only say that it is at its end
            raise self.failure
        if self.batches is None:
            self.batches = self._in_workers() if self.workers else self._here()
        try:
            return next(self.batches)
        except UserError as error:
            self.failure = error
            raise

    def close(self) -> None:
        """End the workers now; left to the end of the process they take seconds."""
        if self.batches is not None:
            self.batches.close()

    def samples(self) -> list[str]:
        """Source and record number of each sample of the last batch."""
        return self.last

    def dropped(self) -> Counter[tuple[str, str]]:
        """What could not be used so far, by (source, reason)."""
        planned = self.rows.state() if self.behind is None else self.behind
        counted = (
            planned["dropped"] if self.part == 0 else []
        )  # the first of those who share a stream tells what all saw
        return self.damaged + Counter({(source, reason): n for source, reason, n in counted})

    def state(self) -> dict[str, Any]:
        """Plain JSON; `load_state` before the first batch goes on from there. Between the two the number of workers may change."""
        state = self.rows.state() if self.behind is None else self.behind
        images = self.dataset.duplicates.first(state["images"]) if self.dataset.duplicates is not None else []
        return state | {"images": images, "damaged": [[*place, n] for place, n in self.damaged.items()]}

    def load_state(self, state: dict[str, Any]) -> None:
        self.rows.load_state(state)
        self.damaged = Counter(
            {(source, reason): n for source, reason, n in state["damaged"] if self.part == 0}
        )
        self.last_epoch = state["epoch"]

    def _plans(self) -> Iterator[list[Row]]:
        stream = iter(self.rows)
        while True:
            plans = [[next(stream) for _ in range(self.size)] for _ in range(self.parts)]
            self.plan.append((plans[self.part], self.rows.state()))
            yield plans[self.part]

    def _finish(self, tiles: Tensor | None, dropped: list[tuple[int, str]]) -> Batch:
        """The batch of the oldest plan without the samples whose images turned out damaged."""
        plan, self.behind = self.plan.popleft()
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
        self.last = [f"{sample.source} {sample.key[1]}" for row in rows for sample in row]
        if tiles is not None:
            self.last_epoch, self.consecutive_empty = self.behind["epoch"], 0
            return collate(rows, self.padding_id, tiles)
        self.consecutive_empty += sum(sample.key[2] == 0 for row in plan for sample in row)
        if self.behind["epoch"] > self.last_epoch + 1 and self.consecutive_empty >= sum(
            map(len, self.dataset.sources)
        ):  # an epoch may be a small part of the data
            raise UserError(f"none of the training images can be used: {by_source(self.dropped())}")
        side = self.dataset.vision.image_size
        return collate(rows, self.padding_id, torch.empty(0, 3, side, side, dtype=torch.uint8))

    def _here(self) -> Generator[Batch, None, None]:
        for plan in self._plans():
            samples, side = list(chain(*plan)), self.dataset.vision.image_size
            tiles = torch.empty(sum(s.tile_total for s in samples), 3, side, side, dtype=torch.uint8)
            yield self._finish(*decode_all(samples, self.dataset.decoded, tiles))

    def _in_workers(self) -> Generator[Batch, None, None]:
        taken = torch.zeros(self.workers, SLOTS, dtype=torch.uint8).share_memory_().numpy()
        for slot, made in self._decoded_by(_Decoder(self.dataset.vision, taken)):
            if isinstance(made, UserError):
                raise made
            tiles, dropped = made
            if (
                tiles is not None and slot is not None
            ):  # the worker may use the memory again when no tensor does any more
                pixels = tiles.numpy()
                weakref.finalize(pixels, taken.__setitem__, slot, 0).atexit = False
                tiles = torch.from_numpy(pixels)
            yield self._finish(tiles, dropped)

    def _decoded_by(self, decoder: Dataset[Any]) -> Iterator[Any]:
        """What new workers make of the plans, in the plans' order."""
        before, handler = set(active_children()), signal.getsignal(signal.SIGCHLD)
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "This DataLoader will create"
            )  # more workers than cores: the user's choice
            made = iter(
                DataLoader(
                    decoder,
                    batch_size=None,
                    collate_fn=_as_it_is,
                    sampler=(
                        [replace(sample, documents=[]) for row in plan for sample in row]
                        for plan in self._plans()
                    ),  # type: ignore[arg-type]
                    num_workers=self.workers,
                    prefetch_factor=PREFETCH,
                    timeout=LOOK,
                    worker_init_fn=_leave_interrupts,
                    generator=torch.Generator(),  # else the global one would be drawn from, and the run depend on `workers`
                )
            )
        if handler is not None and current_thread() is main_thread():
            signal.signal(
                signal.SIGCHLD, handler
            )  # PyTorch's raises wherever the program is: in half a checkpoint, or in a destructor, where nobody hears it
        return _while_alive(made, set(active_children()) - before)


class Streams:
    """This rank's batches: of its streams in turn. A run has a fixed number of streams, each its share of the records; ranks share them, or one has several."""

    def __init__(self, loaders: dict[int, Loader]) -> None:
        self.loaders, self.turn, self.given = loaders, 0, next(iter(loaders.values()))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.given = list(self.loaders.values())[self.turn]
        self.turn = (self.turn + 1) % len(self.loaders)
        return next(self.given)

    def sources(self) -> list[str]:
        """The names of all sources, the same on every rank."""
        return [source.name for source in self.rows.stream.dataset.sources]

    @property
    def rows(self) -> RowStream:
        """The first stream's packed rows."""
        return next(iter(self.loaders.values())).rows

    def close(self) -> None:
        for loader in self.loaders.values():
            loader.close()

    def samples(self) -> list[str]:
        return self.given.samples()

    def dropped(self) -> Counter[tuple[str, str]]:
        return sum((loader.dropped() for loader in self.loaders.values()), Counter())

    def state(self) -> dict[int, Any]:
        """Each stream's, by number; between two steps."""
        return {number: loader.state() for number, loader in self.loaders.items()}

    def load_state(self, states: list[Any]) -> None:
        """What `merged` made of all ranks' states."""
        for number, loader in self.loaders.items():
            loader.load_state(states[number])


def merged(states: list[dict[int, Any]]) -> list[Any]:
    """All ranks' states → one of each stream; what each rank found damaged is added up."""
    out = []
    for number in sorted({number for rank in states for number in rank}):
        shared = [rank[number] for rank in states if number in rank]
        damaged: Counter[tuple[str, str]] = Counter()
        for state in shared:
            damaged.update({(source, reason): n for source, reason, n in state["damaged"]})
        out.append(shared[0] | {"damaged": [[*place, n] for place, n in damaged.items()]})
    return out


def _while_alive(made: Iterator[Any], workers: set[BaseProcess]) -> Iterator[Any]:
    """What `workers` make. That one died, or all are silent for too long, is a `UserError`."""
    advice = "--data.workers takes fewer; --resume auto goes on from the last checkpoint"
    silent = 0
    while True:
        try:
            one = next(made)
        except UserError:
            raise
        except Exception as error:  # a timeout, a connection that broke in the middle, PyTorch's own finding
            late = "timed out" in str(error)
            ended = wait([worker.sentinel for worker in workers], 0 if late else DEATH)
            for worker in workers:
                if worker.sentinel in ended:
                    worker.join()
                    how = (
                        signal.Signals(-worker.exitcode).name
                        if worker.exitcode and worker.exitcode < 0
                        else f"exit status {worker.exitcode}"
                    )
                    raise UserError(
                        f"a data worker died (process {worker.pid}, {how}): out of memory? {advice}"
                    ) from error
            silent += LOOK
            if not late:
                raise
            if silent >= SILENCE:
                raise UserError(f"the data workers gave nothing for {silent} s: {advice}") from error
        else:
            silent = 0
            yield one


class _Decoder(Dataset[Any]):
    """What a worker does. Tiles go into slots of shared memory that are used again: new pages and copies would cost a tenth of its time.

    `taken` (workers, SLOTS): a worker sets what it fills, the training process clears what it no longer needs.
    """

    def __init__(self, vision: VisionConfig, taken: Any) -> None:
        self.vision, self.taken = vision, taken
        self.slots: list[Tensor] = [torch.empty(0, dtype=torch.uint8)] * SLOTS

    def __getitem__(self, samples: Any) -> tuple[tuple[int, int] | None, Decoded | UserError]:
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
        try:
            made = decode_all(samples, lambda sample: decode(sample, self.vision), tiles)
        except UserError as error:  # raised here, PyTorch would wrap it in a traceback
            return None, error
        if slot is None or made[0] is None:
            return None, made
        self.taken[worker, slot] = 1
        return (worker, slot), made


def decode_all(samples: list[Sample], decoded: Callable[[Sample], Sample], tiles: Tensor) -> Decoded:
    """The images of a batch's samples, decoded into `tiles`. Errors: `UserError` where the machine cannot decode, whatever the image."""
    dropped: list[tuple[int, str]] = []
    count = 0
    for number, sample in enumerate(samples):
        try:
            tiles[count : count + sample.tile_total] = decoded(sample).tiles
            count += sample.tile_total
        except ImageError as error:
            dropped.append((number, error.reason))
        except MemoryError:
            raise UserError(
                f"not enough memory to decode an image of {sample.source}: --data.workers takes fewer"
            ) from None
    return (tiles[:count] if len(dropped) < len(samples) else None), dropped


def _as_it_is(made: Any) -> Any:
    return made


def _leave_interrupts(worker: int) -> None:
    """Ctrl-C is the training process's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
