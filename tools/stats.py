"""Count what training would draw: lengths, images, drops by source, how full packed rows are, and the budgets that fit the data.

  python -m tools.stats                                                       the default preset's data → a table and stats.png
  python -m tools.stats --config dual_tower_smollm2 --data.limit 300 --samples 500
  python -m tools.stats --data.sources easy_vqa,openmoji --output /tmp/stats.png

Takes every flag of training. Nothing is trained, no weights are loaded. The picture needs the group report. Its own flags:
"""

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
from data.datasets import Sample, SampleDataset, by_source
from data.images import image_size, tile_count
from data.packing import Budget, Row, RowStream
from tools.inspection import Decoder, arguments, track_progress
from training.setup import Data, build_data
from utils.errors import run_script
from utils.files import replacing
from utils.plotting import PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OWN = {"output": ("stats.png", "picture to write"), "samples": (2000, "samples that are counted")}


@dataclass
class Tally:
    """Of one source, a number for each sample (or image) drawn."""

    name: str
    records: int
    left: list[int] = field(default_factory=list)
    right: list[int] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)  # width, height of every image
    tiles: list[int] = field(default_factory=list)  # of every image

    def add(self, sample: Sample, turn_end: int) -> None:
        self.left.append(sample.left_length)
        self.right.append(sample.right_length)
        self.documents.append(len(sample.documents))
        self.turns.append(
            sum(d.labels.count(turn_end) for d in sample.documents)
        )  # each answer ends with one that is learnt
        self.tiles += map(tile_count, sample.grids)


@dataclass
class Fill:
    """How full rows are."""

    budget: Budget
    left: list[float]  # of each row, 0 to 1
    right: list[float]
    samples: int
    tiles: list[int]

    @property
    def both(self) -> float:
        b = self.budget
        return (sum(self.left) * b.left + sum(self.right) * b.right) / (len(self.left) * (b.left + b.right))


@dataclass
class Stats:
    sources: list[Tally]
    drawn: int
    dropped: dict[str, dict[str, int]]  # source → reason → count
    fill: Fill
    suggested: Fill | None = (
        None  # with the better of the splits that the data's mean lengths give; None: there is no other
    )

    @property
    def used(self) -> int:
        return sum(len(s.left) for s in self.sources)


def gather(config: Config, data: Data, samples: int) -> Stats:
    """Draw and decode the first `samples` of training, then pack about as many."""
    tallies = [Tally(source.name, len(source)) for source in data.training.sources]
    decoder, drawn = Decoder(data.training), []
    sizes: dict[
        tuple[int, int], list[tuple[int, int]]
    ] = {}  # of a record's images, which a sample no longer has once it is decoded and kept
    for sample in track_progress(data.batches.rows.pending, samples, "reading samples"):
        drawn.append(
            replace(sample, images=[], tiles=None)
        )  # encoded images of thousands would fill the memory
        if decoder(sample) is not None:
            tally = tallies[sample.key[0]]
            tally.add(sample, data.tokenizer.turn_end)
            if (place := sample.key[:2]) not in sizes:
                sizes[place] = [image_size(image) for image in sample.images]
            tally.sizes += sizes[place]
    dropped = by_source(+data.training.dropped)
    rows = data.batches.rows
    rows.pending = chain(drawn, rows.pending)
    stats = Stats(tallies, len(drawn), dropped, fill_of(rows, samples))
    usable = [s for s in drawn if s.key[:2] not in decoder.damaged]
    for budget in splits(usable, data.budget) if usable and data.budget.left else ():
        planned, lost = replanned(usable, config, data, budget)
        if planned and not lost:
            again = RowStream(rows.stream, budget, config.data.window)
            again.pending = cycle(planned)
            fill = fill_of(again, samples)
            if stats.suggested is None or fill.both > stats.suggested.both:
                stats.suggested = fill
    return stats


