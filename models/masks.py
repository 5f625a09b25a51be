"""Every attention mask: boolean, (B, 1, queries, keys), True where a query may look at a key.

Padding tokens carry document, group and image −1 and so see only one another: no row is empty (a softmax over
nothing is NaN), and no real token ever sees them.
"""

from typing import Literal

import torch
from torch import Tensor

NEVER = torch.iinfo(
    torch.int64
).max  # the position of a cache slot that holds nothing: later than every query


def left_mask(
    positions: Tensor,
    groups: Tensor,
    images: Tensor,
    isolation: bool,
    attention: Literal["causal", "bidirectional"],
) -> Tensor:
    """Left tower over itself; arguments (B, L).

    With isolation, image A of three tokens and image B of two, in one group:

            keys  A A A B B            bidirectional:   A A A B B
        A         x                                  A  x x x
        A         x x                                A  x x x
        A         x x x                              A  x x x
        B               x                            B        x x
        B               x x                          B        x x

    Without isolation a token also sees every earlier token of its group; text, which stands left where
    `left_context` is "prefix", has image −1 and is always causal.
    """
    same_image = (images[:, :, None] == images[:, None, :]) & (images >= 0)[:, :, None]
    same_group = groups[:, :, None] == groups[:, None, :]
    earlier = positions[:, None, :] <= positions[:, :, None]
    seen = earlier if attention == "causal" else earlier | same_image
    if isolation:
        seen = seen & (same_image | (images < 0)[:, :, None])  # without an image: padding
    return (seen & same_group)[:, None]


def right_mask(
    positions: Tensor, documents: Tensor, groups: Tensor, left_positions: Tensor, left_groups: Tensor
) -> Tensor:
    """Right tower over [image KV | right stream]; arguments (B, R), and (B, L) of the left stream; returns (B, 1, R, L + R).

    Two questions d0, d1 on image A (group 0), whose block stands at positions 1 and 2 of each document:

            keys    A1 A2 | d0p0 d0p3 d0p4 | d1p0 d1p3
        d0p0                |  x
        d0p3         x  x   |  x    x
        d0p4         x  x   |  x    x    x
        d1p0                |                    x
        d1p3         x  x   |                    x    x
    """
    image = (groups[:, :, None] == left_groups[:, None, :]) & (
        left_positions[:, None, :] < positions[:, :, None]
    )
    text = (documents[:, :, None] == documents[:, None, :]) & (positions[:, None, :] <= positions[:, :, None])
    return torch.cat((image, text), dim=-1)[:, None]


def cache_mask(positions: Tensor, key_positions: Tensor) -> Tensor:
    """Queries at `positions` (B, T) over a cache whose slots hold `key_positions` (B, S), NEVER where empty.

    A cache row is one document, so the order of positions says everything:

            slots   p1 p2 -- p0 p3 p4 --
        p3           x  x     x  x
        p4           x  x     x  x  x
    """
    return (key_positions[:, None, :] <= positions[:, :, None])[:, None]
