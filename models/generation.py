"""One generate for every model: sample, prefill, decode."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from configs.errors import UsageError, UserError
from configs.schema import GenerationConfig
from models.kv_cache import DecodingCache, ImageKV
from models.layers import Rotary
from models.masks import NEVER, cache_mask


@dataclass(frozen=True)
class Generation:
    tokens: list[list[int]]  # a row's new tokens, end-of-turn left out
    first_token_s: float  # seconds from the call to the first token of every row
    seconds: float  # of the whole call


def sample(logits: Tensor, settings: GenerationConfig, generator: torch.Generator | None) -> Tensor:
    """Logits (B, V) → next tokens (B,): the likeliest, or drawn after temperature, then top-k, then top-p."""
    if not settings.sampling:
        return logits.argmax(-1)
    logits = logits.float() / settings.temperature
    ranked, ids = logits.sort(dim=-1, descending=True)
    if settings.top_k:
        ranked[:, settings.top_k :] = -torch.inf
    probabilities = ranked.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # the probability of all likelier tokens
    probabilities[before >= settings.top_p] = 0  # the likeliest token always stays: before it there is nothing
    return ids.gather(1, torch.multinomial(probabilities, 1, generator=generator))[:, 0]


def prefill(model: Any, ids: Tensor, positions: Tensor, images: list[list[tuple[ImageKV, int]]], new_tokens: int, tiles: Tensor | None = None) -> tuple[DecodingCache, Tensor]:
    """Fill a cache with image KVs and prompts; → the cache and the logits after each row's last token (B, V).

    `ids`, `positions` (B, R), position −1 at padding; `images`: a row's image KVs and the positions where they start;
    `tiles`: those of a vanilla model, whose images stand among `ids`.
    """
    config, (B, R) = model.right.config, ids.shape
    L = max(sum(kv.tokens for kv, _ in row) for row in images)
    dtype = model.right.embed_tokens.weight.dtype
    cache = DecodingCache(config.layers, B, config.kv_heads, L + R + new_tokens - 1, config.head_size, dtype, ids.device)
    if L:
        keys = torch.zeros(config.layers, 2, B, config.kv_heads, L, config.head_size, dtype=dtype, device=ids.device)
        places = torch.full((B, L), NEVER, device=ids.device)
        for b, row in enumerate(images):
            at = 0
            for kv, start in row:
                keys[:, :, b, :, at : at + kv.tokens] = kv.data.to(dtype)
                places[b, at : at + kv.tokens] = torch.arange(start, start + kv.tokens, device=ids.device)
                at += kv.tokens
        rotary = Rotary.at(places.clamp(max=config.max_positions), config)
        cache.reserve(places)
        for layer in range(config.layers):
            cache.extend(layer, keys[layer, 0], keys[layer, 1], rotary)
    padding = positions < 0
    cache.reserve(positions.masked_fill(padding, NEVER))
    hidden = model.right(model.embed(ids, tiles), positions.clamp(min=0), _mask(cache, positions.clamp(min=0)), cache)  # (B, R, D)
    last = (~padding).sum(1) - 1
    return cache, model.right.logits(hidden[torch.arange(B), last])


def decode(model: Any, cache: DecodingCache, tokens: Tensor, positions: Tensor) -> Tensor:
    """One more token a row: `tokens` at `positions` (B,) → logits (B, V)."""
    cache.reserve(positions[:, None])
    hidden = model.right(model.right.embed_tokens(tokens[:, None]), positions[:, None], _mask(cache, positions[:, None]), cache)
    return model.right.logits(hidden[:, 0])


def _mask(cache: DecodingCache, positions: Tensor) -> Tensor:
    return cache_mask(positions, cache.positions[:, : cache.used])


@torch.inference_mode()
def generate(
    model: Any,
    ids: Tensor,
    positions: Tensor,
    images: list[list[tuple[ImageKV, int]]],
    stop: int,
    settings: GenerationConfig,
    on_tokens: Callable[[list[int]], None] | None = None,
    tiles: Tensor | None = None,
) -> Generation:
    """Answers to a ragged batch of prompts; arguments as in `prefill`, `stop` the end-of-turn token.

    `on_tokens` sees every step's tokens, one a row. A prompt that does not fit with its answer into
    `max_positions` raises `UsageError`.
    """
    started = time.perf_counter()
    longest, limit = int(positions.max()) + 1, model.right.config.max_positions
    if longest + settings.max_new_tokens > limit:
        raise UsageError(f"the prompt has {longest} tokens (image included); with max_new_tokens = {settings.max_new_tokens} that exceeds this model's {limit} positions")
    generator = torch.Generator(ids.device).manual_seed(settings.seed) if settings.sampling else None
    next_positions = positions.max(1).values + 1  # (B,)
    cache, logits = prefill(model, ids, positions, images, settings.max_new_tokens, tiles)
    if not torch.isfinite(logits).all():
        raise UserError("the model's logits are not finite: its weights are damaged, or its training diverged")
    steps: list[Tensor] = []
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    first_token_s = 0.0
    for step in range(settings.max_new_tokens):
        tokens = sample(logits, settings, generator)
        steps.append(tokens)
        done |= tokens == stop
        if step == 0:
            done.any().item()  # waits for the device
            first_token_s = time.perf_counter() - started
        if on_tokens is not None:
            on_tokens(tokens.tolist())
        if bool(done.all()) or step + 1 == settings.max_new_tokens:
            break
        logits = decode(model, cache, tokens, next_positions)
        next_positions = next_positions + 1
    rows = torch.stack(steps, dim=1).tolist()
    rows = [row[: row.index(stop)] if stop in row else row for row in rows]
    return Generation(rows, first_token_s, time.perf_counter() - started)
