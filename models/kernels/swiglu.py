"""SiLU(gate) · up in training: SiLU is computed again in the backward pass instead of stored."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class RecomputedSwiGLU(torch.autograd.Function):
    """Arguments as in `swiglu`."""

    @staticmethod
    def applies(x: Tensor) -> bool:
        return torch.is_grad_enabled()

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), F.silu(gate).mul_(gradient)
