"""Measure training data: lengths, images and drops by source, fill of packed rows, budgets that fit.

  python -m tools.stats                                       the default preset's data → tables, stats.png
  python -m tools.stats --config dual_tower_smollm2 --data.limit 300 --samples 500
  python -m tools.stats --data.sources easy_vqa,openmoji --output /tmp/stats.png

Takes every flag of training. Trains nothing and loads no weights. The picture needs the group report. Its own
flags:
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from configs.train import Config
from data.datasets import Drop, Sample, SampleDataset
from data.images import image_size, tile_count
from data.packing import Budget, Row, RowStream
from tools.inspection import Decoder, arguments, track_progress
from training.setup import Data, build_data, language_model, resolve_config
from utils.errors import run_script
from utils.files import replacing
from utils.plotting import PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OWN = {"output": ("stats.png", "picture to write"), "samples": (2000, "samples that are counted")}


@dataclass
class Tally:
    """One source: a number per sample (or image) drawn."""

    name: str
    records: int
    left: list[int] = field(default_factory=list)
    right: list[int] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)  # (width, height) per image
    tiles: list[int] = field(default_factory=list)  # per image

    def add(self, sample: Sample, turn_end: int) -> None:
        self.left.append(sample.left_length)
        self.right.append(sample.right_length)
        self.documents.append(len(sample.documents))
        # Each answer ends with one supervised `turn_end`.
        self.turns.append(sum(d.labels.count(turn_end) for d in sample.documents))
        self.tiles += map(tile_count, sample.grids)


@dataclass
class Fill:
    """How full rows are: one number per row in each list."""

    budget: Budget
    left: list[float]  # 0 to 1
    right: list[float]
    samples: int
    tiles: list[int]

    @property
    def both(self) -> float:
        """Fill of both streams together, 0 to 1."""
        b = self.budget
        return (sum(self.left) * b.left + sum(self.right) * b.right) / (len(self.left) * (b.left + b.right))


@dataclass
class Stats:
    """Everything that is printed and plotted."""

    sources: list[Tally]
    drawn: int
    dropped: Counter[Drop]
    examples: dict[Drop, str]
    fill: Fill
    suggested: Fill | None = None  # with the best other split of the budgets, see `splits`

    @property
    def used(self) -> int:
        return sum(len(s.left) for s in self.sources)


def gather(config: Config, data: Data, samples: int) -> Stats:
    """Draw and decode the first `samples` samples of training, then pack about as many."""
    tallies = [Tally(source.name, len(source)) for source in data.training.sources]
    decoder, drawn = Decoder(data.training), []
    # (source, record) → sizes of its images: a cached sample is decoded, and has lost them.
    sizes: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for sample in track_progress(data.batches.rows.pending, samples, "reading samples"):
        drawn.append(replace(sample, images=[], tiles=None))  # thousands of images would fill the memory
        if decoder(sample) is not None:
            tally = tallies[sample.key[0]]
            tally.add(sample, data.tokenizer.turn_end)
            if (record := sample.key[:2]) not in sizes:
                sizes[record] = [image_size(image) for image in sample.images]
            tally.sizes += sizes[record]
    dropped, examples = +data.training.dropped, dict(data.training.examples)
    rows = data.batches.rows
    rows.pending = chain(drawn, rows.pending)
    stats = Stats(tallies, len(drawn), dropped, examples, fill_of(rows, samples))
    usable = [s for s in drawn if s.key[:2] not in decoder.damaged]
    for budget in splits(usable, data.budget) if usable and data.budget.left else ():
        resampled, lost = resample(usable, config, data, budget)
        if resampled and not lost:
            stream = RowStream(rows.stream, budget, config.data.window)
            stream.pending = cycle(resampled)
            fill = fill_of(stream, samples)
            if stats.suggested is None or fill.both > stats.suggested.both:
                stats.suggested = fill
    return stats


def fill_of(rows: RowStream, samples: int) -> Fill:
    """Measure as many rows as hold `samples` samples, packed from a full window as in training."""
    out = Fill(rows.budget, [], [], 0, [])
    for row in rows:
        add_row(out, row)
        if out.samples >= samples:
            break
    return out


def add_row(fill: Fill, row: Row) -> None:
    b = fill.budget
    fill.left.append(sum(s.left_length for s in row) / b.left if b.left else 0.0)
    fill.right.append(sum(s.right_length for s in row) / b.right)
    fill.tiles.append(sum(s.tile_total for s in row))
    fill.samples += len(row)


def splits(samples: Sequence[Sample], budget: Budget) -> list[Budget]:
    """Split the budgets' total in the proportion of the data's mean lengths.

    The left budget is rounded down, and up, to a multiple of `budget.unit`, and holds the longest left stream
    drawn. `budget` itself is left out. Mean lengths of 17 and 79, a total of 162, a unit of 17:
    162 · 17/96 = 28.7 → 17 + 145 and 34 + 128.
    """
    total, unit = budget.left + budget.right, budget.unit
    lefts = [-(-s.left_length // unit) * unit for s in samples]
    down = total * sum(lefts) // (sum(lefts) + sum(s.right_length for s in samples)) // unit * unit
    candidates = sorted({max(left, max(lefts), unit) for left in (down, down + unit)} - {budget.left})
    return [replace(budget, left=left, right=total - left) for left in candidates if left < total]


def resample(
    samples: Iterable[Sample], config: Config, data: Data, budget: Budget
) -> tuple[list[Sample], int]:
    """Make the samples of the same records for other budgets; returns them and the number of records lost.

    `right_length` decides where conversations are truncated and records are divided into parts.
    """
    old, d = data.training, config.data
    changed = replace(d, left_length=budget.left, right_length=budget.right)
    dataset = SampleDataset(old.sources, old.renderer, old.vision, changed, old.max_positions, keep=False)
    result: list[Sample] = []
    lost = 0
    for record in dict.fromkeys(s.key[:2] for s in samples):
        parts = dataset.samples(*record, first=False)
        result += parts
        lost += not parts
    return result, lost


def show(stats: Stats, config: Config, console: Console) -> None:
    """Print the tables."""
    tallies = stats.sources
    if len(tallies) > 1:
        tallies = [*tallies, _sum(tallies)]
    console.print(_sample_table(tallies, stats.used, f"{config.config}: {stats.drawn:,} samples drawn"))
    console.print("documents, turns: mean of a sample\n", style="dim")
    console.print(_length_table(tallies))
    console.print(_image_table(tallies))
    if stats.dropped:
        console.print(_dropped_table(stats.dropped, stats.examples))

    console.print(_fill_table(stats))
    console.print(
        f"{len(stats.fill.right):,} rows from a window of {config.data.window:,} samples; "
        "samples, tiles: mean of a row",
        style="dim",
    )
    if (s := stats.suggested) is not None and s.both > stats.fill.both:
        flags = f"--data.left_length {s.budget.left} --data.right_length {s.budget.right}"
        console.print(f"\nThe data's mean lengths suggest: {flags}")
    elif stats.fill.budget.left:
        console.print(
            "\nThe budgets are split as suits the data: its mean lengths suggest none that fills rows better."
        )


def _sum(tallies: list[Tally]) -> Tally:
    fields = ("left", "right", "documents", "turns", "sizes", "tiles")
    columns = (list(chain.from_iterable(getattr(t, name) for t in tallies)) for name in fields)
    return Tally("all", sum(t.records for t in tallies), *columns)


def _sample_table(tallies: list[Tally], used: int, title: str) -> Table:
    table = _table("source", "records", "samples", "share", "documents", "turns", title=title)
    for t in tallies:
        n = len(t.left)
        share = f"{n / used:.1%}" if used else "–"
        table.add_row(t.name, f"{t.records:,}", f"{n:,}", share, _mean(t.documents), _mean(t.turns))
    return table


def _length_table(tallies: list[Tally]) -> Table:
    names = ("left mean", "median", "95 %", "right mean", "median", "95 %")
    table = _table("source", *names, title="tokens of a sample")
    for t in tallies:
        table.add_row(t.name, *_three(t.left), *_three(t.right))
    return table


def _image_table(tallies: list[Tally]) -> Table:
    names = ("images of a sample", "median width × height", "tiles of an image")
    table = _table("source", *names, title="images")
    for t in tallies:
        images = f"{len(t.sizes) / len(t.left):.2f}" if t.left else "–"
        size = "–"
        if t.sizes:
            size = " × ".join(f"{np.median([s[axis] for s in t.sizes]):,.0f}" for axis in (0, 1))
        table.add_row(t.name, images, size, _mean(t.tiles))
    return table


def _dropped_table(dropped: Counter[Drop], examples: dict[Drop, str]) -> Table:
    table = _table("source", "reason", "dropped", "the first", title="left out")
    for drop, n in sorted(dropped.items()):
        table.add_row(*drop, f"{n:,}", examples.get(drop, ""))
    return table


def _fill_table(stats: Stats) -> Table:
    names = ("left", "right", "left fill", "right fill", "both", "samples", "tiles")
    table = _table("budgets", *names, title="packed rows")
    for name, fill in (("configured", stats.fill), ("suggested", stats.suggested)):
        if fill is None:
            continue
        b, rows = fill.budget, len(fill.right)
        table.add_row(
            name,
            f"{b.left:,}",
            f"{b.right:,}",
            f"{sum(fill.left) / rows:.1%}" if b.left else "–",
            f"{sum(fill.right) / rows:.1%}",
            f"{fill.both:.1%}",
            f"{fill.samples / rows:.1f}",
            f"{sum(fill.tiles) / rows:.1f}",
        )
    return table


def _table(first: str, *numbers: str, title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="left" if name == "reason" else "right")
    return table


def _mean(values: Sequence[float]) -> str:
    return f"{np.mean(values):.2f}" if len(values) else "–"


def _three(values: Sequence[float]) -> list[str]:
    return (
        [f"{np.mean(values):,.1f}", f"{np.median(values):,.0f}", f"{np.percentile(values, 95):,.0f}"]
        if len(values)
        else ["–"] * 3
    )


def draw(stats: Stats, config: Config, path: Path) -> str:
    """Write the picture if matplotlib is installed; returns a message."""
    try:
        figure = plot(stats, config)
    except ModuleNotFoundError as error:
        return (
            f"no picture: the package {error.name} is not installed, "
            "which the group report brings (pip install -e '.[report]')"
        )
    with replacing(path) as temp_path:
        figure.savefig(temp_path, format="png")
    return f"written: {path}"


def plot(stats: Stats, config: Config) -> "Figure":
    """Draw four histograms: left and right tokens per sample, longer side of an image, fill of the rows."""
    from matplotlib.figure import Figure

    few = len(PALETTE) - 1  # sources with a colour of their own; the others share the last colour
    parts = [[t] for t in stats.sources[:few]] + [stats.sources[few:]] * (len(stats.sources) > few)
    # The space in front: matplotlib leaves labels that begin with _ out of the legend.
    names = [f"{len(part)} more" if len(part) > 1 else f" {part[0].name}" for part in parts]
    b, rows = stats.fill.budget, len(stats.fill.right)
    figure = Figure(figsize=(16, 10), layout="constrained")
    figure.suptitle(f"{config.config}: {stats.drawn:,} samples as training draws them")
    upper, lower = figure.subplots(2, 2)
    titles = (
        "left tokens of a sample" if b.left else "vanilla: nothing goes left",
        "right tokens of a sample",
        "longer side of an image, pixels",
    )
    columns = (
        [t.left if b.left else [] for t in stats.sources],
        [t.right for t in stats.sources],
        [[max(size) for size in t.sizes] for t in stats.sources],
    )
    for axes, title, column in zip((*upper, lower[0]), titles, columns, strict=True):
        axes.set_title(title)
        groups = [list(chain.from_iterable(column[i : i + len(part)])) for i, part in enumerate(parts)]
        _histogram(axes, groups, stacked=True, color=PALETTE[: len(parts)], label=names)
    fills = {"left": stats.fill.left, "right": stats.fill.right} if b.left else {"right": stats.fill.right}
    lower[1].set_title(f"how full {rows:,} packed rows are, %")
    _histogram(
        lower[1],
        [[100 * f for f in values] for values in fills.values()],
        end=100,
        color=["#356a86", "#a9c7d4"][: len(fills)],
        label=[f"{name}, mean {np.mean(values):.1%}" for name, values in fills.items()],
    )
    lower[1].legend()
    figure.legend(
        *upper[1].get_legend_handles_labels(), loc="outside lower center", ncols=len(PALETTE), frameon=False
    )
    return figure


def _histogram(axes: "Axes", groups: list[list[float]], end: int = 0, **options: Any) -> None:
    """Draw about thirty bars of whole-number width. `end`: upper end of the last bar, 0 for automatic."""
    from matplotlib.ticker import MaxNLocator

    values = list(chain.from_iterable(groups))
    if values:
        low, high = min(values), end or max(values) + 1
        around = max(0, 10 - (high - low)) // 2  # else the bar of a single value would fill the axes
        edges = MaxNLocator(30, integer=True, steps=[1, 2, 5, 10]).tick_values(
            max(0, low - around), high + around * (not end)
        )
        axes.hist(groups, edges, edgecolor="white", **options)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def main(argv: list[str]) -> None:
    args, config, flags = arguments(argv, str(__doc__), OWN)
    torch.set_num_threads(1)  # tiles are small: threads only wait for one another

    config = resolve_config(config, flags)
    with TemporaryDirectory() as folder:
        data = build_data(config, Path(folder), language_model(config))
    stats = gather(config, data, args.samples)
    console = Console(highlight=False, soft_wrap=True)
    show(stats, config, console)
    console.print(draw(stats, config, Path(args.output)), markup=False)


if __name__ == "__main__":
    run_script(main)
