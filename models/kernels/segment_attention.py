"""Attention in training on a CPU: matrix products over segments of a packed row.

A packed row's documents do not see one another, and no token sees a later one: most scores of the dense form
need not be computed. docs/log/experiments.md has the time saved.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.masks import Mask

Array = np.ndarray[Any, Any]

MAX_QUERIES = 128  # of a segment
ALIGNED = 32  # on a CPU, softmax over bf16 needs a multiple of so many keys
SPREAD = 1.25  # of segments that are computed together: most keys ÷ fewest keys


class Segments(NamedTuple):
    """Segments with about the same number of keys, padded to one size and computed together.

    A segment is a run of a row's queries, and the keys that any of them sees. Indices count the rows of
    queries (B · T · G) and keys (B · S · G), where the G heads of a token are adjacent.
    """

    queries: Tensor  # (n, G, t), any index at padding
    keys: Tensor  # (n, G, s), any index at padding
    masked: Tensor  # (n, t, s) bool; False for all of a padding query, as a softmax over nothing is NaN
    padding: Tensor  # flat indices of the padding in `queries`


class _Segment(NamedTuple):
    row: int
    start: int  # of its queries
    end: int
    keys: Array

    @property
    def capacity(self) -> int:
        """Keys, padded to `ALIGNED`."""
        return -(-len(self.keys) // ALIGNED) * ALIGNED


class BlockSparseLayout:
    """The segments of a mask: all that is seen, and little else.

    Slots number the gathered queries and keys of all segments and heads.
    """

    def __init__(self, mask: Mask, kv_heads: int) -> None:
        seen = mask.dense()[:, 0].numpy()
        (B, T, S), G, heads = seen.shape, kv_heads, np.arange(kv_heads)
        pending = [
            _Segment(row, start, end, np.flatnonzero(seen[row, start:end].any(0)))
            for row in range(B)
            for start, end in _split_queries(seen[row])
        ]
        pending.sort(key=lambda segment: segment.capacity)
        self.segments: list[Segments] = []
        query_slots = np.empty((B * T, G), np.int64)
        seen_keys, key_slots = [np.empty(0, np.int64)], [np.empty((0, G), np.int64)]  # of each segment
        Q = K = 0
        while pending:
            group = [segment for segment in pending if segment.capacity <= SPREAD * pending[0].capacity]
            pending = pending[len(group) :]
            queries, keys, masked = _pad(group, seen)
            (n, t), s = queries.shape, keys.shape[1]
            lengths = np.array([segment.end - segment.start for segment in group])
            for i, (segment, length) in enumerate(zip(group, lengths, strict=True)):
                first = segment.row * T + segment.start
                offsets = np.arange(length)[:, None]
                query_slots[first : first + length] = Q + (i * G + heads) * t + offsets
                seen_keys.append(keys[i, : len(segment.keys)])
                key_slots.append(K + (i * G + heads) * s + np.arange(len(segment.keys))[:, None])
            padding = np.flatnonzero(np.broadcast_to(np.arange(t) >= lengths[:, None, None], (n, G, t)))
            q, k = (index[:, None] * G + heads[:, None] for index in (queries, keys))  # (n, G, t), (n, G, s)
            self.segments.append(Segments(*map(torch.from_numpy, (q, k, masked, padding))))
            Q, K = Q + n * G * t, K + n * G * s
        self.queries, self.keys = Q, K  # slots
        self.query_slots = torch.from_numpy(query_slots.reshape(-1))  # (B · T · G,)
        first_slots, more_slots = _occurrences(seen_keys, key_slots, B * S, K)
        self.key_slots = torch.from_numpy(first_slots)  # (B · S · G,)
        self.more_keys = [(torch.from_numpy(rows), torch.from_numpy(slots)) for rows, slots in more_slots]
        self._bias: dict[torch.dtype, list[Tensor]] = {}

    @staticmethod
    def applies(x: Tensor) -> bool:
        """For training on a CPU."""
        return torch.is_grad_enabled() and x.device.type == "cpu"

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Arguments as in `attention`."""
        out: Tensor = SegmentAttention.apply(queries, keys, values, self)
        return out

    def bias(self, dtype: torch.dtype) -> list[Tensor]:
        """Each segment group's addend to its scores (n, G, t, H ÷ G, s): 0, or −∞ where masked.

        Computed once for all layers.
        """
        if dtype not in self._bias:
            self._bias[dtype] = [
                torch.zeros(s.masked.shape, dtype=dtype).masked_fill_(s.masked, -torch.inf)[:, None, :, None]
                for s in self.segments
            ]
        return self._bias[dtype]


