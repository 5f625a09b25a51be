"""Draw the diagrams of the README and of docs/architecture.md.

  python -m tools.diagrams     → docs/two_towers.svg, docs/who_sees_whom.svg

The second one shows the real attention masks of a row: images A and B, two questions on A and one on B.
"""

from pathlib import Path

import torch
from torch import Tensor

from models.masks import left_mask, right_mask

DOCS = Path(__file__).resolve().parent.parent / "docs"
LEFT, RIGHT, KV, INK, QUIET = ("#1f5fa8", "#e9f1fb"), ("#2c7a4b", "#e8f5ec"), "#b4570c", "#4a5560", "#57606a"
LEFT_X, RIGHT_X, WIDE = 70, 585, 260  # x and width of the towers' boxes
CELL = 20  # side of a mask's cell


def svg(width: int, height: int, size: int, *parts: str) -> str:
    """Return an SVG file with `parts` on a white ground."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="{size}" fill="#1b1f24">'
    )
    ground = f'  <rect width="{width}" height="{height}" fill="#ffffff"/>'
    return "\n".join((head, ground, *(f"  {part}" for part in parts), "</svg>")) + "\n"


def text(x: float, y: float, words: str, anchor: str = "middle", **style: object) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{_attributes(style)}>{words}</text>'


def _attributes(style: dict[str, object]) -> str:
    return "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())


def box(x: int, y: int, words: str, colours: tuple[str, str], height: int = 30, **style: object) -> str:
    shape = (
        f'<rect x="{x}" y="{y}" width="{WIDE}" height="{height}" rx="6" stroke="{colours[0]}" '
        f'stroke-width="1.6" fill="{colours[1]}"{_attributes(style)}/>'
    )
    return shape + text(x + WIDE / 2, y + height / 2 + 5, words)


def arrow(path: str, colour: str = INK, width: float = 1.6) -> str:
    marker = "k" if colour == KV else "a"
    return f'<path d="{path}" stroke="{colour}" stroke-width="{width}" marker-end="url(#{marker})"/>'


def two_towers() -> str:
    """Draw the two towers; image and text enter at the bottom."""
    middle_left, middle_right, between = LEFT_X + WIDE // 2, RIGHT_X + WIDE // 2, 457
    heads = [
        f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0 0 10 5 0 10z" fill="{colour}"/></marker>'
        for name, colour in (("a", INK), ("k", KV))
    ]
    left = [
        box(LEFT_X, 290, "vision encoder (timm)", LEFT, 38),
        box(LEFT_X, 236, "pixel shuffle → linear", LEFT, 38),
    ]
    left += [
        box(LEFT_X, 160, "decoder block 1", LEFT),
        box(LEFT_X, 118, "decoder block 2 …", LEFT),
        box(LEFT_X, 76, "last block: keys and values only", LEFT, stroke_dasharray="5 3"),
    ]
    right = [
        box(RIGHT_X, 290, "token embedding", RIGHT, 38),
        box(RIGHT_X, 160, "decoder block 1", RIGHT),
        box(RIGHT_X, 118, "decoder block 2 …", RIGHT),
    ]
    right += [box(RIGHT_X, 76, "last block → LM head", RIGHT)]
    words = [
        text(middle_left, 32, "left tower", font_size=19, font_weight="bold", fill=LEFT[0]),
        text(middle_right, 32, "right tower", font_size=19, font_weight="bold", fill=RIGHT[0]),
        text(middle_left, 362, "image: encoded once"),
        text(middle_right, 362, "“what color is the circle?”  →  “teal”"),
        text(between, 58, "image KV", font_weight="bold", fill=KV),
        *(
            text(between, y, line, font_size=13, fill=KV)
            for y, line in (
                (214, "keys (before rotary) and values of every layer,"),
                (231, "read by any number of questions"),
            )
        ),
        *(
            text(between, y, line, font_size=13, fill=QUIET)
            for y, line in (
                (290, "text queries see the image"),
                (307, "and earlier text of their own"),
                (324, "conversation, nothing else"),
            )
        ),
        text(884, 96, "text", "start", font_size=13, fill=INK),
    ]
    up = [f"M{middle_left} {a}V{b}" for a, b in ((346, 330), (290, 276), (236, 192), (160, 150), (118, 108))]
    up += [f"M{middle_right} {a}V{b}" for a, b in ((346, 330), (290, 192), (160, 150), (118, 108))]
    arrows = [arrow(path) for path in (*up, f"M{RIGHT_X + WIDE} 91H880")] + [
        arrow(f"M{LEFT_X + WIDE} {y}H{RIGHT_X - 2}", KV, 2.2) for y in (175, 133, 91)
    ]
    return svg(920, 400, 15, f"<defs>{''.join(heads)}</defs>", *left, *right, *words, *arrows)


def grid(
    x: int, y: int, title: str, seen: Tensor, rows: list[str], columns: list[str], split: int
) -> list[str]:
    """Draw a mask (queries, keys) as labelled cells; keys before `split` are the left tower's."""
    parts = [text(x, y - 34, title, "start", font_size=14, font_weight="bold")]
    parts += [
        text(x + CELL * (j + 0.5), y - 8, name, font_size=11, fill=LEFT[0] if j < split else RIGHT[0])
        for j, name in enumerate(columns)
    ]
    parts += [
        text(x - 8, y + CELL * (i + 0.5) + 4, name, "end", font_size=11, fill=QUIET)
        for i, name in enumerate(rows)
    ]
    for i, row in enumerate(seen.tolist()):
        for j, on in enumerate(row):
            fill = (LEFT[0] if j < split else RIGHT[0]) if on else "#f1f0ec"
            at = f'x="{x + CELL * j}" y="{y + CELL * i}"'
            parts.append(f'<rect {at} width="{CELL - 2}" height="{CELL - 2}" rx="3" fill="{fill}"/>')
    return parts


