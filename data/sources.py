"""Sources of records, in the format of `data/conversations.py`."""

import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.train import RATINGS, DataConfig
from data import formats
from data.conversations import TEXTS, ConversationError, collect_images, plain_image
from data.easy_vqa import easy_vqa
from data.formats import Record, Splits
from data.mixture import InMemoryRecords, Source
from data.openmoji import openmoji
from data.parquet import TableRecords, local_table_files, table_files
from utils.errors import UsageError, UserError, nearest
from utils.hub import dataset_files, is_hub_id

THE_CAULDRON = "HuggingFaceM4/the_cauldron"
# fmt: off
CAULDRON_SUBSETS = [
    "ai2d", "aokvqa", "chart2text", "chartqa", "clevr", "clevr_math", "cocoqa", "datikz",
    "diagram_image_to_text", "docvqa", "dvqa", "figureqa", "finqa", "geomverse", "hateful_memes", "hitab",
    "iam", "iconqa", "infographic_vqa", "intergps", "localized_narratives", "mapqa", "mimic_cgd",
    "multihiertt", "nlvr2", "ocrvqa", "okvqa", "plotqa", "raven", "rendered_text", "robut_sqa",
    "robut_wikisql", "robut_wtq", "scienceqa", "screen2words", "spot_the_diff", "st_vqa", "tabmwp",
    "tallyqa", "tat_qa", "textcaps", "textvqa", "tqa", "vistext", "visual7w", "visualmrc", "vqarad",
    "vqav2", "vsr", "websight",
]
# fmt: on

FINEVISION = "HuggingFaceM4/FineVision"
# Sets of Parquet files with a folder for each sub-set, and their default path.
TABLES = {"the_cauldron": THE_CAULDRON, "finevision": FINEVISION, "tables": ""}


def table_record(row: dict[str, Any]) -> Record:
    """Convert a table row: of messages, in the form of The Cauldron, or of FineVision, which rates turns."""
    images = row.get("images", [])  # a null is an image that is missing
    if images is not None:
        images = list(map(plain_image, images))
    for key in TEXTS:
        if key != "texts" and row.get(key) is not None:
            record = {"images": images, key: _present(row[key])} | _further(row)
            try:
                return collect_images(record)
            except ConversationError as error:
                return record | {"problem": error.reason}
    texts = [dict(turn) if isinstance(turn, dict) else {} for turn in row.get("texts") or ()]
    for name in RATINGS:
        for turn, rating in zip(texts, row.get(f"{name}_ratings") or (), strict=False):
            turn.setdefault("ratings", {})[name] = rating
    return {"images": images, "texts": texts} | _further(row)


def _further(row: dict[str, Any]) -> Record:
    return {key: row[key] for key in ("clip_score", "references") if row.get(key) is not None}


