"""One generate for every model: prefill, then passes that verify drafts of the multi-token heads, or none, and choose one more token."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from configs.model import GenerationConfig
from models.draft_scheduler import TREE, DraftPlan, DraftScheduler, draft_scheduler
from models.kv_cache import DecodingCache, ImageKV
from models.layers import Rotary
from models.masks import NEVER, cache_mask
from models.multi_token import Drafts, draft_tree_mask
from models.sampling import accept, choose, draw, follow, probabilities, seen_with
from utils.errors import UsageError, UserError


@dataclass(frozen=True)
class Generation:
    tokens: list[list[int]]  # a row's new tokens, end-of-turn left out
    logprobs: list[
        list[float]
    ]  # of each token, before temperature and all that follows; empty unless asked for
    first_token_s: float  # seconds from the call to the first token of every row
    seconds: float  # of the whole call
    decode_steps: list[int]  # of the right tower over a row, prefill included


@dataclass
class Row:
    """An answer in the making."""

    number: int  # in the caller's batch
    position: int  # of the token that was chosen last
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    decode_steps: int = 1
    done: bool = False

    def take(
        self,
        tokens: list[int],
        places: list[int],
        logits: Tensor,
        stop: int,
        settings: GenerationConfig,
        on_tokens: Callable[[int, list[int]], bool | None] | None,
    ) -> int:
        """What a pass gave: tokens, each chosen from the logits (T, V) at one of `places`; → how many there are up to the answer's end, which is one."""
        self.position += len(tokens)
        for count, (token, place) in enumerate(zip(tokens, places, strict=True), start=1):
            if token == stop:
                self.done = True
                return count
            self.tokens.append(token)
            if settings.logprobs:
                self.logprobs.append(logits[place].float().log_softmax(-1)[token].item())
            ended = on_tokens is not None and on_tokens(self.number, self.tokens)
            if ended or len(self.tokens) == settings.max_new_tokens:
                self.done = True
                return count
        return len(tokens)


def check_heads(model: Any, settings: GenerationConfig) -> None:
    if settings.speculative == "on" and model.heads is None:
        raise UsageError(
            "--speculative on: this model has no multi-token heads (python -m tools.train_heads gives it some)"
        )


def prefill(
    model: Any,
    ids: Tensor,
    positions: Tensor,
    images: list[list[tuple[ImageKV, int]]],
    slots: int,
    tiles: Tensor | None = None,
    cache: DecodingCache | None = None,
) -> tuple[DecodingCache, Tensor]:
    """Fill a cache with image KVs and prompts; → the cache and the prompts' hidden states (B, R, D).

    `ids`, `positions` (B, R), position −1 at padding; `images`: a row's image KVs and the positions where they start;
    `slots`: to leave free for answers; `tiles`: those of a vanilla model, whose images stand among `ids`. With `cache`,
    the prompts go on from what it holds.
    """
    config, B = model.right.config, len(ids)
    lengths = [sum(kv.tokens for kv, _ in row) for row in images]
    L = max(lengths)
    dtype = model.right.embed_tokens.weight.dtype
    if cache is None:
        cache = DecodingCache(
            config.layers, B, config.kv_heads, L + ids.shape[1] + slots, config.head_size, dtype, ids.device
        )
    else:
        cache.resize(L + ids.shape[1] + slots)
    wanted = config.layers, 2, config.kv_heads, config.head_size
    for kv, _ in (placed for row in images for placed in row):
        if (*kv.data.shape[:3], *kv.data.shape[4:]) != wanted:
            raise UserError(
                f"an image KV of {tuple(kv.data.shape)} is of another model: this one's are {(*wanted[:3], 'tokens', wanted[3])}; encode the image with it"
            )
    if L:
        keys = torch.zeros(
            config.layers, 2, B, config.kv_heads, L, config.head_size, dtype=dtype, device=ids.device
        )
        places = torch.full((B, L), NEVER, device=ids.device)
        for b, row in enumerate(images):
            at = 0
            for kv, start in row:
                keys[:, :, b, :, at : at + kv.tokens] = kv.data.to(ids.device, dtype)
                places[b, at : at + kv.tokens] = torch.arange(start, start + kv.tokens, device=ids.device)
                at += kv.tokens
        rotary = Rotary.at(places.clamp(max=config.max_positions), config)
        cache.reserve(places)
        for layer in range(config.layers):
            cache.extend(layer, keys[layer, 0], keys[layer, 1], rotary if config.has_rope(layer) else None)
    padding = positions < 0
    cache.reserve(positions.masked_fill(padding, NEVER))
    return cache, model.right(
        model.embed(ids, tiles), positions.clamp(min=0), _mask(cache, positions.clamp(min=0)), cache
    )


