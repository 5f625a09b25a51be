"""Any set that `datasets` opens, from the Hub or a local path: memory-mapped Arrow → records.

Parquet, Arrow, JSON, JSON lines, CSV, folders of images with their metadata, saved `Dataset`s and
`DatasetDict`s.
"""

import csv
import glob
import os
import re
import shutil
import sys
from bisect import bisect_right
from collections.abc import Callable
from copy import copy
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from zlib import crc32

import numpy as np

from data.columns import Record, columns_of, record_of
from data.mixture import InMemoryRecords
from data.splits import by_split, files_below
from utils.errors import UserError
from utils.files import encoding_of, lines_of, refuse_pointer
from utils.hub import is_hub_id, reason_of

T = TypeVar("T")
KINDS = {  # ending of a table → the reader of `datasets`
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
}
# Of a folder of images, and of a saved set: no tables of their own.
METADATA = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}
METADATA |= {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


class Rows(NamedTuple):
    """Rows of a `Dataset` from one folder, in which relative image paths start; None: it is on the Hub."""

    table: Any
    folder: Path | None


class ArrowRecords(InMemoryRecords):
    """Rows as records, in a random but fixed order: the first are a sample of all."""

    def __init__(
        self, name: str, parts: list[Rows], indices: np.ndarray, given: dict[str, str], context: str
    ) -> None:
        """`indices`: of the rows of all parts together. `given`, `context`: as in `columns_of`."""
        super().__init__([])
        self.name = name
        self.ends = list(accumulate(len(part.table) for part in parts))
        self.indices = np.random.default_rng(crc32(name.encode())).permutation(indices)
        self.parts = []
        for part in parts:
            columns = columns_of(part.table.column_names, given, context)
            table = part.table.select_columns(columns.used)
            for column, feature in table.features.items():
                if (encoded := _encoded(feature)) != feature:
                    table = table.cast_column(column, encoded)
            labels = {c: f.names for c, f in table.features.items() if hasattr(f, "int2str")}
            self.parts.append((table, columns, labels, part.folder))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]
        number = int(self.indices[index])
        part = bisect_right(self.ends, number)
        table, columns, labels, folder = self.parts[part]
        row = table[number - (self.ends[part - 1] if part else 0)]
        row |= {column: names[row[column]] for column, names in labels.items() if row[column] is not None}
        return {"id": f"{self.name}/{number}"} | record_of(row, columns, folder)


def _encoded(feature: Any) -> Any:
    """The same feature, with images as bytes or paths."""
    if isinstance(feature, dict):
        return {name: _encoded(value) for name, value in feature.items()}
    changed = copy(feature)
    if hasattr(feature, "feature"):  # of a list
        changed.feature = _encoded(feature.feature)
    elif hasattr(feature, "decode") and hasattr(feature, "mode"):  # of an image
        changed.decode = False
    return changed


class HuggingFaceSet:
    """A set of `datasets`, or one of its configurations: the rows of each split.

    Errors: `UserError` if it cannot be opened, or if its conversion would fill the disk.
    """

    def __init__(self, path: str, config: str) -> None:
        import datasets

        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        if config and not is_hub_id(path) and not _has_configurations(path):  # then it is a folder
            if not (Path(path) / config).is_dir():
                raise UserError(f"{path} has neither a configuration nor a folder '{config}'")
            path = str(Path(path) / config)
        self.path = path
        self.splits: dict[str, list[Rows]] = {}
        if _is_saved(path):
            saved = _reading(path, lambda: datasets.load_from_disk(path))
            splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
            self.splits = {split: [Rows(table, Path(path))] for split, table in splits.items()}
        elif not is_hub_id(path) and not _has_configurations(path) and (tables := tables_of(path)):
            for split, files in tables.items():
                for folder, names in groupby(files, lambda file: Path(file).parent):
                    self._convert(_builder_of_tables(path, split, list(names)), folder)
        else:
            name, _, revision = path.partition("@") if is_hub_id(path) else (path, "", "")
            given = {"name": config or None, "revision": revision or None}
            builder = _reading(path, lambda: datasets.load_dataset_builder(name, **given))
            self._convert(builder, None if is_hub_id(path) else Path(path))
        self.splits = {
            split: parts for split, parts in self.splits.items() if any(len(part.table) for part in parts)
        }
        if not self.splits:
            raise UserError(f"{path} holds no rows")

    def _convert(self, builder: Any, folder: Path | None) -> None:
        data_files = builder.config.data_files or {}
        files = [str(name) for names in data_files.values() for name in names]
        if not Path(builder.cache_dir).exists():
            _check_disk(self.path, files, builder)
        _reading(self.path, builder.download_and_prepare)
        for split, table in _reading(self.path, builder.as_dataset).items():
            # Where a configuration of a local folder says which files are its split, they have a folder.
            own = {Path(str(name)).parent for name in data_files.get(split, ())} if folder else set()
            self.splits.setdefault(str(split), []).append(Rows(table, own.pop() if len(own) == 1 else folder))

    def records(self, name: str, expression: str, given: dict[str, str], context: str) -> ArrowRecords:
        """Return the records of a split, or of an expression as `train[:10%]+validation`."""
        import datasets

        sizes = {split: sum(len(p.table) for p in parts) for split, parts in self.splits.items()}
        read = _reading(self.path, lambda: datasets.ReadInstruction.from_spec(expression).to_absolute(sizes))
        names = list(dict.fromkeys(part.splitname for part in read))
        starts = dict(zip(names, accumulate([0, *(sizes[split] for split in names)]), strict=False))
        indices = [
            starts[part.splitname]
            + np.arange(part.from_ or 0, sizes[part.splitname] if part.to is None else part.to)
            for part in read
        ]
        parts = [part for split in names for part in self.splits[split]]
        return ArrowRecords(name, parts, np.concatenate(indices), given, context)


