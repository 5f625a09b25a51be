"""Cross-entropy over a large vocabulary, without its logits."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.linear import working_dtype

CHUNK = 1 << 24  # logits that exist at a time


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy at each position of `hidden` (S, D) @ `weight` (V, D)ᵀ with `labels` (S,): (S,) in float32, 0 where a label is −100.

    Logits exist for some positions at a time (arXiv 2411.09009 does the same in one kernel), and again in the backward pass:
    memory for one more multiplication by `weight`. torch's `F.linear_cross_entropy` sums in the type of `hidden`, which
    costs bf16 losses their third digit, and takes twice the time on a CPU (docs/experiments.md).
    """
    return CrossEntropy.apply(hidden, weight, labels)


class CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        dtype = working_dtype(weight.dtype, weight.device)
        h, w = hidden.to(dtype), weight.to(dtype)
        losses, logs = torch.empty(2, len(labels), device=hidden.device)  # logs: of the sums of exponentials
        for at in _chunks(labels, w):
            logits, y = F.linear(h[at], w).float(), labels[at]
            logs[at] = logits.logsumexp(-1)
            wanted = logits.gather(1, y.clamp(min=0)[:, None])[:, 0]
            losses[at] = (logs[at] - wanted).masked_fill_(y < 0, 0.0)
        ctx.save_for_backward(h, w, labels, logs)
        ctx.types = hidden.dtype, weight.dtype
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        h, w, labels, logs = ctx.saved_tensors
        d_hidden = torch.empty_like(h)
        d_weight: Tensor | None = None
        for at in _chunks(labels, w):
            y = labels[at]
            d = F.linear(h[at], w).float().sub_(logs[at, None]).exp_()  # the probabilities
            d.scatter_add_(1, y.clamp(min=0)[:, None], d.new_full((len(y), 1), -1.0))
            d = d.mul_((gradient[at] * (y >= 0))[:, None]).to(w.dtype)
            if ctx.needs_input_grad[0]:
                d_hidden[at] = d @ w
            if ctx.needs_input_grad[1]:
                part = (d.T @ h[at]).to(ctx.types[1])
                d_weight = part if d_weight is None else d_weight.add_(part)
        if d_weight is None and ctx.needs_input_grad[1]:
            d_weight = torch.zeros_like(w, dtype=ctx.types[1])
        return d_hidden.to(ctx.types[0]) if ctx.needs_input_grad[0] else None, d_weight, None


def _chunks(labels: Tensor, weight: Tensor) -> list[slice]:
    size = max(1, CHUNK // len(weight))
    return [slice(start, start + size) for start in range(0, len(labels), size)]
