"""Generation, the same for every model: prefill → decode_step → generate.

Prefill fills a cache with image KVs and prompts. Each decode step is one forward of the right tower: it
verifies drafts of the multi-token heads, if any, and chooses one more token.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from configs.model import GenerationConfig, ModelConfig
from models.draft_scheduler import TREE, DraftPlan, DraftScheduler, draft_scheduler
from models.kv_cache import DecodingCache, ImageKV, compact_rows
from models.layers import Rotary
from models.masks import NEVER, Mask, cache_mask
from models.multi_token import Drafts, draft_tree_mask
from models.sampling import accept, choose, draw_draft, follow, probabilities, seen_at_each_node
from utils.errors import UsageError, UserError

# (row in the caller's batch, all its tokens so far) → True ends the row.
OnTokens = Callable[[int, list[int]], bool | None]


@dataclass(frozen=True)
class Generation:
    """The answers to a batch of prompts."""

    tokens: list[list[int]]  # of each row, without the end-of-turn token
    logprobs: list[list[float]]  # of each token, before temperature and all after it; empty unless asked for
    first_token_s: float  # seconds from the call to the first token of every row
    seconds: float  # of the whole call
    decode_steps: list[int]  # forwards of the right tower over a row, prefill included


@dataclass
class Row:
    """An unfinished answer."""

    number: int  # in the caller's batch
    position: int  # of the token chosen last
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    decode_steps: int = 0
    done: bool = False

    def take(
        self,
        tokens: list[int],
        path: list[int],
        logits: Tensor,
        stop: int,
        settings: GenerationConfig,
        on_tokens: OnTokens | None,
    ) -> int:
        """Append a step's tokens up to the answer's end; return how many were read.

        The end-of-turn token counts. Token i was chosen from `logits` (N + 1, V) at node `path[i]`.
        """
        self.decode_steps += 1
        self.position += len(tokens)
        for count, (token, node) in enumerate(zip(tokens, path, strict=True), start=1):
            if token == stop:
                self.done = True
                return count
            self.tokens.append(token)
            if settings.logprobs:
                self.logprobs.append(logits[node].float().log_softmax(-1)[token].item())
            ended = on_tokens is not None and on_tokens(self.number, self.tokens)
            if ended or len(self.tokens) == settings.max_new_tokens:
                self.done = True
                return count
        return len(tokens)


def prefill(
    model: Any,
    ids: Tensor,
    positions: Tensor,
    images: list[list[tuple[ImageKV, int]]],
    slots: int,
    tiles: Tensor | None = None,
    cache: DecodingCache | None = None,
) -> tuple[DecodingCache, Tensor]:
    """Fill a cache with image KVs and prompts; return it and the prompts' hidden states (B, R, D).

    `ids`, `positions` (B, R): position −1 at padding. `images`: each row's image KVs and their start
    positions. `slots`: free slots to leave for answers. `tiles`: of a vanilla model, whose image tokens are
    among `ids`. With `cache`, the prompts continue what it holds.
    """
    config, B = model.right.config, len(ids)
    tokens = max(sum(kv.tokens for kv, _ in row) for row in images) + ids.shape[1]
    dtype = model.right.embed_tokens.weight.dtype
    if cache is None:
        cache = DecodingCache(
            config.layers, B, config.kv_heads, tokens + slots, config.head_size, dtype, ids.device
        )
    else:
        cache.resize(tokens + slots)
    _write_images(cache, images, model.config)
    cache.reserve(positions.masked_fill(positions < 0, NEVER))
    positions = positions.clamp(min=0)
    return cache, model.right(model.embed(ids, tiles), positions, _mask(cache, positions), cache)


def _write_images(cache: DecodingCache, images: list[list[tuple[ImageKV, int]]], config: ModelConfig) -> None:
    """Write each row's image KVs into the cache, keys rotated by their positions.

    Every right layer gets those of the left layer that it reads. `UserError` where an image KV has another
    model's shape.
    """
    left, right = config.left, config.right
    expected = left.layers, 2, left.kv_heads, left.head_size
    for kv, _ in (pair for row in images for pair in row):
        if (*kv.data.shape[:3], *kv.data.shape[4:]) != expected:
            raise UserError(
                f"an image KV of {tuple(kv.data.shape)} is of another model: "
                f"this one's are {(*expected[:3], 'tokens', expected[3])}; encode the image with it"
            )
    B, L = len(images), max(sum(kv.tokens for kv, _ in row) for row in images)
    if not L:
        return
    dtype, device = cache.keys.dtype, cache.keys.device
    layers, _, G, E = expected
    data = torch.zeros(layers, 2, B, G, L, E, dtype=dtype, device=device)
    positions = torch.full((B, L), NEVER, device=device)
    for b, row in enumerate(images):
        at = 0
        for kv, start in row:
            data[:, :, b, :, at : at + kv.tokens] = kv.data.to(device, dtype)
            positions[b, at : at + kv.tokens] = torch.arange(start, start + kv.tokens, device=device)
            at += kv.tokens
    rotary = Rotary.at(positions.clamp(max=right.max_positions), right)
    cache.reserve(positions)
    for layer, read in enumerate(config.left_layer_of):
        cache.extend(layer, data[read, 0], data[read, 1], rotary if right.has_rope(layer) else None)


def verify(
    model: Any, cache: DecodingCache, tokens: Tensor, positions: Tensor, tree_mask: Tensor | None = None
) -> Tensor:
    """Run the right tower over `tokens` (B, T) at `positions` (B, T) → hidden states (B, T, D).

    `tree_mask` (B, T, T): which of one another they see; None: the earlier ones.
    """
    start = cache.lengths
    cache.reserve(positions)
    mask = _mask(cache, positions)
    if tree_mask is not None:
        seen = mask.dense()
        offsets = torch.arange(tokens.shape[1], device=tokens.device)
        slots = torch.tensor(start, device=tokens.device)[:, None, None] + offsets  # (B, 1, T)
        seen[:, 0].scatter_(2, slots.expand_as(tree_mask), tree_mask)
        mask = Mask(lambda query, key: seen[:, 0], mask.queries, mask.keys)
    return model.right(model.right.embed_tokens(tokens), positions, mask, cache)


def _mask(cache: DecodingCache, positions: Tensor) -> Mask:
    return cache_mask(positions, cache.positions[:, : cache.used])


def _check_finite(values: Tensor) -> None:
    if not torch.isfinite(values).all():
        raise UserError(
            "the model's states or logits are not finite: its weights are damaged, or its training diverged"
        )


class StepOutput(NamedTuple):
    """A decode step over B rows with N drafts each.

    Node 0 is the token chosen before, node n the n-th draft.
    """

    logits: Tensor  # (B, N + 1, V)
    paths: list[list[int]]  # of each row: node 0 and the nodes of the accepted drafts
    tokens: list[list[int]]  # of each row: the accepted drafts, and the chosen token
    chosen: Tensor  # (B,), the token after them
    hidden: Tensor  # (B, D), which it was chosen from


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
    """Verify drafts after the tokens `chosen` (B,), and commit the accepted ones to the cache.

    `positions`: of the chosen tokens. `hidden` (B, D): which they were chosen from. `seen` (B, V): tokens
    that the repetition penalty counts.
    """
    tokens = torch.cat((chosen[:, None], drafts.tokens), 1)  # (B, N + 1)
    tree_mask = draft_tree_mask(drafts.parents)  # (B, N + 1, N + 1)
    node_positions = torch.tensor(positions, device=chosen.device)[:, None] + tree_mask.sum(-1) - 1
    start = cache.lengths
    states = verify(model, cache, tokens, node_positions, tree_mask)  # (B, N + 1, D)
    _check_finite(states)
    logits = model.right.logits(states)  # (B, N + 1, V)
    node_seen = seen_at_each_node(seen, tokens, tree_mask) if seen is not None else None
    plain = not settings.sampling and node_seen is None
    target = logits if plain else probabilities(logits, settings, node_seen)
    if settings.sampling and drafts.proposed is not None:
        counts, chosen = accept(drafts.tokens, drafts.proposed, target, generator)
        paths = [list(range(count + 1)) for count in counts]
        ends = [path[-1] for path in paths]
    else:
        targets = choose(target, settings, generator)  # (B, N + 1)
        paths = follow(drafts, targets)
        ends = [path[-1] for path in paths]
        chosen = targets[torch.arange(len(paths)), ends]
    cache.commit(start, paths)
    new_tokens = [
        [*(row[node] for node in path[1:]), last]
        for row, path, last in zip(tokens.tolist(), paths, chosen.tolist(), strict=True)
    ]
    return StepOutput(logits, paths, new_tokens, chosen, states[torch.arange(len(paths)), ends])


@dataclass
class DecodingState:
    """The unfinished rows between two decode steps."""

    cache: DecodingCache
    rows: list[Row]
    chosen: Tensor  # (B,), each row's last token
    hidden: Tensor  # (B, D), which it was chosen from
    seen: Tensor | None  # (B, V), tokens that the repetition penalty counts

    @property
    def positions(self) -> list[int]:
        """Of the rows' last tokens."""
        return [row.position for row in self.rows]

    def advance(
        self, output: StepOutput, stop: int, settings: GenerationConfig, on_tokens: OnTokens | None
    ) -> list[int]:
        """Append a step's tokens to the rows; return how many of each row's were read, as `Row.take` does."""
        self.chosen, self.hidden = output.chosen, output.hidden
        return [
            row.take(tokens, path, logits, stop, settings, on_tokens)
            for row, tokens, path, logits in zip(
                self.rows, output.tokens, output.paths, output.logits, strict=True
            )
        ]

    def prepare(self) -> None:
        """Drop the rows that are done, which then cost nothing, and count the others' tokens as seen."""
        if any(row.done for row in self.rows):
            selected = compact_rows([row.done for row in self.rows])
            index = torch.tensor(selected, device=self.chosen.device)
            self.cache.select_rows(selected)
            self.rows = [self.rows[i] for i in selected]
            self.chosen, self.hidden = self.chosen[index], self.hidden[index]
            self.seen = self.seen[index] if self.seen is not None else None
        if self.seen is not None:
            for i, row in enumerate(self.rows):
                self.seen[i, row.tokens] = True

    def limit(self, plan: DraftPlan, max_new_tokens: int) -> DraftPlan:
        """Plan no more drafts than the longest remaining answer can use."""
        remaining = max(max_new_tokens - len(row.tokens) for row in self.rows)
        return DraftPlan(min(plan.depth, remaining - 1), plan.width)


