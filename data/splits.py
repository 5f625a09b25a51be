"""Data files and their splits from file names, by rules like those of `datasets`."""

import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePath

from utils.errors import UserError, nearest

SPLITS = {  # split → words in names; a file without one is for training
    "train": r"train|training",
    "validation": r"validation|valid|val|dev",
    "test": r"test[a-z]*|eval|evaluation|holdout|heldout",  # testA, testdev, testmini, …
}


def split_of(name: str) -> str:
    """Return the split that a name (of a file or folder) tells, or "".

    >>> split_of("val2017"), split_of("testmini-00000-of-00001.parquet"), split_of("contest.csv")
    ('validation', 'test', '')
    """
    words = re.split(r"[-._ 0-9]+", name.lower())
    return next((split for word in words for split, known in SPLITS.items() if re.fullmatch(known, word)), "")


def is_hidden(part: str) -> bool:
    """Whether a file or folder is nobody's data: hidden, or written by a program for itself."""
    return part.startswith((".", "__")) or (part.startswith("cache-") and part.endswith(".arrow"))


def files_below(folder: str) -> list[str]:
    """List the files below a local folder that are not hidden, in the order of their names."""
    listed = []
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not is_hidden(name)]
        listed += [str(Path(root) / name) for name in files if not is_hidden(name)]
    return sorted(listed)


def by_split(files: Iterable[str], root: PurePath) -> dict[str, list[str]]:
    """Sort the data files below `root` by split: "test" anywhere in a path, else the innermost word."""
    splits: dict[str, list[str]] = {}
    for file in sorted(files):
        parts = PurePath(file).parts[len(root.parts) :]
        if not any(map(is_hidden, parts)):
            named = [split for split in map(split_of, reversed(parts)) if split]
            split = "test" if "test" in named else next(iter(named), "train")
            splits.setdefault(split, []).append(file)
    return splits


def split_names(expression: str) -> list[str]:
    """Return the splits that an expression as `train[:10%]+validation` names."""
    return [re.sub(r"\[.*\]$", "", part.strip()) for part in expression.split("+") if part.strip()]


def choose_splits(names: list[str], split: str, validation: str, context: str) -> tuple[str, str, list[str]]:
    """Choose what trains, what validates ("": rows held out of it), and what is left out.

    `split`, `validation`: the user's choice or "". Errors: `UserError` if neither a name nor the user tells,
    and for rows that would both train and validate.
    """
    training = split or next((name for name in names if split_of(name) == "train"), "")
    if not training and len(names) == 1 and not split_of(names[0]):
        training = names[0]
    if not training:
        raise UserError(
            f"{context} has no split to train on (it has: {', '.join(names)}): choose one, :split=NAME"
        )
    for name in (*split_names(training), *split_names(validation)):
        if name not in names:
            raise UserError(f"{context} has no split '{name}'{nearest(name, names)}")
    both = set(split_names(training)) & set(split_names(validation))
    if both and not ("[" in training and "[" in validation):
        raise UserError(f"{context}: {', '.join(sorted(both))} would both train and validate")
    rest = [name for name in names if name not in split_names(training)]
    if not validation:
        validation = next((name for name in rest if split_of(name) == "validation"), "")
    return training, validation, [name for name in rest if name not in split_names(validation)]
