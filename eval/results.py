"""Results of an evaluation: a table on screen, results.json and the samples behind the scores."""

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
from typing import Any, NamedTuple

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
from eval.tasks import Tasks, caption_pair, run_tasks, scores_of, unscored
from utils.files import file_name, write_text
from utils.ranks import torchrun_context

FORMAT = 2
PACKAGES = ("lmms-eval", "torch", "transformers", "datasets", "tokenizers", "pillow")


SETTINGS = (  # flags that results.json lists
    "limit",
    "batch_size",
    "max_new_tokens",
    "dtype",
    "process_with_media",
    "tokenizer",
    "caption_metrics",
    "matcher",
    "shots",
    "random_baseline",
    "data_root",
)


class RankFigures(NamedTuple):
    """Figures of the model on one rank."""

    images: dict[tuple[str, int], list[str]]  # thumbnails, by task and document
    truncated: int  # answers
    tokens: int
    seconds: float
    seen: dict[tuple[str, int], str]  # checksums of images, by task and document


def evaluate(args: Namespace, output: Path | None) -> None:
    """Run `evaluation.py` with its flags in `args`.

    Under torchrun every rank answers its share of the questions; the first one prints and writes.
    """
    first = int(os.environ.get("RANK", 0)) == 0
    console = Console(quiet=not first)
    metrics = [name.strip() for name in args.caption_metrics.split(",") if name.strip()]
    data_root = Path(args.data_root) if args.data_root else None
    tasks = Tasks(data_root, metrics, args.tokenizer, args.matcher, args.shots)
    for name in args.tasks:  # errors before anything is computed, the quick ones first
        tasks.add(name)
    config = Path(args.config) if args.config else None
    predictor = Predictor.from_pretrained(args.checkpoint, args.dtype, args.device, config=config)
    for name in args.tasks:
        tasks.load(name)
    thumbnails = output / "images" if output is not None else None
    if first and output is not None and (output / "results.json").exists():
        console.print(
            f"{output} holds results of an earlier run, which stay until this one's first task is done",
            soft_wrap=True,
        )
    results: dict[str, Any] = {
        "format": FORMAT,
        "model": str(args.checkpoint),
        "settings": _settings(args) | {"device": predictor.model.device.type},
        "versions": versions(),
        "tasks": {},
    }
    for name in args.tasks:
        entry, samples = run_task(args, predictor, tasks, name, thumbnails, output, console)
        baseline: dict[str, Any] = {}
        if args.random_baseline:
            baseline, _ = run_task(args, untrained(predictor), tasks, name, None, output, console)
        if not first:
            continue
        results["tasks"][name] = entry | {"random_baseline": baseline.get("scores")}
        show(console, name, str(args.checkpoint), results["tasks"][name])
        if output is not None:
            _write(output, name, samples, results)
    if first and output is not None:
        console.print(
            f"written: {output / 'results.json'} "
            f"(python -m tools.evaluation_report {output} makes a page of it)",
            soft_wrap=True,
        )
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _settings(args: Namespace) -> dict[str, Any]:
    """Return the flags for results.json; the matcher only where a task uses it."""
    uses_matcher = any(name.startswith("questions:") for name in args.tasks)
    return {key: getattr(args, key) for key in SETTINGS if key != "matcher" or uses_matcher}


def _write(output: Path, name: str, samples: list[dict[str, Any]], results: dict[str, Any]) -> None:
    """Write a task's samples, and all results so far."""
    lines = "".join(json.dumps(sample) + "\n" for sample in samples)
    write_text(output / f"samples_{file_name(name)}.jsonl", lines)
    write_text(output / "results.json", json.dumps(results, indent=2) + "\n")


def versions() -> dict[str, str]:
    """Return the versions that a score depends on.

    This project's comes from its own file, for it need not be installed.
    """
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    return {project["name"]: project["version"]} | {package: version(package) for package in PACKAGES}


