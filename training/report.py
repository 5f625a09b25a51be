"""Look at training: the curves of one or several runs over their steps, what they ended with, their last predictions. One HTML page that needs nothing else.

  python -m training.report runs/dual_tower_easyvqa                                             → report.html in that folder
  python -m training.report runs/dual_tower_easyvqa runs/vanilla_easyvqa --output /tmp/report.html

Whatever number stands in metrics.jsonl gets a chart: a key's own, those of an object one level down, those of a short list. A run may still be going on.
"""

import argparse
import base64
import html
import io
import json
import math
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from configs.command_line import FlagParser
from configs.errors import UsageError, UserError, run_script
from configs.files import read_json, write_text

RUNS, COLOURS = 21, 7  # at most, on one page; then the colours come again, dashed
LIST, CURVES, FORMS = 16, 400, 32  # numbers of a list that is drawn; curves on a page; patterns made for the lines of a file
FEW = 40  # values of a curve up to which they are drawn as dots too
FULL = 75  # curves of a page that keep the least and the greatest value of every unit of width; of more curves each keeps less, that the page stay below 3 MB
PICTURES = 700_000  # bytes of all pictures together
LEFT, RIGHT, TOP, BOTTOM, WIDTH, HEIGHT = 58, 12, 12, 24, 560, 230  # of a chart, in its own units
SPREAD = 100.0  # greatest ÷ least value from which a loss or a norm is drawn by powers of ten
LOG = {"loss", "losses", "norm", "norms", "ratio", "ratios", "perplexity"}
LOWER, HIGHER = {"loss", "losses", "perplexity"}, {"accuracy", "cider"}  # words of keys of which it is known what is better
GROUPS = {
    "Losses in detail": {"loss", "losses"},
    "Learning rate, gradient and update": {"lr", "grad", "gradient", "norm", "norms", "update", "ratio", "weight"},
    "Speed, memory and data": {"tokens", "tiles", "samples", "seconds", "time", "mfu", "flops", "memory", "wait", "fill", "dropped"},
}
ORDER = ["Loss and validation", *GROUPS, "Other"]


class Key(NamedTuple):
    """Where a number stands in a line: `loss`, or `lr` and there `left`. Numbers of a list count from 1."""

    name: str
    part: str = ""

    @property
    def words(self) -> set[str]:
        return set(re.findall(r"[a-z]+", self.name.lower()))


class Curve(NamedTuple):
    """Finite values over steps that never decrease; `gaps`: steps whose value was null or not finite."""

    steps: np.ndarray
    values: np.ndarray
    gaps: np.ndarray


@dataclass
class Run:
    folder: Path
    name: str
    config: dict[str, Any]
    curves: dict[Key, Curve]
    evaluated: set[str]  # keys that never stand on a line of training
    last: float  # step
    skipped: dict[float, str]  # step → why
    best: Any
    notes: list[str]


class Line(NamedTuple):
    name: str
    colour: int
    curve: Curve


# ---- reading


class Form:
    """Lines alike but for their numbers, read by one pattern: in half the time that JSON takes, which matters in a file of a million."""

    def __init__(self, line: bytes, keys: list[Key]) -> None:
        self.keys, self.rows, self.step = keys, array("d"), keys.index(Key("step"))
        self.pattern = re.compile(b"([-+.eE0-9]+)".join(map(re.escape, re.split(rb"(?<=[\[:, ])-?[0-9][-+.eE0-9]*(?=[,\]}])", line))))

    def numbers(self, line: bytes) -> list[float] | None:
        match = self.pattern.fullmatch(line)
        try:
            numbers = list(map(float, match.groups())) if match else []
        except ValueError:
            return None
        return numbers if len(numbers) == len(self.keys) and 0 <= numbers[self.step] < 1e15 else None

    def columns(self) -> Iterator[tuple[Key, np.ndarray, np.ndarray]]:
        table = np.frombuffer(self.rows).reshape(-1, len(self.keys))
        return ((key, table[:, self.step], table[:, i]) for i, key in enumerate(self.keys))


