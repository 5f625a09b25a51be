"""Sources of records, in the format of `data/conversations.py`."""

import os
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from configs.train import DataConfig
from data import formats
from data.columns import COLUMNS
from data.easy_vqa import easy_vqa
from data.formats import Splits
from data.huggingface import HuggingFaceSet, configurations
from data.mixture import InMemoryRecords, Source
from data.openmoji import openmoji
from data.parquet import TableRecords, table_files
from data.splits import choose_splits, is_hidden, split_names, split_of
from data.synthetic import RECORDS, SKILLS, SyntheticRecords
from data.webdataset import TarRecords, shards_of
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
# Sets of Parquet files with a folder for each sub-set, and their default path: read row group by row group.
TABLES = {"the_cauldron": THE_CAULDRON, "finevision": FINEVISION, "tables": ""}
SETS = {**TABLES, "hf": ""}  # they have sub-sets, splits and columns
SUBSETS = {"the_cauldron": CAULDRON_SUBSETS, "synthetic": list(SKILLS)}  # the names of them all

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
    "mmc4": formats.mmc4,
}
SPEC = re.compile(r"(?P<name>[^*:=]+?)(\*(?P<weight>[0-9.e-]+))?(:(?P<cap>\d+))?(=(?P<path>.+))?")
OPTIONS = (
    "split",
    "validation",
    *COLUMNS,
)  # of a set, behind its path: which split trains, what columns mean
OPTION = re.compile(r":([a-z_]+)=")


@dataclass(frozen=True)
class Spec:
    """One entry of `data.sources`: `NAME[*WEIGHT][:CAP][=PATH[:OPTION=VALUE]…]`."""

    name: str
    subset: str
    weight: float
    cap: int
    path: str
    options: dict[str, str]

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
        if any(
            (other.full_name, other.path, other.options) == (spec.full_name, spec.path, spec.options)
            for other in specs[:number]
        ):
            raise UsageError(f"{setting}: {spec.full_name} is listed twice")
    return specs


def _parse_spec(text: str, hint: str, setting: str) -> Spec:
    """Parse one entry; `hint` ends the errors that a comma in the path before may have caused."""
    match = SPEC.fullmatch(text)
    if match is None:
        raise UsageError(f"{setting}: '{text}' is not of the form NAME[*WEIGHT][:CAP][=PATH]{hint}")
    name, _, subset = match["name"].partition("/")
    embedded = [*SOURCES, "synthetic"]
    if name not in (*embedded, *FILES, *SETS) or (subset and name not in (*SUBSETS, *SETS)):
        if match["path"]:
            readers = [*FILES, *SETS]
            known = f"{nearest(name, readers)}: in NAME=PATH, NAME says how PATH is read"
        else:
            known = nearest(name, [*embedded, *FILES, *SETS])
        raise UsageError(f"{setting}: no source '{match['name']}'{known}{hint}")
    try:
        weight = float(match["weight"] or 1)
    except ValueError:
        raise UsageError(f"{setting}: '{text}': the weight {match['weight']} is not a number") from None
    if not 0 < weight < float("inf"):
        raise UsageError(f"{setting}: '{text}': the weight must be above 0")
    path, options = match["path"] or SETS.get(name, ""), {}
    if name in SETS:
        path, *pairs = OPTION.split(path)
        options = dict(zip(pairs[::2], pairs[1::2], strict=True))
        for word in pairs[::2]:
            if word not in OPTIONS or pairs[::2].count(word) > 1:
                problem = (
                    "is given twice" if word in OPTIONS else f"is no option{nearest(word, list(OPTIONS))}"
                )
                raise UsageError(f"{setting}: '{text}': :{word}= {problem}")
    if path and name in embedded:
        raise UsageError(f"{setting}: {name} takes no path")
    if not path and name not in embedded:
        raise UsageError(f"{setting}: '{text}' needs a path: {name}=PATH")
    if name in SUBSETS and subset not in ("", "all", *SUBSETS[name]):
        raise UsageError(f"{setting}: no sub-set '{subset}' in {name}{nearest(subset, SUBSETS[name], 3)}")
    return Spec(name, subset, weight, int(match["cap"] or 0), path, options)


def _subsets(spec: Spec) -> list[str]:
    """List the sub-sets of a spec, folders or configurations of `datasets`: the given one, or all."""
    if spec.subset not in ("", "all"):
        return [spec.subset]
    if spec.name == "synthetic" or (spec.name == "the_cauldron" and is_hub_id(spec.path)):
        return SUBSETS[spec.name]
    if spec.name == "hf":
        return [""] if shards_of(spec.path, "") else configurations(spec.path)
    if is_hub_id(spec.path):
        folders = dataset_files(spec.path, "")[2]
    else:
        files = table_files(spec.path, "", False)[1].values()
        relative = [Path(file).relative_to(spec.path).parts for file in chain.from_iterable(files)]
        if any(len(parts) == 1 for parts in relative):
            return [""]
        folders = list({parts[0] for parts in relative})
    if any(name == "data" or split_of(name) for name in folders):
        return [""]  # the folders are no sub-sets: splits, and files beside them
    return sorted(name for name in folders if not is_hidden(name)) or [""]


