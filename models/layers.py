"""The parts of a decoder block: norm, rotary embedding, attention, gated MLP."""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import DecoderConfig


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm; under autocast its result is cast here, once, and not again by every projection that reads it."""

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        return super().forward(x).to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype)


class Rotary(NamedTuple):
    """Rotary embedding (RoFormer, arXiv 2104.09864) of a batch of positions; `cos` and `sin` are (B, 1, T, E)."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, positions: Tensor, config: DecoderConfig) -> "Rotary":
        """Angles for `positions` (B, T): position × theta^(−2i/E), computed in float32."""
        exponents = torch.arange(0, config.head_size, 2, device=positions.device, dtype=torch.float32) / config.head_size
        angles = positions[:, None, :, None].float() * config.rope_theta**-exponents  # (B, 1, T, E/2)
        angles = torch.cat((angles, angles), dim=-1)
        return cls(angles.cos(), angles.sin())

    def turn(self, x: Tensor) -> Tensor:
        """Rotate `x` (B, heads, T, E); component i is paired with i + E/2 (the Llama convention)."""
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin


class Past(Protocol):
    """What attention reads besides the tokens at hand. The implementations stand in `models/kv_cache.py`."""

    def extend(self, layer: int, keys: Tensor, values: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Take a layer's new unrotated keys and its values (B, G, T, E); return all rotated keys and values to attend to."""
        ...


class Attention(nn.Module):
    """Grouped-query attention. The mask says everything about who sees whom; nothing is added to it here."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.q_proj = nn.Linear(config.hidden_size, config.heads * config.head_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.kv_heads * config.head_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.kv_heads * config.head_size, bias=False)
        self.o_proj = nn.Linear(config.heads * config.head_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rotary: Rotary, mask: Tensor, past: Past | None) -> Tensor:
        """`x` (B, T, D); `mask` (B, 1, T, S), True where a query may look at a key."""
        E = self.config.head_size
        queries = rotary.turn(self.q_proj(x).unflatten(-1, (-1, E)).transpose(1, 2))  # (B, H, T, E)
        keys, values = key_values(self, x)
        keys, values = past.extend(self.layer, keys, values, rotary) if past is not None else (rotary.turn(keys), values)
        out = attend(queries, keys, values, mask)  # (B, H, T, E)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, T, D)


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention of `queries` (B, H, T, E) over `keys`, `values` (B, G, S, E) where `mask` (B, 1, T, S) allows.

    torch's fused kernel, except in bf16 on a CPU at row lengths where plain matrix products are faster, forward and
    backward together (docs/experiments.md has the figures).
    """
    B, H, T, E = queries.shape
    G, S = keys.shape[1:3]
    if queries.device.type != "cpu" or queries.dtype != torch.bfloat16 or T * S > 1 << 20:
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=H != G)
    bias = torch.zeros(mask.shape, dtype=queries.dtype).masked_fill(~mask, torch.finfo(queries.dtype).min)
    scores = (queries * E**-0.5).reshape(B, G, H // G * T, E) @ keys.transpose(-1, -2)  # (B, G, H/G·T, S)
    weights = (scores.view(B, H, T, S) + bias).softmax(-1).view(B, G, H // G * T, S)
    return (weights @ values).view(B, H, T, E)


def key_values(projections: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Unrotated keys and values (B, G, T, E) of `x` (B, T, D), by a module's `k_proj` and `v_proj`."""
    E = projections.config.head_size
    return tuple(p(x).unflatten(-1, (-1, E)).transpose(1, 2) for p in (projections.k_proj, projections.v_proj))  # type: ignore[return-value]


class MLP(nn.Module):
    """Gated MLP with SiLU (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.down_proj = nn.Linear(config.mlp_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def init_weights(module: nn.Module, layers: int) -> None:
    """Normal(0, 0.02); projections that write into the residual stream are scaled by 1/√(2·layers) (GPT-2)."""
    for name, weight in module.named_parameters():
        if weight.dim() >= 2:
            std = 0.02 / (2 * layers) ** 0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            nn.init.normal_(weight, std=std)
