"""The source synthetic: answers against what the pixels show, splits apart, accuracy by skill."""

import hashlib
import pickle
import re
import sys
from collections import Counter
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest

from configs.train import DataConfig
from data.conversations import text_of
from data.images import image_size, open_pixels
from data.mixture import Mixture
from data.sources import open_sources, parse_sources
from utils.errors import UsageError, UserError

pytest.importorskip("matplotlib", reason="the group synthetic is not installed")

from data import synthetic
from data.drawing import COLOURS, SHAPES, SIDE, load_font
from data.synthetic import SKILLS, SyntheticRecords


def records_of(skill: str, count: int, split: str = "train") -> list[dict]:
    return list(SyntheticRecords(split, count, [skill]))


def questions_of(record: dict) -> list[tuple[str, str, str]]:
    """System message, question and answer of each conversation."""
    return [
        (text_of(messages[0]) if messages[0]["role"] == "system" else "", *map(text_of, messages[-2:]))
        for messages in record["conversations"]
    ]


class Seen(NamedTuple):
    """A shape, as the pixels show it."""

    kind: str
    colour: str
    x: float
    y: float
    width: int


def shapes_in(image) -> list[Seen]:
    """Find the shapes of a scene: connected pixels of one of the colours, named by their outline."""
    pixels = np.asarray(image)[::2, ::2]  # as in a tile of 128 pixels
    shapes = []
    for colour, code in COLOURS.items():
        rgb = [int(code[i : i + 2], 16) for i in (1, 3, 5)]
        left = set(zip(*map(np.ndarray.tolist, np.nonzero((pixels == rgb).all(-1))), strict=True))
        while left:
            part, waiting = [], [left.pop()]
            while waiting:
                y, x = waiting.pop()
                part.append((y, x))
                near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & left
                left -= near
                waiting += near
            shapes.append(named(np.array(part), colour))
    return shapes


def named(part: np.ndarray, colour: str) -> Seen:
    (top, left), (bottom, right) = part.min(0), part.max(0)
    width, height = right - left + 1, bottom - top + 1
    assert abs(width - height) <= 2, "a shape is whole, and apart from all others"
    upper, lower = ((part[:, 0] == row).sum() / width for row in (top, bottom))
    fill = len(part) / (width * height)
    if lower > 0.9:
        kind = "square" if upper > 0.9 else "triangle"
    elif fill > 0.7:
        kind = "circle"
    else:
        kind = "cross" if upper > 0.2 else "diamond"
    return Seen(kind, colour, (left + right) / 2, (top + bottom) / 2, width)


def answer_from(scenes: list[list[Seen]], text: str) -> str:
    """Answer a question about scenes from what is seen."""
    of = {shape.kind: shape for shape in scenes[0]}
    kinds = [kind for kind in re.findall(r"\w+", text) if kind in SHAPES]
    colour = next((word for word in re.findall(r"\w+", text) if word in COLOURS), "")
    if match := re.match("How many (.*) are there", text):
        what = match[1].split()[0]
        return str(sum(what in ("shapes", s.colour, SHAPES[s.kind]) for s in scenes[0]))
    if text.startswith("How many shapes are in the second image"):
        return str(len(scenes[1]))
    if text.startswith("Which image"):
        numbers = [sum(not colour or s.colour == colour for s in scene) for scene in scenes]
        assert numbers[0] != numbers[1]
        return "first" if numbers[0] > numbers[1] else "second"
    if text.startswith("Which is larger"):
        a, b = (of[kind].width for kind in kinds)
        assert max(a, b) > 1.3 * min(a, b)
        return kinds[0] if a > b else kinds[1]
    if text.startswith("What colour"):
        return of[kinds[0]].colour
    fact = {
        "same colour": lambda: of[kinds[0]].colour == of[kinds[1]].colour,
        "left of": lambda: of[kinds[0]].x < of[kinds[1]].x - 10,
        "above": lambda: of[kinds[0]].y < of[kinds[1]].y - 10,
        "equal": lambda: scenes[0] == scenes[1],
    }
    return "yes" if next(fact[key] for key in fact if key in text)() else "no"


@pytest.mark.parametrize("skill", ["count", "relate", "compare"])
def test_answers_about_scenes_are_what_the_pixels_show(skill):
    for record in records_of(skill, 25):
        scenes = [sorted(shapes_in(image())) for image in record["images"]]
        for _, text, answer in questions_of(record):
            assert answer == answer_from(scenes, text), (record["id"], text)