@torch.inference_mode()
def generate(
    model: Any,
    ids: Tensor,
    positions: Tensor,
    images: list[list[tuple[ImageKV, int]]],
    stop: int,
    settings: GenerationConfig,
    on_tokens: OnTokens | None = None,
    tiles: Tensor | None = None,
    cache: DecodingCache | None = None,
    seen: Sequence[int] = (),
) -> Generation:
    """Answer a ragged batch of prompts; arguments as in `prefill`, `stop` is the end-of-turn token.

    `on_tokens` is called after each new token; True ends the row. A given `cache`, of one row, may hold
    earlier turns; afterwards it also holds prompt and answer, but for the answer's last token. `seen`: tokens
    of earlier turns, for the repetition penalty. `UsageError` where prompt and answer exceed `max_positions`.
    """
    started = time.perf_counter()
    _check_length(model, positions, settings)
    check_heads(model, settings)
    if (continued := cache is not None) and len(ids) != 1:
        raise ValueError(f"{len(ids)} prompts: a given cache goes on with one")
    generator = torch.Generator(ids.device).manual_seed(settings.seed) if settings.sampling else None
    heads = model.heads
    scheduler = draft_scheduler(heads, len(ids), settings) if heads is not None else DraftScheduler([], "off")
    slots = settings.max_new_tokens + max(scheduler.max_depth, TREE if scheduler.width > 1 else 0)
    cache, states = prefill(model, ids, positions, images, slots, tiles, cache)
    prompt_lengths = cache.lengths
    counted = _seen_tokens(model, ids, positions, seen) if settings.repetition_penalty != 1.0 else None
    output = _first_token(model, states, positions, counted, settings, generator)
    rows = [Row(b, p) for b, p in enumerate(positions.amax(1).tolist())]
    state = DecodingState(cache, rows, output.chosen, output.hidden, counted)
    first_token_s = time.perf_counter() - started
    scheduler.start_answer(first_token_s)
    unembed = heads.unembedder(model.right.unembedding) if heads is not None else None
    state.advance(output, stop, settings, on_tokens)
    while not all(row.done for row in state.rows):
        state.prepare()
        step_started = time.perf_counter()
        plan = state.limit(scheduler(), settings.max_new_tokens)
        drafts = _drafts(model, unembed, state.hidden, state.chosen, plan, settings, generator)
        output = decode_step(
            model, cache, state.positions, state.hidden, state.chosen, drafts, state.seen, settings, generator
        )
        seconds = time.perf_counter() - step_started
        counts = state.advance(output, stop, settings, on_tokens)
        # Drafts after an answer's end do not count as accepted.
        accepted = [min(len(path) - 1, count) for path, count in zip(output.paths, counts, strict=True)]
        scheduler.record_step(plan if plan.depth else DraftPlan(0), accepted, counts, seconds)
    if continued:
        cache.lengths = [n + max(0, len(row.tokens) - 1) for n, row in zip(prompt_lengths, rows, strict=True)]
    return Generation(
        [row.tokens for row in rows],
        [row.logprobs for row in rows],
        first_token_s,
        time.perf_counter() - started,
        [row.decode_steps for row in rows],
    )


