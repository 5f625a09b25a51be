"""lmms-eval tasks on this project's data sources: any source that training reads can be evaluated.

The YAML files in this folder name the class.
"""

import json
import random
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from lmms_eval.api.task import ConfigurableTask
from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

from data.conversations import Conversation, images_of, parts_of, text_of
from data.datasets import questions_of
from data.easy_vqa import easy_vqa
from data.images import open_image
from data.openmoji import openmoji
from data.sources import FILES, SOURCES, SUBSETS, Spec, parse_sources
from data.synthetic import Split, SyntheticRecords
from eval.lmms_eval_wrapper import CONVERSATION
from utils.errors import UserError

SYNTHETIC_RECORDS = 200  # of each skill
TEST = {"easy_vqa": lambda: easy_vqa("test"), "openmoji": lambda: openmoji("test")}
SHAPES = ("circle", "rectangle", "triangle")

# Lower case, digits for numbers, no articles, no punctuation: "The two dogs." → "2 dogs".
normalise = EvalAIAnswerProcessor()


def exact(answer: str, references: list[str]) -> float:
    """Return 1 where the answer equals a reference, letter for letter."""
    return float(answer.strip() in [reference.strip() for reference in references])


def normalised(answer: str, references: list[str]) -> float:
    """Return 1 where the answer has the normal form of a reference, as for OCR-VQA and most short answers."""
    return float(normalise(answer) in [normalise(reference) for reference in references])


def vqa(answer: str, references: list[str]) -> float:
    """Return VQA's soft accuracy (arXiv 1505.00468).

    min(1, equal references ÷ 3), averaged over leaving out each reference. A single reference counts as in
    `normalised`.
    """
    if len(references) == 1:
        return normalised(answer, references)
    same = [normalise(answer) == normalise(reference) for reference in references]
    return sum(min(1.0, (sum(same) - left_out) / 3) for left_out in same) / len(same)


MATCHERS = {"exact": exact, "normalised": normalised, "vqa": vqa}


def easy_vqa_kind(record: dict[str, Any], answer: str) -> str:
    """Return what an easy-VQA question asks for, judging by its answer."""
    return "yes/no" if answer in ("yes", "no") else "shape" if answer in SHAPES else "color"


def skill_of(record: dict[str, Any], answer: str) -> str:
    """Return the skill of a record of synthetic."""
    return str(record["skill"])


def synthetic(spec: Spec, split: Split) -> list[dict[str, Any]]:
    """Return the first records of every skill of synthetic, or of the sub-set that `spec` names."""
    skills = SUBSETS["synthetic"] if spec.subset in ("", "all") else [spec.subset]
    return list(SyntheticRecords(split, SYNTHETIC_RECORDS * len(skills), skills))


def training_records_of(source: str) -> list[dict[str, Any]]:
    """Return the training records of a source, or all of a set without splits."""
    (spec,) = parse_sources(source)
    if spec.name == "synthetic":
        return synthetic(spec, "train")
    return (SOURCES[spec.name]() if spec.name in SOURCES else FILES[spec.name](Path(spec.path)))[0]


def records_of(source: str) -> list[dict[str, Any]]:
    """Return the test records of a source, else its validation records, else all of a set without splits.

    `source`: NAME or NAME=PATH, as in `data.sources`.
    """
    (spec,) = parse_sources(source)
    if spec.name == "synthetic":
        return synthetic(spec, "test")
    if spec.name in TEST:
        return TEST[spec.name]()
    if spec.name not in {**SOURCES, **FILES}:
        known = ", ".join([*SOURCES, "synthetic", *FILES])
        raise UserError(f"{spec.name} cannot be evaluated by itself (known: {known})")
    training, validation = SOURCES[spec.name]() if spec.name in SOURCES else FILES[spec.name](Path(spec.path))
    return training if validation is None else validation


