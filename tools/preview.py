"""Look at samples as the model sees them, and at how rows are packed: one HTML page that needs nothing else.

  python -m tools.preview                                                     the default preset's data → preview.html
  python -m tools.preview --config vanilla_easyvqa --output /tmp/vanilla.html
  python -m tools.preview --data.sources openmoji --model.vision.image_size 64 --model.vision.max_side 256 --data.left_length 128

Takes every flag of training. Nothing is trained, no weights are loaded. Its own flags:
"""

import base64
import html
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image

from configs.model import MAX_GRID
from configs.train import Config
from data.datasets import Key, Sample, by_source
from data.images import Grid, tile_count
from data.packing import Budget, Row
from data.parquet import UnreadableBlock
from data.render import IGNORE, Document
from data.tokenizer import GLOBAL_IMAGE, TILE_MARKERS, Tokenizer
from tools.inspection import Decoder, arguments, track_progress
from training.setup import Data, build_data
from utils.errors import UserError, run_script
from utils.files import write_text

OWN = {
    "output": ("preview.html", "file to write"),
    "samples": (12, "samples shown in full"),
    "rows": (3, "packed rows shown as bars"),
}
OPEN_TOKENS, OPEN_DOCUMENTS = 240, 4  # what is beyond stands folded up
THUMBNAIL = 160  # pixels along a tile's side, at most


@dataclass(frozen=True)
class Token:
    """One token as it is shown."""

    id: int
    text: str  # readable: a space is ␣, a newline ↵
    position: int
    kind: str  # left, right, or learnt
    special: bool
    note: str = ""


@cache
def _bytes_of_letters() -> dict[str, int]:
    """Byte-level BPE writes each byte as one letter: printable ones as they are, the others from U+0100 on (GPT-2's table)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(plain)]
    return {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(others)}


def visible(text: str) -> str:
    """Text with its spaces seen, and with letters that print nothing, or turn the writing around, as escapes."""
    signs = {" ": "␣", "\n": "↵", "\t": "⇥"}
    return "".join(signs.get(c) or (c if c.isprintable() else f"\\u{ord(c):04x}") for c in text)


class Spelling:
    """Token ids → readable text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.backend, self.image = tokenizer.backend, tokenizer.image
        self.special = {
            number: token.content for number, token in self.backend.get_added_tokens_decoder().items()
        }
        self.byte_level = "ByteLevel" in repr(self.backend.decoder)

    def of(self, ids: list[int]) -> list[tuple[str, str]]:
        """(text, note) of each. A letter cut in several tokens shows as their bytes; the note says which letter.

        "é" in two tokens → [("C3", "bytes of é"), ("A9", "bytes of é")]
        """
        out: list[tuple[str, str]] = []
        waiting: list[bytes] = []  # tokens that are no whole letters yet
        for token in ids:
            raw = None if token in self.special else self._raw(token)
            if raw is None or not waiting:
                out += [(piece.hex(" ").upper(), "bytes") for piece in waiting]
                waiting = []
            if raw is None:
                out.append((visible(self.special[token]), ""))
                continue
            waiting.append(raw)
            try:
                text = visible(b"".join(waiting).decode())
            except UnicodeDecodeError:
                continue
            out += (
                [(text, "")]
                if len(waiting) == 1
                else [(piece.hex(" ").upper(), f"bytes of {text}") for piece in waiting]
            )
            waiting = []
        return out + [(piece.hex(" ").upper(), "bytes") for piece in waiting]

    def _raw(self, token: int) -> bytes:
        letters = self.backend.id_to_token(token)
        return (
            bytes(_bytes_of_letters()[c] for c in letters)
            if self.byte_level
            else letters.replace("▁", " ").encode()
        )


def left_tokens(sample: Sample, spelling: Spelling) -> list[Token]:
    first = sample.documents[0]
    spelt = spelling.of(first.left_ids)
    return [
        Token(i, text, p, "left", i in spelling.special, note)
        for i, (text, note), p in zip(first.left_ids, spelt, first.left_positions, strict=True)
    ]


