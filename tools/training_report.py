"""Look at training: the curves of one or several runs over their steps, what they ended with, their last predictions. One HTML page that needs nothing else.

  python -m tools.training_report runs/dual_tower_easyvqa                                             → report.html in that folder
  python -m tools.training_report runs/dual_tower_easyvqa runs/vanilla_easyvqa --output /tmp/report.html

Whatever number stands in metrics.jsonl gets a chart: a key's own, those of an object one level down, those of a list. A run may still be going on.
Needs the group report.
"""

import argparse
import base64
import html
import io
import json
import math
import re
import warnings
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from configs.cli import FlagParser
from utils.errors import UsageError, UserError, run_script
from utils.files import read_json, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEW, MANY = 40, 200  # values up to which each has a dot; values from which a noisy curve is drawn as its mean
STYLES = [
    (f"C{i}", dashes) for dashes in ("-", "--", ":", "-.") for i in range(10)
]  # of lines: matplotlib's colours; then they come again, dashed
SPREAD = 100.0  # greatest ÷ least value from which a loss or a norm is drawn by powers of ten
LOG = {"loss", "losses", "norm", "norms", "ratio", "ratios", "perplexity"}
DRAWING = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "text.parse_math": False,
    "path.simplify_threshold": 0.5,
    "font.size": 9,
}


class Key(NamedTuple):
    """Where a number stands in a line: `loss`, or `lr` and there `left`. Numbers of a list count from 1."""

    name: str
    part: str = ""


class Curve(NamedTuple):
    """Values over steps that never decrease; NaN where there was no finite one. The loss is NaN at skipped steps."""

    steps: np.ndarray
    values: np.ndarray


@dataclass
class RunCurves:
    folder: Path
    name: str
    config: dict[str, Any]  # flat: "train.lr_left"
    curves: dict[Key, Curve]  # each with a finite value
    last: float  # step
    skipped: dict[float, str]  # step → why
    notes: list[str]


class Line(NamedTuple):
    name: str
    style: int
    curve: Curve