def open_sources(config: DataConfig) -> tuple[list[Source], list[Source]]:
    """Open training and validation sources, with disjoint records.

    A set with a validation split is validated on it; else the first `validation_images` of its records are
    held out, and the sub-sets of one set share this number, as those of synthetic do. Neither depends on
    `limit` or on the run's seed.
    """
    training: list[Source] = []
    validation: list[Source] = []
    opened: list[tuple[str, str, str, str]] = []
    specs = [
        (spec, subset)
        for spec in parse_sources(config.sources)
        for subset in (_subsets(spec) if spec.name in (*SUBSETS, *SETS) else [""])
    ]
    memory = int(config.read_gb * 2**30) // max(1, sum(spec.name in TABLES for spec, _ in specs))
    short = Counter(_name(spec, subset) for spec, subset in specs)
    for spec, subset in specs:
        name = _name(spec, subset)
        if short[name] > 1:  # two sets have sub-sets of that name, or one reader has two files
            name = f"{spec.name}/{subset}={spec.path}" if subset else f"{spec.name}={spec.path}"
            name += "".join(f":{key}={value}" for key, value in spec.options.items())
        records, held_out, note, split = _open(spec, subset, name, memory, config.download)
        this = spec.name, os.path.normpath(spec.path), subset, split
        if this in opened:  # each would hold out other rows than the other
            raise UsageError(f"data.sources: {spec.name}{'/' + subset if subset else ''} is listed twice")
        opened.append(this)
        subset_count = sum(other == spec for other, _ in specs)
        share = -(-config.validation_images // subset_count)
        start = share if held_out is None else 0
        if len(records) <= start:
            raise UserError(
                f"data.validation_images = {config.validation_images} leaves none of the "
                f"{len(records)} records of {name} for training: give fewer, --data.validation_images N"
            )
        stop = min(len(records), start + config.limit) if config.limit else len(records)
        training.append(Source(name, records, start, stop, spec.weight, spec.cap, note))
        if held_out is None:
            validation.append(Source(name, records, 0, start))
        else:
            count = share if spec.name == "synthetic" else config.validation_images
            validation.append(Source(name, held_out, 0, min(count, len(held_out))))
    return training, validation


def _name(spec: Spec, subset: str) -> str:
    if spec.name == "hf" and not subset:
        return Path(spec.path.partition("@")[0]).absolute().name or "hf"
    return subset or spec.name


def _open(spec: Spec, subset: str, name: str, memory: int, download: bool) -> tuple[Any, Any, str, str]:
    """Open a source.

    Returns its training and validation records (None: some of the former), a note, and the split to train on.
    """
    if spec.name == "synthetic":
        skill = [subset]
        training, validation = (SyntheticRecords(split, RECORDS, skill) for split in ("train", "validation"))
        return InMemoryRecords(training), InMemoryRecords(validation), "", ""
    if spec.name not in SETS:
        listed, own_split = (
            SOURCES[spec.name]() if spec.name in SOURCES else FILES[spec.name](Path(spec.path))
        )
        random.Random(spec.name).shuffle(listed if own_split is None else own_split)
        return InMemoryRecords(listed), own_split and InMemoryRecords(own_split), "", ""
    columns = {word: column for word, column in spec.options.items() if word in COLUMNS}
    chosen = spec.options.get("split", ""), spec.options.get("validation", "")
    context = f"{spec.path}/{subset}" if subset else spec.path

    shards = shards_of(spec.path, subset) if spec.name == "hf" else {}
    if spec.name in TABLES:
        system, files = table_files(spec.path, subset, download)
        names = list(files)
    elif shards:
        files, names = shards, list(shards)
    else:
        whole = HuggingFaceSet(spec.path, subset)
        names = list(whole.splits)
    split, held_out, left_out = choose_splits(names, *chosen, context)
    if "[" in split + held_out and (spec.name in TABLES or shards):
        raise UserError(
            f"{context}: a part of a split can be read of converted sets alone, not of {held_out or split}"
        )

    def records(split: str) -> Any:
        if spec.name in TABLES:
            return TableRecords(
                name, [f for s in split_names(split) for f in files[s]], system, columns, memory
            )
        if shards:
            return TarRecords(name, spec.path, [f for s in split_names(split) for f in files[s]], columns)
        return whole.records(name, split, columns, context)

    note = f"{name}: trains on {split}, validates on {held_out or f'rows held out of {split}'}"
    note += f"; not read: {', '.join(left_out)}" if left_out else ""
    held = records(held_out) if held_out else None
    return records(split), held, note if len(names) > 1 else "", split