def _check_length(model: Any, positions: Tensor, settings: GenerationConfig) -> None:
    longest, limit = int(positions.max()) + 1, model.right.config.max_positions
    if longest + settings.max_new_tokens > limit:
        raise UsageError(
            f"the prompt has {longest} tokens (image included); with max_new_tokens = "
            f"{settings.max_new_tokens} that exceeds this model's {limit} positions"
        )


def check_heads(model: Any, settings: GenerationConfig) -> None:
    """Raise `UsageError` where drafts are required and the model has no multi-token heads."""
    if settings.speculative == "on" and model.heads is None:
        raise UsageError(
            "--speculative on: this model has no multi-token heads "
            "(python -m tools.train_heads gives it some)"
        )


def _seen_tokens(model: Any, ids: Tensor, positions: Tensor, earlier: Sequence[int]) -> Tensor:
    """Text tokens of the prompts `ids` (B, R) and of `earlier` turns: (B, V) bool."""
    V, text_size = model.right.unembedding.shape[0], model.vocabulary.text_size
    # Padding and a vanilla model's image tokens go to a column of their own, which is dropped.
    text = ids.masked_fill((positions < 0) | (ids >= text_size), V)
    seen = torch.zeros(len(ids), V + 1, dtype=torch.bool, device=ids.device).scatter_(1, text, True)[:, :V]
    seen[:, [token for token in earlier if token < text_size]] = True
    return seen