def right_tokens(document: Document, spelling: Spelling) -> list[Token]:
    """A document's right stream. Labels are the next token's id: here a token is learnt where it is a target. The last target is no input."""
    learnt = [False, *[label != IGNORE for label in document.labels]]
    ids, positions, notes = [*document.right_ids], [*document.right_positions], [""] * len(document.right_ids)
    if learnt[-1]:
        ids, positions, notes = (
            [*ids, document.labels[-1]],
            [*positions, positions[-1] + 1],
            [*notes, "a target only, never read"],
        )
    spelt = spelling.of(ids)
    return [
        Token(
            i,
            text,
            p,
            "learnt" if target else "right",
            i in spelling.special,
            ", ".join(filter(None, (note, more))),
        )
        for i, (text, note), p, target, more in zip(ids, spelt, positions, learnt, notes, strict=False)
    ]


def _escape(value: Any) -> str:
    """Text that is no markup, and holds no letter that turns the writing around."""
    return html.escape("".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in str(value)), quote=True)


def boxes(tokens: list[Token], image: int) -> str:
    """A box a token; image placeholders are small squares. Where positions jump, the other stream's stand in between."""
    out: list[str] = []
    expected = 0
    for token in tokens:
        if token.position != expected and token.kind != "left":
            out.append(f'<i class="gap">positions {expected}–{token.position - 1} are in the left stream</i>')
        expected = token.position + 1
        names = (
            [token.kind]
            + ["special"] * token.special
            + ["image"] * (token.id == image)
            + ["end"] * token.note.endswith("never read")
        )
        title = f"position {token.position} · id {token.id} · {'left stream' if token.kind == 'left' else 'right stream'}{', learnt' * (token.kind == 'learnt')}"
        shown = "" if token.id == image else _escape(token.text).replace("␣", "<i>␣</i>")
        title += f" · {token.text}" * (token.id == image) + f" · {token.note}" * bool(token.note)
        out.append(f'<b class="{" ".join(names)}" title="{_escape(title)}">{shown}</b>')
        if token.text.endswith("↵") and token.kind != "left" and not token.special:
            out.append("<br>")
    return "".join(out)


def stream(tokens: list[Token], image: int) -> str:
    """Boxes, what is beyond the first few hundred folded up."""
    head, rest = tokens[:OPEN_TOKENS], tokens[OPEN_TOKENS:]
    if len(rest) <= OPEN_TOKENS // 8:
        return f'<p class="tokens">{boxes(tokens, image)}</p>'
    learnt = sum(token.kind == "learnt" for token in rest)
    more = f"{len(rest):,} more tokens" + f", {learnt:,} of them learnt" * bool(learnt)
    # The rest goes on from where the head ends: no gap is shown at its beginning unless there is one.
    whole = boxes(tokens, image)
    cut = len(boxes(head, image))
    return f'<p class="tokens">{whole[:cut]}</p><details><summary>{more}</summary><p class="tokens">{whole[cut:]}</p></details>'


def thumbnail(pixels: Any) -> str:
    """One tile (3, h, w) → the shorter of a PNG and a JPEG, as a data URL."""
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    files = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 85})):
        file = io.BytesIO()
        picture.save(file, kind, **options)
        files[kind] = file.getvalue()
    kind = min(files, key=lambda k: len(files[k]))
    return f"data:image/{kind};base64,{base64.b64encode(files[kind]).decode()}"


def figures(tiles: Any, grids: list[Grid]) -> str:
    """Every image: the view of the whole, then its tiles in their grid, under the names of their markers."""
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
        grid = (
            f'<div class="grid" style="grid-template-columns:repeat({columns},minmax(5.5rem,7.5rem))">{"".join(cells[1:])}</div>'
            if cells[1:]
            else ""
        )
        out.append(f'<div class="picture">{cells[0]}{grid}</div>')
    return "".join(out) or '<p class="quiet">no image</p>'


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