def verify(
    model: Any, cache: DecodingCache, tokens: Tensor, positions: Tensor, sees: Tensor | None = None
) -> Tensor:
    """The right tower over `tokens` (B, T) at `positions` (B, T) → hidden states (B, T, D). `sees` (B, T, T): which of one another they see; None: the earlier ones."""
    start = cache.lengths
    cache.reserve(positions)
    mask = _mask(cache, positions)
    if sees is not None:
        slots = torch.tensor(start, device=tokens.device)[:, None, None] + torch.arange(
            tokens.shape[1], device=tokens.device
        )  # (B, 1, T)
        mask[:, 0].scatter_(2, slots.expand_as(sees), sees)
    return model.right(model.right.embed_tokens(tokens), positions, mask, cache)


def _mask(cache: DecodingCache, positions: Tensor) -> Tensor:
    return cache_mask(positions, cache.positions[:, : cache.used])


def _check_finite(values: Tensor) -> None:
    if not torch.isfinite(values).all():
        raise UserError(
            "the model's states or logits are not finite: its weights are damaged, or its training diverged"
        )


class StepOutput(NamedTuple):
    """What a pass over B rows with N drafts each gave."""

    logits: Tensor  # (B, N + 1, V)
    paths: list[list[int]]  # of each row: the places of the token chosen last and of the drafts that stand
    tokens: list[list[int]]  # of each row: the drafts that stand, and one more
    chosen: Tensor  # (B,), the one more
    hidden: Tensor  # (B, D), what it was chosen from


def decode_step(
    model: Any,
    cache: DecodingCache,
    positions: list[int],
    hidden: Tensor,
    chosen: Tensor,
    drafts: Drafts,
    seen: Tensor | None,
    settings: GenerationConfig,
    generator: torch.Generator | None,
) -> StepOutput:
    """Verify drafts behind the tokens `chosen` (B,), and keep in the cache what stands.

    `positions`: of the chosen tokens, `hidden` (B, D): what they were chosen from; `seen` (B, V): tokens that the repetition penalty counts.
    """
    tokens = torch.cat((chosen[:, None], drafts.tokens), 1)  # (B, N + 1)
    sees = draft_tree_mask(drafts.parents)
    places = torch.tensor(positions, device=chosen.device)[:, None] + sees.sum(-1) - 1
    start = cache.lengths
    states = verify(model, cache, tokens, places, sees)  # (B, N + 1, D)
    _check_finite(states)
    logits = model.right.logits(states)  # (B, N + 1, V)
    also = seen_with(seen, tokens, sees) if seen is not None else None
    target = probabilities(logits, settings, also) if settings.sampling or also is not None else logits
    if settings.sampling and drafts.proposed is not None:
        counts, chosen = accept(drafts.tokens, drafts.proposed, target, generator)
        paths = [list(range(count + 1)) for count in counts]
    else:
        wanted = choose(target, settings, generator)  # (B, N + 1)
        paths = follow(drafts, wanted)
        chosen = wanted[torch.arange(len(paths)), [path[-1] for path in paths]]
    cache.commit(start, paths)
    kept = [
        [*(row[place] for place in path[1:]), last]
        for row, path, last in zip(tokens.tolist(), paths, chosen.tolist(), strict=True)
    ]
    return StepOutput(
        logits, paths, kept, chosen, states[torch.arange(len(paths)), [path[-1] for path in paths]]
    )


