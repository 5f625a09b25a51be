"""Parquet and Arrow files, local or on the Hub, as records: read block by block, never whole.

A block is what the file format reads at once: a row group of a Parquet file, a record batch of an Arrow file. Blocks are
read ahead of use in a thread; a few stay in memory.
"""

import threading
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError, nearest
from utils.hub import dataset_files, fetch, is_hub_id, reason_of, status_may_pass, trying

Record = dict[str, Any]
READERS = 2  # blocks of a source that are read at a time
LOST = 5  # blocks of the Hub in a row that could not be read: the rest will not be either


class UnreadableBlock(Exception):
    """Rows that could not be read, however often it was tried."""


@dataclass(frozen=True)
class RowBlock:
    file: str
    number: int  # row group or record batch
    rows: int
    bytes: int  # in memory


class TableRecords(Sequence[Record]):
    """The rows of some files as records. `order` draws orders that read every block once."""

    def __init__(
        self,
        name: str,
        files: list[str],
        system: Any,
        to_record: Callable[[dict[str, Any]], Record],
        memory_bytes: int,
    ) -> None:
        """`system`: the fsspec file system of `files`, or None where they are local. `memory_bytes`: of blocks that are kept."""
        self.name, self.system, self.to_record = name, system, to_record
        self.mapped: dict[
            str, Any
        ] = {}  # Arrow files: each in one place, or every block that is kept would count as a whole file's memory
        with ThreadPoolExecutor(16) as pool:
            self.blocks = [
                block for blocks in pool.map(self._blocks_of, files) for block in blocks if block.rows
            ]
        self.ends = list(accumulate(block.rows for block in self.blocks))
        largest = max((block.bytes for block in self.blocks), default=1)
        self.pool_blocks = max(
            1, memory_bytes // (2 * max(1, largest))
        )  # mixed with one another, while as many are read ahead
        self.used: OrderedDict[int, Future[Any]] = (
            OrderedDict()
        )  # blocks that rows were taken from, at most `pool_blocks`
        self.ahead: OrderedDict[int, Future[Any] | None] = (
            OrderedDict()
        )  # those to come, in order; read are the first `pool_blocks + 1`
        self.queue: deque[tuple[Future[Any], RowBlock]] = deque()
        self.lost: set[int] = set()  # unreadable, since the last that was read
        self.readers, self.lock = 0, threading.Lock()

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]
        """Errors: `UnreadableBlock`."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self.ends, index)
        try:
            block = self._block(number).result()
        except UnreadableBlock as error:
            self.lost.add(number)
            if self.system is not None and len(self.lost) >= LOST:
                raise UserError(
                    f"{LOST} blocks of {self.name} in a row cannot be read, the last: {error}; --resume auto goes on once they can"
                ) from None
            raise
        self.lost.clear()
        block = block.slice(index - self.ends[number] + self.blocks[number].rows, 1)
        try:
            row = block.to_pylist()[0]
        except UnicodeDecodeError as error:  # Parquet does not promise that its strings are UTF-8
            raise UnreadableBlock(f"row {index} of {self.name}: {error}") from None
        return {"id": f"{self.name}/{index}"} | self.to_record(row)

    def prefetch(self, index: int) -> None:
        """`index` will be asked for soon, after all that were announced before."""
        number = bisect_right(self.ends, index)
        if number not in self.used and number not in self.ahead:
            self.ahead[number] = None
            self._read_ahead()

    def order(self, start: int, stop: int, rng: np.random.Generator, part: int, parts: int) -> np.ndarray:
        """Row numbers from `start` to `stop`, in an order drawn from `rng`: blocks shuffled, some of them at a time mixed row by row.

        Of `parts` disjoint shares this is number `part`: whole blocks, where there are enough of them.
        """
        by_block = len(self.blocks) >= 8 * parts
        shuffled = rng.permutation(len(self.blocks))
        pool = self.pool_blocks * (parts if by_block else 1)
        out = [np.empty(0, np.int64)]
        for first in range(0, len(shuffled), pool):
            rows = [
                np.arange(max(start, self.ends[b] - self.blocks[b].rows), min(stop, self.ends[b]))
                for b in shuffled[first : first + pool]
            ]
            seeds = rng.integers(2**63, size=parts)
            rows = rows[part::parts] if by_block else rows
            if rows:
                out.append(
                    np.random.default_rng(seeds[part if by_block else 0]).permutation(np.concatenate(rows))
                )
        order = np.concatenate(out)
        return order if by_block else order[part::parts]

    def _block(self, number: int) -> Future[Any]:
        """The block, for a row of it. Whatever is announced, no block is given up for one that is due later."""
        future = self.used.pop(number, None)
        if future is None and number in self.ahead:
            while (first := next(iter(self.ahead))) != number:  # announced, and passed over
                if (passed := self.ahead.pop(first)) is not None:
                    passed.cancel()
            future = self.ahead.pop(number)
        self.used[number] = future = future or self._submit(number)
        if len(self.used) > self.pool_blocks:
            self.used.popitem(last=False)
        self._read_ahead()
        return future

    def _read_ahead(self) -> None:
        for number in islice(self.ahead, self.pool_blocks + 1):
            self.ahead[number] = self.ahead[number] or self._submit(number)

    def _submit(self, number: int) -> Future[Any]:
        future: Future[Any] = Future()
        with self.lock:
            self.queue.append((future, self.blocks[number]))
            start = self.readers < READERS
            self.readers += start
        if start:
            threading.Thread(target=self._work, name=f"read {self.name}").start()
        return future

    def _work(self) -> None:
        """Read what is queued. No executor's thread: those, at the program's end, first finish all that was asked of them."""
        while True:
            with self.lock:
                if not self.queue:
                    self.readers -= 1
                    return
                future, block = self.queue.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self._read(block))
                except BaseException as error:  # it is raised where the block is asked for
                    future.set_exception(error)

    def _blocks_of(self, file: str) -> list[RowBlock]:
        import pyarrow.parquet

        def read() -> list[RowBlock]:
            if file.endswith(".arrow"):
                reader = self._arrow_reader(file)
                _check_form(file, reader.schema)
                batches = (
                    map(reader.get_batch, range(reader.num_record_batches))
                    if hasattr(reader, "get_batch")
                    else reader
                )
                return [
                    RowBlock(file, i, batch.num_rows, batch.get_total_buffer_size())
                    for i, batch in enumerate(batches)
                ]
            with self._open(file) as source:
                parquet = pyarrow.parquet.ParquetFile(source)
                _check_form(file, parquet.schema_arrow)
                groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
                return [
                    RowBlock(file, i, group.num_rows, group.total_byte_size) for i, group in enumerate(groups)
                ]

        try:
            return self._trying(file, read)
        except UnreadableBlock as error:
            raise UserError(str(error)) from None

    def _read(self, block: RowBlock) -> Any:
        import pyarrow.parquet

        def read() -> Any:
            if block.file.endswith(".arrow"):
                reader = self._arrow_reader(block.file)
                batch = (
                    reader.get_batch(block.number)
                    if hasattr(reader, "get_batch")
                    else next(islice(reader, block.number, None))
                )
                batch.validate(
                    full=True
                )  # nothing else checks its offsets: damaged ones would end the process
                return batch
            with self._open(block.file) as source:
                return pyarrow.parquet.ParquetFile(source, pre_buffer=True).read_row_group(block.number)

        return self._trying(f"rows of {block.file} (block {block.number})", read)

    def _arrow_reader(self, file: str) -> Any:
        """Of an Arrow file, which has `get_batch(i)`, or of an Arrow stream, which is an iterator."""
        import pyarrow

        if file not in self.mapped:
            with pyarrow.memory_map(file) as source:
                self.mapped[file] = source.read_buffer()
        buffer = self.mapped[file]
        return (
            pyarrow.ipc.open_file(buffer)
            if buffer[:6].to_pybytes() == b"ARROW1"
            else pyarrow.ipc.open_stream(buffer)
        )

    def _open(self, file: str) -> Any:
        import pyarrow

        return (
            pyarrow.OSFile(file) if self.system is None else self.system.open(file, "rb", cache_type="none")
        )

    def _trying(self, what: str, read: Callable[[], Any]) -> Any:
        """`read()`, again and again where a connection or a disk fails it; at last `UnreadableBlock`."""
        import pyarrow

        def alive() -> Any:
            if not threading.main_thread().is_alive():  # its end waits for this thread
                raise UnreadableBlock(f"{what} cannot be read: the program ended")
            return read()

        def bug(
            error: Exception,
        ) -> bool:  # what is raised is pyarrow's, the operating system's, and over HTTP every library's own
            return self.system is None and not isinstance(
                error, (OSError, pyarrow.ArrowException, UnicodeDecodeError)
            )

        try:
            return trying(what, alive, lambda error: not bug(error) and _may_pass(error))
        except (UserError, UnreadableBlock):
            raise
        except Exception as error:
            if bug(error):
                raise
            raise UnreadableBlock(f"{what} cannot be read: {reason_of(error)}") from None


def _may_pass(error: Exception) -> bool:
    """Whether another try may succeed. pyarrow says of damaged bytes that they are an `OSError`, but one without a number."""
    import pyarrow

    if (answered := status_may_pass(error)) is not None:
        return answered
    hopeless = (
        UserError,
        UnreadableBlock,
        pyarrow.ArrowException,
        UnicodeDecodeError,
        FileNotFoundError,
        PermissionError,
    )
    return not isinstance(error, hopeless) and not (type(error) is OSError and error.errno is None)


def _check_form(file: str, schema: Any) -> None:
    import pyarrow

    if missing := [name for name in ("images", "texts") if name not in schema.names]:
        raise UserError(
            f"{file} has no column {' or '.join(missing)} (it has {', '.join(schema.names)}): not of The Cauldron's form"
        )
    for column in (schema.field("images"), schema.field("texts")):
        if not pyarrow.types.is_null(column.type) and (
            not pyarrow.types.is_nested(column.type) or pyarrow.types.is_struct(column.type)
        ):
            raise UserError(
                f"{file}: the column {column.name} holds {column.type}, no lists: not of The Cauldron's form"
            )


ENDINGS = (".parquet", ".arrow")


def table_files_here(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*") if path.suffix in ENDINGS)


def table_files(root: str, folder: str, download: bool) -> tuple[Any, list[str]]:
    """→ file system (None: this machine's) and files below `folder` of `root`, a local folder or a data set on the Hub.

    `download`: the Hub's files are fetched whole first. A folder that is not there raises `UserError`, which names the near ones.
    """
    if not is_hub_id(root):
        base = Path(root)
        if not base.is_dir():
            raise UserError(f"{root} is neither a folder here nor a Hub id (org/name)")
        top = [path.name for path in base.iterdir() if path.is_dir()]
        files = table_files_here(base / folder)
        system = None
    else:
        system, files, top = dataset_files(root, folder, ENDINGS[:1])
        if files and download:
            local = fetch(
                root, [f"{folder}/*.parquet" if folder else "*.parquet"], "its files", kind="dataset"
            )
            return table_files(str(local), folder, False)
    if not files:
        raise UserError(
            f"{root} holds no Parquet files"
            + (f" in a folder {folder}{nearest(folder, top, 3)}" if folder else "")
        )
    return system, files
