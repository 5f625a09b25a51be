"""AdamW with a learning rate for each part, and the schedule."""

import math
from typing import Any

import torch

from configs.schema import TrainConfig


def freeze(model: Any, config: TrainConfig) -> dict[str, float]:
    """Stop gradients of the parts whose learning rate is 0; → every part's learning rate."""
    rates = {"vision": config.lr_vision, "projector": config.lr_projector, "left": config.lr_left, "right": config.lr_right}
    for name, part in model.parts().items():
        part.requires_grad_(rates[name] > 0)
    return rates


def make_optimizer(model: Any, config: TrainConfig) -> torch.optim.AdamW:
    """Two groups a part: matrices with weight decay, the rest (norms, biases) without. Every trained parameter is in exactly one."""
    groups: list[dict[str, Any]] = []
    for name, rate in freeze(model, config).items():
        parameters = [p for p in model.parts()[name].parameters() if p.requires_grad]
        for decay, members in (
            (config.weight_decay, [p for p in parameters if p.dim() >= 2]),
            (0.0, [p for p in parameters if p.dim() < 2]),
        ):
            if members:
                groups.append({"params": members, "weight_decay": decay, "lr": rate, "peak_lr": rate, "part": name})
    grouped = [id(p) for g in groups for p in g["params"]]
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert len(grouped) == len(set(grouped)) and set(grouped) == trained, "every trained parameter belongs to exactly one group"
    return torch.optim.AdamW(groups, betas=(0.9, config.beta2), fused=True)


def schedule(step: int, max_steps: int, config: TrainConfig) -> float:
    """Factor on the peak learning rate at 0-based `step`: linear warm-up, then cosine to `final_lr` at the last step."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps + 1) / max(1, max_steps - config.warmup_steps)
    return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Scale every group's peak rate; → the rates now in force, by part."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return {group["part"]: group["lr"] for group in optimizer.param_groups}