def parsed(path: Path, number: int, line: bytes, notes: list[str]) -> dict[str, Any] | None:
    """The object of a line; None of a blank one, and of half a last line, which is noted: a run is writing it, or was killed. Other damage raises `UserError`."""
    try:
        record = json.loads(line)
        step = record["step"]
        if isinstance(step, bool) or not isinstance(step, int | float) or not 0 <= step < 1e15:
            raise ValueError(f"its step is {str(step)[:40]}")
        return record
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        if line.strip() and line.endswith(b"\n"):
            why = "it is no object with a step" if isinstance(error, TypeError | KeyError) else getattr(error, "msg", error)
            raise UserError(f"{path}, line {number} is damaged ({why}): mend or delete it") from None
        notes += [f"half a last line of {path.name} was passed over: the run may be writing it"] * bool(line.strip())
        return None


def numbers_of(record: dict[str, Any]) -> list[tuple[Key, float]]:
    """All that can be drawn, in the order in which it stands; what is null or not finite is NaN."""
    inner = {name: v.items() if isinstance(v, dict) else enumerate(v, 1) if isinstance(v, list) and len(v) <= LIST else [("", v)] for name, v in record.items()}
    flat = ((Key(name, str(part)), value) for name, parts in inner.items() for part, value in parts)
    return [(key, v if v is not None and abs(v) < 1e300 else math.nan) for key, v in flat if v is None or (isinstance(v, int | float) and not isinstance(v, bool))]


def read_metrics(path: Path, notes: list[str]) -> tuple[dict[Key, Curve], set[str]]:
    """The curves of a metrics.jsonl, in the order of their first values, and the names that stand on lines of training."""
    forms: list[Form] = []
    recent: list[Form] = []  # that are tried
    made = 0
    others: dict[Key, tuple[array, array]] = {}
    trained: set[str] = set()
    lists: set[str] = set()
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            for form in recent:
                if row := form.numbers(line):
                    form.rows.extend(row)
                    break
            else:
                if (record := parsed(path, number, line, notes)) is None:
                    continue
                trained |= set(record) if "loss" in record else set()
                lists |= {name for name, value in record.items() if isinstance(value, list) and len(value) > LIST}
                pairs = numbers_of(record)
                for key, value in pairs:
                    steps, values = others.setdefault(key, (array("d"), array("d")))
                    steps.append(record["step"])
                    values.append(value)
                if made < FORMS and all(value == value for _, value in pairs):  # what is NaN has no digits
                    made, form = made + 1, Form(line, [key for key, _ in pairs])
                    if form.numbers(line) == [value for _, value in pairs]:
                        forms.append(form)
                        recent = [form, *recent[:3]]
    pieces = {key: [(np.frombuffer(steps), np.frombuffer(values))] for key, (steps, values) in others.items()}
    for key, steps, values in (column for form in forms for column in form.columns()):
        pieces[key].append((steps, values))
    notes += [f"{name}: lists of more than {LIST} numbers are not drawn" for name in sorted(lists)]
    return {key: _curve(*map(np.concatenate, zip(*columns, strict=True))) for key, columns in pieces.items()}, trained


def _curve(steps: np.ndarray, values: np.ndarray) -> Curve:
    order = np.argsort(steps, kind="stable")
    steps, values = steps[order], values[order]
    finite = np.isfinite(values) & (np.abs(values) < 1e300)
    return Curve(steps[finite], values[finite], steps[~finite])