def who_sees_whom() -> str:
    """Draw both attention masks of one row.

    Every document begins with one text token. Image A has positions 1 to 3, image B positions 1 and 2.
    """
    # Per token: (position, group, image) in the left stream, (position, document, group) in the right one.
    left = torch.tensor([(1, 0, 0), (2, 0, 0), (3, 0, 0), (1, 1, 1), (2, 1, 1)]).T[:, None]
    right = torch.tensor(
        [(0, 0, 0), (4, 0, 0), (5, 0, 0), (0, 1, 0), (4, 1, 0), (0, 2, 1), (3, 2, 1), (4, 2, 1)]
    ).T[:, None]
    images = [*(f"A{i}" for i in (1, 2, 3)), *(f"B{i}" for i in (1, 2))]
    texts = [
        f"{'abc'[document]}{position}" for position, document in zip(*right[:2, 0].tolist(), strict=True)
    ]
    one = left_mask(*left, isolation=True, attention="bidirectional").dense()[0, 0]
    other = right_mask(*right, left[0], left[1]).dense()[0, 0]
    parts = grid(60, 70, "left tower: images", one, images, images, len(images))
    parts += grid(270, 70, "right tower: image KV, then text", other, texts, [*images, *texts], len(images))
    notes = (
        "a line is a query, a column a key",
        "a, b: two questions on image A",
        "c: a question on image B",
        "the number is the position",
    )
    parts += [text(560, 96 + 22 * i, line, "start", font_size=13, fill=QUIET) for i, line in enumerate(notes)]
    return svg(780, 250, 14, *parts)


DIAGRAMS = {"two_towers.svg": two_towers, "who_sees_whom.svg": who_sees_whom}

if __name__ == "__main__":
    for name, draw in DIAGRAMS.items():
        (DOCS / name).write_text(draw(), encoding="utf-8")
        print(DOCS / name)
