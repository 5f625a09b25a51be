"""The embedded set synthetic: questions about drawn images with exact answers; every skill is a sub-set.

It stands for what FigureQA, DVQA, CLEVR and rendered_text are inside The Cauldron. A record is drawn from its
skill, split and number when it is asked for; nothing is stored.

Training, validation and test are disjoint by construction. The content of a record is what its questions are
about: a text, a scene, or values. Font, colours and noise of a text do not count. The hash of a content
belongs to one split (8:1:1), and a record's content is drawn again until it belongs to the record's split.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise, permutations
from random import Random
from typing import Any, Literal, NamedTuple

from PIL import Image

from data.conversations import ask
from data.drawing import (
    COLOURS,
    FONTS,
    SHAPES,
    SIDE,
    Shape,
    draw_chart,
    draw_pie,
    draw_scene,
    draw_table,
    draw_text,
    load_font,
)
from data.formats import Record

Split = Literal["train", "validation", "test"]

RECORDS = 100_000  # of each skill and split
FOODS = ("kiwi", "plum", "pear", "lime", "fig", "corn", "bean", "rice", "leek", "oats", "nuts", "peas")
COLUMNS = ("cost", "mass", "size", "age")
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
CONSONANTS, VOWELS = "bdfgklmnprstv", "aeiou"


class Question(NamedTuple):
    text: str
    answer: str
    system: str = ""


class Draft(NamedTuple):
    """What a skill draws: `content` decides the split; each of `images` draws an image when it is called."""

    content: Any
    images: list[Callable[[], Image.Image]]
    questions: list[Question]


class SyntheticRecords(Sequence[Record]):
    """Records of a split; successive ones are of successive `skills`."""

    def __init__(self, split: Split, size: int, skills: Sequence[str]) -> None:
        self.split, self.size, self.skills = split, size, skills
        load_font(FONTS[0], 20)  # raises if the fonts are missing

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]
        if not 0 <= index < self.size:
            raise IndexError(index)
        skill, number = self.skills[index % len(self.skills)], index // len(self.skills)
        name = f"synthetic/{skill}/{self.split}/{number}"
        rng = Random(name)
        draft = SKILLS[skill](rng)
        while split_of(draft.content) != self.split:
            draft = SKILLS[skill](rng)
        conversations = [
            [*ask(question.text, system=question.system), {"role": "assistant", "content": question.answer}]
            for question in draft.questions
        ]
        return {"images": draft.images, "conversations": conversations, "id": name, "skill": skill}


def split_of(content: Any) -> Split:
    """Return the split to which a content belongs."""
    share = hashlib.blake2b(repr(content).encode(), digest_size=4).digest()
    split: dict[int, Split] = {0: "test", 1: "validation"}
    return split.get(int.from_bytes(share) % 10, "train")


def _style(rng: Random, size: tuple[int, int], angle: int) -> dict[str, Any]:
    """Draw how a text looks, dark on light or light on dark."""
    ink, paper = (
        "#" + "".join(f"{rng.randint(*bounds):02x}" for _ in range(3)) for bounds in ((0, 90), (190, 255))
    )
    if rng.random() < 0.3:
        ink, paper = paper, ink
    return {
        "font": rng.choice(FONTS),
        "size": rng.randint(*size),
        "angle": rng.randint(-angle, angle),
        "offset": (rng.random(), rng.random()),
        "noise": rng.choice((0.0, 0.15, 0.3)),
        "ink": ink,
        "paper": paper,
    }


def _word(rng: Random, syllables: int) -> str:
    """Draw a word that no language model has read: it must be read letter by letter."""
    end = rng.choice(CONSONANTS) if rng.random() < 0.5 else ""
    return "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(syllables)) + end


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


def word(rng: Random) -> Draft:
    text = _word(rng, rng.randint(2, 3))
    image = partial(draw_text, text, **_style(rng, (44, 72), 30))
    return Draft(text, [image], [Question("What is the word?", text)])


def line(rng: Random) -> Draft:
    words = [_word(rng, rng.randint(1, 2)) for _ in range(3)]
    text, index = " ".join(words), rng.randrange(3)
    image = partial(draw_text, text, **_style(rng, (32, 44), 8))
    ordinal = ("first", "second", "third")[index]
    questions = [
        Question("What is the text?", text),
        Question(f"What is the {ordinal} word?", words[index]),
    ]
    return Draft(text, [image], questions)


def number(rng: Random) -> Draft:
    digits = rng.randint(2, 5)
    text = str(rng.randrange(10 ** (digits - 1), 10**digits))
    if rng.random() < 0.3:
        text = f"{text[:-1]}.{text[-1]}"
    image = partial(draw_text, text, **_style(rng, (44, 80), 30))
    return Draft(text, [image], [Question("What is the number?", text)])


def _scene(
    rng: Random, kinds: Sequence[str], colours: Sequence[str], grid: int, radii: Sequence[int]
) -> list[Shape]:
    """Place shapes in different cells of a grid: none touches another."""
    cell, slack = SIDE // grid, SIDE // grid // 2 - max(radii) - 4
    return [  # in the order of `kinds`
        Shape(
            kind,
            rng.choice(colours),
            index % grid * cell + cell // 2 + rng.randint(-slack, slack),
            index // grid * cell + cell // 2 + rng.randint(-slack, slack),
            rng.choice(radii),
        )
        for kind, index in zip(kinds, rng.sample(range(grid * grid), len(kinds)), strict=True)
    ]


def _drawn(rng: Random, *scenes: list[Shape]) -> list[Callable[[], Image.Image]]:
    paper = rng.choice(("#ffffff", "#f5f0e1", "#e1ebf5", "#dcdcdc"))
    return [partial(draw_scene, shapes, paper) for shapes in scenes]


def count(rng: Random) -> Draft:
    kinds, colours = rng.sample(list(SHAPES), 2), rng.sample(list(COLOURS), 3)
    shapes = _scene(rng, rng.choices(kinds, k=rng.randint(1, 9)), colours, 4, (16, 20, 24))
    kind, colour = rng.choice(kinds), rng.choice(colours)
    questions = [
        Question("How many shapes are there?", str(len(shapes))),
        Question(f"How many {SHAPES[kind]} are there?", str(sum(s.kind == kind for s in shapes))),
        Question(f"How many {colour} shapes are there?", str(sum(s.colour == colour for s in shapes))),
    ]
    return Draft(sorted(shapes), _drawn(rng, shapes), questions)


def relate(rng: Random) -> Draft:
    kinds, colours = rng.sample(list(SHAPES), rng.randint(3, 5)), rng.sample(list(COLOURS), 2)
    shapes = _scene(rng, kinds, colours, 3, (14, 23, 36))
    pairs = list(permutations(shapes, 2))
    a, b = rng.choice(pairs)
    questions = [
        Question(f"Do the {a.kind} and the {b.kind} have the same colour?", _yes(a.colour == b.colour))
    ]
    for axis, relation in (("x", "left of"), ("y", "above")):
        if apart := [(a, b) for a, b in pairs if abs(getattr(a, axis) - getattr(b, axis)) > SIDE // 6]:
            a, b = rng.choice(apart)
            answer = _yes(getattr(a, axis) < getattr(b, axis))
            questions.append(Question(f"Is the {a.kind} {relation} the {b.kind}?", answer))
    if unequal := [(a, b) for a, b in pairs if a.radius != b.radius]:
        a, b = rng.choice(unequal)
        larger = max(a, b, key=lambda shape: shape.radius).kind
        questions.append(Question(f"Which is larger, the {a.kind} or the {b.kind}?", larger))
    return Draft(sorted(shapes), _drawn(rng, shapes), questions)


def _extremes(rng: Random, values: dict[str, int]) -> list[Question]:
    """Ask about labelled values of which no two are equal."""
    a, b = rng.sample(list(values), 2)
    name, choose = rng.choice((("largest", max), ("smallest", min)))
    return [
        Question(f"Which is the {name}?", choose(values, key=lambda label: values[label])),
        Question(f"What is the difference between {a} and {b}?", str(abs(values[a] - values[b]))),
    ]


def bars(rng: Random) -> Draft:
    labels, unit = rng.sample(FOODS, rng.randint(3, 4)), rng.choice((1, 2, 5, 10))
    levels, colours = rng.sample(range(1, 9), len(labels)), rng.sample(list(COLOURS), len(labels))
    if rng.random() < 0.5:
        colours = colours[:1] * len(labels)
    values = {label: level * unit for label, level in zip(labels, levels, strict=True)}
    label = rng.choice(labels)
    value = Question(f"What is the value of {label}?", str(values[label]))
    image = partial(draw_chart, labels, levels, unit, colours)
    return Draft(values, [image], [value, *_extremes(rng, values)])


def curve(rng: Random) -> Draft:
    length, unit = rng.randint(3, 4), rng.choice((1, 2, 5, 10))
    first, levels = rng.randrange(13 - length), rng.sample(range(9), length)
    labels = list(MONTHS[first : first + length])
    values = {label: level * unit for label, level in zip(labels, levels, strict=True)}
    label, (start, end) = rng.choice(labels), rng.choice(list(pairwise(labels)))
    questions = [
        Question(f"What is the value in {label}?", str(values[label])),
        Question(f"Does it rise from {start} to {end}?", _yes(values[start] < values[end])),
        *_extremes(rng, values),
    ]
    image = partial(draw_chart, labels, levels, unit, [rng.choice(list(COLOURS))])
    return Draft(values, [image], questions)


def pie(rng: Random) -> Draft:
    sizes = list(rng.choice(((1, 2, 7), (1, 3, 6), (1, 4, 5), (2, 3, 5), (1, 2, 3, 4))))
    rng.shuffle(sizes)
    starts = [start % 10 for start in accumulate(sizes, initial=rng.randrange(10))]
    slices = sorted(zip(rng.sample(list(COLOURS), len(sizes)), starts, sizes, strict=False))
    values = {colour: 10 * size for colour, _, size in slices}
    colour = rng.choice(list(values))
    value = Question(f"How many percent are {colour}?", str(values[colour]))
    return Draft(slices, [partial(draw_pie, slices)], [value, *_extremes(rng, values)])


def table(rng: Random) -> Draft:
    names, columns = rng.sample(FOODS, rng.randint(2, 4)), rng.sample(COLUMNS, rng.randint(1, 3))
    numbers = [rng.sample(range(1, 100), len(names)) for _ in columns]
    rows = [["", *columns], *([name, *map(str, row)] for name, *row in zip(names, *numbers, strict=True))]
    i, j = rng.randrange(len(names)), rng.randrange(len(columns))
    top = names[numbers[j].index(max(numbers[j]))]
    questions = [
        Question(f"What is the {columns[j]} of {names[i]}?", str(numbers[j][i])),
        Question(f"Which has the highest {columns[j]}?", top),
    ]
    return Draft(rows, [partial(draw_table, rows)], questions)


def compare(rng: Random) -> Draft:
    """Two images: equal, or one shape is missing or has another colour in one of them."""
    kinds = rng.choices(list(SHAPES), k=rng.randint(3, 6))
    colours = rng.sample(list(COLOURS), 4)
    scene = _scene(rng, kinds, colours[:3], 3, (20, 26, 32))
    other, change = list(scene), rng.choice(("none", "none", "number", "colour"))
    questions = [Question("Are the two images equal?", _yes(change == "none"))]
    if change == "number":
        other.pop()
    if change == "colour":
        other[-1] = other[-1]._replace(colour=colours[3])
    rng.shuffle(scenes := [scene, other])
    if change == "number":
        answer = "first" if len(scenes[0]) > len(scenes[1]) else "second"
        questions.append(Question("Which image has more shapes?", answer))
    if change == "colour":
        answer = "first" if scenes[0] is other else "second"
        questions.append(Question(f"Which image has something {colours[3]}?", answer))
    questions.append(Question("How many shapes are in the second image?", str(len(scenes[1]))))
    return Draft([*map(sorted, scenes)], _drawn(rng, *scenes), questions)


def instruct(rng: Random) -> Draft:
    """The same question under different system messages."""
    shapes = _scene(rng, rng.sample(list(SHAPES), rng.randint(1, 3)), list(COLOURS), 2, (30, 40, 50))
    asked = rng.choice(shapes)
    text, answer = f"What colour is the {asked.kind}?", asked.colour
    choices = [answer, *rng.sample([colour for colour in COLOURS if colour != answer], 2)]
    rng.shuffle(choices)
    listed = " ".join(f"{letter}) {choice}" for letter, choice in zip("ABC", choices, strict=True))
    questions = [
        Question(text, answer),
        Question(text, answer.upper(), "Answer in capitals."),
        Question(text, f"{answer} {answer}", "Say the answer twice."),
        Question(text, f"The {asked.kind} is {answer}.", "Answer in a sentence."),
        Question(f"{text} {listed}", "ABC"[choices.index(answer)], "Answer with one letter."),
    ]
    return Draft(sorted(shapes), _drawn(rng, shapes), rng.sample(questions, 3))


SKILLS: dict[str, Callable[[Random], Draft]] = {
    skill.__name__: skill
    for skill in (word, line, number, count, relate, bars, curve, pie, table, compare, instruct)
}
