"""Cross-entropy over a large vocabulary, without storing its logits."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 1 << 24  # logits that exist at a time


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits `hidden` (S, D) @ `weight` (V, D)ᵀ with `labels` (S,), (S,) in float32.

    It is 0 where a label is −100. Logits are computed in chunks, and again in the backward pass: one more
    product by `weight` saves their memory (arXiv 2411.09009 does so in one kernel).
    """
    rows = max(1, CHUNK // len(weight))
    losses = [
        checkpoint(_chunk, chunk, weight, targets, use_reentrant=False, preserve_rng_state=False)
        for chunk, targets in zip(hidden.split(rows), labels.split(rows), strict=True)
    ]
    return torch.cat(losses)


def _chunk(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none")
