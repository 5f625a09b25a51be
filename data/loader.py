"""Packed rows → batches, with state. Rows are planned in this process, images decoded by worker processes, or here."""

import re
import signal
import warnings
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from configs.errors import UserError
from configs.schema import VisionConfig
from data.collators import Batch, collate
from data.datasets import Sample, by_source, decode
from data.images import ImageError
from data.packing import Row, RowStream

Dropped = list[tuple[int, int, str]]  # row, place in it, reason
SILENCE = 600  # seconds after which a worker that gives nothing is taken for dead
PREFETCH = 4  # batches that each worker is ahead


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

    def _finish(self, batch: Batch | None, dropped: Dropped) -> Batch | None:
        plan, self.behind = self.planned.popleft()
        for row, place, reason in dropped:
            sample = plan[row][place]
            if sample.first and sample.key[2] == 0:  # once a record: all its parts have the same images
                self.damaged[sample.source, f"image_{reason}"] += 1
        if batch is not None:
            self.last_epoch = self.behind["epoch"]
        elif self.behind["epoch"] > self.last_epoch + 1:
            raise UserError(f"none of the training images can be used: {by_source(self.dropped())}")
        return batch

    def _here(self) -> Generator[Batch, None, None]:
        for plan in self._plans():
            if (batch := self._finish(*build(plan, self.dataset.decoded, self.padding_id))) is not None:
                yield batch

    def _in_workers(self) -> Generator[Batch, None, None]:
        decoder = _Decoder(self.dataset.vision, self.padding_id)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores: the user's choice
            loader = self._data_loader(decoder)
        with dead_workers_told():
            for made in loader:
                if (batch := self._finish(*made)) is not None:
                    batch["tiles"] = torch.from_numpy(batch["tiles"].numpy().copy())  # the worker will use the memory again
                    yield batch

    def _data_loader(self, decoder: Dataset[Any]) -> Any:
        return DataLoader(
            decoder,
            batch_size=None,
            sampler=self._plans(),  # type: ignore[arg-type]
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
    """What a worker does with planned rows. Tiles go into shared memory that is used again and again: new pages would cost a tenth of its time."""

    def __init__(self, vision: VisionConfig, padding_id: int) -> None:
        self.vision, self.padding_id = vision, padding_id
        self.slots: list[Tensor | None] = [None] * (PREFETCH + 2)  # more than there are batches of this worker under way
        self.batches = 0

    def __getitem__(self, plan: Any) -> tuple[Batch | None, Dropped]:
        return build(plan, lambda sample: decode(sample, self.vision), self.padding_id, self._stack)

    def _stack(self, tiles: list[Tensor]) -> Tensor:
        number, size = self.batches % len(self.slots), len(tiles) * tiles[0].numel()
        self.batches += 1
        slot = self.slots[number]
        if slot is None or slot.numel() < size:
            slot = self.slots[number] = torch.empty(size + size // 4, dtype=torch.uint8).share_memory_()
        return torch.stack(tiles, out=slot[:size].view(len(tiles), *tiles[0].shape))


def build(plan: list[Row], decoded: Callable[[Sample], Sample], padding_id: int, stack: Callable[[list[Tensor]], Tensor] = torch.stack) -> tuple[Batch | None, Dropped]:
    """Planned rows → a batch without the samples whose images turn out damaged; None where nothing is left."""
    dropped: Dropped = []
    rows: list[Row] = []
    for number, row in enumerate(plan):
        whole: list[Sample] = []
        for place, sample in enumerate(row):
            try:
                whole.append(decoded(sample))
            except ImageError as error:
                dropped.append((number, place, error.reason))
        rows.append(whole)
    return (collate(rows, padding_id, stack) if any(rows) else None), dropped


def _leave_interrupts(worker: int) -> None:
    """Ctrl-C is the training process's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
