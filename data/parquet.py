"""Parquet and Arrow files, local or on the Hub, as records: read block by block, never whole.

A block is the unit that the file format reads at once: a row group of a Parquet file, or a record batch of an
Arrow file. Threads read blocks ahead of use; a few blocks stay in memory.
"""

import threading
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import numpy as np

from data.columns import Columns, columns_of, record_of
from data.mixture import block_order
from data.splits import by_split, files_below
from utils.errors import UserError, nearest
from utils.files import refuse_pointer
from utils.hub import dataset_files, fetch, is_hub_id, reason_of, status_may_pass, trying

Record = dict[str, Any]
READERS = 2  # threads per source
MAX_UNREADABLE = 5  # consecutive blocks of the Hub; after so many, the run ends


class UnreadableBlock(Exception):
    """Raised for rows that could not be read after all retries."""


@dataclass(frozen=True)
class RowBlock:
    file: str
    number: int  # row group or record batch
    rows: int
    bytes: int  # in memory


class TableRecords(Sequence[Record]):
    """The rows of Parquet and Arrow files as records. `order` draws orders that read every block once."""

    def __init__(
        self,
        name: str,
        files: list[str],
        system: Any,
        columns: dict[str, str],
        memory_bytes: int,
    ) -> None:
        """List the blocks of `files`.

        `system` is the files' fsspec file system, or None if they are local. `columns`: as `given` in
        `columns_of`. `memory_bytes` limits the blocks in memory: half for those in use, half for those read
        ahead.
        """
        self.name, self.system, self.given = name, system, columns
        self.columns: dict[str, Columns] = {}  # of each file
        # One memory map per Arrow file: with a map for each block, every block would count as a whole file.
        self.mapped: dict[str, Any] = {}
        with ThreadPoolExecutor(16) as pool:
            self.blocks = [
                block for blocks in pool.map(self._blocks_of, files) for block in blocks if block.rows
            ]
        self.ends = list(accumulate(block.rows for block in self.blocks))
        largest = max((block.bytes for block in self.blocks), default=1)
        # Blocks whose rows are mixed with one another; as many are read ahead.
        self.pool_blocks = max(1, memory_bytes // (2 * max(1, largest)))
        # Blocks in use, at most `pool_blocks`.
        self.used: OrderedDict[int, Future[Any]] = OrderedDict()
        # Announced blocks in order, of which the first `pool_blocks + 1` are being read.
        self.ahead: OrderedDict[int, Future[Any] | None] = OrderedDict()
        self.queue: deque[tuple[Future[Any], RowBlock]] = deque()
        self.unreadable: set[int] = set()  # blocks that failed since the last success
        self.readers, self.lock = 0, threading.Lock()

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]
        """Return a row as a record. Errors: `UnreadableBlock`."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self.ends, index)
        try:
            block = self._block(number).result()
        except UnreadableBlock as error:
            self.unreadable.add(number)
            if self.system is not None and len(self.unreadable) >= MAX_UNREADABLE:
                raise UserError(
                    f"{MAX_UNREADABLE} blocks of {self.name} in a row cannot be read, the last: {error}; "
                    "--resume auto goes on once they can"
                ) from None
            raise
        self.unreadable.clear()
        file = self.blocks[number].file
        folder = Path(file).parent if self.system is None else None
        block = block.slice(index - self.ends[number] + self.blocks[number].rows, 1)
        try:
            row = block.to_pylist()[0]
        except UnicodeDecodeError as error:  # Parquet does not guarantee UTF-8 strings
            raise UnreadableBlock(f"row {index} of {self.name}: {error}") from None
        return {"id": f"{self.name}/{index}"} | record_of(row, self.columns[file], folder)

    def prefetch(self, index: int) -> None:
        """Announce that row `index` is needed soon, after all rows announced before."""
        number = bisect_right(self.ends, index)
        if number not in self.used and number not in self.ahead:
            self.ahead[number] = None
            self._read_ahead()

    def order(self, start: int, stop: int, rng: np.random.Generator, part: int, parts: int) -> np.ndarray:
        return block_order(self.ends, start, stop, rng, part, parts, self.pool_blocks)

    def _block(self, number: int) -> Future[Any]:
        """Return a block that is due now. It replaces blocks in use, never one announced for later."""
        future = self.used.pop(number, None)
        if future is None and number in self.ahead:
            while (first := next(iter(self.ahead))) != number:  # announced, but skipped
                if (skipped := self.ahead.pop(first)) is not None:
                    skipped.cancel()
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
        """Read queued blocks, in a plain thread: at exit, an executor would first finish its whole queue."""
        while True:
            with self.lock:
                if not self.queue:
                    self.readers -= 1
                    return
                future, block = self.queue.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self._read(block))
                except BaseException as error:  # raised by the future's `result()`
                    future.set_exception(error)

    def _blocks_of(self, file: str) -> list[RowBlock]:
        """List a file's blocks. Errors: `UserError`."""
        import pyarrow.parquet

        def read() -> list[RowBlock]:
            if file.lower().endswith(".arrow"):
                reader = self._arrow_reader(file)
                self._recognise(file, reader.schema.names)
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
                self._recognise(file, parquet.schema_arrow.names)
                groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
                return [
                    RowBlock(file, i, group.num_rows, group.total_byte_size) for i, group in enumerate(groups)
                ]

        if self.system is None:
            refuse_pointer(Path(file))
        try:
            return self._retry(file, read)
        except UnreadableBlock as error:
            raise UserError(str(error)) from None

    def _recognise(self, file: str, names: list[str]) -> None:
        self.columns[file] = columns_of(names, self.given, file)

    def _read(self, block: RowBlock) -> Any:
        import pyarrow.parquet

        def read() -> Any:
            if block.file.lower().endswith(".arrow"):
                reader = self._arrow_reader(block.file)
                batch = (
                    reader.get_batch(block.number)
                    if hasattr(reader, "get_batch")
                    else next(islice(reader, block.number, None))
                )
                batch.validate(full=True)  # nothing else checks its offsets: damaged ones crash the process
                return batch
            with self._open(block.file) as source:
                return pyarrow.parquet.ParquetFile(source, pre_buffer=True).read_row_group(block.number)

        return self._retry(f"rows of {block.file} (block {block.number})", read)

    def _arrow_reader(self, file: str) -> Any:
        """Open an Arrow file (the reader has `get_batch(i)`) or an Arrow stream (an iterator)."""
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

    def _retry(self, what: str, read: Callable[[], Any]) -> Any:
        """Call `read()`, with retries after failures of a connection or a disk. Errors: `UnreadableBlock`."""
        import pyarrow

        def alive() -> Any:
            if not threading.main_thread().is_alive():  # the program's end waits for this thread
                raise UnreadableBlock(f"{what} cannot be read: the program ended")
            return read()

        def is_bug(error: Exception) -> bool:
            """Over HTTP every library raises its own errors, so nothing counts as a bug."""
            expected = (OSError, pyarrow.ArrowException, UnicodeDecodeError)
            return self.system is None and not isinstance(error, expected)

        try:
            return trying(what, alive, lambda error: not is_bug(error) and _may_pass(error))
        except (UserError, UnreadableBlock):
            raise
        except Exception as error:
            if is_bug(error):
                raise
            raise UnreadableBlock(f"{what} cannot be read: {reason_of(error)}") from None