def _split_queries(seen: Array) -> list[tuple[int, int]]:
    """Split a row's queries (T, S) into segments.

    A segment holds as many whole documents as fit; long documents are split in equal parts. A document ends
    where the next query sees none of the same keys.
    """
    T = len(seen)
    ends = np.flatnonzero(~(seen[1:] & seen[:-1]).any(1)) + 1
    out, start, at = [], 0, 0
    for end in [*ends.tolist(), T]:
        if end - start > MAX_QUERIES and at > start:
            out.append((start, at))
            start = at
        if (length := end - start) > MAX_QUERIES:
            parts = -(-length // MAX_QUERIES)
            out += [(start + length * i // parts, start + length * (i + 1) // parts) for i in range(parts)]
            start = end
        at = end
    return [*out, (start, T)] if start < T else out


def _pad(group: list[_Segment], seen: Array) -> tuple[Array, Array, Array]:
    """Pad segments of a mask `seen` (B, T, S) to one size: queries (n, t), keys (n, s), masked (n, t, s)."""
    _, T, S = seen.shape
    n, t, s = len(group), max(segment.end - segment.start for segment in group), group[-1].capacity
    queries, keys = np.zeros((n, t), np.int64), np.zeros((n, s), np.int64)
    masked = np.ones((n, t, s), bool)
    for i, (row, start, end, key_ids) in enumerate(group):
        length = end - start
        queries[i, :length] = np.arange(row * T + start, row * T + end)
        keys[i, : len(key_ids)] = row * S + key_ids
        masked[i, :length, : len(key_ids)] = ~seen[row, start:end][:, key_ids]
        masked[i, length:] = False
    return queries, keys, masked


def _occurrences(
    seen_keys: list[Array], key_slots: list[Array], count: int, unseen: int
) -> tuple[Array, list[tuple[Array, Array]]]:
    """Slots of each of `count` keys and their G heads, from the keys (k,) and slots (k, G) of each segment.

    Returns the first slots (count · G,), `unseen` where no query sees a key. Then for the second slot, the
    third, and so on: the rows that have one, and their slots.
    """
    keys, slots = np.concatenate(seen_keys), np.concatenate(key_slots)
    order = keys.argsort(kind="stable")
    keys, slots = keys[order], slots[order]
    G = slots.shape[1]
    nth = np.arange(len(keys)) - np.searchsorted(keys, keys)  # earlier slots of the same key
    first = np.full((count, G), unseen, np.int64)
    first[keys[nth == 0]] = slots[nth == 0]
    rows = keys[:, None] * G + np.arange(G)
    more = [
        (rows[nth == n].reshape(-1), slots[nth == n].reshape(-1)) for n in range(1, nth.max(initial=0) + 1)
    ]
    return first.reshape(-1), more


class SegmentAttention(torch.autograd.Function):
    """Attention over segments, by matrix products; the weights are saved for the backward pass.

    Queries, keys and values are gathered by segment, and the results scattered back.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, layout: BlockSparseLayout) -> Tensor:
        B, H, T, E = queries.shape
        G = keys.shape[1]
        q, k, v = _rows(queries, G), _rows(keys, G), _rows(values, G)
        out, saved, at = q.new_empty(layout.queries, q.shape[1]), [], 0
        for segments, bias in zip(layout.segments, layout.bias(queries.dtype), strict=True):
            own_q = _gather(q, segments.queries, E)  # (n · G, t · H ÷ G, E)
            own_k, own_v = _gather(k, segments.keys, E), _gather(v, segments.keys, E)  # (n · G, s, E)
            scores = torch.bmm(own_q.mul_(E**-0.5), own_k.transpose(1, 2))  # (n · G, t · H ÷ G, s)
            scores = scores.view(-1, G, bias.shape[2], H // G, bias.shape[4])  # (n, G, t, H ÷ G, s)
            weights = torch.softmax(scores.add_(bias), -1, out=scores).view(len(own_q), -1, bias.shape[-1])
            at, part = _next(out, at, segments.queries, E)
            torch.bmm(weights, own_v, out=part)
            saved.append(weights)
        ctx.save_for_backward(queries, keys, values, *saved)
        ctx.layout = layout
        return out.index_select(0, layout.query_slots).view(B, T, H, E).transpose(1, 2)  # (B, H, T, E)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        queries, keys, values, *saved = ctx.saved_tensors
        layout = ctx.layout
        B, H, T, E = queries.shape
        G = keys.shape[1]
        q, k, v, g = _rows(queries, G), _rows(keys, G), _rows(values, G), _rows(gradient, G)
        d_q = q.new_empty(layout.queries, q.shape[1])
        d_k, d_v = k.new_empty(layout.keys + 1, E), v.new_empty(layout.keys + 1, E)
        d_k[-1], d_v[-1] = 0, 0  # the slot of keys that no query sees
        at = key_at = 0
        for segments, weights in zip(layout.segments, saved, strict=True):
            own_g = _gather(g, segments.queries, E, segments.padding)
            at, part = _next(d_q, at, segments.queries, E)
            _, k_part = _next(d_k, key_at, segments.keys, E)
            key_at, v_part = _next(d_v, key_at, segments.keys, E)
            torch.bmm(weights.transpose(1, 2), own_g, out=v_part)
            # The gradient of the weights, then, in place, of the scores.
            d = torch.bmm(own_g, _gather(v, segments.keys, E).transpose(1, 2))
            torch.ops.aten._softmax_backward_data.out(d, weights, -1, d.dtype, grad_input=d).mul_(E**-0.5)
            torch.bmm(d, _gather(k, segments.keys, E), out=part)
            torch.bmm(d.transpose(1, 2), _gather(q, segments.queries, E), out=k_part)
        d_queries = d_q.index_select(0, layout.query_slots).view(B, T, H, E).transpose(1, 2)
        d_keys, d_values = (_add_up(d, layout).view(B, -1, G, E).transpose(1, 2) for d in (d_k, d_v))
        return d_queries, d_keys, d_values, None


def _rows(x: Tensor, kv_heads: int) -> Tensor:
    """(B, heads, T, E) → (B · T · G, heads ÷ G · E)"""
    return x.transpose(1, 2).reshape(-1, x.shape[1] // kv_heads * x.shape[3])


def _gather(rows: Tensor, index: Tensor, size: int, padding: Tensor | None = None) -> Tensor:
    """Gather rows by `index` (n, G, t), with 0 at `padding`: (n · G, t · heads ÷ G, E)."""
    out = rows.index_select(0, index.flatten())
    if padding is not None and len(padding):
        out.index_fill_(0, padding, 0)
    return out.view(index.shape[0] * index.shape[1], -1, size)


def _next(rows: Tensor, at: int, index: Tensor, size: int) -> tuple[int, Tensor]:
    """The end, and a view (n · G, t · heads ÷ G, E), of the next `index` (n, G, t) rows from `at` on."""
    end = at + index.numel()
    return end, rows[at:end].view(index.shape[0] * index.shape[1], -1, size)


def _add_up(rows: Tensor, layout: BlockSparseLayout) -> Tensor:
    """Sum the slots of each key: (slots, E) → (B · S · G, E)."""
    out = rows.index_select(0, layout.key_slots)
    for index, slots in layout.more_keys:
        out.index_copy_(0, index, out.index_select(0, index).add_(rows.index_select(0, slots)))
    return out
