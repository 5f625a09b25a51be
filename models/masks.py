"""Every attention mask, as a rule on one query and one key.

Padding tokens have document, group and image −1, so they see only one another. No row is empty (a softmax
over nothing is NaN), and no real token sees them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

NEVER = torch.iinfo(torch.int64).max  # position of an empty cache slot: later than every query's

Columns = tuple[Tensor, ...]


@dataclass(frozen=True)
class Mask:
    """Which query sees which key. `sees` computes it elementwise, from the columns of queries and of keys."""

    sees: Callable[[Columns, Columns], Tensor]
    queries: Columns  # (B, T) each
    keys: Columns  # (B, S) each

    def dense(self) -> Tensor:
        """(B, 1, T, S) bool, True where a query sees a key."""
        queries = tuple(column[:, :, None] for column in self.queries)
        keys = tuple(column[:, None, :] for column in self.keys)
        return self.sees(queries, keys)[:, None]

    def mask_mod(self, b: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """The same rule as FlexAttention reads it: row `b`, query index `q`, key index `k`."""
        return self.sees(tuple(c[b, q] for c in self.queries), tuple(c[b, k] for c in self.keys))


def left_mask(
    positions: Tensor,
    groups: Tensor,
    images: Tensor,
    isolation: bool,
    attention: Literal["causal", "bidirectional"],
) -> Mask:
    """Mask of the left tower over its stream; arguments (B, L).

    With isolation, image A of three tokens and image B of two, in one group:

            keys  A A A B B            bidirectional:   A A A B B
        A         x                                  A  x x x
        A         x x                                A  x x x
        A         x x x                              A  x x x
        B               x                            B        x x
        B               x x                          B        x x

    Without isolation a token also sees every earlier token of its group. Text in the left stream
    (`left_context="prefix"`) has image −1 and is always causal.
    """

    def sees(query: Columns, key: Columns) -> Tensor:
        (position, group, image), (key_position, key_group, key_image) = query, key
        same_image = (image == key_image) & (image >= 0)
        seen = key_position <= position
        if attention == "bidirectional":
            seen = seen | same_image
        if isolation:
            seen = seen & (same_image | (image < 0))  # image −1: padding
        return seen & (group == key_group)

    return Mask(sees, (positions, groups, images), (positions, groups, images))


def right_mask(
    positions: Tensor, documents: Tensor, groups: Tensor, left_positions: Tensor, left_groups: Tensor
) -> Mask:
    """Mask of the right tower over [image KV | right stream], of S = L + R keys.

    Arguments (B, R), those of the left stream (B, L). Two questions d0, d1 on image A (group 0), whose block
    has positions 1 and 2 in each document:

            keys    A1 A2 | d0p0 d0p3 d0p4 | d1p0 d1p3
        d0p0                |  x
        d0p3         x  x   |  x    x
        d0p4         x  x   |  x    x    x
        d1p0                |                    x
        d1p3         x  x   |                    x    x
    """

    def sees(query: Columns, key: Columns) -> Tensor:
        (position, document, group), (key_position, key_document, key_group, is_image) = query, key
        image = (group == key_group) & (key_position < position)
        text = (document == key_document) & (key_position <= position)
        return torch.where(is_image, image, text)

    keys = (
        torch.cat((left_positions, positions), 1),
        torch.cat((torch.full_like(left_groups, -1), documents), 1),
        torch.cat((left_groups, groups), 1),
        torch.cat((torch.ones_like(left_groups), torch.zeros_like(groups)), 1).bool(),
    )  # (B, L + R) each
    return Mask(sees, (positions, documents, groups), keys)


def cache_mask(positions: Tensor, key_positions: Tensor) -> Mask:
    """Mask of queries at `positions` (B, T) over a cache of `key_positions` (B, S).

    Empty slots have the position NEVER. A cache row is one document, so positions decide alone:

            slots   p1 p2 -- p0 p3 p4 --
        p3           x  x     x  x
        p4           x  x     x  x  x
    """
    return Mask(lambda query, key: key[0] <= query[0], (positions,), (key_positions,))
