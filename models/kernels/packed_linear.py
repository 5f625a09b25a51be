"""A decoder's weights laid out anew for decoding on a CPU, and its block over few tokens."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.kernels.attention import attend
from models.kv_cache import DecodingCache
from models.language_model import DecoderBlock
from models.layers import KVSource, RMSNorm, Rotary


class Packed:
    """Linear layers that read the same input, as one, in the layout of oneDNN's kernels; `packed(x)` gives their results side by side.

    On CPUs with bf16 instructions one to sixteen rows cost the same, two thirds of what `F.linear` takes for two to eight
    (docs/experiments.md), and a row's result does not depend on how many there are: verifying drafts is nearly free, and
    gives to the bit what decoding one token at a time gives. The packed weights are a copy, for inference alone; beyond
    `MOST` rows the old layout is the faster one.
    """

    ROWS, MOST = 8, 32  # rows that the layout is made for, and is used for

    def __init__(self, *layers: nn.Linear | Tensor) -> None:
        self.layers = layers
        weights = [(layer if isinstance(layer, Tensor) else layer.weight).detach() for layer in layers]
        biases = [
            layer.bias.detach() for layer in layers if isinstance(layer, nn.Linear) and layer.bias is not None
        ]
        self.weight = torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights), self.ROWS)
        self.bias = torch.cat(biases) if biases else None
        self.product = torch.ops.mkldnn._linear_pointwise.default  # looked up once

    @classmethod
    def takes(cls, x: Tensor) -> bool:
        return x.shape[:-1].numel() <= cls.MOST

    def __call__(self, x: Tensor) -> Tensor:
        if not self.takes(x):
            made = [layer(x) if isinstance(layer, nn.Linear) else F.linear(x, layer) for layer in self.layers]
            return torch.cat(made, -1) if len(made) > 1 else made[0]
        out: Tensor = self.product(x, self.weight, self.bias, "none", [], "")
        return out

    @staticmethod
    def available(weight: Tensor) -> bool:
        """Are there kernels for this device and type? Those of bf16 need a CPU with AVX-512 or better."""
        ops = torch.ops.mkldnn
        there = (
            weight.device.type == "cpu"
            and torch.backends.mkldnn.is_available()
            and hasattr(ops, "_linear_pointwise")
        )
        return there and (
            weight.dtype == torch.float32
            or (weight.dtype == torch.bfloat16 and ops._is_mkldnn_bf16_supported())
        )


class PackedBlock:
    """A decoder block over as many tokens as `Packed` takes, with a cache: what `Block` computes, in half the calls, which at one token are a fourth of the time."""

    def __init__(self, block: DecoderBlock) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.layer, self.has_rope, self.config = attention.layer, attention.has_rope, attention.config
        self.norms = [norm.forward for norm in (block.input_layernorm, block.post_attention_layernorm)]
        self.qk_norms = (attention.q_norm, attention.k_norm) if self.config.qk_norm else None
        self.qkv, self.out = (
            Packed(attention.q_proj, attention.k_proj, attention.v_proj),
            Packed(attention.o_proj),
        )
        self.gate_up, self.down = Packed(mlp.gate_proj, mlp.up_proj), Packed(mlp.down_proj)

    def __call__(self, x: Tensor, rotary: Rotary, mask: Tensor, past: DecodingCache) -> Tensor:
        """`x` (B, T, D); `mask` (B, 1, T, S), a float one."""
        H, G, E, M = self.config.heads, self.config.kv_heads, self.config.head_size, self.config.mlp_size
        qkv = self.qkv(self.norms[0](x)).view(*x.shape[:2], H + 2 * G, E).transpose(1, 2)
        queries_keys = qkv.narrow(1, 0, H + G)
        if self.qk_norms is not None:
            queries_keys = torch.cat(
                (self.qk_norms[0](qkv.narrow(1, 0, H)), self.qk_norms[1](qkv.narrow(1, H, G))), 1
            )
        if self.has_rope:
            queries_keys = rotary.rotate(queries_keys)
        keys, values = past.extend(
            self.layer, queries_keys.narrow(1, H, G), qkv.narrow(1, H + G, G), None
        )  # turned already
        out = attend(queries_keys.narrow(1, 0, H), keys, values, mask)
        x = x + self.out(out.transpose(1, 2).flatten(2))
        gate_up = self.gate_up(self.norms[1](x))
        return x + self.down(F.silu(gate_up.narrow(-1, 0, M)) * gate_up.narrow(-1, M, M))


class PackedDecoder:
    """All blocks of a decoder; takes few tokens over a `DecodingCache`, and nothing else."""

    def __init__(self, blocks: list[DecoderBlock]) -> None:
        self.blocks = [PackedBlock(block) for block in blocks]

    def __call__(self, x: Tensor, rotary: Rotary, mask: Tensor, past: KVSource | None) -> Tensor | None:
        if not isinstance(past, DecodingCache) or not Packed.takes(x):
            return None
        for block in self.blocks:
            x = block(x, rotary, mask, past)
        return x


def pack_for_decoding(model: Any) -> None:
    """Lay out anew the weights of a model's right tower and multi-token heads: decoding on a CPU is faster, for as much memory again."""
    right, heads = model.right, model.heads
    for module in (*right.modules(), *(heads.modules() if heads is not None else ())):
        if isinstance(module, RMSNorm):
            module.pack()
    right.decode, right.unembed = PackedDecoder(list(right.layers)), Packed(right.unembedding)
    if heads is not None:
        for layer in (heads.carry, heads.gate_up, heads.down):
            layer.forward = Packed(layer.weight)  # not the layer: with many rows, its forward would call itself
        heads.unembed = Packed(heads.rows(right.unembedding))
