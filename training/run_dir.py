"""Run folders: where a run lives, and which run is resumed."""

import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from itertools import count
from pathlib import Path
from typing import Any

from configs.cli import override
from configs.serialization import load_json, to_dict
from configs.train import Config, EvalConfig, HubConfig
from training.checkpoint import checkpoints, read_state, step_of
from utils.errors import UsageError, UserError
from utils.files import write_text

BEGUN_BY = ".torchrun"


class InUse(UserError):
    """Another process has the folder."""


CHANGEABLE = (
    "max_steps",
    "output_dir",
    "resume",
    "cache_dir",
    "parallel",
    "log",
    "data.workers",
    "train.log_every",
    "train.diagnostics_every",
    "train.stall_minutes",
    "train.eval_every",
    "train.checkpoint_every",
    "train.checkpoint_minutes",
    "train.recompute",
    "train.compile",
    "train.keep_checkpoints",
    "train.feature_cache_gb",
    "train.device",
    *(f"eval.{field.name}" for field in fields(EvalConfig)),
    *(f"hub.{field.name}" for field in fields(HubConfig)),
)


def open_run(
    config: Config,
    flags: dict[str, Any],
    resolve_config: Callable[[Config], Config],
    lock: Callable[[Path], None],
) -> tuple[Config, Path, Path | None]:
    """→ the configuration in force, the run folder, and the checkpoint to resume from. Nothing is written but what `lock` writes: `keep_config` follows when all else is well.

    `complete` fills in a new run's configuration, before its folder is made; `lock` makes the folder this process's own.

    A resumed run keeps its own configuration; only flags that do not change what is computed may differ.
    """
    folder, checkpoint = _find(config) if config.resume else (_run_of_this_torchrun(config), None)
    if folder is None:
        _not_taken(config)
        config = resolve_config(config)
        return config, _new_folder(config, lock), None
    lock(folder)
    saved = load_json(Config, folder / "config.json")
    chosen = ("train.local_batch_size",) if saved.fit_memory else ()  # by --fit-memory, when the run began
    wanted = override(saved, {k: v for k, v in flags.items() if k not in ("output_dir", "resume", *chosen)})
    changed = [
        f"{k} (was {a}, now {b})"
        for k, a, b in _differences(to_dict(saved), to_dict(wanted))
        if k not in CHANGEABLE
    ]
    if changed:
        raise UsageError(
            f"--resume goes on with the configuration of {folder}; it cannot change {', '.join(changed)}"
        )
    checkpoint = checkpoint or _newest_sound(folder / "checkpoints")
    done = step_of(checkpoint) if checkpoint is not None else 0
    if done > wanted.max_steps:
        raise UserError(f"{checkpoint} is already past max_steps = {wanted.max_steps}: it has {done} steps")
    return replace(wanted, output_dir=str(folder)), folder, checkpoint


def write_config(config: Config, folder: Path) -> None:
    """Write `config.json`, which makes the folder a run, and under torchrun which one began it, or went on with it, last."""
    if _torchrun():
        write_text(folder / BEGUN_BY, _torchrun() + "\n")
    write_text(folder / "config.json", json.dumps(to_dict(config), indent=2) + "\n")


def _torchrun() -> str:
    """Who started this process, and starts it again where `--max-restarts` lets it: nothing where it was not torchrun."""
    return f"{name} {os.getppid()}" if (name := os.environ.get("TORCHELASTIC_RUN_ID")) else ""


def _started_again(folder: Path) -> bool:
    """Is this a restart by the torchrun that has begun `folder`'s run, or gone back in it, before?"""
    mark = folder / BEGUN_BY
    return (
        int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        and mark.is_file()
        and mark.read_text().strip() == _torchrun()
    )


def _run_of_this_torchrun(config: Config) -> Path | None:
    """The run that this torchrun began before it started the ranks again: they go on with it, whether or not they were told to resume."""
    known = [Path(config.output_dir)] if config.output_dir else Path("runs").glob("*")
    return next(
        (folder for folder in known if (folder / "config.json").is_file() and _started_again(folder)), None
    )


def _holds(folder: Path) -> str:
    """What a run has left in a folder, where it is not a new one's; of a run whose `config.json` is gone too."""
    return next(
        (
            name
            for name in ("config.json", "metrics.jsonl", "checkpoints", "tokenizer")
            if (folder / name).exists()
        ),
        "",
    )


