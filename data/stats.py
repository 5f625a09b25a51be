"""Count what training would draw: lengths, images, drops by source, how full packed rows are, and the budgets that fit the data.

  python -m data.stats                                                       the default preset's data → a table and stats.png
  python -m data.stats --config dual_tower_smollm2 --data.limit 300 --samples 500
  python -m data.stats --data.sources easy_vqa,openmoji --output /tmp/stats.png

Takes every flag of training. Nothing is trained, no weights are loaded. Its own flags:
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, cycle
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

from configs.errors import run_script
from configs.files import replacing
from configs.schema import Config
from data.build import Data, build_data
from data.datasets import Sample, SampleDataset, by_source
from data.images import image_size, tile_count
from data.looks import Decoder, arguments, watched
from data.packing import Budget, Row, RowStream
from data.pictures import GRID, INK, PALETTE, QUIET, nice_step

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
        self.turns.append(sum(d.labels.count(turn_end) for d in sample.documents))  # each answer ends with one that is learnt
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
    suggested: Fill | None = None  # with the better of the splits that the data's mean lengths give; None: there is no other

    @property
    def used(self) -> int:
        return sum(len(s.left) for s in self.sources)


def gather(config: Config, data: Data, samples: int) -> Stats:
    """Draw and decode the first `samples` of training, then pack about as many."""
    tallies = [Tally(source.name, len(source)) for source in data.training.sources]
    decoder, drawn = Decoder(data.training), []
    sizes: dict[tuple[int, int], list[tuple[int, int]]] = {}  # of a record's images, which a sample no longer has once it is decoded and kept
    for sample in watched(data.batches.rows.pending, samples, "reading samples"):
        drawn.append(replace(sample, images=[], tiles=None))  # encoded images of thousands would fill the memory
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


def replanned(samples: Iterable[Sample], config: Config, data: Data, budget: Budget) -> tuple[list[Sample], int]:
    """The same records as they would be with other budgets: conversations are cut, and parts of a record made, by `right_length`. And how many more are dropped."""
    old, d = data.training, config.data
    changed = replace(d, left_length=budget.left, right_length=budget.right, filters=replace(d.filters, duplicates=False))  # duplicates are out already
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
        *(list(chain.from_iterable(getattr(t, name) for t in sources)) for name in ("left", "right", "documents", "turns", "sizes", "tiles")),
    )
    lines = [*sources, *[everything] * (len(sources) > 1)]
    table = _table("source", "records", "samples", "share", "documents", "turns", title=f"{config.config}: {stats.drawn:,} samples drawn")
    for t in lines:
        n = len(t.left)
        table.add_row(t.name, f"{t.records:,}", f"{n:,}", f"{n / used:.1%}" if used else "–", _mean(t.documents), _mean(t.turns))
    console.print(table)
    console.print("documents, turns: mean of a sample\n", style="dim")
    table = _table("source", "left mean", "median", "95 %", "right mean", "median", "95 %", title="tokens of a sample")
    for t in lines:
        table.add_row(t.name, *_three(t.left), *_three(t.right))
    console.print(table)
    table = _table("source", "images of a sample", "median width × height", "tiles of an image", title="images")
    for t in lines:
        size = " × ".join(f"{np.median([s[axis] for s in t.sizes]):,.0f}" for axis in (0, 1)) if t.sizes else "–"
        table.add_row(t.name, f"{len(t.sizes) / len(t.left):.2f}" if t.left else "–", size, _mean(t.tiles))
    console.print(table)
    if stats.dropped:
        table = _table("source", "reason", "dropped", title="left out")
        for name, reasons in stats.dropped.items():
            for reason, n in reasons.items():
                table.add_row(name, reason, f"{n:,}")
        console.print(table)

    table = _table("budgets", "left", "right", "left fill", "right fill", "both", "samples", "tiles", title="packed rows")
    for name, fill in (("configured", stats.fill), ("suggested", stats.suggested)):
        if fill is not None:
            b, rows = fill.budget, len(fill.right)
            fills = [f"{sum(fill.left) / rows:.1%}" if b.left else "–", f"{sum(fill.right) / rows:.1%}", f"{fill.both:.1%}"]
            table.add_row(name, f"{b.left:,}", f"{b.right:,}", *fills, f"{fill.samples / rows:.1f}", f"{sum(fill.tiles) / rows:.1f}")
    console.print(table)
    console.print(f"{len(stats.fill.right):,} rows from a window of {config.data.window:,} samples; samples, tiles: mean of a row", style="dim")
    if (s := stats.suggested) is not None and s.both > stats.fill.both:
        console.print(f"\nThe data's mean lengths suggest: --data.left_length {s.budget.left} --data.right_length {s.budget.right}")
    elif stats.fill.budget.left:
        console.print("\nThe budgets are split as suits the data: its mean lengths suggest none that fills rows better.")


def _table(first: str, *numbers: str, title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="left" if name == "reason" else "right")
    return table


def _mean(values: Sequence[float]) -> str:
    return f"{np.mean(values):.2f}" if len(values) else "–"


def _three(values: Sequence[float]) -> list[str]:
    return [f"{np.mean(values):,.1f}", f"{np.median(values):,.0f}", f"{np.percentile(values, 95):,.0f}"] if len(values) else ["–"] * 3


WIDTH, PANEL, MARGIN = 1640, 470, 40


def plot(stats: Stats, config: Config, path: Path) -> None:
    """Four histograms: left and right tokens of a sample, longer side of an image, fill of the rows."""
    shown = PALETTE[: len(PALETTE) - 1]
    groups = stats.sources[: len(shown)]
    rest = stats.sources[len(shown) :]

    def by_group(name: str) -> list[list[float]]:
        lists = [getattr(t, name) for t in stats.sources]
        if name == "sizes":
            lists = [[max(size) for size in sizes] for sizes in lists]
        return [*lists[: len(shown)], *([list(chain.from_iterable(lists[len(shown) :]))] if rest else [])]

    legend = [t.name for t in groups] + [f"{len(rest)} more"] * bool(rest)
    top = 130
    sheet = Image.new("RGB", (WIDTH, top + 2 * PANEL + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 24), f"{config.config}: {stats.drawn:,} samples as training draws them", fill=INK, font=_font(30))
    _legend(draw, MARGIN, 76, legend, PALETTE, WIDTH - 2 * MARGIN)
    half = (WIDTH - 3 * MARGIN) // 2
    places = [(x, y, x + half, y + PANEL - 30) for y in (top, top + PANEL) for x in (MARGIN, 2 * MARGIN + half)]
    fill, b = stats.fill, stats.fill.budget
    if b.left:
        _histogram(draw, places[0], "left tokens of a sample", by_group("left"), PALETTE)
    else:
        _empty(draw, places[0], "left tokens of a sample", "vanilla: nothing goes left")
    _histogram(draw, places[1], "right tokens of a sample", by_group("right"), PALETTE)
    _histogram(draw, places[2], "longer side of an image, pixels", by_group("sizes"), PALETTE)
    colours = ["#356a86", "#a9c7d4"]
    fills = [[100 * f for f in fill.left], [100 * f for f in fill.right]] if b.left else [[100 * f for f in fill.right]]
    names = [f"{name}, mean {sum(values) / len(values):.1f} %" for name, values in zip(["left", "right"] if b.left else ["right"], fills, strict=True)]
    box = places[3]
    _histogram(draw, box, f"how full {len(fill.right):,} packed rows are, %", fills, colours, stacked=False, end=100)
    _legend(draw, box[0] + 70, box[1] + 44, names, colours, half - 70)
    with replacing(path) as beside:
        sheet.save(beside, format="png", optimize=True)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)  # Pillow carries one: nothing depends on the machine's fonts


def _legend(draw: ImageDraw.ImageDraw, x: int, y: int, names: list[str], colours: list[str], room: int) -> None:
    at = x
    for name, colour in zip(names, colours, strict=False):
        width = 26 + int(draw.textlength(name, font=_font(20))) + 28
        if at + width > x + room and at > x:
            break
        draw.rounded_rectangle((at, y + 5, at + 16, y + 21), 3, fill=colour)
        draw.text((at + 26, y), name, fill=INK, font=_font(20))
        at += width


def _empty(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], title: str, text: str) -> None:
    draw.text(box[:2], title, fill=INK, font=_font(23))
    draw.text(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), text, fill=QUIET, font=_font(20), anchor="mm")


def _histogram(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], title: str, groups: list[list[float]], colours: list[str], stacked: bool = True, end: int = 0) -> None:
    """Bars of whole-number width, the groups on one another or side by side; counts up the left side. `end`: where the last bar ends."""
    values = np.concatenate([np.asarray(g, float) for g in groups])
    if not len(values):
        return _empty(draw, box, title, "nothing to count")
    low, high = float(values.min()), max(float(values.max()), end)
    step = nice_step(high - low + 1, 30)
    first = int(low // step) * step if not end else end - step * max(4, int(np.ceil((end - low) / step)))
    edges = np.arange(first, high + step + 1 if not end else end + 1, step)
    if len(edges) < 10 and not end:  # a single value is no wall from side to side
        around = (11 - len(edges)) // 2 * step
        edges = np.arange(max(0, first - around), edges[-1] + around + 1, step)
    counts = np.array([np.histogram(g, edges)[0] for g in groups])  # (groups, bars)
    tallest = int((counts.sum(0) if stacked else counts).max())

    draw.text(box[:2], title, fill=INK, font=_font(23))
    left, top, right, bottom = box[0] + 70, box[1] + (78 if end else 48), box[2], box[3] - 34
    tick = nice_step(tallest, 5)
    ceiling = -(-tallest // tick) * tick
    for n in range(0, ceiling + 1, tick):
        y = bottom - (bottom - top) * n / ceiling
        draw.line((left, y, right, y), fill=GRID if n else QUIET, width=1 if n else 2)
        draw.text((left - 10, y), f"{n:,}", fill=QUIET, font=_font(18), anchor="rm")
    width = (right - left) / (len(edges) - 1)
    for i in range(len(edges) - 1):
        height = 0
        for j, (n, colour) in enumerate(zip(counts[:, i], colours, strict=False)):
            if not n:
                continue
            x0, x1 = left + i * width + 1.5, left + (i + 1) * width - 1.5
            if not stacked:
                x0, x1 = x0 + j * (x1 - x0) / len(groups), x0 + (j + 1) * (x1 - x0) / len(groups)
            y1 = bottom - (bottom - top) * height / ceiling
            y0 = bottom - (bottom - top) * (height + n) / ceiling
            draw.rectangle((x0, min(y0, y1 - 2), max(x0 + 1, x1), y1 - 1), fill=colour)
            height += int(n) if stacked else 0
    every = max(1, nice_step(edges[-1] - edges[0], 7) // step)
    middle = 0.5 if step == 1 and not end else 0.0  # a bar of one number has it under its middle
    for edge in edges[: -1 if middle else None]:
        if edge % (every * step) == 0:
            x = left + ((edge - edges[0]) / step + middle) * width
            draw.line((x, bottom, x, bottom + 6), fill=QUIET, width=2)
            draw.text((x, bottom + 10), f"{int(edge):,}", fill=QUIET, font=_font(18), anchor="ma")
    return None


def main(argv: list[str]) -> None:
    args, config, flags = arguments(argv, str(__doc__), OWN)
    torch.set_num_threads(1)  # tiles are small: threads only wait for one another
    from training.script import complete, language_model

    config = complete(config, flags)
    with TemporaryDirectory() as folder:
        data = build_data(config, Path(folder), language_model(config))
    stats = gather(config, data, args.samples)
    console = Console(highlight=False, soft_wrap=True)
    show(stats, config, console)
    plot(stats, config, Path(args.output))
    console.print(f"written: {args.output}")


if __name__ == "__main__":
    run_script(main)
