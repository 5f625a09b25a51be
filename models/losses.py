"""Cross-entropy over a large vocabulary, without its logits."""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.linear import working_dtype

CHUNK = (
    1 << 25
)  # logits that exist at a time; a fourth of them, or what stays in a CPU's cache, also in float32
CACHED = 1 << 19


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
        wanted, logs = torch.empty(
            2, len(labels), device=hidden.device
        )  # logits of the labels; logarithms of the sums of exponentials
        for at in _chunks(labels, w):
            logits = F.linear(h[at], w)
            few = max(1, (CACHED if logits.device.type == "cpu" else CHUNK // 4) // len(w))
            for part, log in zip(logits.split(few), logs[at].split(few), strict=True):
                torch.logsumexp(part.float(), -1, out=log)
            wanted[at] = logits.gather(1, labels[at].clamp(min=0)[:, None])[:, 0].float()
        losses = logs - wanted
        ctx.save_for_backward(h, w, labels, losses)
        ctx.types = hidden.dtype, weight.dtype
        return losses.masked_fill(labels < 0, 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        h, w, labels, losses = ctx.saved_tensors
        d_hidden = torch.empty_like(h)
        d_weight: Tensor | None = None
        for at in _chunks(labels, w):
            y, logits = labels[at], F.linear(h[at], w)
            d = torch.softmax(logits, -1, out=logits)
            d.scatter_(
                1, y.clamp(min=0)[:, None], torch.expm1(-losses[at])[:, None].to(d.dtype)
            )  # the label's probability less 1
            d.mul_((gradient[at] * (y >= 0)).to(d.dtype)[:, None])
            if ctx.needs_input_grad[0]:
                d_hidden[at] = d @ w
            if ctx.needs_input_grad[1]:
                part = (d.T @ h[at]).to(ctx.types[1])
                d_weight = part if d_weight is None else d_weight.add_(part)
        if d_weight is None and ctx.needs_input_grad[1]:
            d_weight = torch.zeros_like(w, dtype=ctx.types[1])
        return d_hidden.to(ctx.types[0]) if ctx.needs_input_grad[0] else None, d_weight, None


def _chunks(labels: Tensor, weight: Tensor) -> list[slice]:
    """As few as may be, of about one size."""
    count = max(1, -(-len(labels) // max(1, CHUNK // len(weight))))
    ends = [len(labels) * i // count for i in range(count + 1)]
    return [slice(start, end) for start, end in pairwise(ends) if start < end]
