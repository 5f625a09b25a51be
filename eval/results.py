"""An evaluation as people read it: a table on screen, and results.json with the samples that the scores are made of."""

import hashlib
import json
import math
import os
import statistics
import time
import tomllib
from argparse import Namespace
from collections import defaultdict
from collections.abc import Container
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lmms_eval.tasks
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from configs.model import ModelConfig
from eval import captions as captions_module
from eval import ptb_tokenizer
from eval.captions import caption_errors, cider
from eval.lmms_eval_wrapper import DualTower
from eval.predictor import Predictor
from eval.tasks import Tasks, captioned, run_tasks, scores_of, unscored
from utils.files import file_name, write_text
from utils.ranks import torchrun_context

FORMAT = 2
PACKAGES = ("lmms-eval", "torch", "transformers", "datasets", "tokenizers", "pillow")


def evaluate(args: Namespace, output: Path | None) -> None:
    """What `evaluation.py` does, its flags in `args`. Under torchrun every rank takes its share of the questions; the first one tells."""
    first = int(os.environ.get("RANK", 0)) == 0
    console = Console(quiet=not first)
    metrics = [name.strip() for name in args.caption_metrics.split(",") if name.strip()]
    tasks = Tasks(Path(args.data_root) if args.data_root else None, metrics, args.tokenizer, args.matcher)
    for name in args.tasks:  # errors before anything is computed, the quick ones first
        tasks.add(name)
    predictor = Predictor.from_pretrained(args.model, args.dtype, args.device)
    for name in args.tasks:
        tasks.load(name)
    keep = output / "images" if output is not None else None
    if first and output is not None and (output / "results.json").exists():
        console.print(
            f"{output} holds results of an earlier run, which stay until this one's first task is done",
            soft_wrap=True,
        )
    shown = (
        "limit",
        "batch_size",
        "max_new_tokens",
        "dtype",
        "process_with_media",
        "tokenizer",
        "caption_metrics",
        "matcher",
        "random_baseline",
        "data_root",
    )
    shown = tuple(
        key for key in shown if key != "matcher" or any(name.startswith("questions:") for name in args.tasks)
    )  # others have their own
    settings = {key: getattr(args, key) for key in shown} | {"device": predictor.model.device.type}
    results: dict[str, Any] = {
        "format": FORMAT,
        "model": str(args.model),
        "settings": settings,
        "versions": versions(),
        "tasks": {},
    }
    for name in args.tasks:
        told, samples = run_task(args, predictor, tasks, name, keep, output, console)
        baseline = (
            run_task(args, untrained(predictor), tasks, name, None, output, console)[0]
            if args.random_baseline
            else {}
        )
        if not first:
            continue
        results["tasks"][name] = told | {"random_baseline": baseline.get("scores")}
        show(console, name, str(args.model), results["tasks"][name])
        if output is not None:
            write_text(
                output / f"samples_{file_name(name)}.jsonl",
                "".join(json.dumps(sample) + "\n" for sample in samples),
            )
            write_text(output / "results.json", json.dumps(results, indent=2) + "\n")
    if first and output is not None:
        console.print(
            f"written: {output / 'results.json'} (python -m tools.evaluation_report {output} makes a page of it)",
            soft_wrap=True,
        )
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def versions() -> dict[str, str]:
    """Of what a score depends on; of this project from its own file, which need not be installed."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))[
        "project"
    ]
    return {project["name"]: project["version"]} | {package: version(package) for package in PACKAGES}


def run_task(
    args: Namespace,
    predictor: Predictor,
    tasks: Tasks,
    name: str,
    keep: Path | None,
    output: Path | None,
    console: Console,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A task's entry in results.json, and its samples; nothing on all ranks but the first. A group's tasks stand in one entry."""
    tasks.left_out.clear()
    started = time.perf_counter()
    screen = Console(stderr=True, quiet=console.quiet)
    with Progress(
        console=screen, transient=True, disable=not screen.is_terminal
    ) as bar:  # else an empty line stands before an error's
        shown = bar.add_task(name, total=None)
        model = DualTower(
            predictor=predictor, batch_size=args.batch_size, max_new_tokens=args.max_new_tokens, keep=keep
        )
        model.progress = lambda done, total: bar.update(shown, completed=done, total=total)
        found = run_tasks(model, tasks, [name], args.limit, args.process_with_media, output)
    ranks = torchrun_context().gather(
        (model.images, sum(model.truncated.values()), model.tokens, model.seconds, model.seen)
    )
    if not found:
        return {}, []
    images = {key: names for rank in ranks for key, names in rank[0].items()}
    truncated, tokens, seconds = (
        sum(rank[1] for rank in ranks),
        sum(rank[2] for rank in ranks),
        max(rank[3] for rank in ranks),
    )
    samples: list[dict[str, Any]] = []
    errors: dict[tuple[str, str], float] = {}
    warnings = (
        [f"left out for want of Java: {', '.join(dict.fromkeys(tasks.left_out))}"] if tasks.left_out else []
    )
    warnings += [f"no score: {', '.join(none)}"] if (none := unscored(found)) else []
    for task, part in found["samples"].items():
        part.sort(key=lambda sample: sample["doc_id"])
        mine = [sample_of(task, sample, images, tasks.captions) for sample in part]
        captions = [sample for sample in mine if sample["scores"] is None]
        if captions:
            answers, references = (
                [sample["answer"] for sample in captions],
                [sample["reference"] for sample in captions],
            )
            made = cider(answers, references, args.tokenizer)
            warnings += [made.warning] if made.warning else []
            here = {
                metric: tasks.captions[metric]
                for told, metric, _ in scores_of(found)
                if told == task and metric in tasks.captions
            }
            label = next((metric for metric, ours in here.items() if ours == "CIDEr"), "CIDEr")
            for sample, score in zip(captions, made.each, strict=True):
                sample["scores"] = {label: score}
            spread = caption_errors(answers, references, list(here.values()), args.tokenizer)
            errors |= {(task, metric): spread[ours] for metric, ours in here.items() if ours in spread}
        elif len({sample["doc_id"] for sample in part}) == len(
            part
        ):  # else each stands there once for each filter
            known = {
                metric: standard_error(metric.partition(" (")[0], value, part)
                for told, metric, value in scores_of(found)
                if told == task
            }
            errors |= {(task, metric): error for metric, error in known.items() if error is not None}
        samples += mine
    several = len(found["results"]) > 1
    scores, better, standard_errors = {}, {}, {}
    for task, metric, value in scores_of(found):
        label = f"{task}: {metric}" if several else metric
        scores[label] = value
        better[label] = found["higher_is_better"].get(task, {}).get(metric.partition(" (")[0], True)
        if (task, metric) in errors:
            standard_errors[label] = errors[task, metric]
    return {
        "scores": scores,
        "standard_errors": standard_errors,
        "random_baseline": None,
        "higher_is_better": better,
        "samples": len(samples),
        "truncated": truncated,
        "first_prompt": next((text for _, text in model.first_prompts.values()), ""),
        "task_hash": task_hash(tasks, list(found["samples"])),
        "data_hash": data_hash(
            found["samples"], {key: digest for rank in ranks for key, digest in rank[4].items()}
        ),
        "warnings": warnings,
        "seconds": round(time.perf_counter() - started, 1),
        "tokens_per_s": round(tokens / seconds, 1) if seconds else None,
    }, samples


