"""Memory of a training step on the CPU: the estimate of `--fit-memory` and `--dry-run` ÷ counted tensors.

  python -m benchmarks.memory --config dual_tower_cauldron_222m --rows 1,2

A model with random weights makes two steps of two micro-batches of full rows, and every live tensor is
counted. Matrix products and convolutions are not computed but replaced by zeros. Sizes are those of
pretrained models, whose weights are not downloaded; SmolLM2's sizes are in a table.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.guard import Ledger
from configs.cli import preset
from configs.model import DecoderConfig, Vocabulary
from configs.train import Config
from models.dual_tower.dual_tower import DualTowerVLM
from models.vision_encoder import resolve_vision
from models.vision_language_model import VisionLanguageModel
from training.estimate import SkipMatmuls, step_memory
from training.fit_memory import peak
from utils.errors import UserError, run_script

SIZES = {
    "random": None,
    "HuggingFaceTB/SmolLM2-135M-Instruct": DecoderConfig(),
    "HuggingFaceTB/SmolLM2-360M-Instruct": DecoderConfig(
        layers=32, hidden_size=960, heads=15, kv_heads=5, mlp_size=2560
    ),
}
TEXT, MARKERS = 49152, 65  # tokens of SmolLM2's vocabulary; the global image's marker and 8 × 8 tiles'


def counted(steps: Callable[[], Any]) -> float:
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
    of = step_memory(config, model_class, vocabulary)
    return [
        (
            n,
            sum(of(n).values()),
            of(n)["weights"] + peak(config, model_class, vocabulary, n, torch.device("cpu"), counted),
        )
        for n in rows
    ]


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
    args = parser.parse_args(argv)
    config = sized(preset(args.config))
    config = replace(config, train=replace(config.train, dtype=args.dtype, recompute=args.recompute))
    model_class = VisionLanguageModel if config.model.left_context == "none" else DualTowerVLM
    text = TEXT if config.model.right.layers >= 30 else config.data.vocab_size
    table = Table(
        "rows",
        "estimate, GB",
        "counted, GB",
        "estimate ÷ counted",
        title=f"{args.config}, {args.dtype}{', recompute' * args.recompute}",
    )
    for rows, estimate, count in compared(
        config, model_class, Vocabulary(text, MARKERS), [int(n) for n in args.rows.split(",")]
    ):
        table.add_row(str(rows), f"{estimate / 1e9:.2f}", f"{count / 1e9:.2f}", f"{estimate / count:.3f}")
    Console().print(table)


if __name__ == "__main__":
    run_script(main)