def objects(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The lines of a file, each an object with a step. Half a last line is noted: a run is writing it, or was killed. Other damage raises `UserError`."""
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
                notes += [
                    f"half a last line of {path.name} was passed over: the run may be writing it"
                ] * bool(line.strip())
            else:
                yield record


def numbers(record: dict[str, Any]) -> Iterator[tuple[Key, float]]:
    """All that can be drawn; what is null or not finite is NaN."""
    for name, value in record.items():
        inner = (
            value.items()
            if isinstance(value, dict)
            else enumerate(value, 1)
            if isinstance(value, list)
            else [("", value)]
        )
        for part, v in inner:
            if v is None or (isinstance(v, int | float) and not isinstance(v, bool)):
                yield Key(name, str(part)), v if v is not None and abs(v) < 1e100 else math.nan


def read_run(folder: Path, name: str) -> RunCurves:
    """A run folder, checked."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        if (folder / "config.json").is_file():
            raise UserError(f"{folder} has no metrics.jsonl yet: its first step is not done")
        raise UsageError(
            f"{folder} {'holds no metrics.jsonl' if folder.is_dir() else 'is no folder'}: give the folder of a run"
        )
    notes: list[str] = []
    columns: dict[Key, tuple[array, array]] = {}
    for record in objects(path, notes):
        for key, value in numbers(
            record | {"loss": None} if "overflow" in record else record
        ):  # nothing was learnt from it
            steps, values = columns.setdefault(key, (array("d"), array("d")))
            steps.append(record["step"])
            values.append(value)
    if not columns:
        raise UserError(f"{path} holds no whole line: its run has told of no step yet")
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
    """Steps without a loss, and those of skipped.jsonl that were not logged, which are added; a step that was taken again after a resume is none."""
    learnt = {step for step, loss in zip(steps, losses, strict=True) if math.isfinite(loss)}
    skipped = dict.fromkeys(sorted(set(steps) - learnt), "")
    if (path := folder / "skipped.jsonl").is_file():
        for record in objects(path, notes):
            if (step := record["step"]) <= last and step not in learnt:
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


def charts(runs: list[RunCurves]) -> dict[str, list[Line]]:
    """Title → lines, loss and validation first. Of one run the parts of a key share a chart; of several runs each part has its own, where a style is a run."""
    out: dict[str, list[Line]] = {}
    for key in sorted(
        dict.fromkeys(key for run in runs for key in run.curves),
        key=lambda key: not re.match("loss$|validation", key.name),
    ):
        if len(runs) == 1:
            lines = out.setdefault(key.name, [])
            lines.append(Line(key.part or key.name, len(lines), runs[0].curves[key]))
        else:
            out.setdefault(": ".join(filter(None, key)), []).extend(
                Line(run.name, i, run.curves[key]) for i, run in enumerate(runs) if key in run.curves
            )
    return out


def draw(title: str, lines: list[Line], last: float) -> "Figure":
    """One chart over the steps up to `last`. Lines of equal values are drawn once, with both names."""
    from matplotlib.figure import Figure

    same: dict[tuple[bytes, bytes], list[Line]] = {}
    for line in lines:
        same.setdefault((line.curve.steps.tobytes(), line.curve.values.tobytes()), []).append(line)
    names = [printable(" = ".join(line.name for line in group)) for group in same.values()]
    labels = [name if len(name) <= 60 else "…" + name[-59:] for name in names]  # paths differ at their ends
    columns = max(1, 80 // (max(map(len, labels)) + 6))
    figure = Figure(figsize=(5.6, 2.6 + 0.16 * -(-len(labels) // columns)), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(printable(title)[:80], loc="left", fontsize=10)
    for label, ((_, style, curve), *_) in zip(labels, same.values(), strict=True):
        colour, dashes = STYLES[style % len(STYLES)]
        means = smoothed(curve)
        if means:
            axes.plot(*curve, lw=0.6, alpha=0.35, color=colour)
        axes.plot(
            *(means or curve),
            dashes,
            lw=1.4,
            color=colour,
            marker="." * (len(curve.steps) <= FEW),
            label=f" {label}",
        )  # one that begins with _ would be left out
        if len(gaps := curve.steps[np.isnan(curve.values)]):
            told = " skipped" if title == "loss" else " no finite value"
            axes.plot(
                gaps,
                np.full(len(gaps), 0.03),
                "^",
                ms=4,
                color=colour,
                transform=axes.get_xaxis_transform(),
                label=told,
            )
    if by_powers(title, np.concatenate([line.curve.values for line in lines])):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlim(0, 1.02 * last or 1)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(axes.get_legend_handles_labels()[1]) > 1 or labels != [title]:
        figure.legend(loc="outside lower left", ncols=columns, frameon=False)
    return figure


def smoothed(curve: Curve) -> Curve | None:
    """Means over 4 % of the values; None of a short curve, or of one that does not go up and down far more than from one end of its range to the other."""
    finite = np.isfinite(curve.values)
    steps, values = curve.steps[finite], curve.values[finite]
    if len(values) < MANY or np.abs(np.diff(values)).sum() <= 6 * np.ptp(np.quantile(values, (0.02, 0.98))):
        return None
    size = max(10, len(values) // 25)
    return Curve(
        *(
            np.lib.stride_tricks.sliding_window_view(column, size)[:: size // 5].mean(1)
            for column in (steps, values)
        )
    )


def by_powers(title: str, values: np.ndarray) -> bool:
    """Whether a chart is drawn by powers of ten: a loss, norm or ratio that goes over a wide range and nowhere below 0."""
    positive = values[values > 0]
    return bool(
        LOG & set(re.findall("[a-z]+", title.lower()))
        and len(positive)
        and np.nanmin(values) >= 0
        and positive.max() >= SPREAD * positive.min()
    )


def escape(value: Any) -> str:
    """Text that is no markup."""
    return html.escape(printable(value))


def printable(value: Any) -> str:
    """The first 400 letters; those that print nothing, or turn the writing around, are shown as escapes."""
    text = (
        "–" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    )
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text[:400])


def image(kind: str, data: bytes, told: str) -> str:
    return f'<img src="data:image/{kind};base64,{base64.b64encode(data).decode()}" alt="{escape(told)}"/>'


def table(head: list[str], rows: list[list[Any]]) -> str:
    lines = (
        "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)
        for tag, row in zip(["th", *["td"] * len(rows)], [head, *rows], strict=True)
    )
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def value_table(found: dict[str, list[Line]]) -> str:
    """Last, least and greatest value of everything drawn, with their steps."""
    rows = []
    for title, name, _, (steps, values) in (
        (title, *line) for title, lines in found.items() for line in lines
    ):
        places = np.flatnonzero(np.isfinite(values))[-1], np.nanargmin(values), np.nanargmax(values)
        rows.append(
            [
                title,
                name * (name != title),
                *(text for i in places for text in (f"{values[i]:,.6g}", f"{steps[i]:,.0f}")),
            ]
        )
    return table(["metric", "", "last", "at step", "least", "at step", "greatest", "at step"], rows)


def differences(runs: list[RunCurves]) -> str:
    """Settings that are not the same in all runs; last those that only some of them know, being older or newer. Where a run lies is no difference."""
    known = [run for run in runs if run.config]
    keys = dict.fromkeys(key for run in known for key in run.config if key not in ("output_dir", "resume"))
    differ = [key for key in keys if any(run.config.get(key) != known[0].config.get(key) for run in known)]
    differ.sort(key=lambda key: not all(key in run.config for run in known))
    rows = [[key, *(run.config.get(key) for run in known)] for key in differ]
    return (
        f"<h2>Settings that differ</h2>{table(['setting', *(run.name for run in known)], rows)}"
        if rows
        else ""
    )


def heading(run: RunCurves) -> str:
    """A run in the page's head: how far it is, what was skipped, what was noted."""
    written = datetime.fromtimestamp((run.folder / "metrics.jsonl").stat().st_mtime).astimezone()
    notes = list(run.notes)
    if run.skipped:
        why = [
            f"step {step:,.0f}{': ' * bool(reason)}{reason}" for step, reason in list(run.skipped.items())[:4]
        ]
        notes.append(f"{len(run.skipped):,} skipped: {'; '.join(why)}{'; …' * (len(run.skipped) > 4)}")
    told = f"step {run.last:,.0f} of {printable(run.config.get('max_steps'))}, written {written:%Y-%m-%d %H:%M %Z}, {run.folder}"
    return f"<h2>{escape(run.name)}</h2><p>{escape(told)}</p>" + "".join(
        f'<p class="warn">{escape(note)}</p>' for note in notes
    )


SHEETS = {
    "": "predictions",
    "_tokens": "predicted tokens, and the true ones",
}  # how the names of sheets end → what they show


def sheets(run: RunCurves) -> str:
    """The latest picture of each kind in samples/."""
    out = ""
    for suffix, what in SHEETS.items():
        named = (
            (path.stem[5:].removesuffix(suffix), path)
            for path in (run.folder / "samples").glob(f"step_*{suffix}.png")
        )
        step, path = max(
            ((int(number), path) for number, path in named if number.isdecimal()), default=(0, None)
        )
        if path is not None:
            told = f"{run.name}: {what} at step {step:,}"
            out += f"<h2>{escape(told)}</h2>{image('png', path.read_bytes(), told)}"
    return out


STYLE = """
body { margin: 0 auto; max-width: 76rem; padding: 1rem; color: #22252a; font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 1.5rem 0 .3rem; } p { margin: .1rem 0; } .warn { color: #8a5a00; } img { max-width: 100%; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); gap: 1rem; align-items: start; margin-top: 1.5rem; } .charts img { width: 100%; }
table { border-collapse: collapse; font-size: .9rem; } td, th { padding: .15rem 1rem .15rem 0; border-bottom: 1px solid #e2dfd9; text-align: left; font-variant-numeric: tabular-nums; }
"""


def page(runs: list[RunCurves]) -> tuple[str, int]:
    """A whole HTML page, and how many charts it has. Text of the runs is escaped; the policy forbids scripts and fetches besides."""
    import matplotlib

    found, drawn = charts(runs), ""
    with matplotlib.rc_context(DRAWING), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Glyph"
        )  # of letters that matplotlib's own font lacks: the browser has more
        for title, lines in found.items():
            draw(title, lines, max(run.last for run in runs)).savefig(
                file := io.BytesIO(), format="svg", metadata={"Date": None}
            )
            drawn += image("svg+xml", file.getvalue(), title)
    out = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/><meta name="viewport" content="width=device-width, initial-scale=1"/>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'"/>
<title>{escape(", ".join(run.name for run in runs))}: training</title><style>{STYLE}</style></head><body>
{"".join(map(heading, runs))}
{differences(runs)}
{f'<div class="charts">{drawn}</div>' if drawn else '<p class="warn">No finite number in any line: nothing to draw.</p>'}
{"".join(map(sheets, runs))}
<h2>Values</h2>{value_table(found)}
</body></html>
"""
    return out, len(found)


def main(argv: list[str]) -> None:
    parser = FlagParser(
        prog="python -m tools.training_report",
        description=str(__doc__),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", metavar="RUN", nargs="+", help="folders of runs")
    parser.add_argument(
        "--output", metavar="FILE", help="file to write [report.html in the first run's folder]"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse(argv)
    folders = list(
        dict.fromkeys(Path(folder).resolve() for folder in args.folders)
    )  # one that is given twice is one
    output = Path(args.output or folders[0] / "report.html")
    if output.suffix != ".html":
        raise UsageError(f"--output: '{output}' does not end in .html: give a page to write")
    try:
        import matplotlib.figure  # noqa: F401  # before minutes of reading
    except ModuleNotFoundError as error:
        raise UserError(
            f"the package {error.name} is not installed: reports need the group report (pip install -e '.[report]')"
        ) from None
    names = [folder.name for folder in folders]
    runs = [
        read_run(folder, folder.name if names.count(folder.name) == 1 else str(folder)) for folder in folders
    ]
    text, count = page(runs)
    write_text(output, text)
    print(
        f"{output}: runs {len(runs)}, charts {count}, {len(text.encode()) / 2**20:.1f} MB; open it in a browser"
    )


if __name__ == "__main__":
    run_script(main)
