"""`--fit-memory`: how many rows a micro-batch may have, so that a step of the same batch fits the memory.

Memory is linear in the rows of a micro-batch. On a GPU two steps of full rows are measured, of one row and of two; elsewhere it is `--dry_run`'s estimate.
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
from models.layers import pick_device
from training.estimate import full_batch, step_memory, trial_model
from training.optim import make_optimizers
from training.step import Batch, train_step
from training.trainer import set_blocks
from utils.errors import UsageError, UserError
from utils.ranks import SINGLE_PROCESS, DistributedContext

BESIDE = 0.7e9  # bytes that PyTorch takes by itself: its code, on a GPU its context
MARGIN = 1.05  # for what is allocated in pieces that do not fit into one another


def fit_batch_size(
    config: Config, model_class: Any, vocabulary: Vocabulary, world: DistributedContext = SINGLE_PROCESS
) -> tuple[Config, str]:
    """→ `config` with the local batch size that fits, and a line that says why. Where nothing fits: `UserError`.

    Of several ranks the first one's device stands for all. The random state stays as it is.
    """
    device = pick_device(config.train.device)
    if config.fit_memory == "auto":
        limit, whose = free_memory(device), f"that are free on {device.type}"
        if limit is None:
            raise UsageError(
                f"--fit-memory: what is free on {device.type} is not known here: say how many GB, --fit-memory 12"
            )
        limit /= int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if device.type == "cpu" else 1
    else:
        limit, whose = float(config.fit_memory) * 1e9, "that it was given"
    if device.type == "cuda" and config.parallel == "ddp":
        one, two = (peak(config, model_class, vocabulary, rows, device) for rows in (1, 2))
        how = "measured with one row and two"
    else:
        of = step_memory(config, model_class, vocabulary, world.size if config.parallel == "fsdp" else 1)
        one, two = (sum(of(rows).values()) for rows in (1, 2))
        how = "estimated, as by --dry_run"
    return choose(
        config,
        lambda rows: BESIDE + MARGIN * (one if rows == 1 else one + (rows - 1) * (two - one)),
        limit,
        whose,
        how,
        world,
    )


def choose(
    config: Config,
    needed: Callable[[int], float],
    limit: float,
    whose: str,
    how: str,
    world: DistributedContext = SINGLE_PROCESS,
) -> tuple[Config, str]:
    """The most rows that take at most `limit` bytes and divide the global batch so that ranks and streams can share it."""
    c = config.train
    batch, shared = c.global_batch_size, math.lcm(world.size, config.data.streams or world.size)
    choices = [rows for rows in range(1, batch + 1) if batch % rows == 0 and batch // rows % shared == 0]
    if not choices:
        raise UserError(
            f"--fit-memory: train.global_batch_size = {batch} rows cannot be shared by {shared} ranks or streams"
        )
    fit = [rows for rows in choices if needed(rows) <= limit]
    if not fit:
        turn = (
            "shorten data.left_length and data.right_length, or train fewer parts"
            if c.recompute
            else "turn on --train.recompute"
        )
        least = f"{needed(1) / 1e9:.1f} GB ({how}), more" if math.isfinite(needed(1)) else "more"
        raise UserError(
            f"--fit-memory: a micro-batch of one row takes {least} than the {limit / 1e9:.1f} GB {whose}: {turn}"
        )
    rows = max(fit)
    more = next((r for r in choices if r > rows), None)
    beyond = (
        f"; {more} rows would take {needed(more) / 1e9:.1f}" if more and math.isfinite(needed(more)) else ""
    )
    line = f"--fit-memory: train.local_batch_size {rows} of train.global_batch_size {batch}, {needed(rows) / 1e9:.1f} GB ({how}) of the {limit / 1e9:.1f} GB {whose}{beyond}"
    return replace(config, train=replace(c, local_batch_size=rows)), line


def free_memory(device: torch.device) -> float | None:
    """Bytes of `device` that nobody uses; None where the system does not tell."""
    info = Path("/proc/meminfo")
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    if (
        device.type == "cpu"
        and info.exists()
        and (found := re.search(r"MemAvailable:\s+(\d+)", info.read_text()))
    ):
        return int(found[1]) * 1024.0
    return None


class RepeatedBatch:
    """Batches for `train_step`: the same one, again and again."""

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
    watched: Callable[[Callable[[], Any]], float] | None = None,
) -> float:
    """The most bytes that two steps of two micro-batches of `rows` full rows have in use; infinite where the device has not as many. `watched` calls and counts; without, CUDA does."""
    config = replace(
        config, train=replace(config.train, local_batch_size=rows, global_batch_size=2 * rows, compile=False)
    )
    devices = [device.index or 0] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            model = trial_model(config, model_class, vocabulary).to(device)
            set_blocks(model, config.train)
            optimizers, batches = (
                make_optimizers(model, config.train),
                RepeatedBatch(full_batch(config, vocabulary, rows)),
            )
            scaler = torch.amp.GradScaler(
                device.type, init_scale=1.0, enabled=config.train.dtype == "fp16"
            )  # nothing overflows

            def steps() -> None:
                for step in (1, 2):
                    values = train_step(config, model, optimizers, batches, step, device, scaler=scaler)
                    assert values["grad_norm"] is not None, (
                        values
                    )  # else the optimizer's state would be missing

            return _watched_by_cuda(steps, device) if watched is None else watched(steps)
    except torch.OutOfMemoryError:
        return math.inf
    finally:
        model = optimizers = batches = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _watched_by_cuda(steps: Callable[[], Any], device: torch.device) -> float:
    torch.cuda.reset_peak_memory_stats(device)
    steps()
    return float(torch.cuda.max_memory_allocated(device))