@torch.inference_mode()
def generate(
    model: Any,
    ids: Tensor,
    positions: Tensor,
    images: list[list[tuple[ImageKV, int]]],
    stop: int,
    settings: GenerationConfig,
    on_tokens: Callable[[int, list[int]], bool | None] | None = None,
    tiles: Tensor | None = None,
    cache: DecodingCache | None = None,
    seen: Sequence[int] = (),
) -> Generation:
    """Answers to a ragged batch of prompts; arguments as in `prefill`, `stop` the end-of-turn token.

    `on_tokens` gets a row's number and all its tokens so far, each time there are more; where it returns True the row ends. A prompt that
    does not fit with its answer into `max_positions` raises `UsageError`. A given `cache`, of a single row, may hold earlier turns; it holds
    prompt and answer afterwards, but for the answer's last token. `seen`: tokens of earlier turns, for the repetition penalty.
    """
    started = time.perf_counter()
    device, V = ids.device, model.right.unembedding.shape[0]
    longest, limit = int(positions.max()) + 1, model.right.config.max_positions
    if longest + settings.max_new_tokens > limit:
        raise UsageError(
            f"the prompt has {longest} tokens (image included); with max_new_tokens = {settings.max_new_tokens} that exceeds this model's {limit} positions"
        )
    generator = torch.Generator(device).manual_seed(settings.seed) if settings.sampling else None
    heads = model.heads
    check_heads(model, settings)
    shapes = draft_scheduler(heads, len(ids), settings) if heads is not None else DraftScheduler([], "off")
    going_on = cache is not None
    if going_on and len(ids) != 1:
        raise ValueError(f"{len(ids)} prompts: a given cache goes on with one")
    cache, states = prefill(
        model,
        ids,
        positions,
        images,
        settings.max_new_tokens + max(shapes.most, TREE if shapes.width > 1 else 0),
        tiles,
        cache,
    )
    hidden = states[
        torch.arange(len(ids)), (positions >= 0).sum(1) - 1
    ]  # (B, D), at the prompts' last tokens
    prompt_lengths = cache.lengths
    logits = model.right.logits(hidden)[:, None]  # (B, 1, V)
    _check_finite(logits)
    counted = None  # (B, V), tokens that the repetition penalty counts
    if settings.repetition_penalty != 1.0:
        said = ids.masked_fill(
            (positions < 0) | (ids >= model.vocabulary.text_size), V
        )  # neither padding nor a vanilla model's image tokens
        counted = torch.zeros(len(ids), V + 1, dtype=torch.bool, device=device).scatter_(1, said, True)[:, :V]
        counted[:, [token for token in seen if token < model.vocabulary.text_size]] = True
    rows = [Row(b, p) for b, p in enumerate(positions.amax(1).tolist())]
    active = list(rows)
    chosen = choose(
        probabilities(logits, settings, counted[:, None] if counted is not None else None),
        settings,
        generator,
    )[:, 0]  # (B,)
    new, paths = chosen[:, None].tolist(), [[0]] * len(rows)
    first_token_s = time.perf_counter() - started
    shapes.start_answer(first_token_s)
    unembed = heads.unembedder(model.right.unembedding) if heads is not None else None
    passed: tuple[DraftPlan, float] | None = None  # the last pass: what it verified, and its seconds
    while True:
        taken = [
            row.take(tokens, path, chosen_from, stop, settings, on_tokens)
            for row, tokens, path, chosen_from in zip(active, new, paths, logits, strict=True)
        ]
        if passed is not None:  # a draft behind the end of its answer is of no use
            shapes.record_step(
                passed[0],
                [min(len(path) - 1, count) for path, count in zip(paths, taken, strict=True)],
                taken,
                passed[1],
            )
        if all(row.done for row in active):
            break
        if any(row.done for row in active):  # rows that are done cost nothing any more
            left = _closed_up([row.done for row in active])
            at = torch.tensor(left, device=device)
            cache.select_rows(left)
            active, chosen, hidden = [active[i] for i in left], chosen[at], hidden[at]
            counted = counted[at] if counted is not None else None
        if counted is not None:
            for i, row in enumerate(active):
                counted[i, row.tokens] = True
        pass_started = time.perf_counter()
        shape = shapes()
        shape = DraftPlan(
            min(shape.depth, max(settings.max_new_tokens - len(row.tokens) for row in active) - 1),
            shape.width,
        )
        drafts = _drafts(model, unembed, hidden, chosen, shape, settings, generator)
        logits, paths, new, chosen, hidden = decode_step(
            model,
            cache,
            [row.position for row in active],
            hidden,
            chosen,
            drafts,
            counted,
            settings,
            generator,
        )
        for row in active:
            row.decode_steps += 1
        passed = shape if shape.depth else DraftPlan(0), time.perf_counter() - pass_started
    if going_on:
        cache.lengths = [
            length + max(0, len(row.tokens) - 1) for length, row in zip(prompt_lengths, rows, strict=True)
        ]
    return Generation(
        [row.tokens for row in rows],
        [row.logprobs for row in rows],
        first_token_s,
        time.perf_counter() - started,
        [row.decode_steps for row in rows],
    )


def _closed_up(done: list[bool]) -> list[int]:
    """The rows that are not done; the last ones take the places of those that are, so that few move."""
    left = [i for i, ended in enumerate(done) if not ended]
    behind = [i for i in left if i >= len(left)]
    return [behind.pop() if done[i] else i for i in range(len(left))]


def _drafts(
    model: Any,
    unembed: Callable[[Tensor], Tensor] | None,
    hidden: Tensor,
    chosen: Tensor,
    shape: DraftPlan,
    settings: GenerationConfig,
    generator: torch.Generator | None,
) -> Drafts:
    """Drafts of a shape behind the tokens `chosen` (B,) from `hidden` (B, D); `unembed` as in `MultiTokenHeads.draft`."""
    if unembed is None or not shape.depth:
        return Drafts(chosen.new_empty(len(chosen), 0), chosen.new_empty(len(chosen), 0))
    heads, embedding = model.heads, model.right.embed_tokens
    if shape.width > 1:
        return heads.tree(embedding, unembed, hidden, chosen, shape.depth, shape.width, TREE)
    return heads.draft(
        embedding, unembed, hidden, chosen, shape.depth, lambda logits: draw(logits, settings, generator)
    )
