"""Overhead of evaluation over generating the answers.

  python -m benchmarks.evaluation --checkpoint DIR --json benchmarks/results/evaluation.json

wrapper    questions/s through lmms-eval's adapter ÷ those of `Predictor.answer` in the same batches
captions   seconds of 100 captions with CIDEr, as in training ÷ seconds of the answers alone

DIR is a model folder. Both sides of a ratio are measured in turn in one run; both read and tile the images.
Medians over --repeats, and the worst repetition.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import Instance
from rich.console import Console

from benchmarks.about import about
from configs.model import GenerationConfig
from data.easy_vqa import easy_vqa
from data.openmoji import openmoji
from eval.captions import cider
from eval.lmms_eval_wrapper import DualTower
from eval.predictor import Predictor
from utils.errors import run_script


def without_cache(predictor: Predictor) -> Predictor:
    """The same model with an empty store of image KVs."""
    return Predictor(predictor.model, predictor.renderer)


def wrapper(predictor: Predictor, count: int, batch: int, repeats: int) -> list[float]:
    asked = [(record["images"][0], turn["user"]) for record in easy_vqa("test") for turn in record["texts"]][
        :count
    ]
    asked.sort(key=lambda a: -len(predictor.renderer.tokenizer.encode(a[1])))  # as the adapter does
    requests = [
        Instance(
            "generate_until",
            (text, {"max_new_tokens": 8}, lambda d: [d], n, "task", "test"),
            0,
            {"task": "task", "doc_id": n, "repeats": 1},
        )
        for n, (_, text) in enumerate(asked)
    ]
    ratios = []
    for _ in range(repeats + 1):
        direct = without_cache(predictor)
        started = time.perf_counter()
        for i in range(0, count, batch):
            direct.answer(
                [([direct.tiles(Path(path))], text) for path, text in asked[i : i + batch]],
                GenerationConfig(max_new_tokens=8),
            )
        seconds = time.perf_counter() - started
        model = DualTower(predictor=without_cache(predictor), batch_size=batch)
        model.task_dict = {"task": {"test": [Path(path) for path, _ in asked]}}
        started = time.perf_counter()
        model.generate_until(requests)
        ratios.append(seconds / (time.perf_counter() - started))
    return ratios[1:]


def captions(predictor: Predictor, count: int, batch: int, repeats: int) -> list[float]:
    asked = [(record["images"][0], record["references"]) for record in openmoji("test")][:count]
    ratios = []
    for _ in range(repeats + 1):
        times = []
        for scored in (False, True):
            model, texts = without_cache(predictor), []
            started = time.perf_counter()
            for i in range(0, count, batch):
                answers = model.answer(
                    [([model.tiles(path)], "Describe the image.") for path, _ in asked[i : i + batch]],
                    GenerationConfig(max_new_tokens=32),
                )
                texts += [a.text for a in answers]
            if scored:
                cider(texts, [references for _, references in asked])
            times.append(time.perf_counter() - started)
        ratios.append(times[1] / times[0])
    return ratios[1:]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evaluation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--questions", type=int, default=512)
    parser.add_argument("--captions", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    predictor = Predictor.from_pretrained(args.checkpoint)
    measured = {
        "wrapper": wrapper(predictor, args.questions, args.batch, args.repeats),
        "captions": captions(predictor, args.captions, args.batch, args.repeats),
    }
    result: dict[str, Any] = about()
    for name, ratios in measured.items():
        worst = min(ratios) if name == "wrapper" else max(ratios)
        result[name] = {"ratio": statistics.median(ratios), "worst": worst}
        Console().print(
            f"{name}: {statistics.median(ratios):.3f} (worst {worst:.3f}) of {args.repeats} repetitions"
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