def read_run(folder: Path, name: str) -> Run:
    """A run folder, checked."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        if (folder / "config.json").is_file():
            raise UserError(f"{folder} has no metrics.jsonl yet: its first step is not done")
        raise UsageError(f"{folder} {'holds no metrics.jsonl' if folder.is_dir() else 'is no folder'}: give the folder of a run")
    notes: list[str] = []
    curves, trained = read_metrics(path, notes)
    if not curves:
        raise UserError(f"{path} holds no whole line: its run has told of no step yet")
    steps = curves.pop(Key("step")).steps
    config, best = (read_json(folder / file) if (folder / file).is_file() else None for file in ("config.json", "best.json"))
    if not isinstance(config, dict):
        notes.append("no config.json: its settings are not known")
        config = {}
    run = Run(folder, name, dict(_flat(config)), curves, {key.name for key in curves} - trained, float(steps[-1]), {}, best, notes)
    run.skipped = _skipped(run)
    return run


def _skipped(run: Run) -> dict[float, str]:
    """Steps without a loss, and those of skipped.jsonl, which also knows the ones that were not logged; a step that was taken again after a resume is none."""
    loss = run.curves.get(Key("loss"))
    told = dict.fromkeys(loss.gaps.tolist() if loss else [], "")
    if (path := run.folder / "skipped.jsonl").is_file():
        learnt = set(loss.steps.tolist()) if loss else set()
        with open(path, "rb") as file:
            found = [parsed(path, number, line, run.notes) for number, line in enumerate(file, 1)]
        told |= {r["step"]: str(r.get("skipped", "")) for r in found if r is not None and r["step"] <= run.last and r["step"] not in learnt}
    return dict(sorted(told.items()))


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


# ---- what is drawn of a curve


def thinned(steps: np.ndarray, values: np.ndarray, low: float, high: float, buckets: int) -> np.ndarray:
    """Indices that keep the look of a curve: the first and last point, and of each bucket of [low, high] the points of the least and the greatest value."""
    if len(steps) <= 2 * buckets:
        return np.arange(len(steps))
    places, starts = _buckets(steps, low, high, buckets)
    kept = [np.array([0, len(steps) - 1])]
    for extreme in (np.minimum, np.maximum):
        reached = np.flatnonzero(values == extreme.reduceat(values, starts).repeat(np.diff(np.append(starts, len(values)))))
        kept.append(reached[np.unique(places[reached], return_index=True)[1]])  # the first of a bucket
    return np.unique(np.concatenate(kept))


def smoothed(steps: np.ndarray, values: np.ndarray, low: float, high: float, buckets: int) -> tuple[np.ndarray, np.ndarray]:
    """Means over 4 % of the axis around each bucket that holds a value; towards both ends over less, so that a curve begins and ends near its first and last values.

    There is no running sum: one spike of 1e30 would take the digits of all that follow.
    """
    places, starts = _buckets(steps, low, high, buckets)
    at, held = places[starts], np.diff(np.append(starts, len(values)))
    sums, counts = np.zeros(buckets), np.zeros(buckets)
    sums[at], counts[at] = np.add.reduceat(values, starts), held
    reach = max(1, buckets // 50)
    reaches = [min(reach, max(reach // 4, min(b - at[0], at[-1] - b))) for b in at]
    around = [slice(max(0, b - n), b + n + 1) for b, n in zip(at, reaches, strict=True)]
    return np.add.reduceat(steps, starts) / held, np.array([sums[s].sum() / counts[s].sum() for s in around])


def _buckets(steps: np.ndarray, low: float, high: float, buckets: int) -> tuple[np.ndarray, np.ndarray]:
    """The bucket of each point, and the index of the first point in each bucket that has any."""
    places = np.minimum(((steps - low) / (high - low) * buckets).astype(np.int64), buckets - 1)
    return places, np.flatnonzero(np.diff(places, prepend=-1))


def _noisy(y: np.ndarray) -> bool:
    """Whether a curve goes up and down far more than from one end of its range to the other, as a loss does and a learning rate does not."""
    if len(y) < FEW:
        return False
    low, high = np.quantile(y, (0.02, 0.98))
    return float(np.abs(np.diff(y)).sum()) > 6 * float(high - low)


def ticks(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 · 10ⁿ within [low, high], at most `most` + 1."""
    scale = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(digit * scale for digit in (1, 2, 5, 10, 20) if digit * scale * most >= (high - low) * (1 - 1e-9))
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def tick_texts(values: list[float], step: float) -> list[str]:
    """With as many digits as tell neighbours apart: 0.10, 0.15; 20k, 30k; 5e-9, 1e-8."""
    size, fine = (math.floor(math.log10(abs(v)) + 1e-9) if v else 0 for v in (max(values, key=abs, default=0.0), step))
    if not -3 <= size < 9:
        return [_exponent(f"{v:.{max(0, math.floor(math.log10(abs(v)) + 1e-9) - fine)}e}") if v else "0" for v in values]
    power, unit = (6, "M") if size >= 6 else (3, "k") if size >= 4 else (0, "")
    return [f"{v / 10**power:,.{max(0, power - fine)}f}{unit}" if v else "0" for v in values]


def _exponent(text: str) -> str:
    """5.0e-09 → 5e-9"""
    mantissa, _, exponent = text.partition("e")
    return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}" if exponent else mantissa


