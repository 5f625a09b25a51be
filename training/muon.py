"""Muon: orthogonalized momentum for matrices (https://kellerjordan.github.io/posts/muon)."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from utils.device import computes_bf16

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of the quintic Newton-Schulz iteration in the post above
ITERATIONS = 5
MOMENTUM = 0.95


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`, in the dtype that is fast on this machine.

    Updates have AdamW's root mean square (arXiv 2502.16982). PyTorch's class multiplies in bf16 everywhere.
    On a CPU without bf16 instructions that takes 19 times as long as fp32 (docs/log/experiments.md), two
    thirds of a step. This class uses fp32 on such a machine, else bf16. `params` must all be matrices.
    """

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-3, "weight_decay": 0.1})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                state, gradient = self.state[parameter], parameter.grad
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(gradient)
                mean = state["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM)
                update = orthogonal(gradient.lerp(mean, MOMENTUM))  # Nesterov's
                if isinstance(update, DTensor) and isinstance(parameter, DTensor):
                    # Matrix products may have changed its placements.
                    update = update.redistribute(placements=parameter.placements)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-0.2 * max(parameter.shape) ** 0.5 * group["lr"])


def orthogonal(matrix: Tensor) -> Tensor:
    """Approximate U Vᵀ of the singular value decomposition of a matrix (n, m) by Newton-Schulz iterations.

    The singular values end between about 0.7 and 1.2.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(torch.bfloat16 if computes_bf16(matrix.device) else torch.float32)
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
