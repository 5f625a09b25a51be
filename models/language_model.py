"""The decoder of both towers: a Llama-style transformer with one forward for training, prefill and decode."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs.model import DecoderConfig
from models.kernels import find_kernel
from models.kv_cache import KeyValueRecorder
from models.layers import (
    MLP,
    Attention,
    AttentionLayout,
    KeyValue,
    KVSource,
    RMSNorm,
    Rotary,
    init_device,
    init_weights,
    working_dtype,
)
from models.losses import cross_entropy
from models.masks import Mask


class Output(NamedTuple):
    """The result of a model's forward. Losses are None without labels."""

    loss_sum: Tensor | None  # cross-entropy, summed over the supervised tokens
    hidden: Tensor  # (B, T, D)
    head_loss_sums: Tensor | None = None  # (K,), of the multi-token heads; None without heads
    losses: Tensor | None = None  # of each supervised token, (supervised tokens,), without gradient


class DecoderBlock(nn.Module):
    """Attention and MLP, each on a normed input and added to the residual stream."""

    recompute = False  # gradient checkpointing: activations are recomputed in the backward pass, not stored
    compiled: Callable[..., Tensor] | None = None  # `run` by torch.compile, for training only

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, rotary: Rotary, mask: Tensor | AttentionLayout, kv_source: KVSource | None
    ) -> Tensor:
        """`x` (B, T, D) → (B, T, D); arguments as in `Attention`."""
        run = self.compiled if self.compiled is not None and torch.is_grad_enabled() else self.run
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(run, x, rotary, mask, kv_source, use_reentrant=False)
        return run(x, rotary, mask, kv_source)

    def run(
        self, x: Tensor, rotary: Rotary, mask: Tensor | AttentionLayout, kv_source: KVSource | None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, kv_source)
        return x + self.mlp(self.post_attention_layernorm(x))


def prepare_mask(mask: Mask, x: Tensor, config: DecoderConfig) -> Tensor | AttentionLayout:
    """Convert `mask` once for all layers: dense, or to what the attention kernel for `x` reads."""
    kernel = find_kernel("attention", x)
    return kernel(mask, config.kv_heads) if kernel is not None else mask.dense()


class LanguageModel(nn.Module):
    """Decoder-only transformer: embeddings → hidden states, hidden states → logits or losses."""

    compiled_step: Callable[..., Tensor] | None = None  # `forward_cached` by torch.compile

    def __init__(self, config: DecoderConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        with init_device(config):
            self.embed_tokens = nn.Embedding(vocab_size, config.hidden_size)
            self.layers = nn.ModuleList(DecoderBlock(config, i) for i in range(config.layers))
            self.norm = RMSNorm(config.hidden_size, config.norm_eps)
            if not config.tied_embeddings:
                self.lm_head = nn.Linear(config.hidden_size, vocab_size, bias=False)
        init_weights(self, config)

    def forward(self, x: Tensor, positions: Tensor, mask: Mask, kv_source: KVSource | None = None) -> Tensor:
        """Embeddings `x` (B, T, D) → normed hidden states (B, T, D).

        `positions` (B, T); `mask` (B, 1, T, S), where S counts the keys of `kv_source` and the T tokens.
        """
        rotary = Rotary.at(positions, self.config).to(working_dtype(x))  # once, not in every layer
        prepared = prepare_mask(mask, x, self.config)
        for block in self.layers:
            x = block(x, rotary, prepared, kv_source)
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

        `hidden` (B, T, D); `labels` (B, T): the token that follows, −100 where not supervised; packing has
        shifted them. Logits exist at supervised positions only.
        """
        supervised = labels != -100
        return cross_entropy(hidden[supervised], self.unembedding, labels[supervised])

    def output(self, hidden: Tensor, labels: Tensor | None, documents: Tensor, heads: Any = None) -> Output:
        """Hidden states (B, T, D), with their losses where `labels` (B, T) are given.

        `heads`: `MultiTokenHeads`, or None; `documents` (B, T) as in the batch.
        """
        if labels is None:
            return Output(None, hidden)
        head_sums = None
        if heads is not None:
            head_sums = heads.losses(hidden, labels, documents, self.embed_tokens, self.unembedding)
        losses = self.loss(hidden, labels)
        return Output(losses.sum(), hidden, head_sums, losses.detach())


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
        with init_device(config):
            self.layers = nn.ModuleList(
                [*(DecoderBlock(config, i) for i in range(last)), KeyValueLayer(config)]
            )
        init_weights(self, config)

    def forward(self, x: Tensor, positions: Tensor, mask: Mask) -> list[tuple[Tensor, Tensor]]:
        """Embeddings `x` (B, L, D) → unrotated keys and values (B, G, L, E) of each layer.

        `positions` (B, L); `mask` (B, 1, L, L).
        """
        rotary = Rotary.at(positions, self.config).to(working_dtype(x))
        prepared = prepare_mask(mask, x, self.config)
        recorder = KeyValueRecorder()
        *blocks, last = self.layers
        for block in blocks:
            x = block(x, rotary, prepared, recorder)
        return [*recorder.layers, last(x)]
