"""Atomic writes of files and folders: write to a temporary path, sync, rename. Errors: `UserError`."""

import codecs
import fcntl
import gzip
import hashlib
import io
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from utils.errors import UserError

CACHE = "cache"  # default folder of cached results
POINTER = b"version https://git-lfs.github.com/spec/"  # begins a file that stands for a large one
GZIP = b"\x1f\x8b"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of an empty temporary file in `path`'s folder.

    If the block succeeds, the file is synced and renamed to `path`; otherwise it is deleted.
    """
    # Random, not the process id: machines and containers share folders.
    temp_path = path.with_name(f".{path.name}.{int.from_bytes(os.urandom(6))}")
    try:
        temp_path.touch()
        mode = temp_path.stat().st_mode
        yield temp_path
        temp_path.chmod(mode)  # safetensors restricts it to the owner
        sync(temp_path)
        temp_path.replace(path)
    except OSError as error:  # after opening, an OSError does not name the file
        raise UserError(f"{path} could not be written: {error.strerror or error}") from error
    finally:
        temp_path.unlink(missing_ok=True)


def _lock(folder: Path) -> int | None:
    """Lock a folder until the returned descriptor is closed.

    None where another process has it, and on file systems without locks.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_stale(paths: Iterable[Path]) -> None:
    """Remove temporary folders that no process writes to: their owners were killed.

    An empty one may be so new that it is not locked yet.
    """
    for path in paths:
        if any(path.iterdir()) and (descriptor := _lock(path)) is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(descriptor)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield the path of an empty temporary folder in `path`'s parent.

    If the block succeeds, its files are synced and it is renamed to `path`; otherwise it is deleted. An old
    `path` is renamed first and deleted last: a kill in between leaves it whole, under a name that begins with
    a dot.
    """
    # Random, not the process id: machines and containers share folders.
    number, descriptor = int.from_bytes(os.urandom(6)), None
    temp_path, old = (path.with_name(f".{path.name}.{suffix}.{number}") for suffix in ("new", "old"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path.parent.glob(f".{path.name}.new.*"))
        temp_path.mkdir()
        descriptor = _lock(temp_path)
        yield temp_path
        for file in (*temp_path.iterdir(), temp_path):
            sync(file)
        if path.exists():
            path.rename(old)
        temp_path.rename(path)
        sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror or error}") from error
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(temp_path, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def file_name(text: str) -> str:
    """A file name for any text; different texts have different names.

    Characters other than ASCII letters, digits, `-` and `_` become `_`; a changed name ends with a checksum.
    """
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "_" for c in text)[:80]
    if safe == text:
        return safe
    checksum = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=4).hexdigest()
    return f"{safe}-{checksum}"


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temp_path:
        temp_path.write_text(text, encoding="utf-8")


def refuse_pointer(path: Path, head: bytes | None = None) -> None:
    """Raise `UserError` if a file is git-lfs's pointer to it. `head`: its first bytes, if they are known."""
    if head is None:
        with open(path, "rb") as file:
            head = file.read(len(POINTER))
    if head.startswith(POINTER):
        raise UserError(f"{path} is a git-lfs pointer, not the file itself: run 'git lfs pull' in its folder")


@contextmanager
def opened_text(path: Path) -> Iterator[tuple[IO[bytes], str]]:
    """Yield a text file, compressed by gzip or not, and its Unicode encoding.

    Errors: `OSError`, `UserError` for a git-lfs pointer, a damaged gzip file, or damaged text.
    """
    with open(path, "rb") as file:
        is_gzip = file.read(len(GZIP)) == GZIP
    try:
        with gzip.open(path) if is_gzip else open(path, "rb") as file:
            head = file.read(len(POINTER))
            refuse_pointer(path, head)
            file.seek(0)
            yield file, json.detect_encoding(head)
    except (gzip.BadGzipFile, EOFError, zlib.error) as problem:
        raise UserError(f"{path} is a damaged gzip file: {problem}") from None


def encoding_of(path: Path) -> str:
    """Return the Unicode encoding of a text file. Errors: as of `opened_text`."""
    with opened_text(path) as (_, encoding):
        return encoding


def lines_of(path: Path) -> Iterator[bytes]:
    """Yield the lines of a text file in UTF-8. Errors: as of `opened_text`, `UserError` for damaged text."""
    with opened_text(path) as (file, encoding):
        file.seek(len(codecs.BOM_UTF8) if encoding == "utf-8-sig" else 0)
        if encoding.startswith("utf-8"):
            yield from file
            return
        try:
            yield from (line.encode() for line in io.TextIOWrapper(file, encoding))
        except UnicodeError as problem:
            raise UserError(f"{path} is damaged: {problem}") from None


def read_json(path: Path, error: type[UserError] = UserError) -> Any:
    """Parse a JSON file. A missing, unreadable or damaged file raises `error`."""
    try:
        return json.loads(b"".join(lines_of(path)).decode("utf-8"))
    except FileNotFoundError:
        raise error(f"{path} does not exist") from None
    except (ValueError, RecursionError) as problem:
        raise error(f"{path} is not valid JSON: {problem}{in_cache(path)}") from None
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror}") from None


def in_cache(path: Path) -> str:
    """A hint for the error about a damaged file; empty unless `path` links to a blob of the Hub's cache."""
    blob = path.resolve()
    if not (path.is_symlink() and blob.parent.name == "blobs" and "snapshots" in path.parts):
        return ""
    return f"; it is a cached copy of the Hub's file: delete {blob} to fetch it again"


def append_text(path: Path, text: str) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror or error}") from error


def sync(path: Path) -> None:
    """Flush a file, or a folder's directory entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