def card(number: int, sample: Sample, name: str, spelling: Spelling) -> str:
    """One decoded sample."""
    documents = []
    for i, document in enumerate(sample.documents, 1):
        tokens = right_tokens(document, spelling)
        learnt = sum(token.kind == "learnt" for token in tokens)
        head = f"document {i} of {len(sample.documents)}: {_count(len(document.right_ids), 'token')}, {learnt:,} learnt"
        documents.append(
            f'<section class="document"><h4>{head}</h4>{stream(tokens, spelling.image)}</section>'
        )
    folded = documents[OPEN_DOCUMENTS:] if len(documents) > OPEN_DOCUMENTS + 1 else []
    shown = "".join(documents[: len(documents) - len(folded)])
    if folded:
        shown += f"<details><summary>{len(folded)} more documents on the same images</summary>{''.join(folded)}</details>"
    left = left_tokens(sample, spelling)
    if left:
        shown = f'<section class="document"><h4>left stream: {_count(len(left), "token")}</h4>{stream(left, spelling.image)}</section>{shown}'
    part = f" · part {sample.key[2] + 1}" * (sample.key[2] > 0)
    about = f"{_escape(sample.source)} · {_escape(name)}{part} · {_count(len(sample.grids), 'image')} · {f'{sample.left_length:,} left + ' * bool(sample.left_length)}{sample.right_length:,} right tokens"
    return f"<article><h3>{number} <small>{about}</small></h3>{figures(sample.tiles, sample.grids)}{shown}</article>"


def bar(lengths: list[int], tips: list[str], budget: int, scale: int) -> str:
    """One stream of a packed row: the track is as wide as its budget in proportion to `scale`, a segment as its sample in the budget."""
    segments = "".join(
        f'<span style="width:{100 * n / budget:.3f}%;--hue:{_hue(i)}" title="{_escape(tip)}">{n}</span>'
        for i, (n, tip) in enumerate(zip(lengths, tips, strict=True))
        if n
    )
    return f'<div class="bar" style="width:{100 * budget / scale:.3f}%">{segments}</div>'


def _hue(number: int) -> int:
    return (210 + number * 137) % 360  # the golden angle: neighbours differ


def row_bars(number: int, row: Row, budget: Budget) -> str:
    """A packed row: left and right stream, each sample in one colour, and how full they are."""
    tips = [
        f"sample {i} · {s.source} · {s.left_length:,} left, {s.right_length:,} right tokens · {_count(len(s.documents), 'document')} · {_count(s.tile_total, 'tile')}"
        for i, s in enumerate(row, 1)
    ]
    streams = [
        ("left", [s.left_length for s in row], budget.left),
        ("right", [s.right_length for s in row], budget.right),
    ]
    streams = [stream for stream in streams if stream[2]]
    scale = max(size for _, _, size in streams)
    out = [
        f"<h3>row {number} <small>{_count(len(row), 'sample')} · {_count(sum(s.tile_total for s in row), 'tile')} · {fill_text(row, budget)}</small></h3>"
    ]
    for name, lengths, size in streams:
        out.append(
            f'<div class="stream"><span class="label">{name}</span>{bar(lengths, tips, size, scale)}</div>'
        )
    items = "".join(f'<li style="--hue:{_hue(i)}">{_escape(tip)}</li>' for i, tip in enumerate(tips))
    return f'<article class="row">{"".join(out)}<details><summary>samples of this row</summary><ol class="key">{items}</ol></details></article>'


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


