"""Memory of training on the CPU: the estimate of `--fit-memory` and `--dry_run` beside measurements.

  python -m benchmarks.memory --config dual_tower_cauldron_222m --rows 1,2        ÷ counted tensors
  python -m benchmarks.memory --config dual_tower_smollm2 --train 400             beside a real run's process

A model with random weights makes two steps of two micro-batches of full rows, and every live tensor is
counted. Matrix products and convolutions are not computed but replaced by zeros. Sizes are those of
pretrained models, whose weights are not downloaded; SmolLM2's sizes are in a table.

`--train N` runs the training program for N steps, with its evaluations and saves, and samples the memory of
its process ten times a second. Unknown flags are passed on to it. It needs /proc.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.guard import Ledger
from configs.cli import preset, resolve
from configs.model import DecoderConfig, Vocabulary
from configs.train import Config
from models.dual_tower.dual_tower import DualTowerVLM
from models.vision_encoder import resolve_vision
from models.vision_language_model import VisionLanguageModel
from training.memory import OVERHEAD, SkipMatmuls, peak, step_memory
from training.process_memory import resident_bytes
from training.setup import resolve_config, vocabulary_of
from utils.errors import UserError, run_script

SIZES = {
    "random": None,
    "HuggingFaceTB/SmolLM2-135M-Instruct": DecoderConfig(),
    "HuggingFaceTB/SmolLM2-360M-Instruct": DecoderConfig(
        layers=32, hidden_size=960, heads=15, kv_heads=5, mlp_size=2560
    ),
}
TEXT, MARKERS = 49152, 65  # tokens of SmolLM2's vocabulary; the global image's marker and 8 × 8 tiles'


def counted(steps: Callable[[], Any], device: torch.device) -> float:
    ledger = Ledger(TEXT)
    with SkipMatmuls(), ledger:
        steps()
    return float(ledger.peak)


def sized(config: Config) -> Config:
    """Replace a preset's pretrained weights by random ones of the same sizes."""
    for tower in config.model.towers:
        name = getattr(config.model, tower).weights
        if name not in SIZES:
            raise UserError(f"the sizes of {name} are unknown; known: {', '.join(SIZES)}")
        config = replace(
            config, model=replace(config.model, **{tower: SIZES[name] or getattr(config.model, tower)})
        )
    return replace(
        config,
        model=replace(config.model, vision=resolve_vision(replace(config.model.vision, weights="random"))),
    )


def compared(
    config: Config, model_class: Any, vocabulary: Vocabulary, rows: list[int]
) -> list[tuple[int, float, float]]:
    """→ (rows, estimated bytes, counted bytes) for each number of rows."""
    out = []
    for n in rows:
        parts = step_memory(config, model_class, vocabulary, n)
        live = peak(config, model_class, vocabulary, n, torch.device("cpu"), counted)
        out.append((n, sum(parts.values()), parts["weights"] + live))
    return out


def model_class_of(config: Config) -> Any:
    return VisionLanguageModel if config.model.left_context == "none" else DualTowerVLM


@dataclass(frozen=True)
class Held:
    """What the process of a run held: bytes after a step, and the peak up to then."""

    step: int
    resident: float
    peak: float


def trained(command: list[str], folder: Path) -> list[Held]:
    """Run the training program with `command` → what its process held after each step. Raises `UserError`."""
    metrics, held, peak_bytes = folder / "metrics.jsonl", [Held(0, 0, 0)], 0.0
    with subprocess.Popen(command) as program:
        while program.poll() is None:
            resident = resident_bytes(program.pid)
            peak_bytes = max(peak_bytes, resident)
            lines = metrics.read_text().split("\n")[:-1] if metrics.is_file() else []
            step = max((json.loads(line)["step"] for line in lines[-2:]), default=0)
            if step > held[-1].step:
                held.append(Held(step, resident, peak_bytes))
            time.sleep(0.1)
    if program.returncode:
        raise UserError(f"{' '.join(command)} ended with {program.returncode}")
    return held[1:]


def train(name: str, steps: int, flags: list[str]) -> None:
    """Print what a real run holds after chosen steps, beside the estimate of `--dry_run`."""
    given = ["--config", name, "--max_steps", str(steps), "--train.device", "cpu", *flags]
    config = resolve_config(*resolve(given, str(__doc__)))
    rows = config.train.local_batch_size
    parts = step_memory(config, model_class_of(config), vocabulary_of(config), rows, save=True)
    estimate = OVERHEAD + sum(parts.values())
    script = "train_vanilla.py" if config.model.left_context == "none" else "train_dual_tower.py"
    with tempfile.TemporaryDirectory() as folder:
        held = trained([sys.executable, script, *given, "--output_dir", folder], Path(folder))
    table = Table(
        "after step", "holds, GB", "peak so far, GB", "peak ÷ dry run", title=f"{name}, {steps} steps"
    )
    chosen = {1, 2, 5, 10, 25, held[-1].step, *range(50, steps, 50)}
    for h in (h for h in held if h.step in chosen):
        table.add_row(
            str(h.step), f"{h.resident / 1e9:.2f}", f"{h.peak / 1e9:.2f}", f"{h.peak / estimate:.2f}"
        )
    Console().print(table)
    print(f"the dry run says {estimate / 1e9:.2f} GB")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default="dual_tower_cauldron_222m")
    parser.add_argument("--rows", default="1,2", help="rows of a micro-batch, comma-separated")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--train", type=int, metavar="N", help="train N steps and measure the process")
    args, flags = parser.parse_known_args(argv)
    if args.train:
        train(args.config, args.train, flags)
        return
    if flags:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    config = sized(preset(args.config))
    config = replace(config, train=replace(config.train, dtype=args.dtype, recompute=args.recompute))
    text = TEXT if config.model.right.layers >= 30 else config.data.vocab_size
    table = Table(
        "rows",
        "estimate, GB",
        "counted, GB",
        "estimate ÷ counted",
        title=f"{args.config}, {args.dtype}{', recompute' * args.recompute}",
    )
    for rows, estimate, count in compared(
        config, model_class_of(config), Vocabulary(text, MARKERS), [int(n) for n in args.rows.split(",")]
    ):
        table.add_row(str(rows), f"{estimate / 1e9:.2f}", f"{count / 1e9:.2f}", f"{estimate / count:.3f}")
    Console().print(table)


if __name__ == "__main__":
    run_script(main)
