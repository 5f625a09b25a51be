"""Files and folders that are whole or absent: written beside their name, synced, renamed. Errors: `UserError` naming the file."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from utils.errors import UserError

CACHE = "cache"  # folder of what is computed once, where nothing else is said


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """An empty file beside `path` to write to. When the block ends well it is synced and takes `path`'s name, else it is deleted."""
    beside = path.with_name(
        f".{path.name}.{int.from_bytes(os.urandom(6))}"
    )  # not the process's number: machines and containers share folders
    try:
        beside.touch()
        mode = beside.stat().st_mode
        yield beside
        beside.chmod(mode)  # safetensors makes files that nobody else may read
        sync(beside)
        beside.replace(path)
    except OSError as error:  # which, after opening, does not say what file it is about
        raise UserError(f"{path} could not be written: {error.strerror or error}") from error
    finally:
        beside.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return process != os.getpid()


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path` to fill. When the block ends well its files are synced and it takes `path`'s name, else it is deleted.

    An old `path` is moved aside first and deleted last: a kill in between leaves it whole, under a name that begins with a dot.
    """
    beside, old = (path.with_name(f".{path.name}.{what}.{os.getpid()}") for what in ("new", "old"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(f".{path.name}.new.*"):  # what a killed run left half-written
            if not _alive(int(stale.name.rpartition(".")[2])):
                shutil.rmtree(stale)
        beside.mkdir()
        yield beside
        for file in (*beside.iterdir(), beside):
            sync(file)
        if path.exists():
            path.rename(old)
        beside.rename(path)
        sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror or error}") from error
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(beside, ignore_errors=True)


def file_name(text: str) -> str:
    """A file's name for any text, another one for every text: what is not a letter, digit, `-` or `_` becomes `_`, and a checksum tells such names apart."""
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "_" for c in text)[:80]
    return (
        safe
        if safe == text
        else f"{safe}-{hashlib.blake2b(text.encode(errors='surrogatepass'), digest_size=4).hexdigest()}"
    )


def write_text(path: Path, text: str) -> None:
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def read_json(path: Path, error: type[UserError] = UserError) -> Any:
    """What a JSON file holds; a missing, unreadable or damaged one raises `error`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path} does not exist") from None
    except (ValueError, RecursionError) as problem:
        raise error(f"{path} is not valid JSON: {problem}{in_cache(path)}") from None
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror}") from None


def in_cache(path: Path) -> str:
    """The end of an error about a damaged file: what helps where it is the Hub's, a link to a blob of its cache."""
    kept = path.resolve()
    cached = path.is_symlink() and kept.parent.name == "blobs" and "snapshots" in path.parts
    return (
        f"; it is the cache's copy of the Hub's: where that is whole, delete {kept} and it will be fetched again"
        if cached
        else ""
    )


def append_text(path: Path, text: str) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror or error}") from error


def sync(path: Path) -> None:
    """Wait until the disk holds a file, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
