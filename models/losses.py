"""Cross-entropy over a large vocabulary, without storing its logits."""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.linear import working_dtype

CHUNK = 1 << 25  # logits that exist at a time; of them, a fourth also in float32
CACHED = 1 << 19  # logits in float32 at a time on a CPU, to stay in its cache


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits `hidden` (S, D) @ `weight` (V, D)ᵀ with `labels` (S,), (S,) in float32.

    It is 0 where a label is −100. Logits are computed in chunks (arXiv 2411.09009 does so in one kernel), and
    again in the backward pass: one more product by `weight` saves their memory. torch's own
    `F.linear_cross_entropy` sums in the dtype of `hidden`, which costs bf16 losses their third digit. It
    takes twice the time on a CPU (docs/log/experiments.md).
    """
    return CrossEntropy.apply(hidden, weight, labels)


class CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        dtype = working_dtype(weight.dtype, weight.device)
        h, w = hidden.to(dtype), weight.to(dtype)
        label_logits, logsumexp = torch.empty(2, len(labels), device=hidden.device)  # (S,) each
        for chunk in _chunks(labels, w):
            logits = F.linear(h[chunk], w)
            rows = max(1, (CACHED if logits.device.type == "cpu" else CHUNK // 4) // len(w))
            for part, out in zip(logits.split(rows), logsumexp[chunk].split(rows), strict=True):
                torch.logsumexp(part.float(), -1, out=out)
            label_logits[chunk] = logits.gather(1, labels[chunk].clamp(min=0)[:, None])[:, 0].float()
        losses = logsumexp - label_logits
        ctx.save_for_backward(h, w, labels, losses)
        ctx.types = hidden.dtype, weight.dtype
        return losses.masked_fill(labels < 0, 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        h, w, labels, losses = ctx.saved_tensors
        d_hidden = torch.empty_like(h)
        d_weight: Tensor | None = None
        for chunk in _chunks(labels, w):
            y, logits = labels[chunk], F.linear(h[chunk], w)
            d = torch.softmax(logits, -1, out=logits)
            label_gradient = torch.expm1(-losses[chunk])  # the label's probability minus 1
            d.scatter_(1, y.clamp(min=0)[:, None], label_gradient[:, None].to(d.dtype))
            d.mul_((gradient[chunk] * (y >= 0)).to(d.dtype)[:, None])
            if ctx.needs_input_grad[0]:
                d_hidden[chunk] = d @ w
            if ctx.needs_input_grad[1]:
                part = (d.T @ h[chunk]).to(ctx.types[1])
                d_weight = part if d_weight is None else d_weight.add_(part)
        if d_weight is None and ctx.needs_input_grad[1]:
            d_weight = torch.zeros_like(w, dtype=ctx.types[1])
        return d_hidden.to(ctx.types[0]) if ctx.needs_input_grad[0] else None, d_weight, None


def _chunks(labels: Tensor, weight: Tensor) -> list[slice]:
    """The fewest chunks of at most `CHUNK` logits, of about equal size."""
    count = max(1, -(-len(labels) // max(1, CHUNK // len(weight))))
    ends = [len(labels) * i // count for i in range(count + 1)]
    return [slice(start, end) for start, end in pairwise(ends) if start < end]