NOT_METRICS = {
    "doc_id",
    "doc",
    "target",
    "arguments",
    "resps",
    "filtered_resps",
    "token_counts",
    "doc_hash",
    "input_media",
}


def sample_of(
    task: str, sample: dict[str, Any], images: dict[tuple[str, int], list[str]], captions: Container[str]
) -> dict[str, Any]:
    """A logged sample of lmms-eval's → what was asked, said and wanted, and its scores; None of a caption, which is scored among all."""
    metrics = {key: value for key, value in sample.items() if key not in NOT_METRICS}
    scores: dict[str, float] | None = {}
    reference = sample["target"]
    for key, value in metrics.items():
        if key in captions:
            scores, reference = None, captioned(value)[1]
            break
        number = value.get("score") if isinstance(value, dict) else value
        if isinstance(number, bool | int | float):
            scores[key] = float(number)  # type: ignore[index]
    answer = sample["filtered_resps"][0]
    return {
        "id": sample["doc_id"],
        "images": [f"images/{name}" for name in images.get((task, sample["doc_id"]), ())],
        "prompt": next((argument for argument in sample["arguments"] if isinstance(argument, str)), ""),
        "reference": reference if isinstance(reference, str | list) else str(reference),
        "answer": answer if isinstance(answer, str) else json.dumps(answer, default=str),
        "scores": scores,
    }


