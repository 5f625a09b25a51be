"""The embedded set easy-VQA: questions about small pictures of one coloured shape."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Literal

from data.formats import Record
from utils.errors import UserError


def easy_vqa(split: Literal["train", "test"]) -> list[Record]:
    """Read easy-VQA (Zhou, https://github.com/vzhou842/easy-VQA), one record per image of 64×64 pixels."""
    try:
        root = Path(str(files("easy_vqa"))) / "data" / split
    except ModuleNotFoundError:
        raise UserError("the package easy-vqa is not installed (pip install easy-vqa)") from None
    records: dict[int, Record] = {}
    for question, answer, image in json.loads((root / "questions.json").read_text()):
        if image not in records:
            path = str(root / "images" / f"{image}.png")
            records[image] = {"images": [path], "texts": [], "id": f"easy_vqa/{split}/{image}"}
        records[image]["texts"].append({"user": question, "assistant": answer})
    return [records[image] for image in sorted(records)]
