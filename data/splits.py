"""Data files and their splits from file names, by rules like those of `datasets`."""

import re
from collections.abc import Iterable
from pathlib import PurePath

from utils.errors import UserError, nearest

SPLITS = {  # words in names → split; a file without one is for training
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def split_of(name: str) -> str:
    """Return the split that a name (of a file or folder) tells, or "".

    >>> split_of("val2017"), split_of("test-00000-of-00001.parquet"), split_of("contest.csv")
    ('validation', 'test', '')
    """
    words = re.split(r"[-._ 0-9]+", name.lower())
    return next((split for word in words for split, known in SPLITS.items() if word in known), "")


def is_hidden(part: str) -> bool:
    """Whether a file or folder is nobody's data: hidden, or written by a program for itself."""
    return part.startswith((".", "__")) or (part.startswith("cache-") and part.endswith(".arrow"))


def by_split(files: Iterable[str], root: PurePath) -> dict[str, list[str]]:
    """Sort the data files below `root` by split. A name's innermost word counts: `test/train.csv` trains."""
    splits: dict[str, list[str]] = {}
    for file in sorted(files):
        parts = PurePath(file).parts[len(root.parts) :]
        if not any(map(is_hidden, parts)):
            split = next(filter(None, map(split_of, reversed(parts))), "train")
            splits.setdefault(split, []).append(file)
    return splits


def choose_splits(names: list[str], split: str, validation: str, context: str) -> tuple[str, str, list[str]]:
    """Choose what trains, what validates ("": rows held out of it), and what is left out.

    `split`, `validation`: the user's choice or "". Errors: `UserError` if neither a name nor the user tells.
    """
    training = split or next((name for name in names if split_of(name) == "train"), "")
    if not training and len(names) == 1 and not split_of(names[0]):
        training = names[0]
    if not training:
        raise UserError(
            f"{context} has no split to train on (it has: {', '.join(names)}): choose one, :split=NAME"
        )
    for name in re.findall(r"\w[\w.-]*", re.sub(r"\[.*?\]", "", f"{split} {validation}")):
        if name not in names:
            raise UserError(f"{context} has no split '{name}'{nearest(name, names)}")
    rest = [name for name in names if name not in re.split(r"\W+", training)]
    if not validation:
        validation = next((name for name in rest if split_of(name) == "validation"), "")
    return training, validation, [name for name in rest if name not in re.split(r"\W+", validation)]