STYLE = """
:root { color-scheme: light dark; --page: #fbfaf8; --card: #fff; --ink: #22252a; --quiet: #646a73; --line: #e2dfd9; --track: #eceae5;
  --left: #dbe7f6; --right: #ecebe8; --learnt: #cfeccb; --edge: #8a5a00; --segment: 72%; }
@media (prefers-color-scheme: dark) { :root { --page: #17191c; --card: #1f2226; --ink: #e4e3df; --quiet: #9aa0a8; --line: #33373d; --track: #2b2f34;
  --left: #274060; --right: #33373d; --learnt: #23502a; --edge: #e0b060; --segment: 62%; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .75rem; } h3 { font-size: 1rem; margin: 0 0 .6rem; } h4 { font-size: .8rem; font-weight: 600; color: var(--quiet); margin: 0 0 .25rem; }
small, .quiet, .label { color: var(--quiet); font-weight: 400; font-size: .85rem; } p { margin: .25rem 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .75rem 0; } dt { color: var(--quiet); } dd { margin: 0; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1rem; margin: 0 0 1rem; }
.picture { display: flex; flex-wrap: wrap; gap: 1rem; margin: 0 0 .75rem; align-items: flex-start; }
.grid { display: grid; gap: 3px; overflow-x: auto; max-width: 100%; }
figure { margin: 0; width: 7.5rem; max-width: 100%; } .grid figure { width: auto; } figure img { display: block; width: 100%; border-radius: 3px; }
figcaption { font: .65rem/1.4 ui-monospace, monospace; color: var(--quiet); white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.document { border-top: 1px solid var(--line); padding: .6rem 0 .5rem; }
.tokens { font: .8rem/1.35 ui-monospace, "DejaVu Sans Mono", monospace; margin: 0; }
b { display: inline-block; vertical-align: top; font-weight: 400; border-radius: 3px; padding: 0 .25em; margin: 0 2px 3px 0; min-width: .7em; min-height: 1.35em; max-width: 100%; white-space: pre-wrap; }
b i { font-style: normal; opacity: .35; }
b.left { background: var(--left); } b.right { background: var(--right); } b.learnt { background: var(--learnt); }
b.special { color: var(--edge); box-shadow: inset 0 0 0 1px currentColor; } b.end { box-shadow: none; outline: 1px dashed; outline-offset: -1px; }
b.image { box-shadow: none; padding: 0; width: .7em; min-height: 0; height: .7em; margin-top: .35em; border-radius: 2px; background: var(--left); } b.image.right { background: var(--quiet); opacity: .45; }
.gap { display: inline-block; color: var(--quiet); border-left: 3px solid var(--left); padding-left: .4em; margin: 0 .4em 3px 0; font: italic .75rem/1.4 system-ui, sans-serif; }
details { margin: .4rem 0 0; } summary { cursor: pointer; color: var(--quiet); font-size: .85rem; }
.stream { display: grid; grid-template-columns: 2.6rem 1fr; align-items: center; margin: 0 0 .3rem; }
.bar { display: flex; height: 1.6rem; background: var(--track); border-radius: 4px; overflow: hidden; }
.bar span { flex: none; overflow: hidden; white-space: nowrap; text-align: center; font-size: .72rem; line-height: 1.6rem; color: #17191c; background: hsl(var(--hue) 50% var(--segment)); box-shadow: inset -1px 0 var(--card); }
.key { font-size: .85rem; padding: 0; margin: .4rem 0 0; list-style: none; } .key li::before { content: ""; display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .5em; background: hsl(var(--hue) 50% var(--segment)); }
.legend b { font: .8rem/1.35 ui-monospace, monospace; } .legend span { white-space: nowrap; margin-right: 1.2rem; }
@media (max-width: 40rem) { body { padding: 1rem .6rem 3rem; } article { padding: .75rem; } dl { grid-template-columns: 1fr; } dd { margin: 0 0 .4rem; } }
"""

LEGEND = """<p class="legend"><span><b class="left special">&lt;|global_image|&gt;</b> left stream</span><span><b class="left image"></b> one image token</span>
<span><b class="right">word</b> right stream, read only</span><span><b class="learnt">word</b> right stream, learnt</span>
<span><b class="learnt special end">&lt;|im_end|&gt;</b> learnt, never read</span><span><b class="right special">&lt;|im_start|&gt;</b> special token</span>
<span><b class="right"><i>␣</i>↵⇥</b> space, newline, tab</span></p>
<p class="quiet">Point at a token for its position, at a segment of a bar for its sample. A letter cut in several tokens shows as their bytes.</p>"""


