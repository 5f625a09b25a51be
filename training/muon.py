"""Muon: momentum whose matrices are made orthogonal (https://kellerjordan.github.io/posts/muon), in the number format that the machine is fast in."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from models.layers import computes_bf16

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of the quintic Newton-Schulz iteration in the post above
ITERATIONS = 5
MOMENTUM = 0.95


class Muon(torch.optim.Optimizer):
    """What `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")` does: updates have the root mean square of AdamW's (arXiv 2502.16982).

    PyTorch's multiplies in bf16 on every machine, which takes a CPU without such instructions 19 times as long as fp32
    (docs/experiments.md): two thirds of a step. Here the format is fp32 there, and bf16 elsewhere. `params`: of matrices alone.
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
                if isinstance(update, DTensor) and isinstance(
                    parameter, DTensor
                ):  # products may spread it otherwise
                    update = update.redistribute(placements=parameter.placements)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-0.2 * max(parameter.shape) ** 0.5 * group["lr"])


def orthogonal(matrix: Tensor) -> Tensor:
    """(n, m) → about U Vᵀ of its singular value decomposition: singular values between about 0.7 and 1.2, as Newton-Schulz leaves them."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(torch.bfloat16 if computes_bf16(matrix.device) else torch.float32)
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
