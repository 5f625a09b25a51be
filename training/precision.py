"""The dtype of training: autocast and, for fp16, loss scaling."""

from contextlib import AbstractContextManager
from typing import Any

import torch

from configs.train import TrainConfig
from utils.device import computes_bf16


def compute_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The dtype of `train.dtype`; "auto" is bf16 if the machine has bf16 instructions, else fp32."""
    if config.dtype == "auto":
        return torch.bfloat16 if computes_bf16(device) else torch.float32
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.dtype]


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[None]:
    dtype = compute_dtype(config, device)
    enabled = dtype != torch.float32
    return torch.autocast(device.type, dtype if enabled else torch.bfloat16, enabled=enabled)


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
