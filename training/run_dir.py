"""Run folders: where a run is stored, and which run is resumed."""

import fcntl
import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields, replace
from itertools import count
from pathlib import Path
from typing import Any

from configs.cli import override
from configs.serialization import load_json, to_dict
from configs.train import Config, EvalConfig, HubConfig
from training.checkpoint import checkpoints, move_to_abandoned, read_state, step_of
from utils.errors import UsageError, UserError
from utils.files import write_text

NEW_TOKENIZER = ".tokenizer"  # the tokenizer's folder until a new run begins
RUN_FILES = ("config.json", "metrics.jsonl", "checkpoints", "tokenizer")
BEGUN_BY = ".torchrun"  # file that names the torchrun which began or last resumed the run


class InUse(UserError):
    """Raised when another process uses the folder."""


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
    "train.feature_cache",
    "train.feature_cache_gb",
    "train.device",
    *(f"eval.{field.name}" for field in fields(EvalConfig)),
    *(f"hub.{field.name}" for field in fields(HubConfig)),
)


def find_run(config: Config) -> tuple[Path | None, Path | None]:
    """→ the run folder to resume, None for a new run; and the checkpoint, if `--resume` names one.

    `--resume auto` is the run in `output_dir`, or the newest of this preset. A torchrun that restarts its
    ranks resumes the run that it began, even without `--resume`.
    """
    output_dir = Path(config.output_dir) if config.output_dir else None
    if not config.resume:
        known = [output_dir] if output_dir else Path("runs").glob("*")
        return next((p for p in known if (p / "config.json").is_file() and _started_again(p)), None), None
    if config.resume != "auto":
        return _named_run(Path(config.resume), output_dir)
    if output_dir:
        return (output_dir if (output_dir / "config.json").is_file() else None), None
    for path in sorted(Path("runs").glob("*/config.json"), key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            if load_json(Config, path).config == config.config:
                return path.parent, None
        except UserError as error:
            print(f"warning: {error}: passed over", file=sys.stderr)
    return None, None


def _named_run(path: Path, output_dir: Path | None) -> tuple[Path, Path | None]:
    """`--resume PATH` → run folder, and the checkpoint if `path` is one."""
    is_checkpoint = path.name.startswith("step_") and path.parent.name == "checkpoints"
    run = path.parent.parent if is_checkpoint else path
    if output_dir and output_dir.resolve() != run.resolve():
        raise UsageError(f"--resume goes on with {run}, and --output_dir is {output_dir}: leave it out")
    if not is_checkpoint:
        if not (path / "config.json").is_file():
            raise UsageError(f"--resume: {path} is neither a run folder nor a checkpoint in one")
        return path, None
    if _started_again(run):
        return run, None  # the first start went back already
    if path not in checkpoints(path.parent):
        raise UsageError(f"--resume: {path} is no checkpoint")
    read_state(path)
    return run, path


def resume_run(flags: dict[str, Any], folder: Path, checkpoint: Path | None) -> tuple[Config, Path | None]:
    """→ the configuration of the run in `folder`, with the flags of this start, and the checkpoint to load.

    Only flags that do not change what is computed may differ from the run's own.
    """
    saved = load_json(Config, folder / "config.json")
    resumed = override(saved, {k: v for k, v in flags.items() if k not in ("output_dir", "resume")})
    if resumed.train.feature_cache == "auto":  # the run has decided
        resumed = replace(resumed, train=replace(resumed.train, feature_cache=saved.train.feature_cache))
    changed = [
        f"{k} (was {a}, now {b})"
        for k, a, b in _differences(to_dict(saved), to_dict(resumed))
        if k not in CHANGEABLE
    ]
    if changed:
        raise UsageError(
            f"--resume goes on with the configuration of {folder}; it cannot change {', '.join(changed)}"
        )
    checkpoint = checkpoint or _newest_sound(folder / "checkpoints")
    done = step_of(checkpoint) if checkpoint is not None else 0
    if done > resumed.max_steps:
        raise UserError(f"{checkpoint} is already past max_steps = {resumed.max_steps}: it has {done} steps")
    return replace(resumed, output_dir=str(folder)), checkpoint


def _run_file(folder: Path) -> str:
    """Name of a file or folder of an earlier run in `folder`, even one without `config.json`; "" if none."""
    return next((name for name in RUN_FILES if (folder / name).exists()), "")


def check_free(config: Config) -> None:
    """Raise `UsageError` if `output_dir` holds a run."""
    folder = Path(config.output_dir)
    name = _run_file(folder) if config.output_dir else ""
    if name == "config.json":
        raise UsageError(
            f"{folder} already holds a run: add --resume auto to go on with it, "
            "or choose another --output_dir"
        )
    if name:
        raise UsageError(
            f"{folder} holds '{name}', of a run without its config.json perhaps: put that back and --resume, "
            "or choose another --output_dir"
        )


def lock_new_folder(config: Config, stack: ExitStack) -> Path:
    """Lock a new run's folder until `stack` closes: `output_dir`, or the next free one of this preset.

    With `--resume auto` a preset's folder that another process is starting a run in raises `InUse`.
    """
    if config.output_dir:
        stack.enter_context(locked(Path(config.output_dir)))
        check_free(config)  # again: another process may have been faster
        return Path(config.output_dir)
    for number in count(1):
        folder = Path(f"runs/{config.config}" + (f"-{number}" if number > 1 else ""))
        if _run_file(folder):
            continue
        try:
            stack.enter_context(locked(folder))
        except InUse:
            if config.resume:
                raise
            continue
        if not _run_file(folder):
            return folder
    raise AssertionError("numbers do not end")


def begin_run(config: Config, folder: Path, rewound: bool) -> None:
    """Make the folder a run, or let its run go on; called when nothing can fail any more.

    `config.json` makes it a run; the name of this torchrun, if any, stands beside. `rewound`: the run had
    gone further before, and its exported models are moved to `checkpoints/abandoned`.
    """
    if _torchrun():
        write_text(folder / BEGUN_BY, _torchrun() + "\n")
    write_text(folder / "config.json", json.dumps(to_dict(config), indent=2) + "\n")
    if (folder / NEW_TOKENIZER).is_dir():
        (folder / NEW_TOKENIZER).rename(folder / "tokenizer")
    for exported in (folder / "model", folder / "adapters") if rewound else ():
        if exported.exists():
            move_to_abandoned(exported, folder / "checkpoints")


def _torchrun() -> str:
    """Name of the torchrun that started this process, equal after its restarts; "" without torchrun."""
    return f"{name} {os.getppid()}" if (name := os.environ.get("TORCHELASTIC_RUN_ID")) else ""


def _started_again(folder: Path) -> bool:
    """Whether this is a restart by the torchrun that began `folder`'s run, or resumed it, before."""
    mark = folder / BEGUN_BY
    return (
        int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        and mark.is_file()
        and mark.read_text().strip() == _torchrun()
    )


def _newest_sound(folder: Path) -> Path | None:
    """The newest checkpoint that is not damaged; a warning names those passed over.

    If all are damaged: `UserError`, because to begin anew would throw the run away.
    """
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


def _differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Nested dictionaries → dotted key, value in `a`, value in `b`, where they differ."""
    for key in a:
        if isinstance(a[key], dict):
            yield from _differences(a[key], b[key], f"{prefix}{key}.")
        elif a[key] != b[key]:
            yield prefix + key, a[key], b[key]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder if needed, and lock it until the block, or the process, ends.

    If another process has it: `InUse`.
    """
    path = folder / ".lock"
    is_new = not folder.exists()
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
                f"{folder} is in use: another process trains in it (stop that one first, or give this run "
                "another --output_dir)"
            ) from None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # its owner has just ended and deleted it
    with file:
        try:
            yield
        finally:
            # A disk that has become read-only has its own error; the lock ends with the file anyway.
            with suppress(OSError):
                path.unlink(missing_ok=True)
                if is_new:
                    folder.rmdir()  # if it is still empty
