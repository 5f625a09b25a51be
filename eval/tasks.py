"""Evaluation tasks: each turns a model into scores. This far: easy-VQA."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from configs.schema import GenerationConfig
from data.sources import easy_vqa
from eval.answering import Answerer

SHAPES = ("circle", "rectangle", "triangle")
KINDS = ("shape", "color", "yes/no")


def question_kind(answer: str) -> str:
    """What an easy-VQA question asks for, told by its answer."""
    return "yes/no" if answer in ("yes", "no") else "shape" if answer in SHAPES else "color"


def accuracy_by_kind(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Share of samples whose prediction is the answer: over all, and for each kind of question."""
    right: dict[str, list[bool]] = defaultdict(list)
    for sample in samples:
        right[sample["kind"]].append(sample["prediction"] == sample["answer"])
    every = [r for kind in right.values() for r in kind]
    return {
        "accuracy": sum(every) / len(every),
        "count": len(every),
        "kinds": {k: {"accuracy": sum(right[k]) / len(right[k]), "count": len(right[k])} for k in KINDS if k in right},
    }


def easy_vqa_task(answerer: Answerer, batch_size: int, limit: int, progress: Callable[[int, int], None]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All questions on the test images of easy-VQA (or the first `limit`), answered greedily and compared as strings."""
    questions = [(record["images"][0], turn["user"], turn["assistant"]) for record in easy_vqa("test") for turn in record["texts"]]
    questions = questions[: limit or None]
    settings = GenerationConfig(max_new_tokens=8)
    samples = []
    for start in range(0, len(questions), batch_size):
        part = questions[start : start + batch_size]
        tiles = {path: answerer.tiles(path) for path, _, _ in part}
        answers = answerer.answer([([tiles[path]], question) for path, question, _ in part], settings)
        for (path, question, truth), answer in zip(part, answers, strict=True):
            samples.append({"image": path, "question": question, "answer": truth, "prediction": answer.text, "kind": question_kind(truth)})
        progress(len(samples), len(questions))
    return accuracy_by_kind(samples), samples


TASKS = {"easy_vqa": easy_vqa_task}
