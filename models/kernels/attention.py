"""Softmax attention, and the one place that chooses how it is computed: torch's fused kernel, or in training FlexAttention on CUDA and span by span on a CPU."""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple, Union

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Array = np.ndarray[Any, Any]

MOST = 128  # queries of a span
ALIGNED = 32  # softmax over bf16 wants so many keys, or a multiple, on a CPU
SPREAD = 1.25  # keys of the longest of the spans that are computed together ÷ those of the shortest


class Segments(NamedTuple):
    """Spans with about the same number of keys, computed together. A span: some queries of a row next to one another, and the keys that any of them sees.

    Indices count the rows of queries (B · T · G) and keys (B · S · G), G heads of a token next to one another.
    """

    queries: Tensor  # (n, G, t); where a span has fewer, any index
    keys: Tensor  # (n, G, s); the same
    hidden: Tensor  # (n, t, s) bool: True where a query may not look; a query that is none looks everywhere, for a softmax over nothing is NaN
    none: Tensor  # those of `queries`, flat, that are none


class _Segment(NamedTuple):
    row: int
    start: int  # of its queries
    end: int
    keys: Array

    @property
    def capacity(self) -> int:
        return -(-len(self.keys) // ALIGNED) * ALIGNED


class BlockSparseLayout:
    """The spans of a mask (B, 1, T, S): all that is seen, and little else."""

    def __init__(self, mask: Tensor, kv_heads: int) -> None:
        B, _, T, S = mask.shape
        seen, heads = mask[:, 0].numpy(), np.arange(kv_heads)
        cuts = [
            _Segment(row, start, end, np.flatnonzero(seen[row, start:end].any(0)))
            for row in range(B)
            for start, end in _split_queries(seen[row])
        ]
        cuts.sort(key=lambda cut: cut.capacity)
        self.segments: list[Segments] = []
        back = np.empty((B * T, kv_heads), np.int64)  # where a query stands among those of all spans
        key, place = (
            [np.empty(0, np.int64)],
            [np.empty((0, kv_heads), np.int64)],
        )  # each key of each span, and where it stands among those of all spans
        Q = K = 0
        while cuts:
            some = [cut for cut in cuts if cut.capacity <= SPREAD * cuts[0].capacity]
            cuts = cuts[len(some) :]
            lengths = np.array([cut.end - cut.start for cut in some])
            n, t, s = len(some), lengths.max(), some[-1].capacity
            queries, keys, hidden = (
                np.zeros((n, t), np.int64),
                np.zeros((n, s), np.int64),
                np.ones((n, t, s), bool),
            )
            for i, ((row, start, end, sees), length) in enumerate(zip(some, lengths, strict=True)):
                queries[i, :length], keys[i, : len(sees)] = (
                    np.arange(row * T + start, row * T + end),
                    row * S + sees,
                )
                hidden[i, :length, : len(sees)], hidden[i, length:] = ~seen[row, start:end][:, sees], False
                back[row * T + start : row * T + end] = (
                    Q + (i * kv_heads + heads) * t + np.arange(length)[:, None]
                )
                key.append(keys[i, : len(sees)])
                place.append(K + (i * kv_heads + heads) * s + np.arange(len(sees))[:, None])
            none = np.flatnonzero(np.broadcast_to(np.arange(t) >= lengths[:, None, None], (n, kv_heads, t)))
            q, k = (index[:, None] * kv_heads + heads[:, None] for index in (queries, keys))
            self.segments.append(Segments(*map(torch.from_numpy, (q, k, hidden, none))))
            Q, K = Q + n * kv_heads * t, K + n * kv_heads * s
        self.queries, self.keys = Q, K  # of all spans and heads
        self.back = torch.from_numpy(back.reshape(-1))
        first, more = _occurrences(key, place, B * S, K)
        self.keys_back, self.more_keys = (
            torch.from_numpy(first),
            [(torch.from_numpy(rows), torch.from_numpy(places)) for rows, places in more],
        )
        self._bias: dict[torch.dtype, list[Tensor]] = {}

    def bias(self, dtype: torch.dtype) -> list[Tensor]:
        """What is added to the scores (n, G, t, H ÷ G, s) of each of `spans`: 0, or −∞ where nothing is to be seen. Made once for all layers."""
        if dtype not in self._bias:
            self._bias[dtype] = [
                torch.zeros(s.hidden.shape, dtype=dtype).masked_fill_(s.hidden, -torch.inf)[:, None, :, None]
                for s in self.segments
            ]
        return self._bias[dtype]


def _split_queries(seen: Array) -> list[tuple[int, int]]:
    """Queries of a row (T, S): as many whole documents as fit into a span, long ones in equal parts. A document ends where the next query sees none of the same keys."""
    T = len(seen)
    ends = np.flatnonzero(~(seen[1:] & seen[:-1]).any(1)) + 1
    out, start, at = [], 0, 0
    for end in [*ends.tolist(), T]:
        if end - start > MOST and at > start:
            out.append((start, at))
            start = at
        if (length := end - start) > MOST:
            parts = -(-length // MOST)
            out += [(start + length * i // parts, start + length * (i + 1) // parts) for i in range(parts)]
            start = end
        at = end
    return [*out, (start, T)] if start < T else out


def _occurrences(
    key: list[Array], place: list[Array], keys: int, nowhere: int
) -> tuple[Array, list[tuple[Array, Array]]]:
    """A place of each of `keys` and their heads, `nowhere` where nobody sees it; then (rows of keys, their second places) of those that have one, their third, and so on."""
    every, at = np.concatenate(key), np.concatenate(place)
    order = every.argsort(kind="stable")
    every, at = every[order], at[order]
    turn = np.arange(len(every)) - np.searchsorted(every, every)
    first = np.full((keys, at.shape[1]), nowhere, np.int64)
    first[every[turn == 0]] = at[turn == 0]
    rows = every[:, None] * at.shape[1] + np.arange(at.shape[1])
    return first.reshape(-1), [
        (rows[turn == n].reshape(-1), at[turn == n].reshape(-1)) for n in range(1, turn.max(initial=0) + 1)
    ]


AttentionLayout = Union[Tensor, BlockSparseLayout, "BlockMask"]


def attention_layout(mask: Tensor, kv_heads: int) -> AttentionLayout:
    """What `attend` shall be given for a mask (B, 1, T, S), the same in every layer: where gradients are computed, spans on a CPU, FlexAttention's blocks on CUDA.

    A packed row's documents see nothing of one another, and no token sees a later one: most scores need not be computed.
    """
    if not torch.is_grad_enabled():
        return mask
    if mask.device.type == "cuda" and find_spec("triton") is not None:  # in which its kernels are written
        return flex_block_mask(mask)
    return BlockSparseLayout(mask, kv_heads) if mask.device.type == "cpu" else mask


def flex_block_mask(mask: Tensor) -> "BlockMask":
    """Of a mask (B, 1, T, S): blocks of 128 × 128 of which nothing is seen are left out, those that are seen in part look the mask up."""
    from torch.nn.attention.flex_attention import create_block_mask

    B, _, T, S = mask.shape
    return create_block_mask(
        lambda b, h, query, key: mask[b, 0, query, key], B, None, T, S, device=str(mask.device)
    )


@cache
def flex() -> Callable[..., Tensor]:
    """FlexAttention, compiled once for all layers and both towers, whose numbers of queries and keys differ and change from batch to batch."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: AttentionLayout) -> Tensor:
    """Softmax attention of `queries` (B, H, T, E) over `keys`, `values` (B, G, S, E) where the mask (B, 1, T, S), or what was `planned` of it, allows; a float mask is added."""
    if isinstance(mask, BlockSparseLayout):
        return SegmentAttention.apply(queries, keys, values, mask)
    if not isinstance(mask, Tensor):
        return flex()(
            queries,
            keys.to(queries.dtype),
            values.to(queries.dtype),
            block_mask=mask,
            enable_gqa=queries.shape[1] != keys.shape[1],
        )
    return F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, enable_gqa=queries.shape[1] != keys.shape[1]
    )


class SegmentAttention(torch.autograd.Function):
    """Attention over spans, by matrix products; the weights are kept for the backward pass.

    Queries, keys and values are gathered span by span, and what comes out is put back in the same way (docs/experiments.md has how much time that saves).
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, layout: BlockSparseLayout) -> Tensor:
        B, H, T, E = queries.shape
        G = keys.shape[1]
        q, k, v = _rows(queries, G), _rows(keys, G), _rows(values, G)
        out, kept, at = q.new_empty(layout.queries, q.shape[1]), [], 0
        for segments, bias in zip(layout.segments, layout.bias(queries.dtype), strict=True):
            own_q, own_k, own_v = (
                _gather(q, segments.queries, E),
                _gather(k, segments.keys, E),
                _gather(v, segments.keys, E),
            )
            scores = torch.bmm(own_q.mul_(E**-0.5), own_k.transpose(1, 2)).view(
                -1, G, bias.shape[2], H // G, bias.shape[4]
            )
            weights = torch.softmax(scores.add_(bias), -1, out=scores).view(len(own_q), -1, bias.shape[-1])
            at, part = _next(out, at, segments.queries, E)
            torch.bmm(weights, own_v, out=part)
            kept.append(weights)
        ctx.save_for_backward(queries, keys, values, *kept)
        ctx.layout = layout
        return out.index_select(0, layout.back).view(B, T, H, E).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        queries, keys, values, *kept = ctx.saved_tensors
        layout = ctx.layout
        B, H, T, E = queries.shape
        G = keys.shape[1]
        q, k, v, g = _rows(queries, G), _rows(keys, G), _rows(values, G), _rows(gradient, G)
        d_q = q.new_empty(layout.queries, q.shape[1])
        d_k, d_v = k.new_empty(layout.keys + 1, E), v.new_empty(layout.keys + 1, E)
        d_k[-1], d_v[-1] = 0, 0  # of keys that nobody sees
        at = key_at = 0
        for segments, weights in zip(layout.segments, kept, strict=True):
            own_g = _gather(g, segments.queries, E, segments.none)
            at, part = _next(d_q, at, segments.queries, E)
            _, k_part = _next(d_k, key_at, segments.keys, E)
            key_at, v_part = _next(d_v, key_at, segments.keys, E)
            torch.bmm(weights.transpose(1, 2), own_g, out=v_part)
            d = torch.bmm(
                own_g, _gather(v, segments.keys, E).transpose(1, 2)
            )  # of the weights, then of the scores
            torch.ops.aten._softmax_backward_data.out(d, weights, -1, d.dtype, grad_input=d).mul_(E**-0.5)
            torch.bmm(d, _gather(k, segments.keys, E), out=part)
            torch.bmm(d.transpose(1, 2), _gather(q, segments.queries, E), out=k_part)
        d_queries = d_q.index_select(0, layout.back).view(B, T, H, E).transpose(1, 2)
        d_keys, d_values = (_add_up(d, layout).view(B, -1, G, E).transpose(1, 2) for d in (d_k, d_v))
        return d_queries, d_keys, d_values, None


def _rows(x: Tensor, kv_heads: int) -> Tensor:
    """(B, heads, T, E) → (B · T · G, heads ÷ G · E)"""
    return x.transpose(1, 2).reshape(-1, x.shape[1] // kv_heads * x.shape[3])


def _gather(rows: Tensor, index: Tensor, size: int, none: Tensor | None = None) -> Tensor:
    """Rows by `index` (n, G, t), those of `none` as 0: (n · G, t · heads ÷ G, E)."""
    out = rows.index_select(0, index.flatten())
    if none is not None and len(none):
        out.index_fill_(0, none, 0)
    return out.view(index.shape[0] * index.shape[1], -1, size)


def _next(rows: Tensor, at: int, index: Tensor, size: int) -> tuple[int, Tensor]:
    """The part of `rows` from `at` on that `index` (n, G, t) speaks of, as (n · G, t · heads ÷ G, E), behind where it ends."""
    end = at + index.numel()
    return end, rows[at:end].view(index.shape[0] * index.shape[1], -1, size)


def _add_up(rows: Tensor, layout: BlockSparseLayout) -> Tensor:
    """Sums over the places where each key stands."""
    out = rows.index_select(0, layout.keys_back)
    for index, place in layout.more_keys:
        out.index_copy_(0, index, out.index_select(0, index).add_(rows.index_select(0, place)))
    return out
