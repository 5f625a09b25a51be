"""AdamW or Muon with a learning rate per part, schedules, gradient clipping, loss scaling for fp16."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from configs.train import TrainConfig
from models.weights.lora import base_parameters
from training.distributed import full_tensor
from training.muon import Muon

CHUNK = 1 << 16  # numbers of one dot product


def learning_rates(model: Any, config: TrainConfig) -> dict[str, float]:
    """Part → learning rate; 0 freezes the part."""
    rates = {
        "vision": config.lr_vision,
        "projector": config.lr_projector,
        "left": config.lr_left,
        "right": config.lr_right,
        "heads": config.lr_heads,
    }
    return {name: rates[name] for name in model.parts()}


def freeze(model: Any, config: TrainConfig) -> dict[str, float]:
    """Freeze parts with learning rate 0 and base weights under adapters; return part → learning rate."""
    rates, base = learning_rates(model, config), base_parameters(model)
    for name, part in model.parts().items():
        for parameter in part.parameters():
            parameter.requires_grad_(rates[name] > 0 and id(parameter) not in base)
    return rates


def make_optimizers(model: Any, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW; with `optimizer="muon"` Muon for the weights of linear layers and AdamW for the rest.

    Groups are by part; weight decay applies to matrices only. Each trained parameter is in exactly one group.
    Muon's updates have AdamW's size, so both use the part's learning rate.
    """
    linear = (
        {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
        if config.optimizer == "muon"
        else set()
    )
    muon: list[dict[str, Any]] = []
    adamw: list[dict[str, Any]] = []
    for name, rate in freeze(model, config).items():
        trained = [p for p in model.parts()[name].parameters() if p.requires_grad]
        rest = [p for p in trained if id(p) not in linear]
        for groups, decay, members in (
            (muon, config.weight_decay, [p for p in trained if id(p) in linear]),
            (adamw, config.weight_decay, [p for p in rest if p.dim() >= 2]),
            (adamw, 0.0, [p for p in rest if p.dim() < 2]),
        ):
            if members:
                groups.append(
                    {"params": members, "weight_decay": decay, "lr": rate, "peak_lr": rate, "part": name}
                )
    grouped = [id(p) for g in muon + adamw for p in g["params"]]
    expected = {id(p) for p in model.parameters() if p.requires_grad}
    assert len(grouped) == len(set(grouped)) and set(grouped) == expected, (
        "every trained parameter belongs to exactly one group"
    )
    optimizers: list[torch.optim.Optimizer] = []
    if adamw:
        optimizers.append(torch.optim.AdamW(adamw, betas=(0.9, config.beta2), fused=True))
    if muon:
        optimizers.append(Muon(muon))
    return optimizers


def schedule(step: int, max_steps: int, config: TrainConfig, part: str) -> float:
    """Factor on a part's peak learning rate at 0-based `step`: linear warm-up, then decay to `final_lr`.

    "cosine" decays from the end of the warm-up. "wsd" (warm-up, stable, decay: arXiv 2404.06395) stays at the
    peak until the last `decay_share` of the steps, then decays by 1 − √progress (arXiv 2405.18392). The steps
    before do not depend on `max_steps`.
    """
    own = getattr(config, f"warmup_{part}", -1)
    warmup = own if own >= 0 else config.warmup_steps
    warm = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if config.schedule == "wsd":
        decay_steps = max(1, round(config.decay_share * max_steps))
        progress = max(0, step + 1 - (max_steps - decay_steps)) / decay_steps
        return warm * (config.final_lr + (1 - config.final_lr) * (1 - math.sqrt(progress)))
    if step < warmup:
        return warm
    progress = (step - warmup + 1) / max(1, max_steps - warmup)
    return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def head_weights(step: int, heads: int, config: TrainConfig) -> list[float]:
    """λ of each multi-token head at 0-based `step`; heads warm up one by one, each in `head_warmup` steps."""
    warmups = [
        min(1.0, max(0.0, step / config.head_warmup - k)) if config.head_warmup else 1.0 for k in range(heads)
    ]
    return [config.head_weight * config.head_decay**k * warmup for k, warmup in enumerate(warmups)]


def set_learning_rates(
    optimizers: list[torch.optim.Optimizer], step: int, max_steps: int, config: TrainConfig
) -> dict[str, float]:
    """Set every group's learning rate at 0-based `step`; return part → learning rate."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group in groups:
        group["lr"] = group["peak_lr"] * schedule(step, max_steps, config, group["part"])
    return {group["part"]: group["lr"] for group in groups}


def clip_gradients(optimizers: list[torch.optim.Optimizer], max_norm: float) -> dict[str, float]:
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


def grad_scaler(config: TrainConfig, device: torch.device, ranks: int = 1) -> torch.amp.GradScaler:
    """Loss scaler for fp16, whose small gradients would become 0; disabled for other dtypes.

    The scale starts at 65,536, halves at each overflow and doubles after 2,000 steps without one. It is
    divided by `ranks`, because the trainer multiplies losses by `ranks` (DDP averages gradients): fp16 gets
    the same numbers.
    """
    return torch.amp.GradScaler(device.type, init_scale=65536.0 / ranks, enabled=config.dtype == "fp16")


def scale_state(scaler: torch.amp.GradScaler, ranks: int) -> dict[str, Any]:
    """The scaler's state for a checkpoint, independent of the number of ranks."""
    state = scaler.state_dict()
    return state | {"scale": state["scale"] * ranks} if state else state


def load_scale(scaler: torch.amp.GradScaler, state: dict[str, Any], ranks: int) -> None:
    """Restore what `scale_state` returned; the number of ranks may differ."""
    scaler.load_state_dict(state | {"scale": state["scale"] / ranks} if state else state)
