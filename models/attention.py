"""Softmax attention, and the one place that chooses how it is computed: torch's fused kernel, or in training FlexAttention on CUDA and span by span on a CPU."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Union

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

CHUNK = 128  # queries at a time


@dataclass(frozen=True)
class Span:
    """Some queries of a row next to one another, and the keys that any of them sees."""

    row: int
    queries: slice
    keys: list[slice]  # without long gaps in between; a packed right stream has one piece in the left stream and one in its own
    hidden: Tensor  # (queries, keys) bool: True where a query may not look


Plan = Union[Tensor, list[Span], "BlockMask"]


def planned(mask: Tensor) -> Plan:
    """What `attend` shall be given for a mask (B, 1, T, S), the same in every layer: where gradients are computed, spans on a CPU, FlexAttention's blocks on CUDA.

    A packed row's documents see nothing of one another, and no token sees a later one: most scores need not be computed.
    """
    if not torch.is_grad_enabled():
        return mask
    if mask.device.type == "cuda" and find_spec("triton") is not None:  # in which its kernels are written
        return blocks_of(mask)
    return spans_of(mask) if mask.device.type == "cpu" else mask


def blocks_of(mask: Tensor) -> "BlockMask":
    """Of a mask (B, 1, T, S): blocks of 128 × 128 of which nothing is seen are left out, those that are seen in part look the mask up."""
    from torch.nn.attention.flex_attention import create_block_mask

    B, _, T, S = mask.shape
    return create_block_mask(lambda b, h, query, key: mask[b, 0, query, key], B, None, T, S, device=str(mask.device))


@cache
def flex() -> Callable[..., Tensor]:
    """FlexAttention, compiled once for all layers and both towers, whose numbers of queries and keys differ and change from batch to batch."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def spans_of(mask: Tensor) -> list[Span]:
    out = []
    for row, seen in enumerate(mask[:, 0]):
        for start in range(0, seen.shape[0], CHUNK):
            part = seen[start : start + CHUNK]
            columns = part.any(0).nonzero()[:, 0]
            ends = (columns.diff() > CHUNK // 2).nonzero()[:, 0].tolist()
            pieces = [slice(int(columns[a]), int(columns[b]) + 1) for a, b in zip([0, *(e + 1 for e in ends)], [*ends, -1], strict=True)]
            hidden = torch.cat([part[:, piece] for piece in pieces], 1).logical_not_()
            out.append(Span(row, slice(start, start + len(part)), pieces, hidden))
    return out


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Plan) -> Tensor:
    """Softmax attention of `queries` (B, H, T, E) over `keys`, `values` (B, G, S, E) where the mask (B, 1, T, S), or what was `planned` of it, allows; a float mask is added."""
    if isinstance(mask, list):
        return SpanAttention.apply(queries, keys, values, mask)
    if not isinstance(mask, Tensor):
        return flex()(queries, keys.to(queries.dtype), values.to(queries.dtype), block_mask=mask, enable_gqa=queries.shape[1] != keys.shape[1])
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=queries.shape[1] != keys.shape[1])


class SpanAttention(torch.autograd.Function):
    """Attention over spans, one after the other, by matrix products; the weights are kept for the backward pass.

    Forward and backward together it takes a third of the fused kernel's time over the whole row (docs/experiments.md).
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, plan: list[Span]) -> Tensor:
        B, H, T, E = queries.shape
        G = keys.shape[1]
        out = queries.new_empty(B, T, H, E).transpose(1, 2)
        kept = []
        for span in plan:
            q, k, v = _rows(queries, span) * E**-0.5, _gather(keys, span), _gather(values, span)
            scores = torch.bmm(q.reshape(G, -1, E), k.transpose(1, 2)).view(H, *span.hidden.shape)
            weights = scores.masked_fill_(span.hidden, -torch.inf).softmax(-1)
            out[span.row, :, span.queries] = torch.bmm(weights.view(G, -1, weights.shape[-1]), v).view(H, -1, E)
            kept.append(weights)
        ctx.save_for_backward(queries, keys, values, *kept)
        ctx.plan = plan
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        queries, keys, values, *kept = ctx.saved_tensors
        G, E = keys.shape[1], keys.shape[3]
        d_queries, d_keys, d_values = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        for span, weights in zip(ctx.plan, kept, strict=True):
            g = _rows(gradient, span).reshape(G, -1, E)
            w = weights.view(G, -1, weights.shape[-1])
            _scatter(d_values, torch.bmm(w.transpose(1, 2), g), span)
            d_weights = torch.bmm(g, _gather(values, span).transpose(1, 2))
            d_scores = torch.ops.aten._softmax_backward_data(d_weights, w, -1, w.dtype) * E**-0.5
            d_queries[span.row, :, span.queries] = torch.bmm(d_scores, _gather(keys, span)).view(-1, len(span.hidden), E)
            _scatter(d_keys, torch.bmm(d_scores.transpose(1, 2), _rows(queries, span).reshape(G, -1, E)), span)
        return d_queries, d_keys, d_values, None


def _rows(x: Tensor, span: Span) -> Tensor:
    """A span's queries of `x` (B, H, T, E): (H, t, E)."""
    return x[span.row, :, span.queries]


def _gather(x: Tensor, span: Span) -> Tensor:
    """A span's keys or values of `x` (B, G, S, E): (G, s, E)."""
    pieces = [x[span.row, :, piece] for piece in span.keys]
    return torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0]


def _scatter(x: Tensor, gradient: Tensor, span: Span) -> None:
    """Add a span's gradient (G, s, E) where `_gather` took it."""
    for piece, part in zip(span.keys, gradient.split([piece.stop - piece.start for piece in span.keys], 1), strict=True):
        x[span.row, :, piece] += part