def _present(value: Any) -> Any:
    """Leave out keys that are null: a table gives every part of a content the keys of all."""
    if isinstance(value, list):
        return [_present(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _present(entry) for key, entry in value.items() if entry is not None}
    return value


# Sets from a package or a program: training and validation records (None: some of the former are held out).
# Add yours here.
SOURCES: dict[str, Callable[[], Splits]] = {
    "easy_vqa": lambda: (easy_vqa("train"), None),
    "openmoji": lambda: (openmoji("train"), openmoji("validation")),
}
# Sets in local files: NAME=PATH.
FILES: dict[str, Callable[[Path], Splits]] = {
    "coco": formats.coco,
    "ocr_vqa": formats.ocr_vqa,
    "llava": formats.llava,
    "jsonl": formats.jsonl,
}
SPEC = re.compile(r"(?P<name>[^*:=]+?)(\*(?P<weight>[0-9.e-]+))?(:(?P<cap>\d+))?(=(?P<path>.+))?")


@dataclass(frozen=True)
class Spec:
    """One entry of `data.sources`: `NAME[*WEIGHT][:CAP][=PATH]`."""

    name: str
    subset: str
    weight: float
    cap: int
    path: str

    @property
    def full_name(self) -> str:
        return f"{self.name}/{self.subset}" if self.subset else self.name


def parse_sources(sources: str, setting: str = "data.sources") -> list[Spec]:
    """Parse `data.sources`, entries with commas between. `setting`: what error messages call it.

    Errors: `UsageError` for an unknown name or sub-set, a bad weight, a missing path, or a repeated entry.
    """
    specs: list[Spec] = []
    hint = ""
    for text in (part.strip() for part in sources.split(",")):
        specs.append(_parse_spec(text, hint, setting))
        has_path = "=" in text
        hint = "; commas separate sources: a path cannot hold one" if has_path else ""
    for number, spec in enumerate(specs):
        if any((other.full_name, other.path) == (spec.full_name, spec.path) for other in specs[:number]):
            raise UsageError(f"{setting}: {spec.full_name} is listed twice")
    return specs


def _parse_spec(text: str, hint: str, setting: str) -> Spec:
    """Parse one entry; `hint` ends the errors that a comma in the path before may have caused."""
    match = SPEC.fullmatch(text)
    if match is None:
        raise UsageError(f"{setting}: '{text}' is not of the form NAME[*WEIGHT][:CAP][=PATH]{hint}")
    name, _, subset = match["name"].partition("/")
    if name not in {**SOURCES, **FILES, **TABLES} or (subset and name not in TABLES):
        if match["path"]:
            readers = [*FILES, *TABLES]
            known = f"{nearest(name, readers)}: in NAME=PATH, NAME says how PATH is read"
        else:
            known = nearest(name, [*SOURCES, *FILES, *TABLES])
        raise UsageError(f"{setting}: no source '{match['name']}'{known}{hint}")
    try:
        weight = float(match["weight"] or 1)
    except ValueError:
        raise UsageError(f"{setting}: '{text}': the weight {match['weight']} is not a number") from None
    if not 0 < weight < float("inf"):
        raise UsageError(f"{setting}: '{text}': the weight must be above 0")
    path = match["path"] or TABLES.get(name, "")
    if path and name in SOURCES:
        raise UsageError(f"{setting}: {name} takes no path")
    if not path and name not in SOURCES:
        raise UsageError(f"{setting}: '{text}' needs a path: {name}=PATH")
    if name == "the_cauldron" and subset not in ("", "all", *CAULDRON_SUBSETS):
        raise UsageError(
            f"{setting}: no sub-set '{subset}' in the_cauldron{nearest(subset, CAULDRON_SUBSETS, 3)}"
        )
    return Spec(name, subset, weight, int(match["cap"] or 0), path)


def _subsets(spec: Spec) -> list[str]:
    """List the folders of a table set's spec: the given sub-set, or all."""
    if spec.subset not in ("", "all"):
        return [spec.subset]
    if spec.name == "the_cauldron" and is_hub_id(spec.path):
        return CAULDRON_SUBSETS
    if is_hub_id(spec.path):
        return sorted(dataset_files(spec.path, "", ())[2]) or [""]
    root = Path(spec.path)
    return sorted(path.name for path in root.glob("*") if path.is_dir() and local_table_files(path)) or [""]


def open_sources(config: DataConfig) -> tuple[list[Source], list[Source]]:
    """Open training and validation sources, with disjoint records.

    Validation depends neither on `limit` nor on the run's seed. Each source holds out `validation_images`;
    the sub-sets of one set share this number.
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
            raise UsageError(f"data.sources: {spec.name}/{subset} is listed twice")
        name = subset or spec.name
        if short[name] > 1:  # two sets have sub-sets of that name, or one reader has two files
            name = f"{spec.name}/{subset}={spec.path}" if subset else f"{spec.name}={spec.path}"
        if spec.name in TABLES:
            system, files = table_files(spec.path, subset, config.download)
            records: Any = TableRecords(name, files, system, table_record, memory)
            subset_count = sum(other == spec for other, _ in specs)
            start = -(-config.validation_images // subset_count)  # the first rows are held out
            held_out: Any = records
        else:
            listed, own_split = (
                SOURCES[spec.name]() if spec.name in SOURCES else FILES[spec.name](Path(spec.path))
            )
            shuffled = listed if own_split is None else own_split
            random.Random(spec.name).shuffle(shuffled)
            start = config.validation_images if own_split is None else 0
            records, held_out = InMemoryRecords(listed), InMemoryRecords(shuffled)
        if len(records) <= start:
            raise UserError(
                f"data.validation_images = {config.validation_images} leaves none of the "
                f"{len(records)} records of {name} for training: give fewer, --data.validation_images N"
            )
        stop = min(len(records), start + config.limit) if config.limit else len(records)
        training.append(Source(name, records, start, stop, spec.weight, spec.cap))
        validation.append(Source(name, held_out, 0, start or min(config.validation_images, len(held_out))))
    return training, validation