class SourceTask(ConfigurableTask):
    """A task where every answer in every record is a question, after all that was said before it.

    `metadata` names the source, the matcher unless the task is about captions, and the number of `shots`:
    so many answered questions of other records go before each question, one of each record.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.task_metadata = config["metadata"]
        source = self.task_metadata["source"]
        self.records = records_of(source)
        self.shots = int(self.task_metadata.get("shots", 0))
        self.examples = training_records_of(source) if self.shots else []
        self.usable = [i for i, record in enumerate(self.examples) if questions_of(record)]
        ours = {
            "test_split": "test",
            "doc_to_text": "question",
            "doc_to_target": "references",
            "doc_to_visual": self.images,
            "process_results": self.score,
        }
        super().__init__(config={key: value for key, value in config.items() if key != "class"} | ours)

    def download(self, dataset_kwargs: dict[str, Any] | None = None) -> None:
        """Build the rows in memory; images are read when they are needed. Nothing is downloaded."""
        rows = [
            {
                "record": number,
                "question": text_of(messages[-1]),
                "references": [reference for reference in references if reference],
                CONVERSATION: json.dumps(messages),
            }
            for number, record in enumerate(self.records)
            for messages, references in questions_of(record)
        ]
        if "matcher" not in self.task_metadata:  # captions: a record's texts are references for one answer
            first = {row["record"]: row for row in reversed(rows)}
            for row in rows:
                references = first[row["record"]]["references"]
                references += [r for r in row["references"] if r not in references]
            rows = [first[number] for number in sorted(first)]
        if not rows:
            raise UserError(f"{self.task_metadata['source']} holds no question with an answer")
        for number, row in enumerate(rows):
            examples = self._examples(number, row["record"])
            shots = [message for index in examples for message in self._shot(index)]
            messages = json.loads(row[CONVERSATION])
            first = sum(message["role"] == "system" for message in messages[:1])
            row[CONVERSATION] = json.dumps(messages[:first] + shots + messages[first:])
        self.dataset = DatasetDict({"test": Dataset.from_list(rows)})
        self.dataset_no_image = self.dataset

    def _examples(self, number: int, record: int) -> list[int]:
        """Draw the examples of a row, other records than its own."""
        if not self.shots:
            return []
        own = self.records[record]["images"]
        usable = [index for index in self.usable if self.examples[index]["images"] != own]
        if len(usable) < self.shots:
            raise UserError(
                f"--shots {self.shots}: {self.task_metadata['source']} has only {len(usable)} records on "
                "other images to draw from"
            )
        return random.Random(number).sample(usable, self.shots)

    def _shot(self, index: int) -> Conversation:
        """An example: one question, of those about its images, with its answer."""
        asked = questions_of(self.examples[index])
        messages, references = asked[index % len(asked)]
        tagged = [
            {**m, "content": [{**part, "example": index} for part in parts_of(m)]}
            for m in messages
            if m["role"] != "system"  # the row's own comes first, if it has one
        ]
        return [*tagged, {"role": "assistant", "content": references[0]}]

    def images(self, row: dict[str, Any]) -> list[Any]:
        """Open the images of a row's conversation, in their order."""
        own = self.records[row["record"]]
        return [
            open_image(
                (self.examples[part["example"]] if "example" in part else own)["images"][part["index"]]
            )
            for part in images_of(json.loads(row[CONVERSATION]))
        ]

    def score(self, row: dict[str, Any], answers: list[str]) -> dict[str, Any]:
        """Score an answer; captions are passed on to be scored together."""
        if "matcher" not in self.task_metadata:
            return {
                key: {"answer": answers[0], "references": row["references"]} for key in self._metric_fn_list
            }
        right = MATCHERS[self.task_metadata["matcher"]](answers[0], row["references"])
        if "kinds" not in self.task_metadata:
            return {"accuracy": right}
        kind = self.task_metadata["kinds"](self.records[row["record"]], row["references"][0])
        return {"accuracy": right, kind: right}
