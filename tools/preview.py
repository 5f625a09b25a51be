"""Write one self-contained HTML page of samples as the model sees them, and of packed rows.

  python -m tools.preview                                         the default preset's data → preview.html
  python -m tools.preview --config vanilla_easyvqa --output /tmp/vanilla.html
  python -m tools.preview --data.sources openmoji --model.vision.max_side 256 --data.left_length 128

Takes every flag of training. Trains nothing and loads no weights. Its own flags:
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from markupsafe import Markup, escape
from PIL import Image

from configs.model import MAX_GRID
from configs.train import Config
from data.datasets import Key, Sample, drop_report
from data.images import Grid, tile_count
from data.packing import Budget, Row
from data.parquet import UnreadableBlock
from data.render import IGNORE, Document
from data.tokenizer import GLOBAL_IMAGE, TILE_MARKERS
from tools import pages
from tools.inspection import Decoder, arguments, track_progress
from tools.spelling import Spelling
from training.setup import Data, build_data, language_model, resolve_config
from utils.errors import UserError, run_script
from utils.files import write_text

OWN = {
    "output": ("preview.html", "file to write"),
    "samples": (12, "samples shown in full"),
    "rows": (3, "packed rows shown as bars"),
}
OPEN_TOKENS, OPEN_DOCUMENTS = 240, 4  # further ones are folded
THUMBNAIL = 160  # largest side of a tile, in pixels


@dataclass(frozen=True)
class Token:
    """One token of the page."""

    id: int
    text: str  # readable: a space is ␣, a newline ↵
    position: int
    kind: str  # left, right, or supervised
    special: bool
    note: str = ""


def left_tokens(sample: Sample, spelling: Spelling) -> list[Token]:
    first = sample.documents[0]
    spelt = spelling.of(first.left_ids)
    return [
        Token(i, text, p, "left", i in spelling.special, note)
        for i, (text, note), p in zip(first.left_ids, spelt, first.left_positions, strict=True)
    ]


def right_tokens(document: Document, spelling: Spelling) -> list[Token]:
    """Tokens of a document's right stream; a target is `supervised`.

    A label is the id of the next token, so targets are shifted by one. The last target is no input: it is
    appended, with a note.
    """
    supervised = [False, *[label != IGNORE for label in document.labels]]
    ids, positions, notes = [*document.right_ids], [*document.right_positions], [""] * len(document.right_ids)
    if supervised[-1]:
        ids.append(document.labels[-1])
        positions.append(positions[-1] + 1)
        notes.append("a target only, never read")
    tokens = []
    spelt = spelling.of(ids)
    for i, (text, note), p, target, more in zip(ids, spelt, positions, supervised, notes, strict=False):
        kind = "supervised" if target else "right"
        tokens.append(Token(i, text, p, kind, i in spelling.special, ", ".join(filter(None, (note, more)))))
    return tokens


def _escape(value: Any) -> str:
    """Escape markup, unprintable letters, and those that change the writing direction."""
    return str(escape(pages.printable(str(value))))


def boxes(tokens: list[Token], image: int) -> str:
    """Draw one box per token, image placeholders as small squares; a note marks jumps of the positions."""
    out: list[str] = []
    expected = 0
    for token in tokens:
        if token.position != expected and token.kind != "left":
            out.append(f'<i class="gap">positions {expected}–{token.position - 1} are in the left stream</i>')
        expected = token.position + 1
        out.append(_box(token, token.id == image))
        if token.text.endswith("↵") and token.kind != "left" and not token.special:
            out.append("<br>")
    return "".join(out)


def _box(token: Token, is_image: bool) -> str:
    names = (
        [token.kind]
        + ["special"] * token.special
        + ["image"] * is_image
        + ["end"] * token.note.endswith("never read")
    )
    title = (
        f"position {token.position} · id {token.id} · {'left' if token.kind == 'left' else 'right'} stream"
    )
    title += ", supervised" * (token.kind == "supervised")
    title += f" · {token.text}" * is_image + f" · {token.note}" * bool(token.note)
    text = "" if is_image else _escape(token.text).replace("␣", "<i>␣</i>")
    return f'<b class="{" ".join(names)}" title="{_escape(title)}">{text}</b>'


def stream(tokens: list[Token], image: int) -> str:
    """Draw the boxes of a stream; those beyond the first `OPEN_TOKENS` are folded."""
    head, rest = tokens[:OPEN_TOKENS], tokens[OPEN_TOKENS:]
    if len(rest) <= OPEN_TOKENS // 8:
        return f'<p class="tokens">{boxes(tokens, image)}</p>'
    supervised = _supervised(rest)
    more = f"{len(rest):,} more tokens" + f", {supervised:,} of them supervised" * bool(supervised)
    # All boxes are drawn in one call, then split: drawn alone, the rest would begin with a gap.
    html_text, split = boxes(tokens, image), len(boxes(head, image))
    folded = f'<details><summary>{more}</summary><p class="tokens">{html_text[split:]}</p></details>'
    return f'<p class="tokens">{html_text[:split]}</p>{folded}'


def _supervised(tokens: list[Token]) -> int:
    return sum(token.kind == "supervised" for token in tokens)


def thumbnail(pixels: Any) -> str:
    """One tile (3, h, w) → a data URL of a PNG or a JPEG, the smaller of both."""
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    files = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 85})):
        file = io.BytesIO()
        picture.save(file, kind, **options)
        files[kind] = file.getvalue()
    kind = min(files, key=lambda k: len(files[k]))
    return pages.data_uri(files[kind], kind)


def figures(tiles: Any, grids: list[Grid]) -> str:
    """Draw every image: its global tile, then the grid of its tiles, each with the name of its marker."""
    out, start = [], 0
    for rows, columns in grids:
        names = [
            GLOBAL_IMAGE,
            *[TILE_MARKERS[r * MAX_GRID + c] for r in range(rows) for c in range(columns)],
        ][: tile_count((rows, columns))]
        cells = [
            f'<figure><img src="{thumbnail(tile)}" alt=""><figcaption>{_escape(name)}</figcaption></figure>'
            for tile, name in zip(tiles[start : start + len(names)], names, strict=True)
        ]
        start += len(names)
        grid = ""
        if cells[1:]:
            style = f"grid-template-columns:repeat({columns},minmax(5.5rem,7.5rem))"
            grid = f'<div class="grid" style="{style}">{"".join(cells[1:])}</div>'
        out.append(f'<div class="picture">{cells[0]}{grid}</div>')
    return "".join(out) or '<p class="quiet">no image</p>'


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' * (n != 1)}"


def card(number: int, sample: Sample, name: str, spelling: Spelling) -> str:
    """Draw one decoded sample."""
    documents = []
    for i, document in enumerate(sample.documents, 1):
        tokens = right_tokens(document, spelling)
        counts = f"{_count(len(document.right_ids), 'token')}, {_supervised(tokens):,} supervised"
        documents.append(
            _section(f"document {i} of {len(sample.documents)}: {counts}", tokens, spelling.image)
        )
    folded = documents[OPEN_DOCUMENTS:] if len(documents) > OPEN_DOCUMENTS + 1 else []
    body = "".join(documents[: len(documents) - len(folded)])
    if folded:
        summary = f"{len(folded)} more documents on the same images"
        body += f"<details><summary>{summary}</summary>{''.join(folded)}</details>"
    left = left_tokens(sample, spelling)
    if left:
        body = _section(f"left stream: {_count(len(left), 'token')}", left, spelling.image) + body
    part = f" · part {sample.key[2] + 1}" * (sample.key[2] > 0)
    lengths = f"{sample.left_length:,} left + " * bool(sample.left_length) + f"{sample.right_length:,} right"
    record = f"{_escape(sample.source)} · {_escape(name)}{part}"
    facts = f"{record} · {_count(len(sample.grids), 'image')} · {lengths} tokens"
    images = figures(sample.tiles, sample.grids)
    return f"<article><h3>{number} <small>{facts}</small></h3>{images}{body}</article>"


def _section(title: str, tokens: list[Token], image: int) -> str:
    return f'<section class="document"><h4>{title}</h4>{stream(tokens, image)}</section>'


def bar(lengths: list[int], tips: list[str], budget: int, scale: int) -> str:
    """Draw one stream of a packed row.

    The stream's width is `budget` ÷ `scale`, a segment's is its sample's length ÷ `budget`.
    """
    segments = "".join(
        f'<span style="width:{100 * n / budget:.3f}%;--hue:{_hue(i)}" title="{_escape(tip)}">{n}</span>'
        for i, (n, tip) in enumerate(zip(lengths, tips, strict=True))
        if n
    )
    return f'<div class="bar" style="width:{100 * budget / scale:.3f}%">{segments}</div>'


def _hue(number: int) -> int:
    return (210 + number * 137) % 360  # the golden angle: neighbours differ


def row_bars(number: int, row: Row, budget: Budget) -> str:
    """Draw a packed row: both streams, one colour per sample, and how full they are."""
    tips = [
        f"sample {i} · {s.source} · {s.left_length:,} left, {s.right_length:,} right tokens · "
        f"{_count(len(s.documents), 'document')} · {_count(s.tile_total, 'tile')}"
        for i, s in enumerate(row, 1)
    ]
    streams = [
        ("left", [s.left_length for s in row], budget.left),
        ("right", [s.right_length for s in row], budget.right),
    ]
    streams = [stream for stream in streams if stream[2]]
    scale = max(size for _, _, size in streams)
    tiles = sum(s.tile_total for s in row)
    facts = f"{_count(len(row), 'sample')} · {_count(tiles, 'tile')} · {fill_text(row, budget)}"
    bars = "".join(
        f'<div class="stream"><span class="label">{name}</span>{bar(lengths, tips, size, scale)}</div>'
        for name, lengths, size in streams
    )
    items = "".join(f'<li style="--hue:{_hue(i)}">{_escape(tip)}</li>' for i, tip in enumerate(tips))
    key = f'<details><summary>samples of this row</summary><ol class="key">{items}</ol></details>'
    return f'<article class="row"><h3>row {number} <small>{facts}</small></h3>{bars}{key}</article>'


def fill_text(row: Row, budget: Budget) -> str:
    """How full a row is: `left 34 of 34 (100.0 %), right 120 of 128 (93.8 %), both 95.1 %`."""
    left, right = sum(s.left_length for s in row), sum(s.right_length for s in row)
    parts = [
        f"{name} {n:,} of {size:,} ({100 * n / size:.1f} %)"
        for name, n, size in (("left", left, budget.left), ("right", right, budget.right))
        if size
    ]
    return ", ".join(
        parts + [f"both {100 * (left + right) / (budget.left + budget.right):.1f} %"] * (len(parts) > 1)
    )


LEFT_CONTEXTS = {
    "image": "image blocks",
    "prefix": "all up to the last image token",
    "none": "nothing (vanilla)",
}
TURNS = {
    "branch": "independent questions on the same images (branch)",
    "chain": "one conversation (chain)",
}


def head(config: Config, data: Data, drawn: int) -> dict[str, str]:
    """Return the configuration's main facts, and the counts of dropped records."""
    m, b = config.model, data.budget
    dropped = drop_report(data.training.dropped, data.training.examples)
    budgets = (
        f"right {b.right:,}" if not b.left else f"left {b.left:,} (in steps of {b.unit}), right {b.right:,}"
    )
    return {
        "sources": config.data.sources,
        "records": ", ".join(f"{source.name} {len(source):,}" for source in data.training.sources),
        "drawn for this page": _count(drawn, "sample"),
        "dropped so far": dropped or "none",
        "images": f"tiles of {m.vision.image_size} × {m.vision.image_size} pixels, "
        f"{m.tokens_per_tile} image tokens each"
        + (f", images up to {m.vision.max_side} pixels cut into tiles" if m.vision.max_side else ""),
        "goes left": LEFT_CONTEXTS[m.left_context],
        "turns of a record": TURNS[config.data.turns],
        "budgets of a row": budgets + (f", at most {b.tiles} tiles" if b.tiles else ""),
    }


