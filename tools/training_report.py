"""Write one self-contained HTML page of training runs: curves, final values, latest predictions.

  python -m tools.training_report runs/dual_tower_easyvqa                  → report.html in that folder
  python -m tools.training_report runs/dual_tower_easyvqa runs/vanilla_easyvqa --output /tmp/report.html

Draws every number of metrics.jsonl, also those in lists and in objects one level down. A run may still be
going on. Needs the group report.
"""

import argparse
import io
import re
import warnings
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from configs.cli import FlagParser
from tools import pages
from tools.run_curves import Curve, Key, RunCurves, read_run
from utils.errors import UsageError, UserError, run_script
from utils.files import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_DOTS = 40  # a curve of at most as many values has a dot at each
MIN_SMOOTHED = 200  # a noisy curve of at least as many values is smoothed
LINE_STYLES = [(f"C{i}", dashes) for dashes in ("-", "--", ":", "-.") for i in range(10)]
LOG_RATIO = 100.0  # max ÷ min from which the metrics named below have a logarithmic axis
LOG_NAMES = {"loss", "losses", "norm", "norms", "ratio", "ratios", "perplexity"}
DRAWING = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "text.parse_math": False,
    "path.simplify_threshold": 0.5,
    "font.size": 9,
}


class Line(NamedTuple):
    """One line of a chart."""

    name: str
    style: int  # index into LINE_STYLES
    curve: Curve


def charts(runs: list[RunCurves]) -> dict[str, list[Line]]:
    """Group the curves into charts, title → lines, loss and validation first.

    For one run, the parts of a key share a chart. For several, each part has a chart with one line per run.
    """
    out: dict[str, list[Line]] = {}
    keys: dict[Key, None] = dict.fromkeys(key for run in runs for key in run.curves)
    for key in sorted(keys, key=lambda key: not re.match("loss$|validation", key.name)):
        if len(runs) == 1:
            lines = out.setdefault(key.name, [])
            lines.append(Line(key.part or key.name, len(lines), runs[0].curves[key]))
        else:
            out.setdefault(": ".join(filter(None, key)), []).extend(
                Line(run.name, i, run.curves[key]) for i, run in enumerate(runs) if key in run.curves
            )
    return out