def test_answers_follow_the_system_message():
    seen = set()
    for record in records_of("instruct", 25):
        (image,) = record["images"]
        scenes = [shapes_in(image())]
        for system, text, answer in questions_of(record):
            colour = answer_from(scenes, text)
            choice = re.search(rf"([ABC])\) {colour}\b", text)
            kind = next(word for word in re.findall(r"\w+", text) if word in SHAPES)
            expected = {
                "": colour,
                "Answer in capitals.": colour.upper(),
                "Say the answer twice.": f"{colour} {colour}",
                "Answer in a sentence.": f"The {kind} is {colour}.",
                "Answer with one letter.": choice and choice[1],
            }
            assert answer == expected[system]
            seen.add(system)
    assert len(seen) == 5


def chart_values(image: partial) -> dict[str, int]:
    """Labels, from the drawing's arguments, and their values, from the height of the pixels."""
    labels, _, unit, _ = image.args
    rgb = np.asarray(image()).astype(int)
    coloured = np.ptp(rgb, axis=-1) > 30
    coloured |= rgb.sum(-1) < 30
    values = {}
    for n, label in enumerate(labels):
        middle = round(40 + (212 / len(labels)) * (n + 0.5))
        top = np.nonzero(coloured[:235, middle])[0]  # above the labels
        values[label] = round((224 - top.min()) / 24 - 0.05) * unit
    return values


@pytest.mark.parametrize("skill", ["bars", "curve", "pie"])
def test_answers_about_charts_are_what_the_pixels_show(skill):
    for record in records_of(skill, 25):
        (image,) = record["images"]
        if skill == "pie":
            pixels = np.asarray(image())
            ticks = 10 * 14 * 3  # pixels, all black
            areas = {
                colour: int((pixels == [int(code[i : i + 2], 16) for i in (1, 3, 5)]).all(-1).sum())
                for colour, code in COLOURS.items()
            }
            areas["black"] = max(0, areas["black"] - ticks)
            tenths = {c: round(10 * n / sum(areas.values())) for c, n in areas.items()}
            values = {colour: 10 * n for colour, n in tenths.items() if n}
        else:
            values = chart_values(image)
        assert len(set(values.values())) == len(values)
        for _, text, answer in questions_of(record):
            labels = sorted((label for label in values if label in text), key=text.index)
            numbers = [values[label] for label in labels]
            if "largest" in text or "smallest" in text:
                assert answer == (max if "largest" in text else min)(values, key=values.__getitem__)
            elif "difference" in text:
                assert int(answer) == abs(numbers[0] - numbers[1])
            elif "rise" in text:
                assert answer == ("yes" if numbers[0] < numbers[1] else "no")
            else:
                assert int(answer) == numbers[0]


def test_answers_about_tables_are_in_the_cells():
    for record in records_of("table", 40):
        (image,) = record["images"]
        header, *rows = image.args[0]
        for _, text, answer in questions_of(record):
            column = next(i for i, name in enumerate(header) if name and f" {name}" in text)
            if "highest" in text:
                assert answer == max(rows, key=lambda row: int(row[column]))[0]
            else:
                assert answer == next(row[column] for row in rows if row[0] in text)


@pytest.mark.parametrize("skill", ["word", "line", "number"])
def test_texts_are_whole_and_large_enough(skill):
    for record in records_of(skill, 25):
        (image,) = record["images"]
        assert image.args[0] == questions_of(record)[0][2]
        pixels = np.asarray(partial(image, noise=0.0)()).astype(int)
        ink = np.abs(pixels - pixels[0, 0]).sum(-1) > 60
        border = ink[0].any() or ink[-1].any() or ink[:, 0].any() or ink[:, -1].any()
        rows, columns = np.nonzero(ink)
        assert not border and np.ptp(rows) > 20 and np.ptp(columns) > 40, record["id"]


def test_a_record_depends_on_its_name_alone():
    """The digest is of contents and questions: the pixels of a letter change with Pillow's FreeType."""
    records = SyntheticRecords("train", 1000, list(SKILLS))
    again = SyntheticRecords("train", 2000, list(SKILLS))
    digest = hashlib.blake2b(digest_size=8)
    for number in (500, *range(22)):
        first, second = records[number], again[number]
        assert first["conversations"] == second["conversations"] and first["id"] == second["id"]
        images = zip(first["images"], second["images"], strict=True)
        assert all(a().tobytes() == pickle.loads(pickle.dumps(b))().tobytes() for a, b in images)
        drawings = [(image.args, image.keywords) for image in first["images"]]
        digest.update(repr((drawings, first["conversations"])).encode())
    assert digest.hexdigest() == "b398ef3c5f60f8be"
    (image,) = records[0]["images"]
    assert image_size(image) == (SIDE, SIDE) and open_pixels(image).shape == (3, SIDE, SIDE)
    with pytest.raises(IndexError):
        records[1000]


