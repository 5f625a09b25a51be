"""Draw small charts as Pillow images: grids of numbers, curves, predicted tokens.

The notebook shows all of them, a model card its loss curve, and validation its predicted tokens.
"""

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
    "#8a8f98",  # all further sources
]
INK, QUIET, GRID = "#2b2e34", "#6b7078", "#e6e6e3"
EMPTY, RIGHT, WRONG = "#f1f0ec", "#cfe8d2", "#f4cccc"


def cells(title: str, numbers: Tensor, width: int = 4, height: int = 4) -> Image.Image:
    """Draw integers (rows, columns) as boxes of `width` × `height` pixels under a title.

    A number n has colour n modulo the length of PALETTE; −1 is drawn empty.
    """
    # EMPTY comes last, where the index −1 points.
    colours = np.array([tuple(bytes.fromhex(colour[1:])) for colour in (*PALETTE, EMPTY)], np.uint8)
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
    """Draw lines, name → (x, y), on one pair of axes.

    The y axis goes from 0 to the next whole number above the highest value. Raises ValueError without
    values, or if one is negative or not finite.
    """
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
    """Draw true and predicted tokens of answers, aligned token by token.

    An answer is (question, true tokens, predictions); predictions hold one list per name in `names`. A
    predicted token is green if it equals the true one, else red; None is left out. Long answers are broken
    into lines.
    """
    high, left, pad = 20, 60, 4
    layouts = [_token_lines(truth, predictions, width, left, pad) for _, truth, predictions in answers]
    block = high * (1 + len(names)) + 6
    sheet = Image.new("RGB", (width, 8 + sum(24 + block * len(lines) for lines in layouts)), "white")
    draw, y = ImageDraw.Draw(sheet), 8
    for (question, truth, predictions), lines in zip(answers, layouts, strict=True):
        draw.text((4, y), question if len(question) < 140 else "…" + question[-138:], fill=INK, font_size=13)
        y += 20
        for line in lines:
            for row, name in enumerate(["true", *names]):
                draw.text((4, y + row * high + 3), name, fill=QUIET, font_size=12)
                x = left
                for i, wide in line:
                    text = truth[i] if row == 0 else predictions[row - 1][i]
                    if text is not None:
                        fill = EMPTY if row == 0 else RIGHT if text == truth[i] else WRONG
                        draw.rectangle((x, y + row * high, x + wide - 2, y + (row + 1) * high - 2), fill=fill)
                        draw.text((x + pad, y + row * high + 3), text, fill=INK, font_size=12)
                    x += wide
            y += block
        y += 4
    return sheet


def _token_lines(
    truth: list[str], predictions: list[list[str | None]], width: int, left: int, pad: int
) -> list[list[tuple[int, int]]]:
    """Break an answer into lines of (token index, width in pixels) that fit between `left` and `width`."""
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    lines: list[list[tuple[int, int]]] = [[]]
    for i, token in enumerate(truth):
        texts = (token, *(row[i] or "" for row in predictions))
        wide = 2 * pad + math.ceil(max(ruler.textlength(text, font_size=12) for text in texts))
        if lines[-1] and left + sum(w for _, w in lines[-1]) + wide > width:
            lines.append([])
        lines[-1].append((i, min(wide, width - left)))
    return lines


def stacked(images: Sequence[Image.Image]) -> Image.Image:
    """Place images one below the other, on white."""
    sheet = Image.new("RGB", (max(p.width for p in images), sum(p.height for p in images)), "white")
    y = 0
    for image in images:
        sheet.paste(image, (0, y))
        y += image.height
    return sheet


def nice_step(span: float, steps: int) -> int:
    """The smallest of 1, 2, 5, 10, 20, … that divides `span` into at most `steps`."""
    scale = 1
    while True:
        for digit in (1, 2, 5):
            if digit * scale * steps >= span:
                return digit * scale
        scale *= 10


def _titled(title: str, picture: Image.Image) -> Image.Image:
    """Put a title on a white line above a picture; the sheet is as wide as the wider of both."""
    text = math.ceil(ImageDraw.Draw(picture).textlength(title, font_size=14))
    sheet = Image.new("RGB", (max(picture.width, text), picture.height + 24), "white")
    ImageDraw.Draw(sheet).text((0, 2), title, fill=INK, font_size=14)
    sheet.paste(picture, (0, 24))
    return sheet
