"""Attention on CUDA: FlexAttention (arXiv 2412.05496) skips blocks in which nothing is seen."""

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from models.masks import Mask

BLOCK = 128  # tokens of a block: a decode step, of a few tokens a row, would mostly compute padding
MIN_TOKENS = 2048  # of a prefill; in shorter ones compiling costs more than the dense mask


class FlexLayout:
    """FlexAttention's blocks of `BLOCK` × `BLOCK` tokens, made from a mask's rule."""

    def __init__(self, mask: Mask, kv_heads: int) -> None:
        from torch.nn.attention.flex_attention import create_block_mask

        (B, T), S = mask.queries[0].shape, mask.keys[0].shape[1]
        self.blocks = create_block_mask(
            lambda b, h, q, k: mask.mask_mod(b, h, q, k),  # it refuses methods
            *(B, None, T, S),
            device=str(mask.queries[0].device),
            BLOCK_SIZE=BLOCK,
        )

    @staticmethod
    def applies(x: Tensor) -> bool:
        """On CUDA with Triton, its compiler: for training, and else for many tokens in long rows.

        `x` (B, T, D).
        """
        if x.device.type != "cuda" or find_spec("triton") is None:
            return False
        return torch.is_grad_enabled() or (x.shape[1] >= BLOCK and x.shape[0] * x.shape[1] >= MIN_TOKENS)

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
