"""One optimizer step: load the batches, forward and backward, sum over ranks, clip, update, report."""

import math
import resource
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from configs.train import Config
from models.multi_token import chains
from training.diagnostics import FlopsMeter, sources_of
from training.distributed import full_tensor, gradient_sync
from training.ema import update_ema
from training.optim import head_weights, set_learning_rates
from training.precision import grad_scaler
from utils.device import autocast
from utils.ranks import SINGLE_PROCESS, DistributedContext

Batch = dict[str, Tensor]
CHUNK = 1 << 16  # numbers of one dot product


@dataclass
class StepData:
    """The micro-batches of one step on this rank, and what all ranks' micro-batches hold together."""

    micro_batches: list[Batch]
    samples: list[list[str]]  # of each micro-batch: source and record number of its groups, row by row
    sources: list[str]  # names of all sources; empty if there is only one
    counts: dict[str, int]  # see `_count`
    head_targets: Tensor  # (K,) supervised positions of each multi-token head
    seconds_waited: float

    @property
    def supervised(self) -> int:
        return self.counts["supervised"]

    @property
    def tokens(self) -> int:
        return self.counts["left"] + self.counts["right"]


def train_step(
    config: Config,
    model: Any,
    optimizers: list[torch.optim.Optimizer],
    batches: Any,
    step: int,
    device: torch.device,
    world: DistributedContext = SINGLE_PROCESS,
    before_update: Callable[[], None] = lambda: None,
    flops_meter: FlopsMeter | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> dict[str, Any]:
    """Take the 1-based `step`; return its values for the log. `model`: as `wrap_model` returned it.

    The loss is cross-entropy summed over all micro-batches of all ranks ÷ their supervised tokens.
    If loss or gradient are not finite, or no token is supervised, nothing is updated. The values then hold
    "skipped", the reason, and "samples", those of this rank. If fp16's `scaler` scaled too far, they hold
    "overflow", its scale, instead.
    """
    c, started = config.train, time.perf_counter()
    heads, scaler = config.model.multi_token.heads, scaler or grad_scaler(c, device, world.size)
    data = _load(batches, c.micro_batches // world.size, heads, device, world)
    losses = _backward(config, model, data, step, device, world, scaler)
    world.sum(losses)
    rates = set_learning_rates(optimizers, step - 1, config.max_steps, c)
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norms = _clip(optimizers, c.clip)
    norm, (loss, *more) = math.hypot(*norms.values()), losses.tolist()
    is_finite = all(map(math.isfinite, (loss, *more)))
    updates = bool(data.supervised) and is_finite and math.isfinite(norm)
    before_update()
    _update(optimizers, updates, step, c.ema)
    scale = scaler.get_scale() * world.size
    scaler.update()
    speed = _speed(data, time.perf_counter() - started, flops_meter)
    if data.supervised and is_finite and not updates and scaler.is_enabled():
        return {"loss": loss, "grad_norm": None, "overflow": scale} | speed
    if not updates:
        reason = f"loss {loss}, gradient norm {norm}" if data.supervised else "no token to learn"
        samples = [sample for batch_samples in data.samples for sample in batch_samples]
        return {"loss": None, "grad_norm": None, "skipped": reason, "samples": samples} | speed
    values = {"loss": loss, "grad_norm": norm, "grad_norms": norms, "lr": rates}
    if heads:
        values["head_losses"] = more[:heads]
    if data.sources:
        values["source_losses"] = _source_losses(data.sources, more[heads:])
    if scaler.is_enabled():
        values["loss_scale"] = scale
    return (
        values
        | {
            "supervised_tokens": data.supervised,
            "fill": data.tokens / _capacity(config),
            "memory_gb": memory(device),
        }
        | speed
    )


def _load(batches: Any, count: int, heads: int, device: torch.device, world: DistributedContext) -> StepData:
    """Take the next `count` micro-batches. For a GPU in pinned memory, which it reads while it computes."""
    started = time.perf_counter()
    micro_batches, samples = [], []
    for _ in range(count):
        batch = next(batches)
        if device.type == "cuda":
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        micro_batches.append(batch)
        samples.append(batches.samples())
    waited = time.perf_counter() - started
    names = batches.sources()
    counts, head_targets = _count(micro_batches, heads, world)
    return StepData(micro_batches, samples, names if len(names) > 1 else [], counts, head_targets, waited)


def _backward(
    config: Config,
    model: Any,
    data: StepData,
    step: int,
    device: torch.device,
    world: DistributedContext,
    scaler: torch.amp.GradScaler,
) -> Tensor:
    """Accumulate the gradients of all micro-batches.

    → this rank's share of the losses, (1 + K + 2 × sources,): the loss, the mean loss of each head, the
    summed loss of each source, the tokens of each source.
    """
    c, heads, names = config.train, config.model.multi_token.heads, data.sources
    weights = torch.tensor(head_weights(step - 1, heads, c) if heads else [], device=device)
    losses = torch.zeros(1 + heads + 2 * len(names), device=device)
    by_source = losses[1 + heads :].view(2, len(names))
    for number, (batch, samples) in enumerate(zip(data.micro_batches, data.samples, strict=True), 1):
        is_last = number == len(data.micro_batches)
        with gradient_sync(model, is_last) if world.size > 1 else nullcontext():
            with autocast(c.dtype, device):
                output = model(**{k: v.to(device, non_blocking=True) for k, v in batch.items()})
            loss = output.loss_sum / max(1, data.supervised)
            losses[0] += loss.detach()
            if heads:
                means = output.head_loss_sums / data.head_targets.clamp(min=1).to(device)
                losses[1 : 1 + heads] += means.detach()
                loss = loss + (weights * means).sum()
            if names:
                source = sources_of(batch, samples, names).to(device)  # on the CPU, while a GPU computes
                by_source.index_add_(1, source, torch.stack((output.losses, torch.ones_like(output.losses))))
            scaler.scale(loss * world.size).backward()  # the ranks' gradients are averaged
    return losses


def _update(optimizers: list[torch.optim.Optimizer], updates: bool, step: int, ema: float) -> None:
    """Update the weights and their moving average if `updates`; drop the gradients."""
    for optimizer in optimizers:
        if updates:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if updates and ema:
        update_ema(optimizers, step, ema)


def _speed(data: StepData, seconds: float, flops_meter: FlopsMeter | None) -> dict[str, float]:
    """Tokens, tiles and FLOPs per second of all ranks; share of the step that this rank waited for data."""
    speed = {
        "tokens_per_s": data.tokens / seconds,
        "supervised_tokens_per_s": data.supervised / seconds,
        "tiles_per_s": data.counts["tiles"] / seconds,
        "data_wait": data.seconds_waited / seconds,
    }
    return speed | (flops_meter.of(data.counts, seconds) if flops_meter is not None else {})


def _source_losses(names: list[str], sums: list[float]) -> dict[str, float]:
    """Mean loss of each source that has tokens; `sums`: summed losses of all sources, then their tokens."""
    totals, tokens = sums[: len(names)], sums[len(names) :]
    return {name: total / n for name, total, n in zip(names, totals, tokens, strict=True) if n}


def _capacity(config: Config) -> int:
    """Tokens of the step's rows if they were full."""
    left_length = config.data.left_length if config.model.left_context != "none" else 0
    return config.train.global_batch_size * (config.data.right_length + left_length)


def _count(
    micro_batches: list[Batch], heads: int, world: DistributedContext
) -> tuple[dict[str, int], Tensor]:
    """Count over all ranks: tokens (supervised, left, right), tiles, pairs of a query and a key that it sees.

    → the counts by name, and each head's targets (K,).
    """
    streams = ("left", "left_groups"), ("right", "right_documents")
    tokens = [sum(int((b[name] >= 0).sum()) for b in micro_batches) for _, name in streams]
    pairs = [
        sum(int((b[f"{side}_positions"] + 1)[b[name] >= 0].sum()) for b in micro_batches)
        for side, name in streams
    ]
    supervised = sum(int((b["labels"] != -100).sum()) for b in micro_batches)
    tiles = sum(len(b["tiles"]) for b in micro_batches)
    counts = torch.tensor([supervised, *tokens, tiles, *pairs, *[0] * heads])
    if heads:
        counts[6:] = sum(
            (chains(b["labels"], b["right_documents"], heads)[:, 1:] >= 0).sum(0) for b in micro_batches
        )
    world.sum(counts)
    names = ("supervised", "left", "right", "tiles", "left_pairs", "right_pairs")
    return dict(zip(names, counts.tolist(), strict=False)), counts[6:]


def _clip(optimizers: list[torch.optim.Optimizer], max_norm: float) -> dict[str, float]:
    """Scale all gradients to a total norm of `max_norm` if it is larger (0: never).

    → the gradient norm of each part, before scaling.
    """
    parts: dict[str, list[Tensor]] = {}
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        parts.setdefault(group["part"], []).extend(p for p in group["params"] if p.grad is not None)
    norms = torch.stack(
        [full_tensor(_norm([p.grad for p in members if p.grad is not None])) for members in parts.values()]
    )
    total = torch.linalg.vector_norm(norms)
    if max_norm and total > max_norm:
        for members in parts.values():
            torch.nn.utils.clip_grads_with_norm_(members, max_norm, total)
    return dict(zip(parts, norms.tolist(), strict=True))


def _norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all gradients together.

    On a CPU by dot products, which take half the time of torch's norm. They are taken of chunks: some CPUs
    add the products one after the other, which loses digits in long sums.
    """
    if all(type(g) is Tensor and g.device.type == "cpu" for g in gradients):
        flats = [g.flatten() for g in gradients]
        chunks = [chunk for flat in flats for chunk in (flat.split(CHUNK) if len(flat) > CHUNK else (flat,))]
        return torch.stack([torch.dot(chunk, chunk) for chunk in chunks]).sum().sqrt()
    return torch.nn.utils.get_total_norm(gradients)


def memory(device: torch.device) -> float:
    """Peak memory so far in GB: of the GPU, or else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