def appearance(record: dict) -> tuple:
    """What a reader sees, less colours and fonts where these do not matter: equal for equal contents."""
    answers = tuple(answer for _, _, answer in questions_of(record))
    skill = record["skill"]
    if skill in ("word", "line", "number"):
        return (answers[0],)
    if skill in ("bars", "curve"):
        return tuple(map(repr, record["images"][0].args[:3]))
    paper = {0: "#ffffff"} if skill in ("pie", "table") else {}
    images = [image if paper else partial(image.func, image.args[0], "#ffffff") for image in record["images"]]
    return tuple(hashlib.blake2b(image().tobytes()).digest() for image in images)


@pytest.mark.parametrize("skill", SKILLS)
def test_splits_share_no_content(skill):
    seen = {
        split: {appearance(record) for record in records_of(skill, 100, split)}
        for split in ("train", "validation", "test")
    }
    assert not seen["train"] & (seen["validation"] | seen["test"]) and not seen["validation"] & seen["test"]
    assert min(map(len, seen.values())) > 80


def test_a_pie_has_one_content_however_it_is_drawn():
    """Slices in another order, from another start, are the same picture: a hash of the calls would differ."""
    rng = synthetic.Random(0)
    by_picture: dict[bytes, set[str]] = {}
    for _ in range(200):
        draft = synthetic.pie(rng)
        by_picture.setdefault(draft.images[0]().tobytes(), set()).add(repr(draft.content))
    assert max(map(len, by_picture.values())) == 1


def test_every_skill_is_a_sub_set_with_an_equal_share():
    training, validation = open_sources(DataConfig(sources="synthetic:20,easy_vqa", validation_images=200))
    names = [*SKILLS, "easy_vqa"]
    assert [s.name for s in training] == [s.name for s in validation] == names
    assert {len(s) for s in training[:-1]} == {synthetic.RECORDS}
    assert [len(s) for s in validation] == [19] * len(SKILLS) + [200]  # 200 records of each set
    which, record, _ = Mixture(training, 0).epoch(0)
    assert Counter(which.tolist()) == dict(enumerate([20] * len(SKILLS) + [3800]))
    assert all(
        training[w].records[r]["skill"] == names[w] for w, r in zip(which, record, strict=True) if w < 11
    )
    assert {r["skill"] for r in SyntheticRecords("test", len(SKILLS), list(SKILLS))} == set(SKILLS)
    (one,), (held_out,) = open_sources(DataConfig(sources="synthetic/count*0.5"))
    assert (one.name, one.weight, len(held_out)) == ("count", 0.5, 200)
    assert "/train/" in one.records[7]["id"] and "/validation/" in held_out.records[7]["id"]


def test_no_answer_can_be_guessed():
    """The most frequent answer to a question of one form is right in at most 70 %."""
    for skill in SKILLS:
        answers: dict[str, Counter] = {}
        for record in records_of(skill, 300):
            for system, text, answer in questions_of(record):
                answers.setdefault(f"{system} {text.split()[0]} {text.split()[1]}", Counter())[answer] += 1
        for form, counts in answers.items():
            assert counts.most_common(1)[0][1] <= 0.7 * counts.total(), (skill, form, counts)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ("synthetic/cuont", "no sub-set 'cuont' in synthetic .did you mean 'count'"),
        ("synthetic=here", "synthetic takes no path"),
        ("syntetic", "no source 'syntetic' .did you mean 'synthetic'"),
        ("synthetic/count,synthetic/count*2", "synthetic/count is listed twice"),
    ],
)
def test_a_bad_setting_gets_one_line(sources, message):
    with pytest.raises(UsageError, match=message):
        parse_sources(sources)


def test_a_skill_is_listed_once():
    with pytest.raises(UsageError, match="data.sources: synthetic/count is listed twice"):
        open_sources(DataConfig(sources="synthetic,synthetic/count"))


def test_missing_fonts_get_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    load_font.cache_clear()
    with pytest.raises(UserError, match="needs fonts of matplotlib.*pip install matplotlib"):
        open_sources(DataConfig(sources="synthetic"))