class Axis:
    """Values → heights of the picture."""

    def __init__(self, values: np.ndarray, log: bool) -> None:
        self.least = float(values[values > 0].min()) if log else -math.inf
        self.log = log
        low, high = (float(f(self.scaled(values))) for f in (np.min, np.max))
        if high - low <= 1e-9 * max(abs(low), abs(high)) or high - low < 1e-290:  # one value is a line in the middle
            low, high = (low - abs(low) / 10, high + abs(high) / 10) if max(abs(low), abs(high)) > 1e-280 else (-1.0, 1.0)
        margin = (high - low) * 0.04
        self.low, self.high = low - margin, high + margin

    def scaled(self, values: np.ndarray) -> np.ndarray:
        return np.log10(np.maximum(values, self.least)) if self.log else values

    def heights(self, scaled: np.ndarray) -> np.ndarray:
        return HEIGHT - BOTTOM - (scaled - self.low) / (self.high - self.low) * (HEIGHT - BOTTOM - TOP)

    def ticks(self) -> list[tuple[float, str]]:
        """Height and text of each."""
        if self.log:
            first, last = math.ceil(self.low), math.floor(self.high)
            at = [float(n) for n in range(first, last + 1, -(-(last - first) // 6) or 1)]
            texts = [tick_texts([10.0**n], 10.0**n)[0] for n in at]
        else:
            at = ticks(self.low, self.high, 5)
            texts = tick_texts(at, at[1] - at[0] if len(at) > 1 else self.high - self.low)
        return list(zip(self.heights(np.array(at)).tolist(), texts, strict=True))


def by_powers(key: Key, values: np.ndarray) -> bool:
    """Whether a chart is drawn by powers of ten: a loss, norm or ratio that goes over a wide range and nowhere below 0."""
    positive = values[values > 0]
    return bool(key.words & LOG and len(positive) and values.min() >= 0 and positive.max() >= SPREAD * positive.min())


# ---- writing


def escape(value: Any, longest: int = 200) -> str:
    """Text that is no markup; letters that print nothing, or turn the writing around, are shown as escapes."""
    text = "–" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return html.escape("".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text[:longest])) + "…" * (len(text) > longest)


def number(value: float) -> str:
    """1,204, 0.3148, 1.307e-7."""
    whole = abs(value) < 1e15 and (value == int(value) or abs(value) >= 1000)
    return f"{value:,.0f}" if whole else _exponent(f"{value:.4g}")


def _look(colour: int) -> str:
    return f"c{colour % COLOURS} d{colour // COLOURS}"


def _few(steps: list[float], shown: int = 8) -> str:
    return ", ".join(number(step) for step in steps[:shown]) + f" and {len(steps) - shown:,} more" * (len(steps) > shown)


class Charts:
    """Draws charts on the same axis of steps, each curve of as many points as the page has room for."""

    def __init__(self, runs: list[Run], curves: int) -> None:
        steps = [float(edge) for run in runs for c in run.curves.values() for edge in (*c.steps[:1], *c.steps[-1:])] or [0.0]
        self.low, self.high = min(steps), max(steps)
        if self.low <= 0.1 * self.high:
            self.low = 0.0
        if self.high == self.low:
            self.high = self.low + 1
        self.share = min(1.0, FULL / max(1, curves))

    def chart(self, key: Key, title: str, lines: list[Line]) -> str:
        """One metric: a line for each run, or for each part. Lines of equal values are drawn once, with both names."""
        values = np.concatenate([line.curve.values for line in lines])
        axis = Axis(values, log := by_powers(key, values))
        steps = [x for x in ticks(self.low, self.high, 6) if x == int(x)]
        grid, labels = "", f'<text class="y" x="{LEFT - 12}" y="{HEIGHT - 7}">step</text>'
        for y, text in axis.ticks():
            grid += f"M{LEFT},{y:.1f}H{WIDTH - RIGHT}"
            labels += f'<text class="y" x="{LEFT - 6}" y="{y + 4:.1f}">{text}</text>'
        for x, text in zip(self._across(np.array(steps)).tolist(), tick_texts(steps, 1.0), strict=True):
            labels += f'<text class="{"x" if x < WIDTH - 30 else "y"}" x="{x if x < WIDTH - 30 else WIDTH - 1:.1f}" y="{HEIGHT - 7}">{text}</text>'
        faint, strong, legend, below = "", "", "", [f"{n:,} values of 0 at the lower edge"] if log and (n := int((values == 0).sum())) else []
        for line, names in self._merged(lines):
            raw, shape = self._line(line, axis)
            faint, strong = faint + raw, strong + shape
            sample = f'<svg class="key" viewBox="0 0 20 8"><path class="line {_look(line.colour)}" d="M0,4H20"/></svg>'
            legend += f"<li>{sample}{' = '.join(escape(name, 60) for name in names)} <b>{number(line.curve.values[-1])}</b></li>"
            if len(line.curve.gaps):
                what = "skipped" if key == Key("loss") else "no finite value"
                below.append(f"▼ {escape(names[0], 60)}: {what} at {'step' if len(line.curve.gaps) == 1 else 'steps'} {_few(line.curve.gaps.tolist())}")
        below = ["faint: as logged; strong: mean over 4 % of the steps"] * bool(faint) + below
        told = f"{title}{', by powers of ten' if log else ''}"
        base = f"M{LEFT},{HEIGHT - BOTTOM}.5H{WIDTH - RIGHT}"
        svg = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{told}"><path class="grid" d="{grid}"/><path class="base" d="{base}"/>{labels}{faint}{strong}</svg>'
        notes = f'<p class="quiet">{"; ".join(below)}</p>' if below else ""
        small = " <small>by powers of ten</small>" if log else ""
        return f'<figure><h3>{title}{small}</h3>{svg}<figcaption><ul class="legend">{legend}</ul>{notes}</figcaption></figure>'

    def _merged(self, lines: list[Line]) -> list[tuple[Line, list[str]]]:
        out: list[tuple[Line, list[str]]] = []
        for line in lines:
            same = next((names for other, names in out if all(map(np.array_equal, other.curve, line.curve))), None)
            if same is None:
                out.append((line, [line.name]))
            else:
                same.append(line.name)
        return out

    def _across(self, steps: np.ndarray) -> np.ndarray:
        return LEFT + (steps - self.low) / (self.high - self.low) * (WIDTH - LEFT - RIGHT)

    def _line(self, line: Line, axis: Axis) -> tuple[str, str]:
        """What goes below all else: the values of a noisy curve. And what goes above: its means, or the values themselves, dots where they are few, marks where there are none."""
        curve, look = line.curve, _look(line.colour)
        buckets = max(30, int((WIDTH - LEFT - RIGHT) * self.share))
        scaled = axis.scaled(curve.values)
        kept = thinned(curve.steps, scaled, self.low, self.high, buckets)
        points = curve.steps[kept], scaled[kept]
        faint, smooth = "", _noisy(scaled)
        if smooth:
            faint = self._path(*points, axis, f"line {look} raw", line.name)
            points = smoothed(curve.steps, scaled, self.low, self.high, buckets)
        out = self._path(*points, axis, f"line {look}", line.name)
        if len(curve.steps) <= FEW:
            for x, y, step, value in zip(self._across(curve.steps), axis.heights(scaled), curve.steps, curve.values, strict=True):
                out += f'<circle class="{look}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"><title>{escape(line.name, 30)}, step {number(step)}: {number(value)}</title></circle>'
        if len(curve.gaps):
            apart = 2 / self.share  # marks that lie nearer to one another are one
            at = np.unique(np.round(self._across(curve.gaps) / apart)) * apart
            out += f'<path class="mark {look}" d="{"".join(f"M{x:.1f},{HEIGHT - BOTTOM}l-3.5,-7h7z" for x in at.tolist())}"/>'
        return faint, out

    def _path(self, steps: np.ndarray, scaled: np.ndarray, axis: Axis, look: str, name: str) -> str:
        points = "L".join(f"{x:.1f},{y:.1f}" for x, y in zip(self._across(steps).tolist(), axis.heights(scaled).tolist(), strict=True))
        return f'<path class="{look}" d="M{points}"><title>{escape(name, 60)}</title></path>'


def chart_list(runs: list[Run]) -> tuple[dict[str, list[tuple[Key, str, list[Line]]]], list[str]]:
    """Group → its charts (key, title, lines); and the keys that the page has no room for.

    Of one run the parts of a key share a chart, seven at a time; of several runs each part has its own, where a colour is a run, as everywhere.
    """
    every = list(dict.fromkeys(key for run in runs for key, curve in run.curves.items() if len(curve.steps)))
    shown = every[: max(1, CURVES // len(runs))]
    groups: dict[str, list[tuple[Key, str, list[Line]]]] = {name: [] for name in ORDER}
    for name in dict.fromkeys(key.name for key in shown):
        keys = [key for key in shown if key.name == name]
        charts = groups[_group(name, all(name in run.evaluated for run in runs if any(key.name == name for key in run.curves)))]
        if len(runs) == 1 and len(keys) > 1:
            for start in range(0, len(keys), COLOURS):
                some = keys[start : start + COLOURS]
                more = f" ({start // COLOURS + 1} of {-(-len(keys) // COLOURS)})" * (len(keys) > COLOURS)
                charts.append((some[0], escape(name, 80) + more, [Line(key.part or name, i, runs[0].curves[key]) for i, key in enumerate(some)]))
        else:
            for key in keys:
                lines = [Line(run.name, i, _with_skipped(run, key)) for i, run in enumerate(runs) if key in run.curves and len(run.curves[key].steps)]
                charts.append((key, escape(f"{key.name}: {key.part}" if key.part else key.name, 80), lines))
    return {name: charts for name, charts in groups.items() if charts}, [f"{key.name}: {key.part}" if key.part else key.name for key in every[len(shown) :]]


def _with_skipped(run: Run, key: Key) -> Curve:
    curve = run.curves[key]
    return Curve(curve.steps, curve.values, np.array(list(run.skipped))) if key == Key("loss") else curve


def _group(name: str, evaluated: bool) -> str:
    if name == "loss" or evaluated:
        return ORDER[0]
    return next((group for group, words in GROUPS.items() if Key(name).words & words), "Other")


def value_table(runs: list[Run], charts: dict[str, list[tuple[Key, str, list[Line]]]]) -> str:
    """Last, least and greatest value of everything drawn, with their steps; where it is known which is better, that one is strong."""
    rows = ["<thead><tr><th>metric</th><th>run</th><th>last</th><th>least</th><th>at step</th><th>greatest</th><th>at step</th></tr></thead>"]
    for key, title, lines in (chart for group in charts.values() for chart in group):
        for line in lines:
            metric, run = (f"{title}: {escape(line.name, 60)}", runs[0].name) if len(runs) == 1 and len(lines) > 1 else (title, line.name)
            steps, values, _ = line.curve
            least, greatest = int(values.argmin()), int(values.argmax())
            strong = {"least"} if key.words & LOWER else {"greatest"} if key.words & HIGHER else set()
            cells = [f"<td>{metric}</td><td>{escape(run, 60)}</td><td>{number(values[-1])}</td>"]
            for name, at in (("least", least), ("greatest", greatest)):
                shown = f"<b>{number(values[at])}</b>" if name in strong else number(values[at])
                cells.append(f"<td>{shown}</td><td>{number(steps[at])}</td>")
            rows.append(f"<tr>{''.join(cells)}</tr>")
    return f'<h2>Values</h2><div class="scroll"><table class="values">{"".join(rows)}</table></div>'


def differences(runs: list[Run]) -> str:
    """Settings that are not the same in all runs; those that only some of them know, being older or newer, are folded away. Where a run lies is no difference."""
    known = [run for run in runs if run.config]
    if len(known) < 2:
        return ""
    head = f"<thead><tr><th>setting</th>{''.join(f'<th>{escape(run.name, 60)}</th>' for run in known)}</tr></thead>"
    rows: dict[bool, list[str]] = {True: [], False: []}
    for key in dict.fromkeys(key for run in known for key in run.config if key not in ("output_dir", "resume")):
        values = [run.config.get(key) for run in known]
        if any(value != values[0] for value in values):
            cells = "".join(f"<td>{escape(value) or '<small>(empty)</small>'}</td>" for value in values)
            rows[all(key in run.config for run in known)].append(f"<tr><td>{escape(key)}</td>{cells}</tr>")
    tables = {both: f'<div class="scroll"><table class="settings">{head}{"".join(some)}</table></div>' if some else "" for both, some in rows.items()}
    more = f"<details><summary>{len(rows[False]):,} that only some of the runs know</summary>{tables[False]}</details>" if rows[False] else ""
    return f"<h2>Settings that differ</h2>{tables[True] or '<p class=quiet>None that all runs know.</p>'}{more}"


def heading(run: Run, colour: int) -> str:
    """A run in the page's head: how far it is, what was skipped, what was noted."""
    said = [f"step {number(run.last)}" + (f" of {number(most)}" if type(most := run.config.get("max_steps")) is int and most < 1e15 else "")]
    said.append(f"written {datetime.fromtimestamp((run.folder / 'metrics.jsonl').stat().st_mtime).astimezone().strftime('%Y-%m-%d %H:%M %Z')}")
    if isinstance(run.best, dict) and type(run.best.get("value")) in (int, float) and abs(run.best["value"]) < 1e300:
        said.append(f"best {escape(run.best.get('metric'), 60)} {number(run.best['value'])} at step {escape(run.best.get('step'), 20)}")
    sample = f'<svg class="key" viewBox="0 0 20 8"><path class="line {_look(colour)}" d="M0,4H20"/></svg>'
    out = f"<h2>{sample}{escape(run.name)}</h2><p>{' · '.join(said)} <small>{escape(str(run.folder))}</small></p>"
    if run.skipped:
        why = [f"step {number(step)}{': ' * bool(reason)}{escape(reason, 80)}" for step, reason in list(run.skipped.items())[:4]]
        out += f'<p class="warn">{len(run.skipped):,} {"step" if len(run.skipped) == 1 else "steps"} skipped ({"; ".join(why)}{"; …" * (len(run.skipped) > 4)})</p>'
    return f"<section>{out}{''.join(f'<p class=warn>{escape(note)}</p>' for note in run.notes)}</section>"


def latest(run: Run, suffix: str) -> tuple[int, Path] | None:
    """The step and path of the latest samples/step_N`suffix`.png."""
    found = ((path.stem[5:].removesuffix(suffix), path) for path in (run.folder / "samples").glob(f"step_*{suffix}.png"))
    return max(((int(number), path) for number, path in found if number.isdecimal()), default=None)


def picture(run: Run, what: str, step: int, path: Path, most: int) -> str:
    """A picture as a data URI: the file itself, or where that has more than `most` bytes a smaller copy; or a text in its place."""
    told = f"{escape(run.name, 60)}: {what} at step {step:,}"
    try:
        data, kind = path.read_bytes(), "png"
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if len(data) > most:
                file = io.BytesIO()
                image.convert("RGB").save(file, kind := "webp", quality=75)
                data = file.getvalue()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return f'<p class="warn">{told}: samples/{path.name} is not an image</p>'
    if len(data) > most:
        return f'<p class="warn">{told}: samples/{path.name} is too large for this page</p>'
    return f'<figure><h3>{told}</h3><img src="data:image/{kind};base64,{base64.b64encode(data).decode()}" alt="{told}"></figure>'


STYLE = """
:root { color-scheme: light dark; --page: #fbfaf8; --ink: #22252a; --quiet: #646a73; --line: #e2dfd9; --warn: #8a5a00; --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #c0609a; --c4: #d79a00; --c5: #4fabe0; --c6: #22252a; }
@media (prefers-color-scheme: dark) { :root { --page: #17191c; --ink: #e4e3df; --quiet: #9aa0a8; --line: #33373d; --warn: #e0b060; --c0: #4a98de; --c1: #f07a2c; --c2: #1fbf90; --c3: #e08cc0; --c4: #f0c040; --c5: #a8dcff; --c6: #e4e3df; } }
* { box-sizing: border-box; } body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 .75rem; } h2 { font-size: 1.2rem; margin: 2.25rem 0 .5rem; } h3 { font-size: .95rem; margin: 0 0 .2rem; } p { margin: .15rem 0; } header h2 { font-size: 1rem; margin: .5rem 0 0; } summary { cursor: pointer; color: var(--quiet); font-size: .85rem; margin: .3rem 0; }
small, .quiet { color: var(--quiet); font-weight: 400; font-size: .85rem; } .warn { color: var(--warn); } b { font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); gap: 1.5rem 1.25rem; } figure { margin: 0; min-width: 0; } img { max-width: 100%; border-radius: 4px; }
svg.chart { display: block; width: 100%; font-size: 11px; } text { fill: var(--quiet); font-variant-numeric: tabular-nums; } .y { text-anchor: end; } .x { text-anchor: middle; } .grid, .base { stroke: var(--line); } .base { stroke: var(--quiet); }
.line { fill: none; stroke: var(--c); stroke-width: 1.6; stroke-linejoin: round; vector-effect: non-scaling-stroke; } .raw { stroke-width: 1; opacity: .38; } .raw ~ .raw { opacity: .25; } circle, .mark { fill: var(--c); } .d1 { stroke-dasharray: 6 3; } .d2 { stroke-dasharray: 2 2.5; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); } .c4 { --c: var(--c4); } .c5 { --c: var(--c5); } .c6 { --c: var(--c6); }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; list-style: none; margin: .2rem 0 0; padding: 0 0 0 .2rem; font-size: .85rem; } svg.key { width: 20px; height: 8px; margin-right: .4rem; vertical-align: 1px; } .key .line { stroke-width: 3; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; overflow-wrap: normal; } td, th { padding: .2rem 1rem .2rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: baseline; font-variant-numeric: tabular-nums; }
th { color: var(--quiet); font-weight: 400; font-size: .85rem; white-space: nowrap; } .values td:nth-child(n + 3), .values th:nth-child(n + 3) { text-align: right; white-space: nowrap; } .values td:nth-child(odd):nth-child(n + 4) { color: var(--quiet); }
@media (max-width: 40rem) { body { padding: 1rem .6rem 3rem; } svg.chart { font-size: 15px; } }
"""


def page(runs: list[Run]) -> tuple[str, int]:
    """A whole HTML page, and how many charts it has. Text of the runs is escaped; the policy forbids scripts and fetches besides."""
    groups, left = chart_list(runs)
    charts = Charts(runs, sum(len(lines) for group in groups.values() for _, _, lines in group))
    title = escape(", ".join(run.name for run in runs))
    sections = "".join(f'<h2>{group}</h2><div class="charts">{"".join(charts.chart(key, name, lines) for key, name, lines in members)}</div>' for group, members in groups.items())
    kinds = {"": "predictions", "_tokens": "predicted tokens, and the true ones"}
    sheets = [(run, what, *found) for run in runs for suffix, what in kinds.items() if (found := latest(run, suffix)) is not None]
    pictures = "".join(picture(*sheet, PICTURES // len(sheets)) for sheet in sheets)
    out = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}: training</title><style>{STYLE}</style></head><body>
<header><h1>Training</h1>{"".join(heading(run, colour) for colour, run in enumerate(runs))}</header>
{differences(runs)}
{sections or '<p class="warn">No finite number in any line: nothing to draw.</p>'}
{f'<p class="warn">{len(left):,} more are not drawn: {escape(", ".join(left), 400)}</p>' if left else ""}
{f'<h2>Predictions</h2><div class="charts">{pictures}</div>' if pictures else ""}
{value_table(runs, groups) if groups else ""}
</body></html>
"""
    return out, sum(map(len, groups.values()))


def _names(folders: list[Path]) -> list[str]:
    """The folders' names; where two are the same, the whole paths."""
    short = [folder.resolve().name or str(folder) for folder in folders]
    return [str(folder) if short.count(name) > 1 else name for folder, name in zip(folders, short, strict=True)]


def main(argv: list[str]) -> None:
    parser = FlagParser(prog="python -m training.report", description=str(__doc__), allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", metavar="RUN", nargs="+", help=f"folders of runs, at most {RUNS}")
    parser.add_argument("--output", metavar="FILE", help="file to write [report.html in the first run's folder]")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse(argv)
    given: dict[Path, Path] = {}
    for path in map(Path, args.folders):
        given.setdefault(path.resolve(), path)  # one that is given twice is one
    folders = list(given.values())
    if len(folders) > RUNS:
        raise UsageError(f"{len(folders)} runs are more than one page can tell apart: give at most {RUNS}")
    output = folders[0] / "report.html" if args.output is None else Path(args.output)
    if args.output is not None and (output.suffix not in (".html", ".htm") or output.is_dir() or not output.parent.is_dir()):
        raise UsageError(f"--output: '{output}' does not end in .html, or lies in a folder that does not exist: give a file that can be written")
    runs = [read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    text, charts = page(runs)
    write_text(output, text)
    print(f"{output}: runs {len(runs)}, charts {charts}, {len(text.encode()) / 2**20:.1f} MB; open it in a browser")


if __name__ == "__main__":
    run_script(main)
