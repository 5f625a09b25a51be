"""Every attention mask: boolean, (B, 1, queries, keys), True where a query sees a key.

Padding tokens have document, group and image −1, so they see only one another. No row is empty (a softmax
over nothing is NaN), and no real token sees them.
"""

from typing import Literal

import torch
from torch import Tensor

NEVER = torch.iinfo(torch.int64).max  # position of an empty cache slot: later than every query's


def left_mask(
    positions: Tensor,
    groups: Tensor,
    images: Tensor,
    isolation: bool,
    attention: Literal["causal", "bidirectional"],
) -> Tensor:
    """Mask of the left tower, (B, 1, L, L); arguments (B, L).

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
    same_image = (images[:, :, None] == images[:, None, :]) & (images >= 0)[:, :, None]
    same_group = groups[:, :, None] == groups[:, None, :]
    earlier = positions[:, None, :] <= positions[:, :, None]
    seen = earlier if attention == "causal" else earlier | same_image
    if isolation:
        seen = seen & (same_image | (images < 0)[:, :, None])  # image −1: padding
    return (seen & same_group)[:, None]


def right_mask(
    positions: Tensor, documents: Tensor, groups: Tensor, left_positions: Tensor, left_groups: Tensor
) -> Tensor:
    """Mask of the right tower over [image KV | right stream], (B, 1, R, L + R).

    Arguments (B, R), those of the left stream (B, L). Two questions d0, d1 on image A (group 0), whose block
    has positions 1 and 2 in each document:

            keys    A1 A2 | d0p0 d0p3 d0p4 | d1p0 d1p3
        d0p0                |  x
        d0p3         x  x   |  x    x
        d0p4         x  x   |  x    x    x
        d1p0                |                    x
        d1p3         x  x   |                    x    x
    """
    same_group = groups[:, :, None] == left_groups[:, None, :]
    image = same_group & (left_positions[:, None, :] < positions[:, :, None])  # (B, R, L)
    same_document = documents[:, :, None] == documents[:, None, :]
    text = same_document & (positions[:, None, :] <= positions[:, :, None])  # (B, R, R)
    return torch.cat((image, text), dim=-1)[:, None]


def cache_mask(positions: Tensor, key_positions: Tensor) -> Tensor:
    """Mask of queries at `positions` (B, T) over a cache of `key_positions` (B, S), (B, 1, T, S).

    Empty slots have the position NEVER. A cache row is one document, so positions decide alone:

            slots   p1 p2 -- p0 p3 p4 --
        p3           x  x     x  x
        p4           x  x     x  x  x
    """
    return (key_positions[:, None, :] <= positions[:, :, None])[:, None]
