"""easy-VQA from scratch: train the default preset, then answer all 9,673 test questions; one line per seed.

  python -m benchmarks.easy_vqa --seeds 0 1 2 --json benchmarks/results/easy_vqa.json

Seconds are those of the whole training script: imports, vision features and validation included. Nothing is
cached between runs. The test set is evaluated once per seed.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.about import about
from configs.cli import resolve
from utils.errors import run_script

ROOT = Path(__file__).resolve().parent.parent


def one(seed: int, extra: list[str]) -> dict[str, float]:
    """Train and evaluate with one seed in an empty folder."""
    with tempfile.TemporaryDirectory() as work:
        run = Path(work) / "run"
        started = time.perf_counter()
        command = [
            sys.executable,
            str(ROOT / "train_dual_tower.py"),
            "--seed",
            str(seed),
            "--output_dir",
            str(run),
            "--cache_dir",
            f"{work}/cache",
            *extra,
        ]
        subprocess.run(command, cwd=work, check=True, stdout=sys.stderr)
        seconds = time.perf_counter() - started
        command = [
            sys.executable,
            str(ROOT / "evaluation.py"),
            "--model",
            str(run / "model"),
            "--tasks",
            "easy_vqa",
            "--output",
            f"{work}/out",
        ]
        subprocess.run(command, cwd=work, check=True, stdout=sys.stderr)
        scores = json.loads(Path(f"{work}/out/results.json").read_text())["tasks"]["easy_vqa"]
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    accuracies = scores["scores"]
    validation = [x["validation_accuracy"] for x in lines if "validation_accuracy" in x][-1]
    return {
        "seed": seed,
        "train_s": seconds,
        "validation": validation,
        "test": accuracies.pop("accuracy"),
        "questions": scores["samples"],
        **accuracies,
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="file for the figures")
    args, extra = parser.parse_known_args(argv)
    resolve(extra, "")  # report a wrong training flag now
    results = [one(seed, extra) for seed in args.seeds]
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    title = f"easy-VQA, {machine}, torch {torch.__version__}, {date.today()}"
    table = Table(*results[0], title=title)
    for r in results:
        table.add_row(
            *[f"{v:.2%}" if isinstance(v, float) and k != "train_s" else f"{v:.0f}" for k, v in r.items()]
        )
    Console(width=140).print(table)
    if args.json:
        head = about() | {"threads": torch.get_num_threads(), "flags": extra}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(head | {"results": results}, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
