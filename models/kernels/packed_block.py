"""Decoder blocks for decoding on a CPU: merged linear layers, with weights in oneDNN's own layout.

For more than one row, torch lays bf16 weights out anew at every call; for the few rows of a decode step that
takes as long as the products. Beside it the block's many small calls are halved. docs/log/experiments.md has
the figures.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.kernels import in_use
from models.kv_cache import DecodingCache
from models.layers import AttentionLayout, KVSource, RMSNorm, Rotary, attention

ROWS = 8  # that the layout is made for
MAX_ROWS = 32  # that it is used for; with more the plain block is faster


class PackedLinear:
    """Linear layers over the same input as one product; their results are concatenated.

    A row's result does not depend on the number of rows, so that a verified draft equals plain decoding.
    """

    def __init__(self, *layers: nn.Linear) -> None:
        weights = [layer.weight.detach() for layer in layers]
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.weight = torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights), ROWS)
        self.bias = torch.cat(biases) if biases else None
        self.product = torch.ops.mkldnn._linear_pointwise.default  # looked up once

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self.product(x, self.weight, self.bias, "none", [], "")
        return out


class PackedNorm:
    """RMSNorm by LayerNorm's one kernel: x and −x together have mean 0 and x's mean square as variance."""

    def __init__(self, norm: RMSNorm) -> None:
        self.weight, self.eps = torch.cat((norm.weight, norm.weight)).detach(), norm.eps
        self.signs = norm.weight.new_tensor(((1.0,), (-1.0,)))

    def __call__(self, x: Tensor) -> Tensor:
        D = x.shape[-1]
        signed = (x.unsqueeze(-2) * self.signs).flatten(-2)  # (…, 2·D)
        return torch.layer_norm(signed, (2 * D,), self.weight, None, self.eps).narrow(-1, 0, D)


class PackedBlock:
    """The forward of a `DecoderBlock` over few tokens and a `DecodingCache`; other inputs take the plain one.

    The packed weights are a copy, for inference only. They are packed at the first call, and again after the
    block's weights have changed.
    """

    def __init__(self, block: Any) -> None:
        self.block = block
        self.weights = list(block.parameters())  # listing them at every call would take a millisecond a step
        self.packed: list[tuple[int, int]] = []  # address and version of each weight when it was packed

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedBlock":
        twin = copy.copy(self)
        twin.block, twin.weights = copy.deepcopy((self.block, self.weights), memo)
        return twin

    def _pack(self) -> None:
        """Pack the block's weights as they are now."""
        # Weights made in inference mode count no versions.
        weights = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.weights]
        if weights == self.packed:
            return
        self.packed, attention, mlp = weights, self.block.self_attn, self.block.mlp
        self.norms = PackedNorm(self.block.input_layernorm), PackedNorm(self.block.post_attention_layernorm)
        self.qkv = PackedLinear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = PackedLinear(attention.o_proj)
        self.gate_up, self.down = PackedLinear(mlp.gate_proj, mlp.up_proj), PackedLinear(mlp.down_proj)

    @staticmethod
    def applies(weight: Tensor) -> bool:
        """For fp32, and bf16 where there are instructions for it (AVX-512), on a CPU."""
        ops = torch.ops.mkldnn
        if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return False
        bf16 = weight.dtype == torch.bfloat16 and ops._is_mkldnn_bf16_supported()
        return hasattr(ops, "_linear_pointwise") and (weight.dtype == torch.float32 or bf16)

    def __call__(
        self, x: Tensor, rotary: Rotary, mask: Tensor | AttentionLayout, kv_source: KVSource | None
    ) -> Tensor:
        """`x` (B, T, D) → (B, T, D); arguments as in `DecoderBlock`."""
        block, attend = self.block, self.block.self_attn
        if block.training:
            raise ValueError("the weights are packed for decoding: load the model again to train it")
        few = isinstance(kv_source, DecodingCache) and x.shape[:-1].numel() <= MAX_ROWS
        if kv_source is None or not few or not in_use(PackedBlock, attend.o_proj.weight):
            plain: Tensor = block.run(x, rotary, mask, kv_source)
            return plain
        self._pack()
        c = attend.config
        H, G, E, M = c.heads, c.kv_heads, c.head_size, c.mlp_size
        qkv = self.qkv(self.norms[0](x)).view(*x.shape[:2], H + 2 * G, E).transpose(1, 2)
        queries_keys = qkv.narrow(1, 0, H + G)  # (B, H + G, T, E)
        if c.qk_norm:
            queries, keys = attend.q_norm(qkv.narrow(1, 0, H)), attend.k_norm(qkv.narrow(1, H, G))
            queries_keys = torch.cat((queries, keys), 1)
        if attend.has_rope:
            queries_keys = rotary.rotate(queries_keys)
        new_keys, new_values = queries_keys.narrow(1, H, G), qkv.narrow(1, H + G, G)
        keys, values = kv_source.update(attend.layer, new_keys, new_values, None)  # keys are rotated already
        seen = attention(queries_keys.narrow(1, 0, H), keys, values, mask)  # (B, H, T, E)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        gate_up = self.gate_up(self.norms[1](x))  # (B, T, 2·M)
        return x + self.down(F.silu(gate_up.narrow(-1, 0, M)) * gate_up.narrow(-1, M, M))


def pack_blocks(decoder: Any) -> None:
    """Pack a decoder's blocks, where this kernel is in use. The copies take as much memory again."""
    if in_use(PackedBlock, decoder.unembedding):
        for block in decoder.layers:
            block.forward = PackedBlock(block)
