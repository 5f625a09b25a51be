"""The decoder of both towers: a Llama-style transformer with one forward for training, prefill and decode."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs.model import DecoderConfig
from models.kernels import find_kernel
from models.layers import (
    MLP,
    Attention,
    AttentionLayout,
    KeyValue,
    KVSource,
    RMSNorm,
    Rotary,
    building,
    init_weights,
)
from models.losses import cross_entropy
from models.masks import Mask


class Output(NamedTuple):
    """The result of a model's forward. Losses are None without labels."""

    loss_sum: Tensor | None  # cross-entropy, summed over the supervised tokens
    hidden: Tensor  # (B, R, D)
    head_loss_sums: Tensor | None = None  # (K,), of the multi-token heads; None without heads
    losses: Tensor | None = None  # of each supervised token, (supervised tokens,), without gradient


class DecoderBlock(nn.Module):
    """Attention and MLP, each on a normed input and added to the residual stream."""

    recompute = False  # activations are recomputed in the backward pass instead of stored
    compiled: Callable[..., Tensor] | None = None  # `run` by torch.compile, for training only

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, rotary: Rotary, mask: Tensor | AttentionLayout, past: KVSource | None
    ) -> Tensor:
        """`x` (B, T, D) → (B, T, D); arguments as in `Attention`."""
        run = self.run if self.compiled is None or not torch.is_grad_enabled() else self.compiled
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(run, x, rotary, mask, past, use_reentrant=False)
        return run(x, rotary, mask, past)

    def run(self, x: Tensor, rotary: Rotary, mask: Tensor | AttentionLayout, past: KVSource | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, past)
        return x + self.mlp(self.post_attention_layernorm(x))


def attention_layout(mask: Mask, x: Tensor, config: DecoderConfig) -> Tensor | AttentionLayout:
    """`mask` in the form that attention over `x` reads: once for all layers."""
    kernel = find_kernel("attention", x)
    return mask.dense() if kernel is None else kernel(mask, config.kv_heads)


class LanguageModel(nn.Module):
    """Decoder-only transformer: embeddings → hidden states, hidden states → logits or losses."""

    def __init__(self, config: DecoderConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        with building(config):
            self.embed_tokens = nn.Embedding(vocab_size, config.hidden_size)
            self.layers = nn.ModuleList(DecoderBlock(config, i) for i in range(config.layers))
            self.norm = RMSNorm(config.hidden_size, config.norm_eps)
            if not config.tied_embeddings:
                self.lm_head = nn.Linear(config.hidden_size, vocab_size, bias=False)
        init_weights(self, config)

    def forward(self, x: Tensor, positions: Tensor, mask: Mask, past: KVSource | None = None) -> Tensor:
        """Embeddings `x` (B, T, D) → normed hidden states (B, T, D).

        `positions` (B, T); `mask` (B, 1, T, S), where S counts the keys of `past` and the T tokens.
        """
        rotary = Rotary.at(positions, self.config).to(self.norm.weight.dtype)  # once, not in every layer
        layout = attention_layout(mask, x, self.config)
        for block in self.layers:
            x = block(x, rotary, layout, past)
        return self.norm(x)

    @property
    def unembedding(self) -> Tensor:
        """(V, D)"""
        return self.embed_tokens.weight if self.config.tied_embeddings else self.lm_head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, D) → (…, V)"""
        return F.linear(hidden, self.unembedding)

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each supervised token, (supervised tokens,).

        `hidden` (B, T, D); `labels` (B, T), −100 where not supervised. Logits exist at supervised positions
        only.
        """
        supervised = labels != -100
        return cross_entropy(hidden[supervised], self.unembedding, labels[supervised])

    def output(self, hidden: Tensor, labels: Tensor | None, head_loss_sums: Tensor | None = None) -> Output:
        """Hidden states (B, R, D), with their losses where `labels` (B, R) are given."""
        if labels is None:
            return Output(None, hidden)
        losses = self.loss(hidden, labels)
        return Output(losses.sum(), hidden, head_loss_sums, losses.detach())


class KeyValueLayer(nn.Module):
    """The left tower's last layer: only its keys and values are read, so it computes nothing else."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = KeyValue(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x` (B, L, D) → unrotated keys and values (B, G, L, E)."""
        return self.self_attn.key_values(self.input_layernorm(x))


class KeyValueDecoder(nn.Module):
    """The left tower's decoder: embeddings in, every layer's keys and values out. No final norm, no head."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        last = config.layers - 1
        with building(config):
            self.layers = nn.ModuleList(
                [*(DecoderBlock(config, i) for i in range(last)), KeyValueLayer(config)]
            )
        init_weights(self, config)

    def forward(self, x: Tensor, positions: Tensor, mask: Mask, past: KVSource) -> None:
        """Run `x` (B, L, D) through the layers; `past` receives each layer's keys and values."""
        rotary = Rotary.at(positions, self.config)
        layout = attention_layout(mask, x, self.config)
        *blocks, last = self.layers
        for block in blocks:
            x = block(x, rotary, layout, past)
        keys, values = last(x)
        past.extend(len(blocks), keys, values, rotary if self.config.has_rope(len(blocks)) else None)
