"""WebDataset tars, as img2dataset writes them, local or on the Hub → records: shard by shard, in place.

Files with the same name before the first dot form one sample: `000017.jpg`, `000017.txt`, `000017.json`.
Its columns are `images`, the endings of its texts, and the keys of its JSON. Nothing is unpacked: an index
says where a shard's files are.
"""

import json
import os
import tarfile
import threading
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data.columns import Record, columns_of, record_of
from data.mixture import block_order
from data.parquet import UnreadableBlock
from data.splits import by_split, files_below
from utils.errors import UserError
from utils.files import read_json, refuse_pointer
from utils.hub import dataset_files, fetch, is_hub_id, reason_of

POOL = 4  # shards whose rows are mixed
FIRST = 32  # samples whose columns are looked at
TEXT_FILES = ("txt", "text", "caption")
OTHERS = (*TEXT_FILES, "json", "cls", "npy", "npz", "pth", "pkl", "csv", "html", "mp3", "wav", "mp4", "url")
Entry = tuple[int, int]  # where a file begins in its tar, and its size
Index = list[dict[str, Entry]]  # of each sample: ending → entry


class TarRecords(Sequence[Record]):
    """The samples of tar files as records. Shards on the Hub are fetched when they are due."""

    def __init__(self, name: str, path: str, shards: list[str], given: dict[str, str]) -> None:
        """`path`: a folder or a data set on the Hub; `shards`: tars in it; `given`: as in `columns_of`."""
        self.name, self.path, self.shards = name, path, shards
        # Local file and index of the shards that were used last.
        self.indices: dict[int, Future[tuple[Path, Index]]] = {}
        self.lock = threading.Lock()
        self.noted = self._noted()
        if is_hub_id(path) and None in self.noted and os.environ.get("RANK", "0") == "0":
            print(f"{path}: {self.noted.count(None):,} shards without *_stats.json are fetched to be counted")
        counts = [len(self._index(n)[1]) if count is None else count for n, count in enumerate(self.noted)]
        self.ends = list(accumulate(counts))
        first = next((n for n, count in enumerate(counts) if count), None)
        if first is None:
            raise UserError(f"{path} holds no sample in {len(shards)} tar files")
        self.columns = columns_of(self._keys(first), given, self.shards[first])

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]
        """Return a sample as a record. Errors: `UnreadableBlock`."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect_right(self.ends, index)
        row = self._row(shard, index - (self.ends[shard - 1] if shard else 0))
        return {"id": f"{self.name}/{index}"} | record_of(row, self.columns)

    def prefetch(self, index: int) -> None:
        """Announce that row `index` is needed soon: its shard is fetched meanwhile."""
        shard = bisect_right(self.ends, index)
        if shard not in self.indices:
            threading.Thread(target=self._future, args=(shard,), daemon=True).start()

    def order(self, start: int, stop: int, rng: np.random.Generator, part: int, parts: int) -> np.ndarray:
        """Return share `part` of `parts` of a random order of the rows from `start` to `stop`."""
        return block_order(self.ends, start, stop, rng, part, parts, POOL)

    def _keys(self, shard: int) -> list[str]:
        """The columns of the first samples that can be read. Errors: `UserError` if none can."""
        keys: dict[str, None] = {}
        for number in range(min(FIRST, len(self._index(shard)[1]))):
            with suppress(UnreadableBlock):
                keys |= dict.fromkeys(self._row(shard, number))
        if not keys:
            raise UserError(f"{self.shards[shard]}: its first samples cannot be read")
        return list(keys)

    def _row(self, shard: int, number: int) -> dict[str, Any]:
        """Read the files of a sample."""
        path, index = self._index(shard)
        if number >= len(index):
            raise UnreadableBlock(f"{self.shards[shard]} has {len(index)} samples, not {number + 1}")
        try:
            with open(path, "rb") as file:
                files = {ending: _content(file, *entry) for ending, entry in sorted(index[number].items())}
            row = json.loads(files.pop("json", b"{}"))
            row["images"] = [data for name, data in files.items() if name.split(".")[-1] not in OTHERS]
            texts = {name: data.decode() for name, data in files.items() if name in TEXT_FILES}
            return {**row, **texts}
        except (OSError, ValueError, TypeError) as error:
            raise UnreadableBlock(f"sample {number} of {self.shards[shard]}: {reason_of(error)}") from None

    def _fetched(self, pattern: str) -> Path:
        """The folder with the files of that pattern."""
        return (
            fetch(self.path, [pattern], pattern, kind="dataset") if is_hub_id(self.path) else Path(self.path)
        )

    def _noted(self) -> list[int | None]:
        """The samples of each shard, where img2dataset noted them: `00000_stats.json` for `00000.tar`."""
        folder = self._fetched("*_stats.json")
        notes = [folder / f"{shard.removesuffix('.tar')}_stats.json" for shard in self.shards]
        read = [read_json(file) if file.is_file() else None for file in notes]
        counts = [note.get("successes") if isinstance(note, dict) else None for note in read]
        return [count if isinstance(count, int) else None for count in counts]

    def _index(self, shard: int) -> tuple[Path, Index]:
        return self._future(shard).result()

    def _future(self, shard: int) -> Future[tuple[Path, Index]]:
        """Index a shard once, whichever thread needs it first."""
        with self.lock:
            future, is_new = self.indices.get(shard), shard not in self.indices
            if future is None:
                future = self.indices[shard] = Future()
                if len(self.indices) > 4 * POOL:
                    del self.indices[next(iter(self.indices))]
        if is_new:
            try:
                name, noted = self.shards[shard], self.noted[shard]
                path = self._fetched(name) / name
                index = index_of(path, noted is not None)
                if noted is not None and len(index) > noted:
                    raise UserError(
                        f"{name} has {len(index)} samples, its _stats.json says {noted}: delete that file"
                    )
                future.set_result((path, index))
            except BaseException as error:  # raised by the future's `result()`
                future.set_exception(error)
        return future


def _content(file: Any, start: int, size: int) -> bytes:
    file.seek(start)
    return bytes(file.read(size))


def index_of(path: Path, may_be_truncated: bool = False) -> Index:
    """Find the samples of a tar file: ending → where it is. Errors: `UserError`.

    The last sample of a truncated file is left out, if it `may_be_truncated`.
    """
    try:
        refuse_pointer(path)
        members = _members(path)
    except (OSError, tarfile.TarError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a tar file: {reason_of(error)}") from None
    samples: dict[str, dict[str, Entry]] = {}
    whole = path.stat().st_size
    for name, start, size in members:
        folder, file = PurePosixPath(name).parent, PurePosixPath(name).name
        key, _, ending = file.partition(".")
        if key and ending:
            samples.setdefault(f"{folder}/{key}", {})[ending.lower()] = (start, size)
            if start + size > whole:
                if not may_be_truncated:
                    raise UserError(f"{path} is truncated in {name}: fetch it again")
                del samples[f"{folder}/{key}"]
    return list(samples.values())


def _members(path: Path) -> list[tuple[str, int, int]]:
    """List name, start and size of the regular files of a tar.

    Headers of plain files are read here, fifteen times as fast as by `tarfile`, which reads all others.
    """
    members, position = [], 0
    with open(path, "rb") as file:
        while len(header := _content(file, position, 512)) == 512 and header[0]:
            if header[156:157] not in b"0\0" or header[345]:  # a link, folder, or a name in another form
                with tarfile.open(path, "r:") as tar:
                    return [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]
            size = int(header[124:136].rstrip(b"\0 "), 8)
            name = header[:100].rstrip(b"\0").decode("utf-8", "surrogateescape")
            members.append((name, position + 512, size))
            position += 512 + (size + 511) // 512 * 512
    if not members:
        raise tarfile.ReadError("no file in it, or not a tar")
    return members


def shards_of(path: str, subset: str) -> dict[str, list[str]]:
    """Return the tars of a folder, or of a data set on the Hub, by split, relative to it.

    `subset`: a folder in it, or "". Errors: `UserError` for tars beside tables, and for compressed tars.
    """
    if Path(path).is_file():
        files = []
    elif is_hub_id(path):
        files = ["/".join(file.split("/")[3:]) for file in dataset_files(path, subset)[1]]
    else:
        files = [Path(file).relative_to(path).as_posix() for file in files_below(path)]
        files = [file for file in files if file.startswith(f"{subset}/" if subset else "")]
    shards = [file for file in files if file.endswith(".tar")]
    notes = {shard.removesuffix(".tar") for shard in shards}  # img2dataset writes a table for each
    tables = [
        f for f in files if f.endswith((".parquet", ".csv", ".jsonl")) and f.rpartition(".")[0] not in notes
    ]
    if shards and tables:
        raise UserError(f"{path} holds tars ({shards[0]}) and tables ({tables[0]}): give one of them")
    if not shards and (compressed := next((f for f in files if f.endswith((".tar.gz", ".tgz"))), None)):
        raise UserError(
            f"{path}: {compressed} is compressed, and cannot be read in place: unpack it with gunzip"
        )
    return by_split(shards, PurePosixPath())