def fill_of(rows: RowStream, samples: int) -> Fill:
    """Of as many rows as hold `samples` samples, taken while the window is full, as in training."""
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
    """The same total, split as the data's mean lengths are: left rounded down, and up, to whole steps, and no less than the longest left stream drawn.

    Mean lengths of 17 and 79, a total of 162, steps of 17: 162 · 17/96 = 28.7 → 17 + 145, and 34 + 128. What is `budget` itself is left out.
    """
    total, unit = budget.left + budget.right, budget.unit
    lefts = [-(-s.left_length // unit) * unit for s in samples]
    down = total * sum(lefts) // (sum(lefts) + sum(s.right_length for s in samples)) // unit * unit
    ways = sorted({max(left, max(lefts), unit) for left in (down, down + unit)} - {budget.left})
    return [replace(budget, left=left, right=total - left) for left in ways if left < total]


def replanned(
    samples: Iterable[Sample], config: Config, data: Data, budget: Budget
) -> tuple[list[Sample], int]:
    """The same records as they would be with other budgets: conversations are cut, and parts of a record made, by `right_length`. And how many more are dropped."""
    old, d = data.training, config.data
    changed = replace(
        d, left_length=budget.left, right_length=budget.right, filters=replace(d.filters, duplicates=False)
    )  # duplicates are out already
    dataset = SampleDataset(old.sources, old.renderer, old.vision, changed, old.max_positions, keep=False)
    planned: list[Sample] = []
    lost = 0
    for place in dict.fromkeys(s.key[:2] for s in samples):
        made = dataset.samples(*place, first=False)
        planned += made
        lost += not made
    return planned, lost


def show(stats: Stats, config: Config, console: Console) -> None:
    """Print the tables."""
    used, sources = stats.used, stats.sources
    everything = Tally(
        "all",
        sum(t.records for t in sources),
        *(
            list(chain.from_iterable(getattr(t, name) for t in sources))
            for name in ("left", "right", "documents", "turns", "sizes", "tiles")
        ),
    )
    lines = [*sources, *[everything] * (len(sources) > 1)]
    table = _table(
        "source",
        "records",
        "samples",
        "share",
        "documents",
        "turns",
        title=f"{config.config}: {stats.drawn:,} samples drawn",
    )
    for t in lines:
        n = len(t.left)
        table.add_row(
            t.name,
            f"{t.records:,}",
            f"{n:,}",
            f"{n / used:.1%}" if used else "–",
            _mean(t.documents),
            _mean(t.turns),
        )
    console.print(table)
    console.print("documents, turns: mean of a sample\n", style="dim")
    table = _table(
        "source", "left mean", "median", "95 %", "right mean", "median", "95 %", title="tokens of a sample"
    )
    for t in lines:
        table.add_row(t.name, *_three(t.left), *_three(t.right))
    console.print(table)
    table = _table(
        "source", "images of a sample", "median width × height", "tiles of an image", title="images"
    )
    for t in lines:
        size = (
            " × ".join(f"{np.median([s[axis] for s in t.sizes]):,.0f}" for axis in (0, 1)) if t.sizes else "–"
        )
        table.add_row(t.name, f"{len(t.sizes) / len(t.left):.2f}" if t.left else "–", size, _mean(t.tiles))
    console.print(table)
    if stats.dropped:
        table = _table("source", "reason", "dropped", title="left out")
        for name, reasons in stats.dropped.items():
            for reason, n in reasons.items():
                table.add_row(name, reason, f"{n:,}")
        console.print(table)

    table = _table(
        "budgets", "left", "right", "left fill", "right fill", "both", "samples", "tiles", title="packed rows"
    )
    for name, fill in (("configured", stats.fill), ("suggested", stats.suggested)):
        if fill is not None:
            b, rows = fill.budget, len(fill.right)
            fills = [
                f"{sum(fill.left) / rows:.1%}" if b.left else "–",
                f"{sum(fill.right) / rows:.1%}",
                f"{fill.both:.1%}",
            ]
            table.add_row(
                name,
                f"{b.left:,}",
                f"{b.right:,}",
                *fills,
                f"{fill.samples / rows:.1f}",
                f"{sum(fill.tiles) / rows:.1f}",
            )
    console.print(table)
    console.print(
        f"{len(stats.fill.right):,} rows from a window of {config.data.window:,} samples; samples, tiles: mean of a row",
        style="dim",
    )
    if (s := stats.suggested) is not None and s.both > stats.fill.both:
        console.print(
            f"\nThe data's mean lengths suggest: --data.left_length {s.budget.left} --data.right_length {s.budget.right}"
        )
    elif stats.fill.budget.left:
        console.print(
            "\nThe budgets are split as suits the data: its mean lengths suggest none that fills rows better."
        )


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
    """Write the picture, where matplotlib is there; what to say of it."""
    try:
        figure = plot(stats, config)
    except ModuleNotFoundError as error:
        return f"no picture: the package {error.name} is not installed, which the group report brings (pip install -e '.[report]')"
    with replacing(path) as beside:
        figure.savefig(beside, format="png")
    return f"written: {path}"


def plot(stats: Stats, config: Config) -> "Figure":
    """Four histograms: left and right tokens of a sample, longer side of an image, fill of the rows."""
    from matplotlib.figure import Figure

    few = len(PALETTE) - 1  # sources with a colour of their own; the last colour is the others'
    parts = [[t] for t in stats.sources[:few]] + [stats.sources[few:]] * (len(stats.sources) > few)
    names = [
        f"{len(part)} more" if len(part) > 1 else f" {part[0].name}" for part in parts
    ]  # one that begins with _ would be left out
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
        _histogram(
            axes,
            [list(chain.from_iterable(column[i : i + len(part)])) for i, part in enumerate(parts)],
            stacked=True,
            color=PALETTE[: len(parts)],
            label=names,
        )
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
    """Some thirty bars of whole-number width, the groups on one another or side by side. `end`: where the last bar ends."""
    from matplotlib.ticker import MaxNLocator

    values = list(chain.from_iterable(groups))
    if values:
        low, high = min(values), end or max(values) + 1
        around = max(0, 10 - (high - low)) // 2  # a single value is no wall from side to side
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
    from training.script import language_model, resolve_config

    config = resolve_config(config, flags)
    with TemporaryDirectory() as folder:
        data = build_data(config, Path(folder), language_model(config))
    stats = gather(config, data, args.samples)
    console = Console(highlight=False, soft_wrap=True)
    show(stats, config, console)
    console.print(draw(stats, config, Path(args.output)), markup=False)


if __name__ == "__main__":
    run_script(main)
