"""One optimizer step: batches, forward and backward, what all ranks sum, clipping, update, and what is told of it."""

import math
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from configs.train import Config
from models.multi_token import chains
from training.diagnostics import FlopsMeter, sources_of
from training.distributed import full_tensor, gradient_sync
from training.ema import update_ema
from training.optim import head_weights, set_learning_rates
from training.precision import autocast, grad_scaler
from utils.ranks import SINGLE_PROCESS, DistributedContext

Batch = dict[str, Tensor]
PIECE = 1 << 16  # numbers of a dot product


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
    """One optimizer step. The loss is cross-entropy summed over all micro-batches of all ranks ÷ their supervised tokens.

    `model` is what `wrap_model` returned. Where loss or gradient are not finite, or nothing is to be learnt, nothing is changed, and the
    values say so: "skipped", and the "samples" of this rank's batches; or, where `scaler` (of fp16) scaled too far, "overflow": its scale.
    """
    c, started = config.train, time.perf_counter()
    micro, samples = [], []
    for _ in range(c.micro_batches // world.size):
        micro.append(next(batches))
        samples.append(batches.samples())
    waited = time.perf_counter() - started
    heads, scaler = config.model.multi_token.heads, scaler or grad_scaler(c, device, world.size)
    names = named if len(named := batches.sources()) > 1 else []
    count, targets = _count(micro, heads, world)
    supervised, tokens = count["supervised"], count["left"] + count["right"]
    weights = torch.tensor(head_weights(step - 1, heads, c), device=device)
    losses = torch.zeros(1 + heads + 2 * len(names), device=device)
    by_source = losses[1 + heads :].view(2, len(names))  # sums of losses, and tokens
    for number, (batch, own) in enumerate(zip(micro, samples, strict=True), 1):
        with gradient_sync(model, number == len(micro)):
            with autocast(c, device):
                output = model(**{k: v.to(device, non_blocking=True) for k, v in batch.items()})
            loss = output.loss_sum / max(1, supervised)
            losses[0] += loss.detach()
            if heads:
                means = output.head_loss_sums / targets.clamp(min=1).to(device)
                losses[1 : 1 + heads] += means.detach()
                loss = loss + (weights * means).sum()
            if names:
                source = sources_of(batch, own, names).to(device)  # found while a GPU computes
                by_source.index_add_(1, source, torch.stack((output.losses, torch.ones_like(output.losses))))
            scaler.scale(loss * world.size).backward()  # the ranks' gradients are averaged
    world.sum(losses)
    rates = set_learning_rates(optimizers, step - 1, config.max_steps, c)
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norms = _clip(optimizers, c.clip)
    norm, (loss, *more) = math.hypot(*norms.values()), losses.tolist()
    told = all(map(math.isfinite, (loss, *more)))
    learns = bool(supervised) and told and math.isfinite(norm)
    before_update()
    for optimizer in optimizers:
        if learns:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if learns and c.ema:
        update_ema(optimizers, step, c.ema)
    scale = scaler.get_scale() * world.size
    scaler.update()
    seconds = time.perf_counter() - started
    speed = {
        "tokens_per_s": tokens / seconds,
        "supervised_tokens_per_s": supervised / seconds,
        "tiles_per_s": count["tiles"] / seconds,
        "data_wait": waited / seconds,
    }
    speed |= flops_meter.of(count, seconds) if flops_meter is not None else {}
    if supervised and told and not learns and scaler.is_enabled():
        return {"loss": loss, "grad_norm": None, "overflow": scale} | speed
    if not learns:
        reason = f"loss {loss}, gradient norm {norm}" if supervised else "no token to learn"
        return {
            "loss": None,
            "grad_norm": None,
            "skipped": reason,
            "samples": [sample for own in samples for sample in own],
        } | speed
    learnt = {"loss": loss, "grad_norm": norm, "grad_norms": norms, "lr": rates} | (
        {"head_losses": more[:heads]} if heads else {}
    )
    learnt |= (
        {
            "source_losses": {
                name: total / n for name, total, n in zip(names, *by_source.tolist(), strict=True) if n
            }
        }
        if names
        else {}
    )
    learnt |= {"loss_scale": scale} if scaler.is_enabled() else {}
    full = c.global_batch_size * (
        config.data.right_length + (config.data.left_length if config.model.left_context != "none" else 0)
    )
    return (
        learnt | {"supervised_tokens": supervised, "fill": tokens / full, "memory_gb": memory(device)} | speed
    )


def _count(micro: list[Batch], heads: int, world: DistributedContext) -> tuple[dict[str, int], Tensor]:
    """What all ranks' micro-batches hold: tokens, tiles, pairs of a query and a key that it sees; and each head's targets (K,)."""
    tokens = [sum(int((b[name] >= 0).sum()) for b in micro) for name in ("left_groups", "right_documents")]
    pairs = [
        sum(int((b[f"{side}_positions"] + 1)[b[name] >= 0].sum()) for b in micro)
        for side, name in (("left", "left_groups"), ("right", "right_documents"))
    ]
    counts = torch.tensor(
        [
            sum(int((b["labels"] != -100).sum()) for b in micro),
            *tokens,
            sum(len(b["tiles"]) for b in micro),
            *pairs,
            *[0] * heads,
        ]
    )
    if heads:
        counts[6:] = sum((chains(b["labels"], b["right_documents"], heads)[:, 1:] >= 0).sum(0) for b in micro)
    world.sum(counts)
    return dict(
        zip(
            ("supervised", "left", "right", "tiles", "left_pairs", "right_pairs"),
            counts.tolist(),
            strict=False,
        )
    ), counts[6:]


def _clip(optimizers: list[torch.optim.Optimizer], most: float) -> dict[str, float]:
    """Gradient norm of each part, as it was before all gradients were scaled to a norm of `most` (0: they are not)."""
    parts: dict[str, list[Tensor]] = {}
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        parts.setdefault(group["part"], []).extend(p for p in group["params"] if p.grad is not None)
    norms = torch.stack([full_tensor(_norm([p.grad for p in members])) for members in parts.values()])  # type: ignore[misc]
    total = torch.linalg.vector_norm(norms)
    if most and total > most:
        for members in parts.values():
            torch.nn.utils.clip_grads_with_norm_(members, most, total)
    return dict(zip(parts, norms.tolist(), strict=True))


def _norm(gradients: list[Tensor]) -> Tensor:
    """Of all together. On a CPU by dot products, which take half the time of torch's norm; of pieces, for on some CPUs they add up one number after the other."""
    if all(type(g) is Tensor and g.device.type == "cpu" for g in gradients):
        flats = [g.flatten() for g in gradients]
        pieces = [piece for flat in flats for piece in (flat.split(PIECE) if len(flat) > PIECE else (flat,))]
        return torch.stack([torch.dot(piece, piece) for piece in pieces]).sum().sqrt()
    return torch.nn.utils.get_total_norm(gradients)


def memory(device: torch.device) -> float:
    """The most that was in use so far, in GB: of the device's memory, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    )
