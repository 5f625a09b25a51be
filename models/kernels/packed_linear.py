"""Packed weights for decoding on a CPU, and a decoder block over few tokens."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.kernels.attention import attend
from models.kv_cache import DecodingCache
from models.language_model import DecoderBlock
from models.layers import KVSource, RMSNorm, Rotary


class Packed:
    """Linear layers over the same input, merged into one in oneDNN's layout; results are concatenated.

    On CPUs with bf16 instructions, one to sixteen rows cost the same: two thirds of `F.linear`'s time for two
    to eight (docs/log/experiments.md). A row's result does not depend on the number of rows. So verifying
    drafts is nearly free, and bit-identical to decoding one token at a time. The packed weights are a
    copy, for inference only. Beyond `MAX_ROWS` rows the plain layout is faster.
    """

    ROWS = 8  # that the layout is made for
    MAX_ROWS = 32  # that it is used for

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
        """Whether `x` (…, D) has few enough rows."""
        return x.shape[:-1].numel() <= cls.MAX_ROWS

    def __call__(self, x: Tensor) -> Tensor:
        if not self.takes(x):
            parts = [
                layer(x) if isinstance(layer, nn.Linear) else F.linear(x, layer) for layer in self.layers
            ]
            return torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        out: Tensor = self.product(x, self.weight, self.bias, "none", [], "")
        return out

    @staticmethod
    def available(weight: Tensor) -> bool:
        """Whether there are kernels for the weight's device and dtype. Those of bf16 need AVX-512."""
        ops = torch.ops.mkldnn
        if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return False
        if not hasattr(ops, "_linear_pointwise"):
            return False
        bf16 = weight.dtype == torch.bfloat16 and ops._is_mkldnn_bf16_supported()
        return weight.dtype == torch.float32 or bf16


class PackedBlock:
    """`DecoderBlock` over a cache and as few tokens as `Packed` takes, in half the calls.

    At one token, the calls are a fourth of the time.
    """

    def __init__(self, block: DecoderBlock) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.layer, self.has_rope, self.config = attention.layer, attention.has_rope, attention.config
        self.norms = [norm.forward for norm in (block.input_layernorm, block.post_attention_layernorm)]
        self.qk_norms = (attention.q_norm, attention.k_norm) if self.config.qk_norm else None
        self.qkv = Packed(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = Packed(attention.o_proj)
        self.gate_up, self.down = Packed(mlp.gate_proj, mlp.up_proj), Packed(mlp.down_proj)

    def __call__(self, x: Tensor, rotary: Rotary, mask: Tensor, past: DecodingCache) -> Tensor:
        """`x` (B, T, D) → (B, T, D); `mask` (B, 1, T, S), float."""
        H, G, E, M = self.config.heads, self.config.kv_heads, self.config.head_size, self.config.mlp_size
        qkv = (
            self.qkv(self.norms[0](x)).view(*x.shape[:2], H + 2 * G, E).transpose(1, 2)
        )  # (B, H + 2·G, T, E)
        queries_keys = qkv.narrow(1, 0, H + G)
        if self.qk_norms is not None:
            q_norm, k_norm = self.qk_norms
            queries_keys = torch.cat((q_norm(qkv.narrow(1, 0, H)), k_norm(qkv.narrow(1, H, G))), 1)
        if self.has_rope:
            queries_keys = rotary.rotate(queries_keys)
        new_keys, new_values = queries_keys.narrow(1, H, G), qkv.narrow(1, H + G, G)
        keys, values = past.extend(self.layer, new_keys, new_values, None)  # keys are rotated already
        out = attend(queries_keys.narrow(1, 0, H), keys, values, mask)  # (B, H, T, E)
        x = x + self.out(out.transpose(1, 2).flatten(2))  # (B, T, D)
        gate_up = self.gate_up(self.norms[1](x))  # (B, T, 2·M)
        return x + self.down(F.silu(gate_up.narrow(-1, 0, M)) * gate_up.narrow(-1, M, M))


class PackedDecoder:
    """All blocks of a decoder, over few tokens and a `DecodingCache`; None for other inputs."""

    def __init__(self, blocks: list[DecoderBlock]) -> None:
        self.blocks = [PackedBlock(block) for block in blocks]

    def __call__(self, x: Tensor, rotary: Rotary, mask: Tensor, past: KVSource | None) -> Tensor | None:
        if not isinstance(past, DecodingCache) or not Packed.takes(x):
            return None
        for block in self.blocks:
            x = block(x, rotary, mask, past)
        return x


def pack_for_decoding(model: Any) -> None:
    """Pack the weights of a model's right tower and multi-token heads, for faster decoding on a CPU.

    The copies take as much memory again.
    """
    right, heads = model.right, model.heads
    for module in (*right.modules(), *(heads.modules() if heads is not None else ())):
        if isinstance(module, RMSNorm):
            module.pack()
    right.decode, right.unembed = PackedDecoder(list(right.layers)), Packed(right.unembedding)
    if heads is not None:
        for layer in (heads.carry, heads.gate_up, heads.down):
            # Of the weight, not the layer: with many rows, its forward would call itself.
            layer.forward = Packed(layer.weight)
        packed_rows = Packed(heads.rows(right.unembedding))
        heads.unembedder = lambda unembedding: packed_rows
