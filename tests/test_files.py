"""Folders that are replaced as a whole, beside other processes that do the same."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from utils.files import replacing_folder


def temporary(folder: Path, name: str) -> Path:
    path = folder / name
    path.mkdir()
    (path / "half.json").write_text("{")
    return path


def test_only_what_no_process_writes_is_removed(tmp_path):
    """Judged by a lock: process ids mean nothing in another container, and a name may be anybody's."""
    dead, foreign = temporary(tmp_path, f".model.new.{os.getpid()}"), temporary(tmp_path, ".model.new.tmp")
    busy = temporary(tmp_path, ".model.new.4194999")
    descriptor = os.open(busy, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with replacing_folder(tmp_path / "model") as new:
        (new / "config.json").write_text("{}")
        with replacing_folder(tmp_path / "model") as other:  # as another process would
            (other / "config.json").write_text("[]")
        assert (new / "config.json").is_file()
    os.close(descriptor)
    assert not dead.exists() and not foreign.exists() and (busy / "half.json").exists()
    assert (tmp_path / "model" / "config.json").read_text() == "{}"
    with replacing_folder(tmp_path / "model"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failed_replacement_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), replacing_folder(tmp_path / "model"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """The folder is written all the same, and nothing is removed, because nobody knows whose it is."""

    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    other = temporary(tmp_path, ".model.new.7")
    with replacing_folder(tmp_path / "model") as new:
        (new / "config.json").write_text("{}")
    assert (tmp_path / "model" / "config.json").read_text() == "{}" and other.exists()


def test_a_folder_that_was_just_made_is_not_removed(tmp_path):
    (tmp_path / ".model.new.7").mkdir()
    with replacing_folder(tmp_path / "model"):
        pass
    assert (tmp_path / ".model.new.7").exists()
