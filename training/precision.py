"""The type that training computes in."""

from contextlib import AbstractContextManager

import torch

from configs.schema import TrainConfig
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


def grad_scaler(config: TrainConfig, device: torch.device) -> torch.amp.GradScaler:
    """Under fp16, whose gradients would else become 0; otherwise one that does nothing. Its scale starts at 65,536, halves at each overflow and doubles after 2,000 steps without any."""
    return torch.amp.GradScaler(device.type, enabled=config.dtype == "fp16")