def _is_saved(path: str) -> bool:
    return any((Path(path) / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _has_configurations(path: str) -> bool:
    """Whether a folder's README names configurations, as that of a data set on the Hub."""
    page = Path(path) / "README.md"
    return page.is_file() and bool(re.search(r"^configs:", page.read_text("utf-8", "replace"), re.MULTILINE))


def configurations(path: str) -> list[str]:
    """List the configurations of a set; [""] if there is only one. Errors: `UserError`."""
    import datasets

    if not Path(path).exists() and not is_hub_id(path):
        raise UserError(f"{path} is neither a local file or folder nor a Hub id (org/name)")
    if not is_hub_id(path) and (_is_saved(path) or not _has_configurations(path)):
        return [""]
    name, _, revision = path.partition("@") if is_hub_id(path) else (path, "", "")
    names = _reading(path, lambda: datasets.get_dataset_config_names(name, revision=revision or None))
    return sorted(names) if len(names) > 1 else [""]


def _ending(file: str) -> str:
    return Path(file.lower().removesuffix(".gz")).suffix


def tables_of(path: str) -> dict[str, list[str]]:
    """Return the table files of a folder, or a file, by split. Errors: `UserError` for several kinds."""
    if Path(path).is_file():
        if _ending(path) not in KINDS:
            tar = "; of a tar, give the folder" if path.endswith(".tar") else ""
            raise UserError(f"{path} is no table that is read: {', '.join(KINDS)}{tar}")
        return {"train": [path]}
    files = [f for f in files_below(path) if _ending(f) in KINDS and Path(f).name not in METADATA]
    splits = by_split(files, Path(path))
    kinds = sorted({KINDS[_ending(file)] for names in splits.values() for file in names})
    if len(kinds) > 1:
        raise UserError(f"{path} holds files of several kinds ({', '.join(kinds)}): give one file or folder")
    return splits


def _builder_of_tables(path: str, split: str, files: list[str]) -> Any:
    """Make the builder of tables of one folder; all values of CSV files are texts, as they are written."""
    import datasets

    for file in files:
        refuse_pointer(Path(file))
    kind = KINDS[_ending(files[0])]
    options: dict[str, Any] = {}
    if kind in ("csv", "json"):
        options["encoding"] = encoding_of(Path(files[0]))
    if kind == "csv":
        separator = "\t" if ".tsv" in files[0].lower() else ","
        names = next(csv.reader([next(lines_of(Path(files[0])), b"").decode()], delimiter=separator), [])
        features = datasets.Features({name: datasets.Value("string") for name in names})
        options |= {"sep": separator, "features": features, "keep_default_na": False}
    data_files = {split: [glob.escape(str(Path(file).absolute())) for file in files]}
    return _reading(path, lambda: datasets.load_dataset_builder(kind, data_files=data_files, **options))


def _check_disk(path: str, files: list[str], builder: Any) -> None:
    """Say what a conversion needs before it begins. Errors: `UserError` if the disk is too small."""
    if is_hub_id(path):
        from huggingface_hub import HfApi

        repo, _, revision = path.partition("@")
        info = _reading(
            path, lambda: HfApi().dataset_info(repo, revision=revision or None, files_metadata=True)
        )
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        size = 2 * sum(sizes.get(re.sub("^hf://datasets/[^/]+/[^/]+/", "", name), 0) for name in files)
    else:  # images of a folder are not copied, only their paths
        tables = [Path(file) for file in files if _ending(file) in KINDS and Path(file).exists()]
        size = sum(file.stat().st_size * (10 if file.suffix == ".gz" else 1) for file in tables)
    folder = Path(builder.cache_dir)
    existing = next(parent for parent in folder.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    line = (
        f"{path}: {len(files):,} files become Arrow in {folder}, about {_gigabytes(size)} of "
        f"{_gigabytes(free)} free"
    )
    if size > free:
        raise UserError(f"{line}: set HF_HOME to a larger disk, or stream Parquet files: tables={path}")
    if os.environ.get("RANK", "0") == "0":
        print(line)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size > 1e8 else f"{size / 1e6:,.1f} MB"


def _reading(path: str, read: Callable[[], T]) -> T:
    try:
        return read()
    except UserError:
        raise
    except Exception as error:  # every reader, and every HTTP library, has its own
        while isinstance(error.__cause__, Exception):
            error = error.__cause__  # `datasets` says only that generating failed
        raise UserError(f"{path} cannot be opened by `datasets`: {reason_of(error)}") from error