def head(config: Config, data: Data, drawn: int) -> str:
    """What the page shows, and what was dropped on the way to it."""
    m, b = config.model, data.budget
    dropped = "; ".join(
        f"{name}: " + ", ".join(f"{reason} {n:,}" for reason, n in reasons.items())
        for name, reasons in by_source(+data.training.dropped).items()
    )
    budgets = (
        f"right {b.right:,}" if not b.left else f"left {b.left:,} (in steps of {b.unit}), right {b.right:,}"
    )
    facts = {
        "sources": config.data.sources,
        "records": ", ".join(f"{source.name} {len(source):,}" for source in data.training.sources),
        "drawn for this page": _count(drawn, "sample"),
        "dropped so far": dropped or "none",
        "images": f"tiles of {m.vision.image_size} × {m.vision.image_size} pixels, {m.tokens_per_tile} image tokens each"
        + (f", images up to {m.vision.max_side} pixels cut into tiles" if m.vision.max_side else ""),
        "goes left": {
            "image": "image blocks",
            "prefix": "all up to the last image token",
            "none": "nothing (vanilla)",
        }[m.left_context],
        "turns of a record": {
            "branch": "independent questions on the same images (branch)",
            "chain": "one conversation (chain)",
        }[config.data.turns],
        "budgets of a row": budgets + (f", at most {b.tiles} tiles" if b.tiles else ""),
    }
    rows = "".join(f"<dt>{_escape(name)}</dt><dd>{_escape(value)}</dd>" for name, value in facts.items())
    return f"<h1>{_escape(config.config)}</h1><p class='quiet'>Training samples as the model sees them, in the order of training.</p><dl>{rows}</dl>{LEGEND}"


def name_of(data: Data, sample: Sample) -> str:
    """The id of a sample's record, or its number."""
    number = f"record {sample.key[1]}"
    try:
        return str(data.training.record(*sample.key[:2]).get("id") or number)
    except UnreadableBlock:  # it was read when the sample was drawn
        return number


def page(config: Config, data: Data, samples: list[Sample], rows: list[Row], drawn: int) -> str:
    """Decoded samples and packed rows → a whole HTML page. Text of the data is escaped; the policy forbids scripts and fetches besides."""
    spelling = Spelling(data.tokenizer)
    cards = [card(i, s, name_of(data, s), spelling) for i, s in enumerate(samples, 1)]
    bars = [row_bars(i, row, data.budget) for i, row in enumerate(rows, 1)]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{_escape(config.config)}: data</title><style>{STYLE}</style></head><body>
<header>{head(config, data, drawn)}</header>
<h2>Samples</h2>{"".join(cards)}
<h2>Packed rows</h2><p class="quiet">One colour is one sample: its images in the left stream, its documents in the right one. Both bars have the same scale.</p>{"".join(bars)}
</body></html>
"""


def draw(data: Data, samples: int, rows: int) -> tuple[list[Sample], list[Row], int]:
    """The first samples and the first rows of training, decoded, without those whose images are damaged; and how many samples were drawn."""
    stream, decoder = data.batches.rows, Decoder(data.training)
    drawn: list[Sample] = []

    def remembered(source: Iterator[Sample]) -> Iterator[Sample]:
        for sample in source:
            drawn.append(sample)
            yield sample

    stream.pending = remembered(stream.pending)
    packed = [
        [made for sample in row if (made := decoder(sample)) is not None]
        for row in track_progress(stream, rows, "packing rows")
    ]
    shown: dict[Key, Sample] = {}
    at = 0
    while len(shown) < samples and (
        at < len(drawn) or stream.stream.epoch == 0
    ):  # a set of fewer samples is not shown twice
        if at == len(drawn):
            next(stream.pending)
        if (made := decoder(drawn[at])) is not None:
            shown.setdefault(made.key, made)
        at += 1
    if not shown:
        raise UserError(f"none of the images can be decoded: {by_source(+data.training.dropped)}")
    return list(shown.values()), packed, len(drawn)


def main(argv: list[str]) -> None:
    args, config, flags = arguments(argv, str(__doc__), OWN)
    torch.set_num_threads(1)  # tiles are small: threads only wait for one another
    from training.script import language_model, resolve_config

    config = resolve_config(config, flags)
    with TemporaryDirectory() as folder:
        data = build_data(config, Path(folder), language_model(config))
    samples, rows, drawn = draw(data, args.samples, args.rows)
    text = page(config, data, samples, rows, drawn)
    write_text(Path(args.output), text)
    print(
        f"{args.output}: {len(samples)} samples and {len(rows)} rows of {config.config}, {len(text) / 2**20:.1f} MB; open it in a browser"
    )


if __name__ == "__main__":
    run_script(main)
