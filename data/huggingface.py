"""Any set that `datasets` opens, from the Hub or a local path: memory-mapped Arrow → records.

Parquet, Arrow, JSON, JSON lines, CSV, folders of images with their metadata, saved `Dataset`s and
`DatasetDict`s.
"""

import os
import shutil
import sys
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any, TypeVar
from zlib import crc32

import numpy as np

from data.columns import Columns, Record, record_of
from data.mixture import InMemoryRecords
from utils.errors import UserError
from utils.hub import is_hub_id, reason_of

T = TypeVar("T")


class ArrowRecords(InMemoryRecords):
    """The rows of a `Dataset` as records, in a random but fixed order: the first are a sample of all."""

    def __init__(self, name: str, rows: Any, columns: Columns, folder: Path | None) -> None:
        """`folder`: where relative image paths start; None: the set is on the Hub."""
        super().__init__([])
        self.name, self.columns, self.folder = name, columns, folder
        for column, feature in rows.features.items():
            if (encoded := _encoded(feature)) != feature:
                rows = rows.cast_column(column, encoded)
        self.rows = rows
        self.indices = np.random.default_rng(crc32(name.encode())).permutation(len(rows))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]
        number = int(self.indices[index])
        return {"id": f"{self.name}/{number}"} | record_of(self.rows[number], self.columns, self.folder)


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
    """A set of `datasets`: one of its configurations, with all its splits.

    Errors: `UserError` if it cannot be opened, or if its conversion would fill the disk.
    """

    def __init__(self, path: str, config: str) -> None:
        import datasets

        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        self.path = path
        local = Path(path)
        if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
            saved = _reading(path, lambda: datasets.load_from_disk(path))
            self.splits = dict(saved) if isinstance(saved, datasets.DatasetDict) else {"train": saved}
            self.folders = dict.fromkeys(self.splits, local)
            return
        given: dict[str, Any] = {"name": config or None}
        if local.is_file():
            path, given["data_files"] = str(local.parent), {"train": local.name}
        elif is_hub_id(path):
            path, _, revision = path.partition("@")
            given["revision"] = revision or None
        elif not local.is_dir():
            raise UserError(f"{path} is neither a local file or folder nor a Hub id (org/name)")
        builder = _reading(self.path, lambda: datasets.load_dataset_builder(path, **given))
        data_files = builder.config.data_files or {}
        files = {str(split): list(map(str, names)) for split, names in data_files.items()}
        if not Path(builder.cache_dir).exists():
            _check_disk(self.path, files, builder)
        _reading(self.path, builder.download_and_prepare)
        self.splits = {str(split): rows for split, rows in builder.as_dataset().items()}
        self.folders = {
            split: Path(os.path.commonpath([Path(name).parent for name in names]))
            for split, names in files.items()
            if not is_hub_id(self.path)
        }
        self.builder = builder

    def rows(self, split: str) -> tuple[Any, Path | None]:
        """Return the rows of a split, or of an expression as `train[:10%]`, and the folder of its images."""
        folder = next((self.folders[name] for name in self.folders if split.startswith(name)), None)
        if split in self.splits:
            return self.splits[split], folder
        return _reading(self.path, lambda: self.builder.as_dataset(split=split)), folder


def configurations(path: str) -> list[str]:
    """List the configurations of a set; [""] if there is only one."""
    import datasets

    if Path(path).is_file() or any(
        (Path(path) / name).is_file() for name in ("dataset_dict.json", "state.json")
    ):
        return [""]
    if not Path(path).is_dir() and not is_hub_id(path):
        raise UserError(f"{path} is neither a local file or folder nor a Hub id (org/name)")
    name, _, revision = path.partition("@") if is_hub_id(path) else (path, "", "")
    names = _reading(path, lambda: datasets.get_dataset_config_names(name, revision=revision or None))
    return sorted(names) if len(names) > 1 else [""]


def _check_disk(path: str, files: dict[str, list[str]], builder: Any) -> None:
    """Say what a conversion needs before it begins. Errors: `UserError` if the disk is too small."""
    names = {name for split in files.values() for name in split}
    if is_hub_id(path):
        from huggingface_hub import HfApi

        repo, _, revision = path.partition("@")
        info = HfApi().dataset_info(repo, revision=revision or None, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        size = 2 * sum(n for file, n in sizes.items() if any(name.endswith("/" + file) for name in names))
    else:
        size = sum(Path(name).stat().st_size for name in names if Path(name).exists())
    folder = Path(builder.cache_dir)
    existing = next(parent for parent in folder.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    line = (
        f"{path}: {len(names):,} files become Arrow in {folder}, about {_gigabytes(size)} of "
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
    except Exception as error:  # every reader, and every HTTP library, has its own
        while error.__cause__ is not None and isinstance(error.__cause__, Exception):
            error = error.__cause__  # `datasets` says only that generating failed
        raise UserError(f"{path} cannot be opened by `datasets`: {reason_of(error)}") from error