def _first_token(
    model: Any,
    states: Tensor,
    positions: Tensor,
    seen: Tensor | None,
    settings: GenerationConfig,
    generator: torch.Generator | None,
) -> StepOutput:
    """Choose each row's first token from the prompts' hidden states (B, R, D)."""
    hidden = states[torch.arange(len(states)), (positions >= 0).sum(1) - 1]  # (B, D), at the prompts' ends
    logits = model.right.logits(hidden)[:, None]  # (B, 1, V)
    _check_finite(logits)
    distribution = probabilities(logits, settings, seen[:, None] if seen is not None else None)
    chosen = choose(distribution, settings, generator)[:, 0]  # (B,)
    return StepOutput(logits, [[0]] * len(states), chosen[:, None].tolist(), chosen, hidden)


def _drafts(
    model: Any,
    unembed: Callable[[Tensor], Tensor] | None,
    hidden: Tensor,
    chosen: Tensor,
    plan: DraftPlan,
    settings: GenerationConfig,
    generator: torch.Generator | None,
) -> Drafts:
    """The planned drafts after the tokens `chosen` (B,), from `hidden` (B, D).

    `unembed`: as in `MultiTokenHeads.draft`.
    """
    if unembed is None or not plan.depth:
        return Drafts(chosen.new_empty(len(chosen), 0), chosen.new_empty(len(chosen), 0))
    heads, embedding = model.heads, model.right.embed_tokens
    if plan.width > 1:
        return heads.tree(embedding, unembed, hidden, chosen, plan.depth, plan.width, TREE)
    return heads.draft(
        embedding, unembed, hidden, chosen, plan.depth, lambda logits: draw_draft(logits, settings, generator)
    )
