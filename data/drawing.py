"""Drawings of texts, scenes, charts and tables, for data/synthetic.py.

A drawing is a function of plain values, so that the process that needs an image can draw it.
"""

from functools import cache
from importlib.util import find_spec
from math import cos, radians, sin
from pathlib import Path
from random import Random
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from utils.errors import UserError

SIDE = 256  # pixels; everything can be read at half of it
# matplotlib carries these fonts. With other fonts, the same record would have other images.
FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Italic",
    "DejaVuSansMono",
    "STIXGeneral",
)
COLOURS = {
    "red": "#d81e1e",
    "orange": "#ff8c00",
    "yellow": "#f2d600",
    "green": "#1e9632",
    "blue": "#1e50dc",
    "purple": "#82289b",
    "pink": "#ff8cc8",
    "black": "#000000",
}
SHAPES = {  # and their plurals
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "diamond": "diamonds",
    "cross": "crosses",
}


class Shape(NamedTuple):
    """A shape of a scene: its centre, and half of its height and width, in pixels."""

    kind: str
    colour: str
    x: int
    y: int
    radius: int


@cache
def load_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """Load a font of matplotlib. Errors: `UserError` if matplotlib is not installed."""
    spec = find_spec("matplotlib")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the source synthetic needs fonts of matplotlib, which is not installed (pip install matplotlib)"
        )
    path = Path(spec.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf" / f"{name}.ttf"
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def _blank(paper: str = "#ffffff") -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (SIDE, SIDE), paper)
    return image, ImageDraw.Draw(image)


def draw_text(
    text: str,
    font: str,
    size: int,
    angle: int,
    offset: tuple[float, float],
    ink: str,
    paper: str,
    noise: float,
) -> Image.Image:
    """Draw a text, rotated by `angle` degrees, smaller than `size` if it would not fit.

    `offset`: position in the free space, from 0 to 1. `noise`: share of grey noise in each pixel.
    """
    along, across = cos(radians(angle)), abs(sin(radians(angle)))
    length = load_font(font, size).getlength(text) + size / 2
    size = int(size * min(1, (SIDE - 8) / (length * along + 1.4 * size * across)))
    width, height = int(load_font(font, size).getlength(text) + size / 2), int(1.4 * size)
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).text(
        (width / 2, height / 2), text, fill=255, font=load_font(font, size), anchor="mm"
    )
    mask = mask.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    image, _ = _blank(paper)
    corner = int(offset[0] * (SIDE - mask.width)), int(offset[1] * (SIDE - mask.height))
    image.paste(ink, corner, mask)
    grain = Image.frombytes("L", (SIDE, SIDE), Random(text).randbytes(SIDE * SIDE))
    return Image.blend(image, grain.convert("RGB"), noise)


def draw_scene(shapes: list[Shape], paper: str) -> Image.Image:
    """Draw shapes."""
    image, draw = _blank(paper)
    for kind, colour, x, y, r in shapes:
        third = r // 3
        box, fill = (x - r, y - r, x + r, y + r), COLOURS[colour]
        if kind == "circle":
            draw.ellipse(box, fill)
        elif kind == "square":
            draw.rectangle(box, fill)
        elif kind == "triangle":
            draw.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill)
        elif kind == "diamond":
            draw.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], fill)
        else:
            draw.rectangle((x - third, y - r, x + third, y + r), fill)
            draw.rectangle((x - r, y - third, x + r, y + third), fill)
    return image


def draw_chart(labels: list[str], levels: list[int], unit: int, colours: list[str]) -> Image.Image:
    """Draw a chart of `levels` grid lines, each worth `unit`: bars, or a line if there is one colour."""
    image, draw = _blank()
    font, left, bottom, step, column = load_font(FONTS[0], 20), 40, 224, 24, 212 // len(labels)
    for level in range(9):
        y = bottom - level * step
        draw.line((left, y, SIDE - 4, y), "#b4b4b4" if level else "#000000", 2)
        if level % 2 == 0:
            draw.text((left - 6, y), str(level * unit), "#000000", font, "rm")
    points = [(left + column * n + column // 2, bottom - level * step) for n, level in enumerate(levels)]
    for label, (x, _) in zip(labels, points, strict=True):
        draw.text((x, bottom + 6), label, "#000000", font, "ma")
    if len(colours) > 1:
        for colour, (x, y) in zip(colours, points, strict=True):
            draw.rectangle((x - column // 3, y, x + column // 3, bottom - 1), COLOURS[colour])
        return image
    draw.line(points, COLOURS[colours[0]], 5)
    for x, y in points:
        draw.ellipse((x - 6, y - 6, x + 6, y + 6), COLOURS[colours[0]])
    return image


def draw_pie(slices: list[tuple[str, int, int]]) -> Image.Image:
    """Draw slices (colour, start, size), in tenths of the pie, and a tick at each tenth."""
    image, draw = _blank()
    middle, radius = SIDE // 2, 106
    box = (middle - radius, middle - radius, middle + radius, middle + radius)
    for colour, start, size in slices:
        draw.pieslice(box, 36 * start, 36 * (start + size), COLOURS[colour], "#ffffff")
    for tick in range(10):
        x, y = cos(radians(36 * tick)), sin(radians(36 * tick))
        draw.line([(middle + r * x, middle + r * y) for r in (radius + 3, radius + 16)], "#000000", 3)
    return image


def draw_table(rows: list[list[str]]) -> Image.Image:
    """Draw a table with a header."""
    image, draw = _blank()
    font = load_font(FONTS[0], 21)
    width, height = (SIDE - 8) // len(rows[0]), (SIDE - 8) // len(rows)
    for i, row in enumerate(rows):
        for j, cell in enumerate(row):
            x, y = 4 + j * width, 4 + i * height
            draw.rectangle((x, y, x + width, y + height), "#ffffff" if i and j else "#dce6f5", "#787878", 2)
            draw.text((x + width // 2, y + height // 2), cell, "#000000", font, "mm")
    return image