def name_of(data: Data, sample: Sample) -> str:
    """The id of a sample's record, or its number."""
    number = f"record {sample.key[1]}"
    try:
        return str(data.training.record(*sample.key[:2]).get("id") or number)
    except UnreadableBlock:  # it was read when the sample was drawn
        return number


def page(config: Config, data: Data, samples: list[Sample], rows: list[Row], drawn: int) -> str:
    """Draw decoded samples and packed rows as a whole HTML page."""
    spelling = Spelling(data.tokenizer)
    cards = [card(i, s, name_of(data, s), spelling) for i, s in enumerate(samples, 1)]
    bars = [row_bars(i, row, data.budget) for i, row in enumerate(rows, 1)]
    return pages.render(
        "preview.html",
        title=f"{config.config}: data",
        name=config.config,
        facts=head(config, data, drawn),
        cards=Markup("".join(cards)),
        bars=Markup("".join(bars)),
    )


def draw(data: Data, samples: int, rows: int) -> tuple[list[Sample], list[Row], int]:
    """Draw and decode the first samples and the first rows of training.

    Samples with damaged images are left out. Returns samples, rows, and the number of samples drawn.
    """
    stream, decoder = data.batches.rows, Decoder(data.training)
    drawn: list[Sample] = []

    def recording(source: Iterator[Sample]) -> Iterator[Sample]:
        for sample in source:
            drawn.append(sample)
            yield sample

    stream.pending = recording(stream.pending)
    packed = [
        [decoded for sample in row if (decoded := decoder(sample)) is not None]
        for row in track_progress(stream, rows, "packing rows")
    ]
    selected: dict[Key, Sample] = {}
    index = 0
    # Not beyond the first epoch: its samples would come again.
    while len(selected) < samples and (index < len(drawn) or stream.stream.epoch == 0):
        if index == len(drawn):
            next(stream.pending)
        if (decoded := decoder(drawn[index])) is not None:
            selected.setdefault(decoded.key, decoded)
        index += 1
    if not selected:
        raise UserError(
            f"none of the images can be decoded: {drop_report(data.training.dropped, data.training.examples)}"
        )
    return list(selected.values()), packed, len(drawn)


def main(argv: list[str]) -> None:
    args, config, flags = arguments(argv, str(__doc__), OWN)
    torch.set_num_threads(1)  # tiles are small: threads only wait for one another

    config = resolve_config(config, flags)
    with TemporaryDirectory() as folder:
        data = build_data(config, Path(folder), language_model(config))
    samples, rows, drawn = draw(data, args.samples, args.rows)
    text = page(config, data, samples, rows, drawn)
    write_text(Path(args.output), text)
    print(
        f"{args.output}: {len(samples)} samples and {len(rows)} rows of {config.config}, "
        f"{len(text) / 2**20:.1f} MB; open it in a browser"
    )


if __name__ == "__main__":
    run_script(main)