def _may_pass(error: Exception) -> bool:
    """Return whether a retry may succeed. For damaged bytes pyarrow raises an `OSError` without a number."""
    import pyarrow

    if (may_pass := status_may_pass(error)) is not None:
        return may_pass
    permanent = (
        UserError,
        UnreadableBlock,
        pyarrow.ArrowException,
        UnicodeDecodeError,
        FileNotFoundError,
        PermissionError,
    )
    return not isinstance(error, permanent) and not (type(error) is OSError and error.errno is None)


ENDINGS = (".parquet", ".arrow")


def table_files(root: str, folder: str, download: bool) -> tuple[Any, dict[str, list[str]]]:
    """Return the file system (None: local) and, by split, the files below `folder` of `root`.

    `root` is a local folder or a data set on the Hub. With `download`, the Hub's files are first fetched
    whole. A missing folder raises `UserError`, which names similar ones.
    """
    if not is_hub_id(root):
        base = Path(root)
        if not base.is_dir():
            raise UserError(f"{root} is neither a local folder nor a Hub id (org/name)")
        top = [path.name for path in base.iterdir() if path.is_dir()]
        system, below = None, files_below(str(base / folder))
        start: PurePath = base / folder
    else:
        system, below, top = dataset_files(root, folder)
        start = PurePosixPath(*PurePosixPath(below[0]).parts[:3], folder) if below else PurePosixPath()
        if below and download:
            local = fetch(
                root, [f"{folder}/*.parquet" if folder else "*.parquet"], "its files", kind="dataset"
            )
            return table_files(str(local), folder, False)
    splits = by_split([file for file in below if file.lower().endswith(ENDINGS)], start)
    if not splits:
        raise UserError(
            f"{root} holds no Parquet files"
            + (f" in a folder {folder}{nearest(folder, top, 3)}" if folder else "")
        )
    return system, splits
