"""Studies: a few configurations, each with several seeds; a table with mean and spread, and curves.

  python -m benchmarks.study towers --smallest                 two seeds, minutes on two CPU cores
  python -m benchmarks.study towers --seeds 0 1 2 --output runs/towers
  python -m benchmarks.study towers --only vanilla             some of its configurations

Runs are processes of the training scripts, one after another. The same command goes on with an interrupted
study: a run that ended is read from its JSON, and one that did not is resumed.

The learning rate stays constant and a moving average of the weights is validated. So a validation in mid-run
does not depend on the length of the run, and runs are compared where they have spent the same: "same tokens",
"same supervised tokens" and "same TFLOPs" are the accuracy where a run had spent what the cheapest run spent
in all, interpolated between two validations.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from benchmarks.about import about
from configs.cli import FlagParser, resolve
from configs.serialization import to_dict
from configs.train import Config
from utils.errors import UsageError, UserError, nearest, run_script
from utils.files import read_json, write_text

ROOT = Path(__file__).resolve().parent.parent
UNITS = {  # what a run spends → its figure in the table, and by what it is divided there
    "tokens": ("tokens, M", 1e6),
    "supervised": ("supervised tokens, M", 1e6),
    "flops": ("TFLOPs", 1e12),
}
FORMATS = {  # of figures that are no shares
    "parameters, M": ".2f",
    "loss": ".3f",
    "cider": ".3f",
    "tokens, M": ".2f",
    "supervised tokens, M": ".3f",
    "TFLOPs": ".1f",
    "tokens/s": ",.0f",
    "memory, GB": ".2f",
}
Result = dict[str, Any]  # of a run: what its JSON holds


@dataclass(frozen=True)
class Study:
    question: str
    flags: str  # of every run
    configs: dict[str, str]  # name → further flags
    smallest: str = "--max_steps 350 --train.eval_every 50"  # flags of --smallest


# The cache of features is on, not auto: FLOPs must not depend on a measurement of time.
COMMON = """--max_steps 4000 --train.eval_every 200 --train.final_lr 1 --train.ema 0.99
    --train.feature_cache on --train.checkpoint_every 0
    --train.checkpoint_minutes 5"""
SMOLLM2 = f"--config dual_tower_smollm2 {COMMON} --max_steps 400 --train.eval_every 50"
STUDIES = {
    "towers": Study(
        "Does a dual tower of about 2 M parameters learn as well as a vanilla model of the same size?",
        f"{COMMON} --data.sources easy_vqa,synthetic:350",
        {
            "dual tower": "--config dual_tower_easyvqa",
            "vanilla": "--config vanilla_easyvqa --model.right.layers 5",
        },
        "--max_steps 350 --train.eval_every 50 --data.validation_images 100 --data.sources "
        "easy_vqa,synthetic/relate:1000,synthetic/count:1000,synthetic/compare:1000,synthetic/instruct:1000",
    ),
    "bridge": Study(
        "Do learned factors on the image KV help?",
        f"{COMMON} --data.sources easy_vqa,synthetic:350",
        {"none": "", "gate": "--model.bridge gate"},
    ),
    "depth": Study(
        "How many layers does the left tower need?",
        f"{COMMON} --data.sources easy_vqa,synthetic:350 --model.right.layers 4",
        {
            "100 %": "--model.left.layers 4",
            "50 %": "--model.left.layers 2",
            "25 %": "--model.left.layers 1",
        },
    ),
    "isolation": Study(
        "Must images see one another, in questions that compare two of them?",
        f"{COMMON} --data.sources synthetic/compare",
        {"isolated": "", "together": "--model.image_isolation false"},
    ),
    "frozen": Study(
        "Does the right tower of a pretrained pair have to be trained?",
        SMOLLM2,
        {"trained": "", "LoRA": "--lora.right.r 16 --train.lr_right 5e-4", "frozen": "--train.lr_right 0"},
        "--max_steps 50 --train.eval_every 10",
    ),
    "questions": Study(
        "What does it save that an image's questions share it in a row?",
        COMMON,
        {
            "many": "",
            # A row of one question, of 14 to 19 tokens, and as many questions in a step.
            "one": "--data.left_length 17 --data.right_length 20 "
            "--train.local_batch_size 154 --train.global_batch_size 154",
        },
    ),
}


@dataclass(frozen=True)
class StudyRun:
    config: str  # its name in the study
    seed: int
    flags: list[str]
    folder: Path  # of the training run; the JSON lies beside it

    @property
    def json(self) -> Path:
        return self.folder.with_suffix(".json")

    @property
    def title(self) -> str:
        return f"{self.config}, seed {self.seed}"


def runs_of(study: Study, seeds: list[int], only: list[str], smallest: bool, output: Path) -> list[StudyRun]:
    """The runs, seed by seed: after each, every configuration has as many."""
    runs = []
    for seed in seeds:
        for name, flags in study.configs.items():
            text = f"{study.flags} {flags} {study.smallest * smallest} --seed {seed}"
            if not only or name in only:
                folder = output / f"{'_'.join(name.replace('%', '').split())}-{seed}"
                runs.append(StudyRun(name, seed, shlex.split(text), folder))
    return runs


def result_of(run: StudyRun) -> Result:
    """Read a run's JSON, or train and write it."""
    if run.json.is_file():
        result: Result = read_json(run.json)
        if result["flags"] != run.flags:
            raise UserError(f"{run.json} is of other flags: choose another --output, or delete it")
        return result
    config, _ = resolve(run.flags, "")
    cache = run.folder.with_suffix(".cache")  # its own: features of an earlier run would cost no FLOPs
    model = run.folder / "model"  # a stopped run has only checkpoints
    if not model.is_dir():
        script = "train_vanilla.py" if config.model.left_context == "none" else "train_dual_tower.py"
        paths = ["--output_dir", str(run.folder), "--cache_dir", str(cache), "--resume", "auto"]
        print(f"{run.title}: {script} {shlex.join(run.flags)}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, str(ROOT / script), *run.flags, *paths], stdout=sys.stderr)
    if not model.is_dir():
        raise UserError(f"{run.title}: the run did not end; the same command goes on with it")
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    result = about() | {"config": run.config, "seed": run.seed, "flags": run.flags}
    result |= measure(lines) | answers(model, config) | {"settings": to_dict(config)}
    write_text(run.json, json.dumps(result, indent=1) + "\n")
    for path in (cache, run.folder / "checkpoints"):
        shutil.rmtree(path, ignore_errors=True)
    return result


def measure(lines: list[dict[str, Any]]) -> Result:
    """Curves and figures from the lines of a run's metrics.jsonl."""
    spent = dict.fromkeys(UNITS, 0.0)
    curve, validations = [], []
    for line in lines:
        if "supervised_tokens" in line:
            seconds = line["supervised_tokens"] / line["supervised_tokens_per_s"]  # of the step
            spent["tokens"] += line["tokens_per_s"] * seconds
            spent["supervised"] += line["supervised_tokens"]
            spent["flops"] += line["tflops_per_s"] * 1e12 * seconds
            curve.append([line["step"], line["loss"]])
        elif "validation_loss" in line:
            scores = {
                name.removeprefix("validation_"): value
                for name, value in line.items()
                if name.startswith(("validation_loss", "validation_accuracy", "validation_cider"))
            }
            validations.append({"step": line["step"]} | spent | scores)
    steps = [line for line in lines if "supervised_tokens" in line]
    return spent | {
        "tokens_per_s": median(line["tokens_per_s"] for line in steps),
        "memory_gb": max(line["memory_gb"] for line in steps),
        "validations": validations,
        "curve": curve,
    }


def answers(model: Path, config: Config) -> Result:
    """Number of parameters, and generated answers to the first validation questions of each source."""
    from configs.model import GenerationConfig
    from data.conversations import text_of
    from data.datasets import questions_of
    from data.sources import open_sources
    from eval.predictor import Predictor
    from eval.validation import images_of_record

    predictor = Predictor.from_pretrained(model, dtype="fp32")
    asked = [
        (source.name, images_of_record(record, messages), messages, references[0])
        for source in open_sources(config.data)[1]
        for record in [source.records[i] for i in range(source.start, min(source.stop, source.start + 2))]
        for messages, references in questions_of(record)[:2]
    ]
    prompts = [([predictor.tiles(image) for image in images], messages) for _, images, messages, _ in asked]
    generated = predictor.answer(prompts, GenerationConfig(max_new_tokens=32))
    samples = [
        {"source": name, "question": text_of(messages[-1]), "answer": right, "generated": answer.text}
        for (name, _, messages, right), answer in zip(asked, generated, strict=True)
    ]
    return {"parameters": sum(p.numel() for p in predictor.model.parameters()), "samples": samples}


def accuracy_at(result: Result, unit: str, budget: float) -> float:
    """Accuracy where a run had spent `budget` tokens or FLOPs, interpolated between validations."""
    points = result["validations"]
    return float(np.interp(budget, [p[unit] for p in points], [p["accuracy"] for p in points]))


def summarize(results: list[Result]) -> dict[str, dict[str, list[float]]]:
    """Configuration → figure → its value for each seed."""
    budgets = {unit: min(result[unit] for result in results) for unit in UNITS}
    summary: dict[str, dict[str, list[float]]] = {}
    for result in results:
        last = result["validations"][-1]
        figures = {"parameters, M": result["parameters"] / 1e6}
        figures |= {name: last[name] for name in ("loss", "accuracy", "cider") if name in last}
        for unit, (title, _) in UNITS.items():
            figures[f"same {title.split(',')[0]}"] = accuracy_at(result, unit, budgets[unit])
        figures |= {title: result[unit] / scale for unit, (title, scale) in UNITS.items()}
        figures |= {"tokens/s": result["tokens_per_s"], "memory, GB": result["memory_gb"]}
        figures |= {name: last[name] for name in last if name.startswith("accuracy_")}
        for name, value in figures.items():
            summary.setdefault(result["config"], {}).setdefault(name, []).append(value)
    return summary


def table(summary: dict[str, dict[str, list[float]]]) -> Iterator[str]:
    """Lines of a Markdown table: a row per figure; mean, and minimum to maximum, of the seeds."""
    figures = list(dict.fromkeys(name for values in summary.values() for name in values))
    seeds = {name: len(values["loss"]) for name, values in summary.items()}
    yield "| | " + " | ".join(f"{name}, {count} seeds" for name, count in seeds.items()) + " |"
    yield "| --- |" + " --- |" * len(summary)
    for figure in figures:
        cells = (format_spread(figure, values[figure]) for values in summary.values())
        yield f"| {figure} | " + " | ".join(cells) + " |"


def format_spread(figure: str, values: list[float]) -> str:
    """Format as `mean (minimum to maximum)`."""
    numbers = (fmean(values), min(values), max(values))
    mean, low, high = (format(x, FORMATS.get(figure, ".1%")).replace("%", " %") for x in numbers)
    return mean if low == high else f"{mean} ({low.removesuffix(' %')} to {high.removesuffix(' %')})"


def draw(results: list[Result], path: Path) -> None:
    """Validation accuracy by tokens and by FLOPs: mean, minimum and maximum of the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.3), layout="constrained")
    panels = figure.subplots(1, len(UNITS), sharey=True)
    for axes, (unit, (title, scale)) in zip(panels, UNITS.items(), strict=True):
        for name in dict.fromkeys(result["config"] for result in results):
            runs = [result for result in results if result["config"] == name]
            first = max(run["validations"][0][unit] for run in runs)
            x = np.linspace(first, min(run[unit] for run in runs), 100)
            curves = np.array([[accuracy_at(run, unit, budget) for budget in x] for run in runs])
            (line,) = axes.plot(x / scale, curves.mean(0), label=name)
            axes.fill_between(
                x / scale, curves.min(0), curves.max(0), color=line.get_color(), alpha=0.2, lw=0
            )
        axes.set(xlabel=title)
    panels[0].set(ylabel="validation accuracy")
    panels[0].legend()
    figure.savefig(path, dpi=110)


def main(argv: list[str]) -> None:
    parser = FlagParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", help=f"one of {', '.join(STUDIES)}")
    parser.add_argument("--seeds", type=int, nargs="+", help="[0 1 2; with --smallest 0 1]")
    parser.add_argument("--only", nargs="+", default=[], help="names of configurations [all]")
    parser.add_argument("--smallest", action="store_true", help="few steps, for two CPU cores")
    parser.add_argument("--output", type=Path, help="folder [runs/studies/NAME, or NAME_smallest]")
    args = parser.parse(argv)
    if args.study not in STUDIES:
        raise UsageError(f"no study '{args.study}'{nearest(args.study, list(STUDIES))}")
    study = STUDIES[args.study]
    for name in args.only:
        if name not in study.configs:
            raise UsageError(f"--only: {args.study} has no '{name}'{nearest(name, list(study.configs))}")
    output = args.output or ROOT / "runs/studies" / f"{args.study}{'_smallest' * args.smallest}"
    seeds = args.seeds or ([0, 1] if args.smallest else [0, 1, 2])
    results = [result_of(run) for run in runs_of(study, seeds, args.only, args.smallest, output)]
    lines = [study.question, "", *table(summary := summarize(results))]
    print("\n".join(lines))
    write_text(output / "summary.md", "\n".join(lines) + "\n")
    write_text(output / "summary.json", json.dumps(about() | {"figures": summary}, indent=1) + "\n")
    draw(results, output / "curves.png")


if __name__ == "__main__":
    run_script(main)
