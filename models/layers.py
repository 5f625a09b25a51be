"""The parts of a decoder block: norm, rotary embedding, attention, gated MLP."""

import math
import os
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.model import DecoderConfig
from models.kernels.attention import AttentionLayout, attend
from models.kernels.linear import Linear, working_dtype
from utils.errors import UsageError, UserError


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm; under autocast the result is cast once, not by every projection that reads it.

    The fused GPU kernel needs input and weight of one dtype.
    """

    eps: float  # never None, as torch's may be
    packed_weight: Tensor | None = None  # (2·D,), the weight twice; set by `pack`

    def forward(self, x: Tensor) -> Tensor:
        if self.packed_weight is not None:
            size = x.shape[-1]
            signed = (x.unsqueeze(-2) * self.signs).flatten(-2)  # (…, 2·D)
            normed = torch.layer_norm(signed, (2 * size,), self.packed_weight, None, self.eps)
            return normed.narrow(-1, 0, size)  # (…, D)
        dtype = working_dtype(x.dtype, x.device)
        if x.device.type == "cpu" and torch.is_grad_enabled():
            return TrainedNorm.apply(x.to(self.weight.dtype), self.weight, self.eps, dtype)
        return super().forward(x.to(self.weight.dtype)).to(dtype)

    def pack(self) -> None:
        """Prepare for decoding on a CPU, where torch has no fused RMSNorm.

        x and −x together have mean 0 and the mean square of x as variance, so LayerNorm's one kernel serves.
        """
        self.packed_weight = torch.cat((self.weight, self.weight)).detach()
        self.signs = self.weight.new_tensor(((1.0,), (-1.0,)))


class TrainedNorm(torch.autograd.Function):
    """RMSNorm for training on a CPU, where torch's takes some thirty operations.

    Its gradient is LayerNorm's at mean 0, which is one kernel, plus the term that LayerNorm subtracts because
    its mean depends on x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # (…, 1)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight, scale = ctx.saved_tensors
        gradient, size = gradient.to(x.dtype), x.shape[-1:]
        needed = [True, ctx.needs_input_grad[1], False]
        d_x, d_weight, _ = torch.ops.aten.native_layer_norm_backward(
            gradient, x, size, torch.zeros_like(scale), scale, weight, None, needed
        )
        mean_term = (gradient @ weight).div_(x.shape[-1]).unsqueeze(-1).mul_(scale)
        return d_x.add_(mean_term), d_weight, None, None


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

    def extend(
        self, layer: int, keys: Tensor, values: Tensor, rotary: Rotary | None
    ) -> tuple[Tensor, Tensor]:
        """Take a layer's new unrotated keys and values (B, G, T, E).

        Returns all rotated keys and values to attend to (B, G, S, E).
        """
        ...


class KeyValue(nn.Module):
    """The key and value projections of a layer: all that the left tower's last layer has."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.k_proj = Linear(config.hidden_size, config.kv_heads * config.head_size, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, config.kv_heads * config.head_size, bias=config.qkv_bias)
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
        self.q_proj = Linear(config.hidden_size, config.heads * config.head_size, bias=config.qkv_bias)
        self.q_norm = RMSNorm(config.head_size, config.norm_eps) if config.qk_norm else nn.Identity()
        self.o_proj = Linear(config.heads * config.head_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rotary: Rotary, mask: AttentionLayout, past: KVSource | None) -> Tensor:
        """`x` (B, T, D) → (B, T, D); `mask`: the `attention_layout` of (B, 1, T, S)."""
        rope = rotary if self.has_rope else None
        queries = rotate(rope, self._heads(self.q_proj(x), self.q_norm))  # (B, H, T, E)
        out = self._attend(queries, *self.key_values(x), rope, mask, past)  # (B, H, T, E)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, T, H · E) → (B, T, D)

    # Differs between layers and rows: a compiled block would be compiled again for each.
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's
    def _attend(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        rope: Rotary | None,
        mask: AttentionLayout,
        past: KVSource | None,
    ) -> Tensor:
        if past is None:
            keys = rotate(rope, keys)
        else:
            keys, values = past.extend(self.layer, keys, values, rope)  # (B, G, S, E)
        return attend(queries, keys, values, mask)


class Gated(torch.autograd.Function):
    """SiLU(gate) · up; the backward pass recomputes SiLU instead of storing it."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), F.silu(gate).mul_(gradient)


class MLP(nn.Module):
    """Gated MLP with SiLU (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.mlp_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.mlp_size, bias=False)
        self.down_proj = Linear(config.mlp_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(Gated.apply(self.gate_proj(x), self.up_proj(x)))


def building(config: DecoderConfig) -> torch.device:
    """The device to build a decoder on: "meta" where a file has the weights; random ones take seconds."""
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


def computes_bf16(device: torch.device) -> bool:
    """Whether the device computes bf16 products natively."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return (
        device.type == "cpu"
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    )


def pick_device(name: str, flag: str = "train.device") -> torch.device:
    """The device called `name`; "auto" is cuda if available, under torchrun this rank's own.

    `flag`: what error messages call it.
    """
    device = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if device.split(":")[0] not in ("cpu", "cuda", "mps"):
        raise UsageError(f"{flag} = {name!r} is none of auto, cpu, cuda, mps")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"{flag} = {device!r} cannot be used: {str(error).splitlines()[0]}") from None
