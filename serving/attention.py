"""Where a token of an answer looks: the right tower's attention over an image's tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from data.render import Document
from eval.predictor import Predictor
from models.generation import new_cache, write_images
from models.kv_cache import ImageKV
from models.layers import Rotary, rotate
from models.masks import cache_mask


@torch.inference_mode()
def attention_maps(
    predictor: Predictor, prompt: Document, kvs: Sequence[tuple[ImageKV, int]], answer: list[int]
) -> list[Tensor]:
    """For each image, the weights (rows, columns) of its whole view, at most 1.

    The query is the last of the `answer`'s tokens; weights are the mean over layers and heads. `kvs`: the
    prompt's image KVs with their first positions.
    """
    right, config = predictor.model.right, predictor.model.config
    ids = torch.tensor([prompt.right_ids + answer], device=predictor.model.device)
    start = prompt.right_positions[-1] + 1
    own_positions = list(range(start, start + len(answer)))
    positions = torch.tensor([prompt.right_positions + own_positions], device=ids.device)
    cache = new_cache(predictor.model, 1, ids.shape[1] + sum(kv.tokens for kv, _ in kvs))
    write_images(cache, [list(kvs)], config)
    cache.reserve(positions)
    x, rotary = right.embed_tokens(ids), Rotary.at(positions, right.config)
    mask = cache_mask(positions, cache.positions[:, : cache.used]).dense()
    total = torch.zeros(cache.used, device=ids.device)
    blocks: Any = right.layers
    for layer, block in enumerate(blocks):
        attention: Any = block.self_attn
        queries = attention.q_proj(block.input_layernorm(x)).unflatten(-1, (-1, right.config.head_size))
        queries = attention.q_norm(queries).transpose(1, 2)  # (1, H, T, E)
        query = rotate(rotary if attention.has_rope else None, queries)[0, :, -1]  # (H, E)
        x = block.run(x, rotary, mask, cache)
        keys = cache.keys[layer][0, :, : cache.used].repeat_interleave(len(query) // right.config.kv_heads, 0)
        scores = (keys @ query[..., None])[..., 0].float() / right.config.head_size**0.5  # (H, S)
        total += scores.masked_fill(~mask[0, 0, -1], -torch.inf).softmax(-1).mean(0)
    maps, at, side = [], 0, round(config.tokens_per_tile**0.5)
    for kv, _ in kvs:
        # Its block is the global marker, the whole view's tokens, and then the tiles.
        weights = total[at + 1 : at + 1 + config.tokens_per_tile]
        if side * side == len(weights):
            maps.append((weights / weights.max().clamp(min=1e-12)).view(side, side).cpu())
        at += kv.tokens
    return maps
