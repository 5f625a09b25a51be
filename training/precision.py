"""The type that training computes in."""

from contextlib import AbstractContextManager
from typing import Any

import torch

from configs.train import TrainConfig
from models.layers import computes_bf16


def computed_in(config: TrainConfig, device: torch.device) -> torch.dtype:
    """`train.dtype`; "auto" is bf16 where the machine multiplies in it, else fp32."""
    if config.dtype == "auto":
        return torch.bfloat16 if computes_bf16(device) else torch.float32
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.dtype]


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[None]:
    dtype = computed_in(config, device)
    on = dtype != torch.float32
    return torch.autocast(device.type, dtype if on else torch.bfloat16, enabled=on)


def grad_scaler(config: TrainConfig, device: torch.device, ranks: int = 1) -> torch.amp.GradScaler:
    """Under fp16, whose gradients would else become 0; otherwise one that does nothing. Its scale starts at 65,536, halves at each overflow and doubles after 2,000 steps without any.

    Of several ranks, whose losses count `ranks` times because gradients are averaged, it is divided by as many: fp16 holds the same numbers.
    """
    return torch.amp.GradScaler(device.type, init_scale=65536.0 / ranks, enabled=config.dtype == "fp16")


def scale_state(scaler: torch.amp.GradScaler, ranks: int) -> dict[str, Any]:
    """What a checkpoint keeps: for any number of ranks."""
    state = scaler.state_dict()
    return state | {"scale": state["scale"] * ranks} if state else state


def load_scale(scaler: torch.amp.GradScaler, state: dict[str, Any], ranks: int) -> None:
    scaler.load_state_dict(state | {"scale": state["scale"] / ranks} if state else state)