def standard_error(metric: str, score: float, samples: list[dict[str, Any]]) -> float | None:
    """Of a score that is the mean of its samples', or the mean over groups of these of their means, as MMStar's is over its finer categories.

    None where it is neither, and where all samples score the same: that they differ by nothing is not known from these.
    """
    told = [sample[metric] for sample in samples if isinstance(sample.get(metric), bool | int | float | dict)]
    rows = [value if isinstance(value, dict) else {"score": value} for value in told]
    if not rows or not all(isinstance(row.get("score"), bool | int | float) for row in rows):
        return None
    for key in (None, *(key for key, value in rows[0].items() if isinstance(value, str))):
        groups: dict[Any, list[float]] = defaultdict(list)
        for row in rows:
            groups[row.get(key)].append(float(row["score"]))
        parts = list(groups.values())
        if (
            min(map(len, parts)) > 1
            and abs(statistics.fmean(map(statistics.fmean, parts)) - score) < 1e-9
            and any(len(set(part)) > 1 for part in parts)
        ):
            return math.sqrt(sum(statistics.variance(part) / len(part) for part in parts)) / len(parts)
    return None


def data_hash(samples: dict[str, list[dict[str, Any]]], seen: dict[tuple[str, int], str]) -> str:
    """Of the rows, and of the images as the model sees them: `seen`, their checksums by task and document."""
    rows = [sample["doc_hash"] for part in samples.values() for sample in part]
    return hashlib.blake2b(
        "".join([*rows, *(seen[key] for key in sorted(seen))]).encode(), digest_size=8
    ).hexdigest()


def task_hash(tasks: Tasks, names: list[str]) -> str:
    """Of the tasks' YAML files, all that stands beside them, what all tasks share and our scores of captions: a changed matcher shows."""
    paths = {Path(tasks.task_index[name]["yaml_path"]) for name in names}
    paths |= {Path(captions_module.__file__), Path(ptb_tokenizer.__file__)}
    folders = {Path(tasks.task_index[name]["yaml_path"]).parent for name in names} | {
        Path(lmms_eval.tasks.__file__).parent / "_task_utils"
    }
    beside = {
        other
        for folder in folders
        for pattern in ("*.py", "*.yaml", "_*")
        for other in folder.glob(pattern)
        if other.is_file()
    }
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(paths | beside):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def untrained(predictor: Predictor) -> Predictor:
    """The same architecture with random weights, the same at every call."""
    config: ModelConfig = predictor.model.config
    towers = {tower: replace(getattr(config, tower), weights="random") for tower in config.towers}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = type(predictor.model)(
            replace(config, vision=replace(config.vision, weights="random"), **towers),
            predictor.model.vocabulary,
        )
    return Predictor(
        model.to(predictor.model.device, predictor.model.right.unembedding.dtype).eval(), predictor.renderer
    )


def show(console: Console, name: str, model: str, told: dict[str, Any]) -> None:
    table = Table("score", "value", "± standard error", "untrained")
    for metric, value in told["scores"].items():
        error, baseline = told["standard_errors"].get(metric), (told["random_baseline"] or {}).get(metric)
        table.add_row(
            metric,
            f"{value:.4f}",
            f"{error:.4f}" if error is not None else "",
            f"{baseline:.4f}" if baseline is not None else "",
        )
    console.print(f"{name}: {model}, {told['samples']:,} samples in {told['seconds']} s", soft_wrap=True)
    console.print(table)
    if told["truncated"]:
        console.print(
            f"{told['truncated']} of {told['samples']} answers were truncated at their longest length (--max_new_tokens)",
            soft_wrap=True,
        )
    for warning in told["warnings"]:
        console.print(f"warning: {warning}", soft_wrap=True)
