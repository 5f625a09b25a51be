"""The parts of a decoder block: norm, rotary embedding, attention, gated MLP."""

import math
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.model import DecoderConfig
from models.kernels import find_kernel


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467) of the last dimension, with a learned weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        # Under autocast the result is cast once here, not by every projection that reads it.
        return rms_norm(x.to(self.weight.dtype), self.weight, self.eps).to(working_dtype(x))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x ÷ √(mean(x²) + eps) · weight over the last dimension."""
    if kernel := find_kernel("rms_norm", x):
        normed: Tensor = kernel.apply(x, weight, eps)
        return normed
    return F.rms_norm(x, weight.shape, weight, eps)


def working_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products of `x` are computed: autocast's where it is on, else that of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class Rotary(NamedTuple):
    """Rotary embedding (RoFormer, arXiv 2104.09864) of a batch of positions."""

    cos: Tensor  # (B, 1, T, E)
    sin: Tensor  # (B, 1, T, E), the first half negated

    @classmethod
    def at(cls, positions: Tensor, config: DecoderConfig) -> "Rotary":
        """Angles of `positions` (B, T): position × frequency, in float32."""
        angles = positions[:, None, :, None].float() * frequencies(config, positions.device)  # (B, 1, T, E/2)
        cos, sin = angles.cos(), angles.sin()
        return cls(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))

    def to(self, dtype: torch.dtype) -> "Rotary":
        return Rotary(self.cos.to(dtype), self.sin.to(dtype))

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate `x` (B, heads, T, E); component i is paired with i + E/2 (the Llama convention)."""
        cos, sin = self if self.cos.dtype == x.dtype else self.to(x.dtype)
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def frequencies(config: DecoderConfig, device: torch.device) -> Tensor:
    """theta^(−2i/E), (E/2,). `rope_scaling` divides the low ones by its factor, as Llama 3.1 does."""
    inverse = 1.0 / config.rope_theta ** (
        torch.arange(0, config.head_size, 2, device=device, dtype=torch.float32) / config.head_size
    )
    s = config.rope_scaling
    if s.factor == 1.0:
        return inverse
    periods = s.original_positions * inverse / (2 * math.pi)  # within the original length
    ramp = ((periods - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
    return inverse * (ramp + (1 - ramp) / s.factor)


def rotate(rotary: Rotary | None, x: Tensor) -> Tensor:
    """Rotate `x`, except in layers without rotary embedding."""
    return x if rotary is None else rotary.rotate(x)


class KVSource(Protocol):
    """Keys and values that attention reads besides its own tokens'; implemented in `models/kv_cache.py`."""

    def update(
        self, layer: int, keys: Tensor, values: Tensor, rotary: Rotary | None
    ) -> tuple[Tensor, Tensor]:
        """Take a layer's new unrotated keys and values (B, G, T, E).

        Returns all rotated keys and values to attend to (B, G, S, E).
        """
        ...


class AttentionLayout(Protocol):
    """A mask in the form of a kernel in `models/kernels/`, made once for all layers."""

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The same as `attention`, arguments and all."""
        ...


def attention(queries: Tensor, keys: Tensor, values: Tensor, mask: "Tensor | AttentionLayout") -> Tensor:
    """Softmax attention of `queries` (B, H, T, E) over `keys`, `values` (B, G, S, E) → (B, H, T, E).

    `mask` (B, 1, T, S): True where a query sees a key.
    """
    if not isinstance(mask, Tensor):
        return mask.attend(queries, keys, values)
    grouped = queries.shape[1] != keys.shape[1]
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=grouped)


class KeyValue(nn.Module):
    """The key and value projections of a layer: all that the left tower's last layer has."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.k_proj = nn.Linear(config.hidden_size, config.kv_heads * config.head_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.kv_heads * config.head_size, bias=config.qkv_bias)
        self.k_norm = RMSNorm(config.head_size, config.norm_eps) if config.qk_norm else nn.Identity()

    def key_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x` (B, T, D) → unrotated keys and values (B, G, T, E)."""
        return self._heads(self.k_proj(x), self.k_norm), self._heads(self.v_proj(x))

    def _heads(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """(B, T, heads · E) → (B, heads, T, E)"""
        E = self.config.head_size
        x = x.view(*x.shape[:-1], x.shape[-1] // E, E)  # (B, T, heads, E)
        return (x if norm is None else norm(x)).transpose(1, 2)


class Attention(KeyValue):
    """Grouped-query attention (arXiv 2305.13245). Which token sees which is up to the mask alone."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__(config)
        self.layer, self.has_rope = layer, config.has_rope(layer)
        self.q_proj = nn.Linear(config.hidden_size, config.heads * config.head_size, bias=config.qkv_bias)
        self.q_norm = RMSNorm(config.head_size, config.norm_eps) if config.qk_norm else nn.Identity()
        self.o_proj = nn.Linear(config.heads * config.head_size, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, rotary: Rotary, mask: Tensor | AttentionLayout, kv_source: KVSource | None
    ) -> Tensor:
        """`x` (B, T, D) → (B, T, D); `mask` (B, 1, T, S)."""
        rope = rotary if self.has_rope else None
        queries = rotate(rope, self._heads(self.q_proj(x), self.q_norm))  # (B, H, T, E)
        attend = self._attend_uncompiled if torch.is_grad_enabled() else self._attend
        out = attend(queries, *self.key_values(x), rope, mask, kv_source)  # (B, H, T, E)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, T, H · E) → (B, T, D)

    def _attend(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        rope: Rotary | None,
        mask: Tensor | AttentionLayout,
        kv_source: KVSource | None,
    ) -> Tensor:
        if kv_source is None:
            keys = rotate(rope, keys)
        else:
            keys, values = kv_source.update(self.layer, keys, values, rope)  # (B, G, S, E)
        return attention(queries, keys, values, mask)

    # In training it differs between layers and rows: a compiled block would be compiled again for each.
    _attend_uncompiled = torch.compiler.disable(_attend)


class MLP(nn.Module):
    """Gated MLP with SiLU (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.down_proj = nn.Linear(config.mlp_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) · up"""
    if kernel := find_kernel("swiglu", gate):
        gated: Tensor = kernel.apply(gate, up)
        return gated
    return F.silu(gate) * up


def init_device(config: DecoderConfig) -> torch.device:
    """Device of a new decoder: "meta" where a file has the weights, because random ones take seconds."""
    return torch.device("meta") if config.weights != "random" else torch.get_default_device()


def init_weights(module: nn.Module, config: DecoderConfig) -> None:
    """Normal(0, 0.02), times 1/√(2·layers) for projections into the residual stream (GPT-2).

    A module on the meta device gets its values from a file (models/weights/tensors.py).
    """
    if next(module.parameters()).is_meta:
        return
    for name, weight in module.named_parameters():
        if name.endswith(".bias"):
            nn.init.zeros_(weight)
        elif weight.dim() >= 2:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(weight, std=0.02 / (2 * config.layers) ** 0.5 if residual else 0.02)
