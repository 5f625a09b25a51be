"""The type that training computes in."""

from contextlib import AbstractContextManager

import torch

from configs.schema import TrainConfig
from models.layers import computes_bf16


def computes_in_bf16(config: TrainConfig, device: torch.device) -> bool:
    """`train.dtype`; "auto" is bf16 where the machine multiplies in it, else fp32."""
    return config.dtype == "bf16" or (config.dtype == "auto" and computes_bf16(device))


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[None]:
    return torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bf16(config, device))
