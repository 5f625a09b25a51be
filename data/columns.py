"""Rows of tables → records: what a column means, by its name.

The text of a row is the first of these that is there, its images those of `images` or `image`:
    messages, conversations, texts, interleaved    as in `data/conversations.py`
    question with answer(s)                        the most frequent answer is trained, all are references
    caption(s), sentences, text                    each caption is trained, all are references
Other names are mapped behind the path: `hf=ORG/NAME:question=ask:answer=reply`, `:caption=en+de`.
"""

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from configs.train import RATINGS
from data.conversations import (
    CAPTION_PROMPT,
    TEXTS,
    ConversationError,
    as_text,
    collect_images,
    locate,
)
from utils.errors import UserError, nearest

Record = dict[str, Any]
COLUMNS = {  # word → the columns that have this meaning
    "images": ("images", "image"),
    **{word: (word,) for word in TEXTS},
    "question": ("question", "questions"),
    "answer": ("multiple_choice_answer", "answer", "answers"),
    "references": ("references",),
    "caption": ("caption", "captions", "sentences", "text", "txt"),  # the last: of a WebDataset
}
JOINED = ("images", "question", "answer", "caption")  # several columns can be given
CHOICES = ("choices", "options")  # of a question; its answer may be the number of one
FURTHER = ("clip_score", *CHOICES, *(f"{name}_ratings" for name in RATINGS))


@dataclass(frozen=True)
class Columns:
    """What the columns of a table mean."""

    text: str  # the word of `COLUMNS` that a row's text comes from
    names: dict[str, list[str]]  # word → columns: those that are given, else the first of these with a value
    given: frozenset[str]
    used: list[str]  # all columns that are read


def columns_of(present: Iterable[str], given: dict[str, str], context: str) -> Columns:
    """Recognise columns by their names; `given` maps words of `COLUMNS` to columns, with + between several.

    Errors: `UserError`, which lists the columns and the words.
    """
    present = list(present)
    free = set(present) - {column for columns in given.values() for column in columns.split("+")}
    names = {word: [column for column in known if column in free] for word, known in COLUMNS.items()}
    for word, columns in given.items():
        names[word] = columns.split("+")
        if len(names[word]) > 1 and word not in JOINED:
            raise UserError(f"{context}: '{word}' is one column, not {columns}")
        for column in names[word]:
            if column not in present:
                raise UserError(f"{context} has no column '{column}'{nearest(column, present)}")
    usable = [word for word in (*TEXTS, "question", "caption") if names[word]]
    if not names["answer"]:
        usable = [word for word in usable if word != "question"]
    text = next((word for word in usable if word in given), next(iter(usable), ""))
    mapping = f"{context} has the columns {', '.join(present)}: map them with {', '.join(COLUMNS)}"
    if not text:
        raise UserError(f"{mapping}, for example :question=COLUMN:answer=COLUMN or :caption=COLUMN")
    if not names["images"] and text in ("texts", "question", "caption"):
        raise UserError(f"{mapping}, for example :images=COLUMN")
    read = {column for columns in names.values() for column in columns} | set(FURTHER)
    return Columns(text, names, frozenset(given), [column for column in present if column in read])


def record_of(row: dict[str, Any], columns: Columns, folder: Path | None = None) -> Record:
    """Convert a row. Its image paths start at `folder`, that of the file it came from; None: as they are."""
    values = {word: [row.get(name) for name in names] for word, names in columns.names.items()}
    for word in values.keys() - columns.given - {"answer"}:
        values[word] = list(islice((v for v in values[word] if not _is_empty(v)), 1)) or values[word][:1]
    record: Record = {"images": _images(values["images"], columns.text)}
    if columns.text == "question":
        record |= _questions(values["question"], values["answer"], row)
    elif columns.text == "caption":
        captions = [text for value in values["caption"] for text in _texts(value)]
        turns = [{"user": CAPTION_PROMPT, "assistant": caption} for caption in captions]
        record |= {"texts": turns, "turns": "branch", "references": captions}
    elif columns.text == "texts":
        record["texts"] = _pairs(row, values["texts"][0])
    else:
        record[columns.text] = _present(values[columns.text][0])
    if values["references"] and values["references"][0] is not None:
        record["references"] = values["references"][0]
    if row.get("clip_score") is not None:
        with suppress(TypeError, ValueError):
            record["clip_score"] = float(row["clip_score"])
    try:
        record = collect_images(record)
    except ConversationError as error:
        record["problem"] = error.reason
    if record["images"] is not None:
        record["images"] = [locate(image, folder) for image in record["images"]]
    return record


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | tuple) and not value)


def _images(values: list[Any], text: str) -> list[Any] | None:
    """The images of a row; None: one is missing. Conversations and pairs may have none, or an empty list."""
    images: list[Any] = []
    for value in values:
        if isinstance(value, list | tuple):
            images += value
        elif not _is_empty(value):
            images.append(value)
        elif text in ("texts", "question", "caption"):
            return None
    return images or (None if text in ("question", "caption") else [])


def _questions(questions: list[Any], answers: list[Any], row: dict[str, Any]) -> Record:
    """One question, or a list of questions with a list of answers, one each."""
    if isinstance(questions[0], list):
        listed = next((answer for answer in answers if isinstance(answer, list)), [])
        pairs = [{"user": q, "assistant": a} for q, a in zip_longest(questions[0], listed)]  # a half: counted
        return {"texts": pairs, "turns": "branch"}
    asked = [text for value in questions for text in _texts(value)]
    choices = next((_texts(row[name]) for name in CHOICES if isinstance(row.get(name), list)), [])
    if choices:
        asked.append("Choices: " + "; ".join(choices))
        numbers = [a for a in answers if isinstance(a, int) and 0 <= a < len(choices)]
        answers = [choices[number] for number in numbers] or answers
    texts = list(map(_texts, answers))  # a column each
    majority = Counter(next(filter(None, texts), [])).most_common(1)
    pair = {"user": "\n".join(asked), "assistant": majority[0][0] if majority else ""}
    return {"texts": [pair], "references": max(texts, key=len)}


def _texts(value: Any) -> list[str]:
    """The texts of a value: a text, or a list of texts or of objects with one (VQAv2's, COCO's)."""
    keys = ("answer", "raw", "caption", "text")

    def inner(entry: Any) -> Any:
        return next((entry[key] for key in keys if key in entry), None) if isinstance(entry, dict) else entry

    value = inner(value)
    entries = list(map(inner, value if isinstance(value, list | tuple) else [value]))
    entries = [str(entry) if isinstance(entry, Decimal | date) else entry for entry in entries]
    return [text for text in (as_text(entry).strip() for entry in entries) if text]


def _pairs(row: dict[str, Any], value: Any) -> list[dict[str, Any]]:
    """The pairs of a row of The Cauldron, or of FineVision, which rates them."""
    turns = [value] if isinstance(value, dict) else value if isinstance(value, list) else []
    texts = [dict(turn) if isinstance(turn, dict) else {} for turn in turns]
    for name in RATINGS:
        ratings = row.get(f"{name}_ratings")
        for turn, rating in zip(texts, ratings if isinstance(ratings, list) else (), strict=False):
            turn.setdefault("ratings", {})[name] = rating
    return texts


def _present(value: Any) -> Any:
    """Leave out keys that are null: a table gives every part of a content the keys of all."""
    if isinstance(value, list):
        return [_present(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _present(entry) for key, entry in value.items() if entry is not None}
    return value