def draw(title: str, lines: list[Line], last: float) -> "Figure":
    """Draw one chart over the steps up to `last`. Lines of equal values are drawn once, with both names."""
    from matplotlib.figure import Figure

    same: dict[tuple[bytes, bytes], list[Line]] = {}
    for line in lines:
        same.setdefault((line.curve.steps.tobytes(), line.curve.values.tobytes()), []).append(line)
    names = [printable(" = ".join(line.name for line in group)) for group in same.values()]
    labels = [name if len(name) <= 60 else "…" + name[-59:] for name in names]  # paths differ at the end
    columns = max(1, 80 // (max(map(len, labels)) + 6))
    figure = Figure(figsize=(5.6, 2.6 + 0.16 * -(-len(labels) // columns)), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(printable(title)[:80], loc="left", fontsize=10)
    for label, ((_, style, curve), *_) in zip(labels, same.values(), strict=True):
        _draw_curve(axes, curve, label, style, " skipped" if title == "loss" else " no finite value")
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


def _draw_curve(axes: "Axes", curve: Curve, label: str, style: int, gap_label: str) -> None:
    """Draw a curve, its mean if it is noisy, and a mark at each step without a value."""
    colour, dashes = LINE_STYLES[style % len(LINE_STYLES)]
    means = smoothed(curve)
    if means:
        axes.plot(*curve, lw=0.6, alpha=0.35, color=colour)
    marker = "." * (len(curve.steps) <= MAX_DOTS)
    # The space in front: matplotlib leaves labels that begin with _ out of the legend.
    axes.plot(*(means or curve), dashes, lw=1.4, color=colour, marker=marker, label=f" {label}")
    if len(gaps := curve.steps[np.isnan(curve.values)]):
        heights, transform = np.full(len(gaps), 0.03), axes.get_xaxis_transform()
        axes.plot(gaps, heights, "^", ms=4, color=colour, transform=transform, label=gap_label)


def smoothed(curve: Curve) -> Curve | None:
    """Return means over 4 % of the values; None if the curve is short or calm.

    A curve is noisy if its total variation exceeds six times its range (2 % to 98 % quantile).
    """
    finite = np.isfinite(curve.values)
    steps, values = curve.steps[finite], curve.values[finite]
    if len(values) < MIN_SMOOTHED or np.abs(np.diff(values)).sum() <= 6 * np.ptp(
        np.quantile(values, (0.02, 0.98))
    ):
        return None
    size = max(10, len(values) // 25)
    return Curve(
        *(
            np.lib.stride_tricks.sliding_window_view(column, size)[:: size // 5].mean(1)
            for column in (steps, values)
        )
    )


def by_powers(title: str, values: np.ndarray) -> bool:
    """Whether the axis is logarithmic: for a loss, norm or ratio of wide range without negative values."""
    positive = values[values > 0]
    return bool(
        LOG_NAMES & set(re.findall("[a-z]+", title.lower()))
        and len(positive)
        and np.nanmin(values) >= 0
        and positive.max() >= LOG_RATIO * positive.min()
    )


def printable(value: Any) -> str:
    """Return the first 400 letters of a value, the unprintable ones escaped."""
    return pages.printable(value, 400)


def value_rows(groups: dict[str, list[Line]]) -> list[list[str]]:
    """Return the last, least and greatest value of every line, with their steps."""
    rows = []
    for title, lines in groups.items():
        for name, _, (steps, values) in lines:
            indices = np.flatnonzero(np.isfinite(values))[-1], np.nanargmin(values), np.nanargmax(values)
            cells = [text for i in indices for text in (f"{values[i]:,.6g}", f"{steps[i]:,.0f}")]
            rows.append([title, name * (name != title), *cells])
    return rows


def differences(known: list[RunCurves]) -> list[list[Any]]:
    """Return the settings that differ between runs, those that only some runs have last.

    The folders of the runs are not compared.
    """
    keys = dict.fromkeys(key for run in known for key in run.config if key not in ("output_dir", "resume"))
    differ = [key for key in keys if any(run.config.get(key) != known[0].config.get(key) for run in known)]
    differ.sort(key=lambda key: not all(key in run.config for run in known))
    return [[key, *(run.config.get(key) for run in known)] for key in differ]


def heading(run: RunCurves) -> dict[str, Any]:
    """Return a run's name, progress, and notes, skipped steps included."""
    written = datetime.fromtimestamp((run.folder / "metrics.jsonl").stat().st_mtime).astimezone()
    notes = list(run.notes)
    if run.skipped:
        reasons = [
            f"step {step:,.0f}{': ' * bool(reason)}{reason}" for step, reason in list(run.skipped.items())[:4]
        ]
        notes.append(f"{len(run.skipped):,} skipped: {'; '.join(reasons)}{'; …' * (len(run.skipped) > 4)}")
    progress = f"step {run.last:,.0f} of {printable(run.config.get('max_steps'))}"
    status = f"{progress}, written {written:%Y-%m-%d %H:%M %Z}, {run.folder}"
    return {"name": run.name, "status": status, "notes": notes}


# Suffix of a file in samples/ → caption.
SHEETS = {"": "predictions", "_tokens": "predicted tokens, and the true ones"}


def sheets(run: RunCurves) -> dict[str, bytes]:
    """Return the latest image of each kind in samples/, title → PNG."""
    images = {}
    for suffix, caption in SHEETS.items():
        named = (
            (path.stem[5:].removesuffix(suffix), path)
            for path in (run.folder / "samples").glob(f"step_*{suffix}.png")
        )
        step, path = max(
            ((int(number), path) for number, path in named if number.isdecimal()), default=(0, None)
        )
        if path is not None:
            images[f"{run.name}: {caption} at step {step:,}"] = path.read_bytes()
    return images


def page(runs: list[RunCurves]) -> tuple[str, int]:
    """Draw the whole HTML page; returns it with the number of charts."""
    import matplotlib

    groups, drawn = charts(runs), {}
    last = max(run.last for run in runs)
    with matplotlib.rc_context(DRAWING), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # missing in matplotlib's font; the browser draws the text
        for title, lines in groups.items():
            file = io.BytesIO()
            draw(title, lines, last).savefig(file, format="svg", metadata={"Date": None})
            drawn[title] = file.getvalue()
    known = [run for run in runs if run.config]
    text = pages.render(
        "training_report.html",
        title=f"{printable(', '.join(run.name for run in runs))}: training",
        headings=[heading(run) for run in runs],
        names=[run.name for run in known],
        differences=differences(known),
        charts=drawn,
        sheets={title: png for run in runs for title, png in sheets(run).items()},
        values=value_rows(groups),
    )
    return text, len(groups)


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
    folders = list(dict.fromkeys(Path(folder).resolve() for folder in args.folders))  # each once
    output = Path(args.output or folders[0] / "report.html")
    if output.suffix != ".html":
        raise UsageError(f"--output: '{output}' does not end in .html: give a page to write")
    try:
        import matplotlib.figure  # noqa: F401  # raise before minutes of reading
    except ModuleNotFoundError as error:
        raise UserError(
            f"the package {error.name} is not installed: "
            "reports need the group report (pip install -e '.[report]')"
        ) from None
    names = [folder.name for folder in folders]
    runs = [
        read_run(folder, folder.name if names.count(folder.name) == 1 else str(folder)) for folder in folders
    ]
    text, count = page(runs)
    write_text(output, text)
    megabytes = len(text.encode()) / 2**20
    print(f"{output}: runs {len(runs)}, charts {count}, {megabytes:.1f} MB; open it in a browser")


if __name__ == "__main__":
    run_script(main)
