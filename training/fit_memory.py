"""`--fit-memory`: the largest local batch size that fits the memory; the global batch size stays.

Memory is linear in the rows of a micro-batch. On a GPU it is measured, in steps with one full row and two.
Elsewhere it is the estimate of `--dry_run`.
"""

import gc
import math
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from configs.model import Vocabulary
from configs.train import Config
from training.estimate import OVERHEAD, full_batch, step_memory, trial_model
from training.process_memory import GROWTH
from training.trainer import Batch, Trainer
from utils.device import pick_device
from utils.errors import UsageError, UserError
from utils.ranks import SINGLE_PROCESS, DistributedContext

MARGIN = 1.05  # for fragmentation on a GPU; on a CPU it is at most GROWTH


def fit_batch_size(
    config: Config, model_class: Any, vocabulary: Vocabulary, world: DistributedContext = SINGLE_PROCESS
) -> tuple[Config, str]:
    """→ `config` with the local batch size that fits, and a line that says why. If nothing fits: `UserError`.

    The device of rank 0 represents those of all ranks. The random state is left as it is.
    """
    device = pick_device(config.train.device)
    if config.fit_memory == "auto":
        limit, limit_label = free_memory(device), f"that are free on {device.type}"
        if limit is None:
            raise UsageError(
                f"--fit-memory: the free memory of {device.type} is unknown: say how many GB, --fit-memory 12"
            )
        limit /= int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if device.type == "cpu" else 1
    else:
        limit, limit_label = float(config.fit_memory) * 1e9, "that it was given"
    if device.type == "cuda" and config.parallel == "ddp":
        one, two = (peak(config, model_class, vocabulary, rows, device) for rows in (1, 2))
        method = "measured with one row and two"
    else:
        ranks = world.size if config.parallel == "fsdp" else 1
        of = step_memory(config, model_class, vocabulary, ranks, save=device.type == "cpu", device=device)
        one, two = (sum(of(rows).values()) for rows in (1, 2))
        method = "estimated, as by --dry_run"
    margin = GROWTH if device.type == "cpu" else MARGIN
    return choose(
        config,
        lambda rows: OVERHEAD + margin * (one if rows == 1 else one + (rows - 1) * (two - one)),
        limit,
        limit_label,
        method,
        world,
    )


def choose(
    config: Config,
    needed: Callable[[int], float],
    limit: float,
    limit_label: str,
    method: str,
    world: DistributedContext = SINGLE_PROCESS,
) -> tuple[Config, str]:
    """Choose the most rows that take at most `limit` bytes and divide the global batch.

    Ranks and streams must be able to share it. `needed`: rows → bytes; `limit_label`, `method`: for messages.
    """
    c = config.train
    batch, shared = c.global_batch_size, math.lcm(world.size, config.data.streams or world.size)
    choices = [rows for rows in range(1, batch + 1) if batch % rows == 0 and batch // rows % shared == 0]
    if not choices:
        raise UserError(
            f"--fit-memory: train.global_batch_size = {batch} rows cannot be shared by {shared} ranks or "
            "streams"
        )
    fit = [rows for rows in choices if needed(rows) <= limit]
    if not fit:
        advice = (
            "shorten data.left_length and data.right_length, or train fewer parts"
            if c.recompute
            else "turn on --train.recompute"
        )
        takes = f"{needed(1) / 1e9:.1f} GB ({method}), more" if math.isfinite(needed(1)) else "more"
        raise UserError(
            f"--fit-memory: a micro-batch of one row takes {takes} than the {limit / 1e9:.1f} GB "
            f"{limit_label}: {advice}"
        )
    rows = max(fit)
    more = next((r for r in choices if r > rows), None)
    beyond = (
        f"; {more} rows would take {needed(more) / 1e9:.1f}" if more and math.isfinite(needed(more)) else ""
    )
    line = (
        f"--fit-memory: train.local_batch_size {rows} of train.global_batch_size {batch}, "
        f"{needed(rows) / 1e9:.1f} GB ({method}) of the {limit / 1e9:.1f} GB {limit_label}{beyond}"
    )
    return replace(config, train=replace(c, local_batch_size=rows)), line


def free_memory(device: torch.device) -> float | None:
    """Free memory of `device` in bytes; None if the system does not report it."""
    info = Path("/proc/meminfo")
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    if (
        device.type == "cpu"
        and info.exists()
        and (match := re.search(r"MemAvailable:\s+(\d+)", info.read_text()))
    ):
        return int(match[1]) * 1024.0
    return None


class RepeatedBatch:
    """Batches for `Trainer.train_step`: the same one, again and again."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __next__(self) -> Batch:
        return self.batch

    def sources(self) -> list[str]:
        return []

    def samples(self) -> list[str]:
        return []


def peak(
    config: Config,
    model_class: Any,
    vocabulary: Vocabulary,
    rows: int,
    device: torch.device,
    measure: Callable[[Callable[[], Any]], float] | None = None,
) -> float:
    """Peak bytes in use during two steps of two micro-batches of `rows` full rows; infinite if memory ends.

    `measure` calls a function and returns its peak; by default CUDA's counter does.
    """
    config = replace(
        config, train=replace(config.train, local_batch_size=rows, global_batch_size=2 * rows, compile=False)
    )
    devices = [device.index or 0] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            return _measure_trial(config, model_class, vocabulary, rows, device, measure)
    except torch.OutOfMemoryError:
        return math.inf
    finally:  # the trial's model is freed by now
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _measure_trial(
    config: Config,
    model_class: Any,
    vocabulary: Vocabulary,
    rows: int,
    device: torch.device,
    measure: Callable[[Callable[[], Any]], float] | None,
) -> float:
    batches = RepeatedBatch(full_batch(config, vocabulary, rows))
    trainer = Trainer(config, trial_model(config, model_class, vocabulary), batches)
    # A scale of 1, so that nothing overflows.
    trainer.scaler = torch.amp.GradScaler(device.type, init_scale=1.0, enabled=config.train.dtype == "fp16")

    def steps() -> None:
        for _ in range(2):
            values = trainer.train_step()
            assert values["grad_norm"] is not None, values  # else the optimizer's state would be missing

    return _measure_on_cuda(steps, device) if measure is None else measure(steps)


def _measure_on_cuda(steps: Callable[[], Any], device: torch.device) -> float:
    torch.cuda.reset_peak_memory_stats(device)
    steps()
    return float(torch.cuda.max_memory_allocated(device))
