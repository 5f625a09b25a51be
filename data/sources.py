"""Where records come from. A record is the Cauldron's: `{"images": [path], "texts": [{"user", "assistant"}, …], "id"}`."""

import json
import random
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from configs.errors import UserError

Record = dict[str, Any]


def easy_vqa(split: Literal["train", "test"]) -> list[Record]:
    """easy-VQA (Zhou, https://github.com/vzhou842/easy-VQA): 64×64 pictures of one coloured shape, one record an image."""
    try:
        root = Path(str(files("easy_vqa"))) / "data" / split
    except ModuleNotFoundError:
        raise UserError("the package easy-vqa is not installed (pip install easy-vqa)") from None
    records: dict[int, Record] = {}
    for question, answer, image in json.loads((root / "questions.json").read_text()):
        record = records.setdefault(image, {"images": [str(root / "images" / f"{image}.png")], "texts": [], "id": f"easy_vqa/{split}/{image}"})
        record["texts"].append({"user": question, "assistant": answer})
    return [records[image] for image in sorted(records)]


def training_records(source: str, limit: int, validation_images: int) -> tuple[list[Record], list[Record]]:
    """Training and validation records, disjoint in images. Validation does not depend on `limit` or on the run's seed."""
    records = {"easy_vqa": easy_vqa}[source]("train")
    random.Random(source).shuffle(records)
    validation, training = records[:validation_images], records[validation_images:]
    if not training:
        raise UserError(f"data.validation_images = {validation_images} leaves none of the {len(records)} images of {source} for training")
    return training[: limit or None], validation