def _not_taken(config: Config) -> None:
    if (name := _holds(folder := Path(config.output_dir))) and config.output_dir:
        if name == "config.json":
            raise UsageError(
                f"{folder} already holds a run: add --resume auto to go on with it, or choose another --output_dir"
            )
        raise UsageError(
            f"{folder} holds '{name}', of a run without its config.json perhaps: put that back and --resume, or choose another --output_dir"
        )


def _new_folder(config: Config, lock: Callable[[Path], None]) -> Path:
    """A locked one. Without `output_dir` the next free of its kind; `--resume auto` does not begin another beside one that is about to begin."""
    if config.output_dir:
        lock(Path(config.output_dir))
        _not_taken(config)  # by another start, meanwhile
        return Path(config.output_dir)
    for number in count(1):
        folder = Path(f"runs/{config.config}" + (f"-{number}" if number > 1 else ""))
        if _holds(folder):
            continue
        try:
            lock(folder)
        except InUse:
            if config.resume:
                raise
            continue
        if not _holds(folder):
            return folder
    raise AssertionError("numbers do not end")


def _find(config: Config) -> tuple[Path | None, Path | None]:
    """`--resume` → run folder, and the checkpoint where one is named; "auto" finds the newest run, or nothing yet."""
    if config.resume != "auto":
        path = Path(config.resume)
        run = (
            path.parent.parent
            if path.name.startswith("step_") and path.parent.name == "checkpoints"
            else path
        )
        if config.output_dir and Path(config.output_dir).resolve() != run.resolve():
            raise UsageError(
                f"--resume goes on with {run}, and --output_dir is {config.output_dir}: leave it out"
            )
        if path.name.startswith("step_") and path.parent.name == "checkpoints":
            if _started_again(run):
                return run, None  # it went back already
            if path not in checkpoints(path.parent):
                raise UsageError(f"--resume: {path} is no checkpoint")
            read_state(path)
            return run, path
        if not (path / "config.json").is_file():
            raise UsageError(f"--resume: {path} is neither a run folder nor a checkpoint in one")
        return path, None
    if config.output_dir:
        path = Path(config.output_dir)
        return (path, None) if (path / "config.json").is_file() else (None, None)
    for path in sorted(Path("runs").glob("*/config.json"), key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            if load_json(Config, path).config == config.config:
                return path.parent, None
        except UserError as error:
            print(f"warning: {error}: passed over", file=sys.stderr)
    return None, None


def _newest_sound(folder: Path) -> Path | None:
    """The newest checkpoint that is not damaged; those passed over are named. Where all are, `UserError`: to begin anew would throw the run away."""
    damaged = None
    for checkpoint in reversed(checkpoints(folder)):
        try:
            read_state(checkpoint)
            return checkpoint
        except UserError as error:
            print(f"warning: {error}: passed over", file=sys.stderr)
            damaged = error
    if damaged is not None:
        raise UserError(
            f"every checkpoint in {folder} is damaged: delete them to train from the beginning"
        ) from damaged
    return None


def _differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    out = []
    for key in a:
        if isinstance(a[key], dict):
            out += _differences(a[key], b[key], f"{prefix}{key}.")
        elif a[key] != b[key]:
            out.append((prefix + key, a[key], b[key]))
    return out


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder, made where there is none, is this process's alone until the block ends, or the process. Where another has it: `UserError`."""
    path = folder / ".lock"
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror or error}") from error
    while True:
        try:
            file = path.open("w")
        except OSError as error:
            raise UserError(f"{folder} cannot be written to: {error.strerror or error}") from error
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which data workers would inherit
        except (BlockingIOError, PermissionError):
            file.close()
            raise InUse(
                f"{folder} is in use: another process trains in it (stop that one first, or give this run another --output_dir)"
            ) from None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # of one that ended a moment ago
    with file:
        try:
            yield
        finally:
            with suppress(
                OSError
            ):  # of a disk that has turned read-only, whose own line shall be told; the lock ends with the file all the same
                path.unlink(missing_ok=True)
                if made:
                    folder.rmdir()  # where nothing has come into it
