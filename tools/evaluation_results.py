"""Read and check what `evaluation.py --output DIR` writes: results.json and the samples of each task."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from utils.errors import UsageError, UserError
from utils.files import file_name, read_json

FORMAT = 2  # of results.json
PARTS = {
    "scores": dict,
    "standard_errors": dict,
    "random_baseline": dict,
    "higher_is_better": dict,
    "warnings": list,
}


@dataclass(frozen=True)
class TaskResult:
    """One task of results.json, in the folder that also holds its samples."""

    name: str
    facts: dict[str, Any]
    folder: Path

    @property
    def file(self) -> str:
        return f"samples_{file_name(self.name)}.jsonl"

    @cached_property
    def samples(self) -> list[dict[str, Any]] | None:
        """The samples of the file; None if it does not exist."""
        if (path := inside(self.folder, self.file)) is None:
            return None
        samples, remedy = [], "delete that line, or evaluate again"
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            context = f"{self.folder / self.file}, line {number}"
            if line.strip():
                try:
                    samples.append(json.loads(line.decode()))
                except (ValueError, RecursionError) as error:
                    reason = getattr(error, "msg", error)
                    raise UserError(f"{context} is not valid JSON ({reason}): {remedy}") from None
                _fill(samples[-1], {"images": list, "scores": dict}, context, remedy)
        return samples

    @cached_property
    def lower(self) -> set[str]:
        """The metrics where lower is better. A group names them `task: metric`, its samples `metric`."""
        names = [name for name, higher in self.facts["higher_is_better"].items() if higher is False]
        return {*names, *(name.rpartition(": ")[2] for name in names)}

    def sign(self, metric: str) -> int:
        return -1 if metric in self.lower else 1

    def values(self) -> dict[str, list[float]]:
        """The finite scores of all samples, by metric."""
        scores = [
            (metric, value)
            for sample in self.samples or []
            for metric, value in sample["scores"].items()
            if finite(value)
        ]
        return {metric: [float(value) for name, value in scores if name == metric] for metric in dict(scores)}

    def ranked(self) -> list[tuple[float | None, dict[str, Any]]]:
        """Return (key, sample), worst first.

        The key is the mean score; a metric where lower is better counts negative. Ties keep the file's order,
        and None comes last.
        """
        scores = [
            [self.sign(metric) * value for metric, value in s["scores"].items() if finite(value)]
            for s in self.samples or []
        ]
        pairs = [
            (fmean(values) if values else None, s)
            for values, s in zip(scores, self.samples or [], strict=True)
        ]
        return sorted(pairs, key=lambda pair: (pair[0] is None, pair[0] or 0.0))

    def verdict(self, sample: dict[str, Any], tops: dict[str, int]) -> str:
        """Return `full marks` or `no marks` if all scores of a sample agree on it, else "".

        `tops`: the highest value of each metric, 1 or 100.
        """
        verdicts = set()
        for metric, score in sample["scores"].items():
            if isinstance(score, int | float):
                full, none = (tops.get(metric, 1), 0)[:: self.sign(metric)]
                verdicts.add("full marks" if score == full else "no marks" if score == none else "")
        return verdicts.pop() if len(verdicts) == 1 else ""


def finite(value: Any) -> bool:
    """Whether a value is a number; neither NaN nor an integer beyond the range of floats."""
    return isinstance(value, int | float) and abs(value) < 1e300


def inside(folder: Path, name: str) -> Path | None:
    """Return the path of file `name` of a folder; None if it does not exist or lies outside the folder."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return None
    try:
        path = (folder / name).resolve(strict=True)
        return path if path.is_relative_to(folder.resolve()) and path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # missing, impossible name, circular links
        return None


def _fill(holder: Any, parts: dict[str, type], context: str, remedy: str = "evaluate again") -> None:
    """Check that `holder` is an object with parts of these types, and add missing parts, empty.

    `context` and `remedy` are for the text of the `UserError`.
    """
    if not isinstance(holder, dict):
        raise UserError(f"{context} is not an object: {remedy}")
    for key, kind in parts.items():
        holder[key] = holder.get(key) or kind()
        if not isinstance(holder[key], kind):
            name = "an object" if kind is dict else "a list"
            raise UserError(f"{context}: '{key}' is not {name}: {remedy}")


def read_results(folder: Path) -> dict[str, Any]:
    """Read and check results.json."""
    path = folder / "results.json"
    if not path.is_file():
        problem = "holds no results.json" if folder.is_dir() else "is no folder"
        raise UsageError(f"{folder} {problem}: give the one that evaluation.py --output wrote")
    results = read_json(path)
    version = results.get("format", 0) if isinstance(results, dict) else 0
    if version != FORMAT:
        reason = (
            "made by a newer version, update this project"
            if finite(version) and version > FORMAT
            else "made by an older version, or by something else; evaluate again"
        )
        raise UserError(f"{path} is of format {plain(version)[:80]}, not {FORMAT}: {reason}")
    _fill(results, {"settings": dict, "versions": dict, "tasks": dict}, str(path))
    for name, facts in results["tasks"].items():
        _fill(facts, PARTS, f"{path}: task '{name}'")
    return results


def plain(value: Any) -> str:
    """Return text as it is, None as "", anything else as JSON."""
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)
