"""Packed rows → batches, with state. This process plans rows; it or worker processes decode images."""

import math
import signal
import warnings
import weakref
from collections import ChainMap, Counter, deque
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
from data.datasets import Drop, Sample, decode, drop_report
from data.packing import Row, RowStream
from utils.errors import ImageError, UserError

Damaged = list[tuple[int, tuple[str, str]]]  # number of a sample; reason and message
Decoded = tuple[Tensor | None, Damaged]  # tiles, or None if nothing could be decoded
TIMEOUT_SECONDS = 600  # without any batch, after which the run ends
POLL_SECONDS = 2  # between two checks that the workers are alive
EXIT_SECONDS = 1  # to wait for the end of a worker whose connection broke
PREFETCH = 4  # batches that each worker decodes ahead
SLOTS = PREFETCH + 12  # batches of each worker in shared memory: those ahead, and those of a training step


class Loader:
    """Endless batches of `size` rows, with state.

    `parts` ranks can share one stream: of each `parts` batches in a row, this rank gets number `part`. The
    content of a batch depends on the data, the seed and the stream, never on the number of workers: this
    process makes all choices, and workers only decode. `state()` is the position after the last `parts`
    batches, however far ahead the workers are. A batch without a usable image is empty, so that all ranks
    stay in step.
    """

    def __init__(
        self, rows: RowStream, size: int, padding_id: int, workers: int, part: int = 0, parts: int = 1
    ) -> None:
        self.rows, self.size, self.padding_id, self.workers = rows, size, padding_id, workers
        self.part, self.parts = part, parts
        self.dataset = rows.stream.dataset
        # Batches that are being decoded, each with the state after it.
        self.plan: deque[tuple[list[Row], dict[str, Any]]] = deque()
        self.damaged: Counter[tuple[str, str]] = Counter()  # drops in decoding
        self.last_epoch = 0  # with a batch that was not empty
        self.consecutive_empty = 0  # records since then, none of which could be decoded
        self.consumed: dict[str, Any] | None = None  # state after the last batch given out
        self.batches: Generator[Batch, None, None] | None = None
        self.failure: UserError | None = None
        self.last: list[str] = []

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.failure is not None:  # a failed generator would only raise StopIteration
            raise self.failure
        if self.batches is None:
            self.batches = self._in_workers() if self.workers else self._in_process()
        try:
            return next(self.batches)
        except UserError as error:
            self.failure = error
            raise

    def close(self) -> None:
        """End the workers now: at the end of the process this takes seconds."""
        if self.batches is not None:
            self.batches.close()

    def samples(self) -> list[str]:
        """Return source and record number of each sample of the last batch."""
        return self.last

    def dropped(self) -> Counter[tuple[str, str]]:
        """Count what could not be used so far, by (source, reason)."""
        state = self.rows.state() if self.consumed is None else self.consumed
        # All ranks that share a stream have the same counts: only the first reports them.
        counts = state["dropped"] if self.part == 0 else []
        return self.damaged + Counter({(source, reason): n for source, reason, n in counts})

    def examples(self) -> dict[Drop, str]:
        """Describe the first drop of each source and reason since the start of this process."""
        return self.dataset.examples

    def state(self) -> dict[str, Any]:
        """Return the position as plain JSON."""
        state = self.rows.state() if self.consumed is None else self.consumed
        return state | {"damaged": [[*key, n] for key, n in self.damaged.items()]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a saved state. Call before the first batch; the number of workers may differ."""
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

    def _finish(self, tiles: Tensor | None, dropped: Damaged) -> Batch:
        """Collate the oldest planned batch, without the samples whose images are damaged."""
        plan, self.consumed = self.plan.popleft()
        reasons = dict(dropped)
        samples = iter(enumerate(sample for row in plan for sample in row))
        rows: list[Row] = []
        for row in plan:
            usable = []
            for _ in row:
                number, sample = next(samples)
                if number not in reasons:
                    usable.append(sample)
                elif sample.first and sample.key[2] == 0:  # once a record: all its parts have the same images
                    reason, message = reasons[number]
                    drop = sample.source, f"image_{reason}"
                    self.damaged[drop] += 1
                    self.dataset.examples.setdefault(drop, f"record {sample.key[1]}: {message}")
            rows.append(usable)
        self.last = [f"{sample.source} {sample.key[1]}" for row in rows for sample in row]
        if tiles is not None:
            self.last_epoch, self.consecutive_empty = self.consumed["epoch"], 0
            return collate(rows, self.padding_id, tiles)
        self.consecutive_empty += sum(sample.key[2] == 0 for row in plan for sample in row)
        # A whole epoch and as many records as there are: with small weights, an epoch draws only a few.
        all_empty = self.consecutive_empty >= sum(map(len, self.dataset.sources))
        if all_empty and self.consumed["epoch"] > self.last_epoch + 1:
            raise UserError(
                f"none of the training images can be used: {drop_report(self.dropped(), self.examples())}"
            )
        side = self.dataset.vision.image_size
        return collate(rows, self.padding_id, torch.empty(0, 3, side, side, dtype=torch.uint8))

    def _in_process(self) -> Generator[Batch, None, None]:
        for plan in self._plans():
            samples, side = list(chain(*plan)), self.dataset.vision.image_size
            tiles = torch.empty(sum(s.tile_total for s in samples), 3, side, side, dtype=torch.uint8)
            yield self._finish(*decode_all(samples, self.dataset.decoded, tiles))

    def _in_workers(self) -> Generator[Batch, None, None]:
        taken = torch.zeros(self.workers, SLOTS, dtype=torch.uint8).share_memory_().numpy()
        for slot, decoded in self._decoded_by(_Decoder(self.dataset.vision, taken)):
            if isinstance(decoded, UserError):
                raise decoded
            tiles, dropped = decoded
            if tiles is not None and slot is not None:
                pixels = tiles.numpy()  # once no tensor refers to it, the worker may reuse the slot
                weakref.finalize(pixels, taken.__setitem__, slot, 0).atexit = False
                tiles = torch.from_numpy(pixels)
            yield self._finish(tiles, dropped)

    def _decoded_by(self, decoder: Dataset[Any]) -> Iterator[Any]:
        """Start workers and return their results, in the order of the plans."""
        before, handler = set(active_children()), signal.getsignal(signal.SIGCHLD)
        plans = ([replace(sample, documents=[]) for row in plan for sample in row] for plan in self._plans())
        with warnings.catch_warnings():
            # More workers than cores are the user's choice.
            warnings.filterwarnings("ignore", "This DataLoader will create")
            results = iter(
                DataLoader(
                    decoder,
                    batch_size=None,
                    collate_fn=_identity,
                    sampler=plans,
                    num_workers=self.workers,
                    prefetch_factor=PREFETCH,
                    timeout=POLL_SECONDS,
                    worker_init_fn=_ignore_interrupts,
                    generator=torch.Generator(),  # with the global one, results would depend on `workers`
                )
            )
        if handler is not None and current_thread() is main_thread():
            # PyTorch's handler raises at any point: within a checkpoint, or unnoticed in a destructor.
            signal.signal(signal.SIGCHLD, handler)
        return _while_alive(results, set(active_children()) - before)


class Streams:
    """This rank's batches, from its streams in turn.

    A run has a fixed number of streams, each with its share of the records. Several ranks share a stream,
    or a rank has several.
    """

    def __init__(self, loaders: dict[int, Loader]) -> None:
        self.loaders, self.turn = loaders, 0
        self.current = next(iter(loaders.values()))  # whose batch was the last

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.current = list(self.loaders.values())[self.turn]
        self.turn = (self.turn + 1) % len(self.loaders)
        return next(self.current)

    def sources(self) -> list[str]:
        """Return the names of all sources; they are the same on every rank."""
        return [source.name for source in self.rows.stream.dataset.sources]

    @property
    def rows(self) -> RowStream:
        """The first stream's packed rows."""
        return next(iter(self.loaders.values())).rows

    def close(self) -> None:
        for loader in self.loaders.values():
            loader.close()

    def samples(self) -> list[str]:
        return self.current.samples()

    def dropped(self) -> Counter[tuple[str, str]]:
        return sum((loader.dropped() for loader in self.loaders.values()), Counter())

    def examples(self) -> dict[Drop, str]:
        return dict(ChainMap(*(loader.examples() for loader in self.loaders.values())))

    def state(self) -> dict[int, Any]:
        """Return the state of each stream by its number. Call between two steps."""
        return {number: loader.state() for number, loader in self.loaders.items()}

    def load_state(self, states: list[Any]) -> None:
        """Continue from the states of all streams, as `merged` returns them."""
        for number, loader in self.loaders.items():
            loader.load_state(states[number])


def merged(states: list[dict[int, Any]]) -> list[Any]:
    """Merge the states of all ranks into one per stream; counts of damaged images are added up."""
    out = []
    for number in sorted({number for rank in states for number in rank}):
        shared = [rank[number] for rank in states if number in rank]
        damaged: Counter[tuple[str, str]] = Counter()
        for state in shared:
            damaged.update({(source, reason): n for source, reason, n in state["damaged"]})
        out.append(shared[0] | {"damaged": [[*key, n] for key, n in damaged.items()]})
    return out


def _while_alive(results: Iterator[Any], workers: set[BaseProcess]) -> Iterator[Any]:
    """Yield the workers' results. Errors: `UserError` if a worker died or all are silent for too long."""
    advice = "--data.workers takes fewer; --resume auto goes on from the last checkpoint"
    silent = 0
    while True:
        try:
            result = next(results)
        except UserError:
            raise
        except Exception as error:  # a timeout, a broken connection, or PyTorch's own report of a death
            timed_out = "timed out" in str(error)
            ended = wait([worker.sentinel for worker in workers], 0 if timed_out else EXIT_SECONDS)
            for worker in workers:
                if worker.sentinel in ended:
                    worker.join()
                    how = _exit_reason(worker)
                    raise UserError(
                        f"a data worker died (process {worker.pid}, {how}): out of memory? {advice}"
                    ) from error
            silent += POLL_SECONDS
            if not timed_out:
                raise
            if silent >= TIMEOUT_SECONDS:
                raise UserError(f"the data workers gave nothing for {silent} s: {advice}") from error
        else:
            silent = 0
            yield result


def _exit_reason(process: BaseProcess) -> str:
    """Name the signal or the exit status of an ended process."""
    if process.exitcode and process.exitcode < 0:
        return signal.Signals(-process.exitcode).name
    return f"exit status {process.exitcode}"


class _Decoder(Dataset[Any]):
    """Decodes a batch's images, in a worker.

    Tiles are written to reusable slots of shared memory: new pages and copies would cost a tenth of the
    time. `taken` (workers, SLOTS): a worker sets the slots it fills, and the training process clears them
    after use.
    """

    def __init__(self, vision: VisionConfig, taken: Any) -> None:
        self.vision, self.taken = vision, taken
        self.slots: list[Tensor] = [torch.empty(0, dtype=torch.uint8)] * SLOTS

    def __getitem__(self, samples: Any) -> tuple[tuple[int, int] | None, Decoded | UserError]:
        info, side = get_worker_info(), self.vision.image_size
        assert info is not None, "only workers decode with this class"
        worker = info.id
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
            decoded = decode_all(samples, lambda sample: decode(sample, self.vision), tiles)
        except UserError as error:  # returned, because PyTorch would wrap a raised one in a traceback
            return None, error
        if slot is None or decoded[0] is None:
            return None, decoded
        self.taken[worker, slot] = 1
        return (worker, slot), decoded


def decode_all(samples: list[Sample], decode_one: Callable[[Sample], Sample], tiles: Tensor) -> Decoded:
    """Decode the images of a batch's samples into `tiles`.

    Errors: `UserError` if this machine cannot decode any image, for lack of memory or of a package.
    """
    dropped: Damaged = []
    count = 0
    for number, sample in enumerate(samples):
        try:
            tiles[count : count + sample.tile_total] = decode_one(sample).require_tiles()
            count += sample.tile_total
        except ImageError as error:
            dropped.append((number, (error.reason, str(error))))
        except MemoryError:
            raise UserError(
                f"not enough memory to decode an image of {sample.source}: --data.workers takes fewer"
            ) from None
    return (tiles[:count] if len(dropped) < len(samples) else None), dropped


def _identity(samples: Any) -> Any:
    return samples


def _ignore_interrupts(worker: int) -> None:
    """Leave Ctrl-C to the training process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
