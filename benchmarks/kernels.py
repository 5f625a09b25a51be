"""What each kernel earns: seconds with it alone, and with all of them, ÷ seconds of the plain core.

  python -m benchmarks.kernels --json benchmarks/results/kernels.json

Three workloads, each in the dtype that `auto` takes on this machine:

default     optimizer steps of the default config, its vision features cached
222m        the standard row of `benchmarks.train_step`, dual tower
decoding    one token, and a chain of four, after 200 others: the right tower of 222m, one row

The kernels take turns in one process, step by step. Figures are medians (minimum to maximum). A kernel that
does not apply on this machine is left out.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.about import about
from benchmarks.trial import SIZES, Trial
from configs.cli import preset
from models.dual_tower.dual_language_model import DualLanguageModel
from models.dual_tower.dual_tower import DualTowerVLM
from models.kernels import KERNELS, use_kernels
from models.kernels.packed_block import PackedBlock, pack_blocks
from models.kv_cache import DecodingCache
from models.masks import cache_mask
from training.logging import RunLog
from training.setup import prepare, resolve_config
from training.trainer import Trainer
from utils.device import compute_dtype
from utils.errors import run_script
from utils.ranks import SINGLE_PROCESS

CPU = torch.device("cpu")
TEXT = 200  # tokens in the cache before decoding


class FixedBatches:
    """The same few batches, in turn."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.at = batches, 0

    def __next__(self) -> Any:
        self.at += 1
        return self.batches[self.at % len(self.batches)]

    def sources(self) -> list[str]:
        return []

    def samples(self) -> list[str]:
        return []


def default_step(folder: Path) -> Callable[[], Any]:
    config = resolve_config(replace(preset("dual_tower_easyvqa"), cache_dir=str(folder / "cache")), {})
    log = RunLog(folder)
    model, data, _ = prepare(config, log, folder / "tokenizer", None, DualTowerVLM, SINGLE_PROCESS)
    batches = FixedBatches([next(data.batches) for _ in range(8)])
    return Trainer(config, model, batches).train_step


def decoding(tokens: int, dtype: torch.dtype) -> Callable[[], Any]:
    """A decode step over `tokens` new tokens, its blocks packed where the kernels in use say so."""
    size = SIZES["222m"]
    model = DualLanguageModel(size.decoder, size.text).eval().to(dtype)
    pack_blocks(model)
    c = size.decoder
    cache = DecodingCache(c.layers, 1, c.kv_heads, TEXT + tokens, c.head_size, dtype, CPU)
    ids, positions = torch.zeros(1, tokens, dtype=torch.int64), TEXT + torch.arange(tokens)[None]

    @torch.inference_mode()
    def step() -> None:
        cache.lengths = [TEXT]
        cache.positions[:, :TEXT] = torch.arange(TEXT)
        cache.reserve(positions)
        mask = cache_mask(positions, cache.positions[:, : cache.used])
        model.logits(model(model.embed_tokens(ids), positions, mask, cache)).argmax(-1).tolist()

    return step


def measure(step: Callable[[], Any], choices: dict[str, Any], repeats: int) -> dict[str, list[float]]:
    """Seconds of `step` with each choice of kernels, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in choices}
    for repeat in range(repeats + 1):  # the first is a warm-up
        for name, chosen in choices.items():
            use_kernels(chosen)
            started = time.perf_counter()
            step()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    use_kernels("auto")
    return seconds


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", choices=("default", "222m", "decoding"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    dtype = compute_dtype("auto", CPU)
    short = str(dtype).removeprefix("torch.")
    trained = [kernel for kernels in KERNELS.values() for kernel in kernels]
    workloads: dict[str, tuple[list[Any], Callable[[Path], Callable[[], Any]], int]] = {
        "default": (trained, default_step, 10),
        "222m": (
            trained,
            lambda _: Trial("dual_tower", "222m", {"bfloat16": "bf16"}.get(short, "fp32"), CPU).step,
            1,
        ),
        "decoding, one token": ([PackedBlock], lambda _: decoding(1, dtype), 10),
        "decoding, four tokens": ([PackedBlock], lambda _: decoding(4, dtype), 10),
    }
    table = Table("workload", "kernels", "seconds", "÷ plain", title=f"{about()['machine']}, {short}")
    results: dict[str, Any] = {}
    for name, (kernels, make, times) in workloads.items():
        if args.only and not name.startswith(args.only):
            continue
        use_kernels("auto")
        probe = torch.empty(0, dtype=dtype)
        choices: dict[str, Any] = {"plain": "plain"} | {
            kernel.__name__: [kernel] for kernel in kernels if kernel.applies(probe)
        }
        if len(choices) == 1:
            table.add_row(name, "none applies", "", "")
            continue
        with TemporaryDirectory() as folder:
            seconds = measure(make(Path(folder)), choices | {"all": "auto"}, args.repeats * times)
        results[name] = {
            choice: {
                "seconds": statistics.median(s),
                "min_seconds": min(s),
                "max_seconds": max(s),
                "share_of_plain": statistics.median(s) / statistics.median(seconds["plain"]),
            }
            for choice, s in seconds.items()
        }
        for choice, r in results[name].items():
            spread = f"{r['seconds']:.4f} ({r['min_seconds']:.4f} to {r['max_seconds']:.4f})"
            table.add_row(name, choice, spread, f"{r['share_of_plain']:.2f}")
    Console(width=110).print(table)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(about() | {"dtype": short} | results, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
