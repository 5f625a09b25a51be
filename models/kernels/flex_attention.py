"""Attention in training on CUDA: FlexAttention (arXiv 2412.05496) skips blocks in which nothing is seen."""

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from models.masks import Mask


class FlexLayout:
    """FlexAttention's blocks of 128 × 128 tokens, made from a mask's rule."""

    def __init__(self, mask: Mask, kv_heads: int) -> None:
        from torch.nn.attention.flex_attention import create_block_mask

        (B, T), S = mask.queries[0].shape, mask.keys[0].shape[1]
        self.blocks = create_block_mask(
            lambda b, h, q, k: mask.mask_mod(b, h, q, k),  # it refuses methods
            *(B, None, T, S),
            device=str(mask.queries[0].device),
        )

    @staticmethod
    def applies(x: Tensor) -> bool:
        """For training on CUDA with Triton, its compiler."""
        return torch.is_grad_enabled() and x.device.type == "cuda" and find_spec("triton") is not None

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Arguments as in `attention`."""
        dtype, grouped = queries.dtype, queries.shape[1] != keys.shape[1]
        out: Tensor = compiled_flex()(
            queries, keys.to(dtype), values.to(dtype), block_mask=self.blocks, enable_gqa=grouped
        )
        return out


@cache
def compiled_flex() -> Any:
    """FlexAttention, compiled once for all layers and both towers, with dynamic sizes."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)
