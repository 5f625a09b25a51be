"""Read the metrics of a run folder as curves over its steps."""

import json
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.errors import UsageError, UserError
from utils.files import read_json


class Key(NamedTuple):
    """The name of a number in a line: `loss`, or `lr` with the part `left`. Parts of a list count from 1."""

    name: str
    part: str = ""


class Curve(NamedTuple):
    """Values over non-decreasing steps. A value that was not finite is NaN, also a skipped step's loss."""

    steps: np.ndarray
    values: np.ndarray


@dataclass
class RunCurves:
    """A run's settings and curves."""

    folder: Path
    name: str
    config: dict[str, Any]  # flat: "train.lr_left"
    curves: dict[Key, Curve]  # each has at least one finite value
    last: float  # the last step
    skipped: dict[float, str]  # step → reason
    notes: list[str]


def objects(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the lines of a file, each an object with a step.

    An incomplete last line adds a note: the run is writing it, or was killed. Other damage raises
    `UserError`.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                step = record["step"]
                if isinstance(step, bool) or not isinstance(step, int | float) or not 0 <= step < 1e15:
                    raise ValueError(f"its step is {str(step)[:40]}")
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                if line.strip() and line.endswith(b"\n"):
                    why = (
                        "it is no object with a step"
                        if isinstance(error, TypeError | KeyError)
                        else getattr(error, "msg", error)
                    )
                    raise UserError(f"{path}, line {number} is damaged ({why}): mend or delete it") from None
                if line.strip():
                    notes.append(f"the last line of {path.name} is incomplete: the run may be writing it")
            else:
                yield record


def numbers(record: dict[str, Any]) -> Iterator[tuple[Key, float]]:
    """Yield every number of a line with its key; null and values that are not finite are NaN."""
    for name, value in record.items():
        if isinstance(value, dict):
            parts = value.items()
        elif isinstance(value, list):
            parts = enumerate(value, 1)
        else:
            parts = [("", value)]
        for part, v in parts:
            if v is None or (isinstance(v, int | float) and not isinstance(v, bool)):
                yield Key(name, str(part)), v if v is not None and abs(v) < 1e100 else math.nan


def read_run(folder: Path, name: str) -> RunCurves:
    """Read and check a run folder.

    Raises UsageError for a folder that is no run, and UserError for damaged files.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        if (folder / "config.json").is_file():
            raise UserError(f"{folder} has no metrics.jsonl yet: its first step is not done")
        problem = "holds no metrics.jsonl" if folder.is_dir() else "is no folder"
        raise UsageError(f"{folder} {problem}: give the folder of a run")
    notes: list[str] = []
    columns: dict[Key, tuple[array, array]] = {}
    for record in objects(path, notes):
        if "overflow" in record:  # the step was skipped
            record = record | {"loss": None}
        for key, value in numbers(record):
            steps, values = columns.setdefault(key, (array("d"), array("d")))
            steps.append(record["step"])
            values.append(value)
    if not columns:
        raise UserError(f"{path} holds no whole line: its first step is not done")
    last = max(columns.pop(Key("step"))[1])
    skipped = _skipped(folder, *columns.setdefault(Key("loss"), (array("d"), array("d"))), last, notes)
    curves = {}
    for key, (steps, values) in columns.items():
        order = np.argsort(steps, kind="stable")
        curve = Curve(np.array(steps)[order], np.array(values)[order])
        if np.isfinite(curve.values).any():
            curves[key] = curve
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else None
    if not isinstance(config, dict):
        notes.append("no config.json: its settings are not known")
        config = {}
    return RunCurves(folder, name, dict(_flat(config)), curves, last, skipped, notes)


def _skipped(folder: Path, steps: array, losses: array, last: float, notes: list[str]) -> dict[float, str]:
    """Collect the skipped steps: step → reason.

    These are the logged steps without a finite loss, and the steps of skipped.jsonl that were not logged. The
    latter are appended to `steps` and `losses`. A step that succeeded after a resume does not count.
    """
    done = {step for step, loss in zip(steps, losses, strict=True) if math.isfinite(loss)}
    skipped = dict.fromkeys(sorted(set(steps) - done), "")
    if (path := folder / "skipped.jsonl").is_file():
        for record in objects(path, notes):
            if (step := record["step"]) <= last and step not in done:
                if step not in skipped:
                    steps.append(step)
                    losses.append(math.nan)
                skipped[step] = str(record.get("skipped", ""))
    return dict(sorted(skipped.items()))


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
