"""Small pictures of numbers, as Pillow images: what stands where in a grid, curves, tokens. `e2e_dual_tower.ipynb` shows them, a model card its loss, validation its tokens."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

PALETTE = [
    "#4c78a8",
    "#f2a154",
    "#6aa56f",
    "#c8626a",
    "#8f78b5",
    "#8c6d5a",
    "#d98bb3",
    "#8a8f98",
]  # the last: all further sources
INK, QUIET, GRID = "#2b2e34", "#6b7078", "#e6e6e3"
EMPTY, RIGHT, WRONG = "#f1f0ec", "#cfe8d2", "#f4cccc"


def cells(title: str, numbers: Tensor, width: int = 4, height: int = 4) -> Image.Image:
    """Integers (rows, columns) as boxes of `width` × `height` pixels under a title: a number's colour is PALETTE's, again and again; −1 is no colour."""
    colours = np.array(
        [tuple(bytes.fromhex(colour[1:])) for colour in (*PALETTE, EMPTY)], np.uint8
    )  # the last one, where −1 points
    grid = numbers.cpu().numpy()
    boxes = colours[np.where(grid < 0, -1, grid % len(PALETTE))]  # (rows, columns, 3)
    picture = Image.fromarray(boxes.repeat(height, 0).repeat(width, 1))
    return _titled(title, picture)


def curves(
    title: str,
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    width: int = 640,
    height: int = 240,
) -> Image.Image:
    """Name → (x, y), drawn over one pair of axes; y starts at 0 and ends at the next whole number above the highest value. Values must be finite and not below 0."""
    xs, ys = ([value for line in lines.values() for value in line[axis]] for axis in (0, 1))
    if not ys or not all(0 <= y < math.inf for y in ys):
        raise ValueError(f"{title}: curves need values, none of them below 0 or infinite")
    first, last, top = min(xs), max(xs), math.ceil(max(ys)) or 1
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    left, upper, right, lower = 44, 12, width - 16, height - 24
    across, down = (right - left) / (last - first or 1), (lower - upper) / top
    for i in range(5):
        y = lower - down * top * i / 4
        draw.line((left, y, right, y), fill=GRID if i else QUIET)
        draw.text((left - 6, y), f"{top * i / 4:g}", fill=QUIET, font_size=12, anchor="rm")
    step = nice_step(last - first, 8)
    for x in range(-(-math.ceil(first) // step) * step, math.floor(last) + 1, step):
        draw.text((left + across * (x - first), lower + 6), f"{x:,}", fill=QUIET, font_size=12, anchor="ma")
    for i, (name, (x, y)) in enumerate(lines.items()):
        colour = PALETTE[i % len(PALETTE)]
        points = [(left + across * (a - first), lower - down * b) for a, b in zip(x, y, strict=True)]
        draw.line(points, fill=colour, width=2)
        for a, b in points if len(points) <= 40 else ():
            draw.ellipse((a - 3, b - 3, a + 3, b + 3), fill=colour)
        draw.text((right - 4, upper + 4 + 16 * i), name, fill=colour, font_size=13, anchor="ra")
    return _titled(title, picture)


def agreement(
    answers: Sequence[tuple[str, list[str], list[list[str | None]]]], names: list[str], width: int = 960
) -> Image.Image:
    """Answers token by token: question, true tokens, and below each what `names` said: green where it is the true one, red where not, nothing where it is None. Long answers are broken into lines."""
    high, left, pad = 20, 60, 4
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    drawn: list[
        tuple[str, list[list[tuple[int, int]]], list[str], list[list[str | None]]]
    ] = []  # question, lines of (token, width), truth, said
    for question, truth, said in answers:
        lines: list[list[tuple[int, int]]] = [[]]
        for i, token in enumerate(truth):
            wide = 2 * pad + math.ceil(
                max(ruler.textlength(text, font_size=12) for text in (token, *(row[i] or "" for row in said)))
            )
            if lines[-1] and left + sum(w for _, w in lines[-1]) + wide > width:
                lines.append([])
            lines[-1].append((i, min(wide, width - left)))
        drawn.append((question, lines, truth, said))
    block = high * (1 + len(names)) + 6
    sheet = Image.new("RGB", (width, 8 + sum(24 + block * len(lines) for _, lines, _, _ in drawn)), "white")
    draw, y = ImageDraw.Draw(sheet), 8
    for question, lines, truth, said in drawn:
        draw.text((4, y), question if len(question) < 140 else "…" + question[-138:], fill=INK, font_size=13)
        y += 20
        for line in lines:
            for row, name in enumerate(["true", *names]):
                draw.text((4, y + row * high + 3), name, fill=QUIET, font_size=12)
                x = left
                for i, wide in line:
                    text = truth[i] if row == 0 else said[row - 1][i]
                    if text is not None:
                        fill = EMPTY if row == 0 else RIGHT if text == truth[i] else WRONG
                        draw.rectangle((x, y + row * high, x + wide - 2, y + (row + 1) * high - 2), fill=fill)
                        draw.text((x + pad, y + row * high + 3), text, fill=INK, font_size=12)
                    x += wide
            y += block
        y += 4
    return sheet


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """One below the other, on white."""
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    y = 0
    for picture in pictures:
        sheet.paste(picture, (0, y))
        y += picture.height
    return sheet


def nice_step(span: float, steps: int) -> int:
    """The least of 1, 2, 5, 10, 20, … that divides `span` into at most `steps`."""
    scale = 1
    while True:
        for digit in (1, 2, 5):
            if digit * scale * steps >= span:
                return digit * scale
        scale *= 10


def _titled(title: str, picture: Image.Image) -> Image.Image:
    """A white line of text over a picture; as wide as either needs."""
    text = math.ceil(ImageDraw.Draw(picture).textlength(title, font_size=14))
    sheet = Image.new("RGB", (max(picture.width, text), picture.height + 24), "white")
    ImageDraw.Draw(sheet).text((0, 2), title, fill=INK, font_size=14)
    sheet.paste(picture, (0, 24))
    return sheet