def run_task(
    args: Namespace,
    predictor: Predictor,
    tasks: Tasks,
    name: str,
    thumbnails: Path | None,
    output: Path | None,
    console: Console,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run a task, or the tasks of a group, as one entry of results.json.

    Returns the entry and its samples; both are empty on all ranks but the first.
    """
    tasks.left_out.clear()
    started = time.perf_counter()
    model = DualTower(
        predictor=predictor,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        thumbnails=thumbnails,
    )
    outcome = _answer_task(args, model, tasks, name, output, console)
    ranks = torchrun_context().gather(
        RankFigures(model.images, sum(model.truncated.values()), model.tokens, model.seconds, model.seen)
    )
    if not outcome:
        return {}, []
    images = {key: names for rank in ranks for key, names in rank.images.items()}
    seen = {key: digest for rank in ranks for key, digest in rank.seen.items()}
    seconds = max(rank.seconds for rank in ranks)
    samples: list[dict[str, Any]] = []
    errors: dict[tuple[str, str], float] = {}
    warnings = _missing_scores(tasks, outcome)
    for task, logged in outcome["samples"].items():
        logged.sort(key=lambda sample: sample["doc_id"])
        task_samples = [sample_of(task, sample, images, tasks.captions) for sample in logged]
        captions = [sample for sample in task_samples if sample["scores"] is None]
        if captions:
            task_errors, warning = _score_captions(task, captions, outcome, tasks, args.tokenizer)
            warnings += [warning] if warning else []
        else:
            task_errors = _standard_errors(task, logged, outcome)
        errors |= {(task, metric): error for metric, error in task_errors.items()}
        samples += task_samples
    return {
        **_labelled_scores(outcome, errors),
        "samples": len(samples),
        "truncated": sum(rank.truncated for rank in ranks),
        "first_prompt": next((text for _, text in model.first_prompts.values()), ""),
        "task_hash": task_hash(tasks, list(outcome["samples"])),
        "data_hash": data_hash(outcome["samples"], seen),
        "warnings": warnings,
        "seconds": round(time.perf_counter() - started, 1),
        "tokens_per_s": round(sum(rank.tokens for rank in ranks) / seconds, 1) if seconds else None,
    }, samples


def _answer_task(
    args: Namespace, model: DualTower, tasks: Tasks, name: str, output: Path | None, console: Console
) -> dict[str, Any]:
    """Run a task through lmms-eval with a progress bar; return lmms-eval's results."""
    screen = Console(stderr=True, quiet=console.quiet)
    # Off a terminal the bar would print an empty line before an error's.
    with Progress(console=screen, transient=True, disable=not screen.is_terminal) as bar:
        bar_id = bar.add_task(name, total=None)
        model.progress = lambda done, total: bar.update(bar_id, completed=done, total=total)
        return run_tasks(model, tasks, [name], args.limit, args.process_with_media, output)


def _missing_scores(tasks: Tasks, outcome: dict[str, Any]) -> list[str]:
    """Return warnings about metrics without a score."""
    warnings = []
    if tasks.left_out:
        warnings.append(f"left out for want of Java: {', '.join(dict.fromkeys(tasks.left_out))}")
    if missing := unscored(outcome):
        warnings.append(f"no score: {', '.join(missing)}")
    return warnings


def _score_captions(
    task: str, captions: list[dict[str, Any]], outcome: dict[str, Any], tasks: Tasks, tokenizer: str
) -> tuple[dict[str, float], str | None]:
    """Put CIDEr into each sample; return the standard error of each metric, and CIDEr's warning."""
    answers = [sample["answer"] for sample in captions]
    references = [sample["reference"] for sample in captions]
    result = cider(answers, references, tokenizer)
    canonical = {  # the task's metric → our name of it
        metric: tasks.captions[metric]
        for scored, metric, _ in scores_of(outcome)
        if scored == task and metric in tasks.captions
    }
    label = next((metric for metric, name in canonical.items() if name == "CIDEr"), "CIDEr")
    for sample, score in zip(captions, result.each, strict=True):
        sample["scores"] = {label: score}
    errors = caption_errors(answers, references, list(canonical.values()), tokenizer)
    return {metric: errors[name] for metric, name in canonical.items() if name in errors}, result.warning


def _standard_errors(task: str, logged: list[dict[str, Any]], outcome: dict[str, Any]) -> dict[str, float]:
    """Return the standard error of each metric; none where several filters log the same document."""
    if len({sample["doc_id"] for sample in logged}) != len(logged):
        return {}
    errors = {
        metric: standard_error(metric.partition(" (")[0], value, logged)
        for scored, metric, value in scores_of(outcome)
        if scored == task
    }
    return {metric: error for metric, error in errors.items() if error is not None}


def _labelled_scores(outcome: dict[str, Any], errors: dict[tuple[str, str], float]) -> dict[str, Any]:
    """Return scores and standard errors by metric, or by task and metric where there are several tasks."""
    several = len(outcome["results"]) > 1
    scores, higher_is_better, standard_errors = {}, {}, {}
    for task, metric, value in scores_of(outcome):
        label = f"{task}: {metric}" if several else metric
        scores[label] = value
        directions = outcome["higher_is_better"].get(task, {})
        higher_is_better[label] = directions.get(metric.partition(" (")[0], True)
        if (task, metric) in errors:
            standard_errors[label] = errors[task, metric]
    return {
        "scores": scores,
        "standard_errors": standard_errors,
        "random_baseline": None,
        "higher_is_better": higher_is_better,
    }


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
    """Turn a sample that lmms-eval logged into one of ours.

    `scores` is None for a caption, which is scored together with all others.
    """
    metrics = {key: value for key, value in sample.items() if key not in NOT_METRICS}
    scores: dict[str, float] = {}
    reference = sample["target"]
    is_caption = False
    for key, value in metrics.items():
        if key in captions:
            is_caption, reference = True, caption_pair(value)[1]
            break
        number = value.get("score") if isinstance(value, dict) else value
        if isinstance(number, bool | int | float):
            scores[key] = float(number)
    answer = sample["filtered_resps"][0]
    return {
        "id": sample["doc_id"],
        "images": [f"images/{name}" for name in images.get((task, sample["doc_id"]), ())],
        "prompt": next((argument for argument in sample["arguments"] if isinstance(argument, str)), ""),
        "reference": reference if isinstance(reference, str | list) else str(reference),
        "answer": answer if isinstance(answer, str) else json.dumps(answer, default=str),
        "scores": None if is_caption else scores,
    }


def standard_error(metric: str, score: float, samples: list[dict[str, Any]]) -> float | None:
    """Estimate the standard error of a score: a mean over samples, or a mean over groups of group means.

    MMStar's score is a mean over its finer categories. None where the score is neither, and where all
    samples score the same: their spread is unknown then.
    """
    values = [
        sample[metric] for sample in samples if isinstance(sample.get(metric), bool | int | float | dict)
    ]
    rows = [value if isinstance(value, dict) else {"score": value} for value in values]
    if not rows or not all(isinstance(row.get("score"), bool | int | float) for row in rows):
        return None
    for key in (None, *(key for key, value in rows[0].items() if isinstance(value, str))):
        groups: dict[Any, list[float]] = defaultdict(list)
        for row in rows:
            groups[row.get(key)].append(float(row["score"]))
        parts = list(groups.values())
        matches = abs(statistics.fmean(map(statistics.fmean, parts)) - score) < 1e-9
        if matches and min(map(len, parts)) > 1 and any(len(set(part)) > 1 for part in parts):
            return math.sqrt(sum(statistics.variance(part) / len(part) for part in parts)) / len(parts)
    return None


def data_hash(samples: dict[str, list[dict[str, Any]]], seen: dict[tuple[str, int], str]) -> str:
    """Hash the rows, and the images as the model sees them.

    `seen`: checksums of the images, by task and document.
    """
    rows = [sample["doc_hash"] for part in samples.values() for sample in part]
    return hashlib.blake2b(
        "".join([*rows, *(seen[key] for key in sorted(seen))]).encode(), digest_size=8
    ).hexdigest()


def task_hash(tasks: Tasks, names: list[str]) -> str:
    """Hash the code of the tasks, so that a changed matcher shows.

    That is their YAML files, the files next to these, what all tasks share, and our scores of captions.
    """
    yaml_paths = [Path(tasks.task_index[name]["yaml_path"]) for name in names]
    paths = {*yaml_paths, Path(captions_module.__file__), Path(ptb_tokenizer.__file__)}
    folders = {path.parent for path in yaml_paths} | {Path(lmms_eval.tasks.__file__).parent / "_task_utils"}
    for folder in folders:
        for pattern in ("*.py", "*.yaml", "_*"):
            paths |= {path for path in folder.glob(pattern) if path.is_file()}
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(paths):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def untrained(predictor: Predictor) -> Predictor:
    """Return the same architecture with random weights, equal at every call."""
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


def show(console: Console, name: str, model: str, entry: dict[str, Any]) -> None:
    """Print a task's entry of results.json as a table."""
    table = Table("score", "value", "± standard error", "untrained")
    baselines = entry["random_baseline"] or {}
    for metric, value in entry["scores"].items():
        error, baseline = entry["standard_errors"].get(metric), baselines.get(metric)
        table.add_row(
            metric,
            f"{value:.4f}",
            f"{error:.4f}" if error is not None else "",
            f"{baseline:.4f}" if baseline is not None else "",
        )
    console.print(f"{name}: {model}, {entry['samples']:,} samples in {entry['seconds']} s", soft_wrap=True)
    console.print(table)
    if entry["truncated"]:
        console.print(
            f"{entry['truncated']} of {entry['samples']} answers were truncated at their longest length "
            "(--max_new_tokens)",
            soft_wrap=True,
        )
    for warning in entry["warnings"]:
        console.print(f"warning: {warning}", soft_wrap=True)
