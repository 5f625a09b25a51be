"""Loss scaling for fp16."""

from typing import Any

import torch

from configs.train import TrainConfig


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
