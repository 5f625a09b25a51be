"""Generation, the same for every model: prefill, then draft → verify → commit until all have ended.

    prompt → prefill → token → heads draft K tokens → a decode step verifies them → accept some, and one more
                         ↑                                                                     │
                         └─────────────────────── commit to cache and answers ─────────────────┘

Without drafts (K = 0) this is plain decoding.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from configs.model import GenerationConfig, ModelConfig
from models.dual_tower.dual_tower import DualTowerVLM
from models.kv_cache import DecodingCache, ImageKV, compact_rows, to_device
from models.language_model import LanguageModel
from models.layers import Rotary
from models.masks import NEVER, cache_mask
from models.multi_token import Drafts
from models.sampling import DraftGuard, accept_greedy, accept_sampled, probabilities, seen_after_drafts
from models.vision_language_model import VisionLanguageModel
from utils.errors import UsageError, UserError

SLOTS = 256  # a cache of fixed shapes has a multiple of these, so that the decode step is compiled for few
VLM = DualTowerVLM | VisionLanguageModel
# (row in the caller's batch, all its tokens so far) → True ends the row.
OnTokens = Callable[[int, list[int]], bool | None]


@dataclass(frozen=True)
class Generation:
    """The answers to a batch of prompts."""

    tokens: list[list[int]]  # of each row, without the end-of-turn token
    ends: list[int | None]  # each row's end-of-turn token; None where something else ended it
    logprobs: list[list[float]]  # of each token, by the unmodified logits; empty unless asked for
    first_token_s: float  # seconds from the call to the first token of every row
    seconds: float  # of the whole call
    decode_steps: list[int]  # forwards of the right tower over a row; prefill counts as one


@dataclass
class Row:
    """The answer to one prompt, so far."""

    index: int  # in the caller's batch
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    decode_steps: int = 0
    done: bool = False
    end: int | None = None  # the end-of-turn token that ended it


@torch.inference_mode()
def generate(
    model: VLM,
    ids: Tensor,
    positions: Tensor,
    images: list[list[tuple[ImageKV, int]]],
    turn_end: int | Collection[int],
    settings: GenerationConfig,
    on_tokens: OnTokens | None = None,
    tiles: Tensor | None = None,
    cache: DecodingCache | None = None,
    seen: Sequence[int] = (),
    suppressed: Sequence[int] = (),
) -> Generation:
    """Answer a ragged batch of prompts; arguments as in `prefill`.

    `turn_end`: the end-of-turn token, or several. `suppressed`: tokens that are never chosen.
    `on_tokens` is called after each new token; True ends the row. A given `cache`, of one row, may hold
    earlier turns; afterwards it also holds prompt and answer, but for the answer's last token. `seen`: tokens
    of earlier turns, for the repetition penalty. `UsageError` where prompt and answer exceed `max_positions`.
    """
    started = time.perf_counter()
    _check_length(model, positions, settings)
    check_heads(model, settings)
    continued = cache is not None
    if continued and len(ids) != 1:
        raise ValueError(f"{len(ids)} prompts: a given cache goes on with one")
    guard = DraftGuard.of(model.heads, settings, len(ids), ids.device)
    slots = settings.max_new_tokens + guard.draft_length
    cache, states = prefill(model, ids, positions, images, slots, tiles, cache)
    prompt_lengths = cache.lengths
    rows = [Row(b) for b in range(len(ids))]
    turn_ends = frozenset((turn_end,) if isinstance(turn_end, int) else turn_end)
    batch = DecodingBatch(model, cache, rows, positions.amax(1), settings, turn_ends, on_tokens)
    if len(set(suppressed)) == len(model.right.unembedding):
        raise UsageError("every token is suppressed: none is left to choose")
    if suppressed:
        batch.suppressed = torch.tensor(suppressed, device=ids.device)
    if settings.repetition_penalty != 1.0:
        batch.seen = _seen_tokens(model, ids, positions, seen)
    prompt_ends = (positions >= 0).sum(1) - 1
    states = states.take_along_dim(prompt_ends[:, None, None], 1)  # (B, 1, D)
    logits = model.right.logits(states)
    if not torch.isfinite(logits).all():
        raise _not_finite()
    batch.commit(batch.draft(0), states, logits)  # no drafts: the first token
    first_token_s = time.perf_counter() - started
    while not batch.done:
        drafts = batch.draft(guard.next_length())
        counts = batch.commit(drafts, *batch.verify(drafts))
        guard.record(drafts.tokens.shape[1], counts)
    if continued:
        cache.truncate([n + max(0, len(row.tokens) - 1) for n, row in zip(prompt_lengths, rows, strict=True)])
    return Generation(
        [row.tokens for row in rows],
        [row.end for row in rows],
        [row.logprobs for row in rows],
        first_token_s,
        time.perf_counter() - started,
        [row.decode_steps for row in rows],
    )


@dataclass
class DecodingBatch:
    """The unfinished rows, and the parts of a decode step: draft → verify → accept → commit."""

    model: VLM
    cache: DecodingCache  # of all tokens but each row's last one
    rows: list[Row]
    positions: Tensor  # (B,), of the last tokens
    settings: GenerationConfig
    turn_ends: frozenset[int]
    on_tokens: OnTokens | None
    seen: Tensor | None = None  # (B, V), tokens that the repetition penalty counts
    suppressed: Tensor | None = None  # tokens that are never chosen
    tokens: Tensor = field(init=False)  # (B,), the last ones
    hidden: Tensor = field(init=False)  # (B, D), the states that they were chosen from

    def __post_init__(self) -> None:
        settings, device, heads = self.settings, self.positions.device, self.model.heads
        self.active = torch.ones_like(self.positions)  # (B,), 0: done, and yet in the batch
        self.generator = torch.Generator(device).manual_seed(settings.seed) if settings.sampling else None
        self.draftable = heads.draftable(self.model.right.unembedding) if heads is not None else None

    @property
    def done(self) -> bool:
        return all(row.done for row in self.rows)

    def draft(self, count: int) -> Drafts:
        """Let the heads propose `count` tokens after each row's last one, fewer if no row needs so many."""
        heads, right = self.model.heads, self.model.right
        count = min(count, max(self.settings.max_new_tokens - len(row.tokens) for row in self.rows) - 1)
        if heads is None or self.draftable is None or not count:
            B, V = len(self.rows), right.unembedding.shape[0]
            proposed = self.positions.new_empty(B, 0, V, dtype=torch.float32)
            return Drafts(self.positions.new_empty(B, 0), proposed if self.settings.sampling else None)
        compiled = heads.compiled_draft if not self.settings.sampling else None
        return (compiled or heads.draft)(
            right.embed_tokens,
            self.draftable,
            self.hidden,
            self.tokens,
            count,
            self.settings,
            self.generator,
        )

    def verify(self, drafts: Drafts) -> tuple[Tensor, Tensor]:
        """The decode step for `accept`: → states (B, K + 1, D) and logits (B, K + 1, V)."""
        tokens = torch.cat((self.tokens[:, None], drafts.tokens), 1)  # (B, K + 1)
        offsets = torch.arange(tokens.shape[1], device=tokens.device)
        states = decode_step(self.model, self.cache, tokens, self.positions[:, None] + offsets)
        return states, self.model.right.logits(states)

    def accept(self, drafts: Drafts, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens (B, K + 1) that `logits` (B, K + 1, V) accept, and how many of each row's count (B,)."""
        settings = self.settings
        if self.suppressed is not None:
            logits = logits.index_fill(-1, self.suppressed, -torch.inf)
        seen = seen_after_drafts(self.seen, drafts.tokens) if self.seen is not None else None
        plain = not settings.sampling and seen is None
        # What is not finite is reported by `commit`; torch must not draw from it.
        target = logits if plain else probabilities(logits.nan_to_num(), settings, seen)
        if drafts.proposed is None:
            return accept_greedy(drafts.tokens, target)
        return accept_sampled(drafts.tokens, drafts.proposed, target, self.generator)

    def commit(self, drafts: Drafts, states: Tensor, logits: Tensor) -> list[int]:
        """Add the tokens that are accepted to cache and answers → how many each unfinished answer took.

        `states` (B, K + 1, D) and `logits` (B, K + 1, V) are of the forward that verified the drafts. Rows
        that are done leave the batch, and then cost nothing.
        """
        tokens, counts = self.accept(drafts, logits)
        counts = counts * self.active if self.cache.fixed else counts
        finite = torch.isfinite(states).all().expand(len(counts), 1)
        report = torch.cat(
            (finite, counts[:, None], tokens), 1
        ).tolist()  # here the host waits for the device
        if not report[0][0]:
            raise _not_finite()
        accepted = [new[:count] for _, count, *new in report]
        T, last = logits.shape[1], counts[:, None].clamp(min=1) - 1
        self.cache.truncate([n - T + len(new) for n, new in zip(self.cache.lengths, accepted, strict=True)])
        self.tokens, self.positions = tokens.gather(1, last)[:, 0], self.positions + counts
        self.hidden = states.take_along_dim(last[..., None], 1)[:, 0]
        if self.seen is not None:  # the columns after a row's last token repeat its first one
            new = torch.where(torch.arange(T, device=tokens.device) <= last, tokens, tokens[:, :1])
            self.seen.scatter_(1, new, True)
        logprobs: list[list[float]] = [[]] * len(accepted)
        if self.settings.logprobs:
            logprobs = logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0].tolist()
        rows = zip(self.rows, accepted, logprobs, strict=True)
        taken = [self._extend(row, *new) for row, *new in rows if not row.done]
        if any(row.done for row in self.rows) and not self.done:
            self._leave([row.done for row in self.rows])
        return taken

    def _extend(self, row: Row, tokens: list[int], logprobs: list[float]) -> int:
        """Append `tokens` to an answer up to its end; return how many, the end-of-turn token included."""
        row.decode_steps += 1
        for count, token in enumerate(tokens, start=1):
            if token in self.turn_ends:
                row.done, row.end = True, token
                return count
            row.tokens.append(token)
            row.logprobs += logprobs[count - 1 : count]
            ended = self.on_tokens is not None and self.on_tokens(row.index, row.tokens)
            if ended or len(row.tokens) == self.settings.max_new_tokens:
                row.done = True
                return count
        return len(tokens)

    def _leave(self, done: list[bool]) -> None:
        """Remove rows that are done from the batch; from one of fixed shapes they only take nothing more."""
        if self.cache.fixed:
            self.active = to_device([not row_done for row_done in done], self.tokens.device)
            return
        rows = compact_rows(done)
        index = to_device(rows, self.tokens.device)
        self.cache.select_rows(rows)
        self.rows = [self.rows[i] for i in rows]
        self.tokens, self.positions = self.tokens[index], self.positions[index]
        self.hidden = self.hidden[index]
        self.seen = self.seen[index] if self.seen is not None else None


def prefill(
    model: VLM,
    ids: Tensor,
    positions: Tensor,
    images: list[list[tuple[ImageKV, int]]],
    slots: int,
    tiles: Tensor | None = None,
    cache: DecodingCache | None = None,
) -> tuple[DecodingCache, Tensor]:
    """Fill a cache with image KVs and prompts; return it and the prompts' hidden states (B, R, D).

    `ids`, `positions` (B, R): padded on the right, with position −1. `images`: each row's image KVs and their
    start positions. `slots`: free slots to leave for answers. `tiles`: of a vanilla model, whose image tokens
    are among `ids`. With `cache`, the prompts continue what it holds.
    """
    slots += max(sum(kv.tokens for kv, _ in row) for row in images) + ids.shape[1]
    if cache is None:
        cache = new_cache(model, len(ids), slots)
    else:
        cache.resize(slots)
    write_images(cache, images, model.config)
    cache.reserve(positions.masked_fill(positions < 0, NEVER))
    return cache, forward_cached(model.right, model.embed(ids, tiles), positions.clamp(min=0), cache)


def write_images(cache: DecodingCache, images: list[list[tuple[ImageKV, int]]], config: ModelConfig) -> None:
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
    dtype, device = cache.keys[0].dtype, cache.positions.device
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
        cache.update(layer, data[read, 0], data[read, 1], rotary if right.has_rope(layer) else None)


def decode_step(model: VLM, cache: DecodingCache, tokens: Tensor, positions: Tensor) -> Tensor:
    """One forward of the right tower: `tokens` (B, T) at `positions` (B, T) → hidden states (B, T, D)."""
    cache.reserve(positions)
    run = model.right.compiled_step if cache.fixed else None
    return (run or forward_cached)(model.right, model.right.embed_tokens(tokens), positions, cache)


def forward_cached(right: LanguageModel, x: Tensor, positions: Tensor, cache: DecodingCache) -> Tensor:
    """Embeddings `x` (B, T, D) at `positions`, for which `cache` has slots → hidden states (B, T, D)."""
    return right(x, positions, cache_mask(positions, cache.positions[:, : cache.used]), cache)


def new_cache(model: VLM, rows: int, slots: int) -> DecodingCache:
    """An empty cache for a model; of fixed shapes where its decode step is compiled."""
    c, weight, fixed = (
        model.right.config,
        model.right.embed_tokens.weight,
        model.right.compiled_step is not None,
    )
    slots = -(-slots // SLOTS) * SLOTS if fixed else slots
    return DecodingCache(c.layers, rows, c.kv_heads, slots, c.head_size, weight.dtype, weight.device, fixed)


def _seen_tokens(model: VLM, ids: Tensor, positions: Tensor, earlier: Sequence[int]) -> Tensor:
    """Text tokens of the prompts `ids` (B, R) and of `earlier` turns: (B, V) bool."""
    V, text_size = model.right.unembedding.shape[0], model.vocabulary.text_size
    # Padding and a vanilla model's image tokens go to a column of their own, which is dropped.
    text = ids.masked_fill((positions < 0) | (ids >= text_size), V)
    seen = torch.zeros(len(ids), V + 1, dtype=torch.bool, device=ids.device).scatter_(1, text, True)[:, :V]
    seen[:, [token for token in earlier if token < text_size]] = True
    return seen


def _check_length(model: VLM, positions: Tensor, settings: GenerationConfig) -> None:
    longest, limit = int(positions.max()) + 1, model.right.config.max_positions
    if longest + settings.max_new_tokens > limit:
        raise UsageError(
            f"the prompt has {longest} tokens (image included); with max_new_tokens = "
            f"{settings.max_new_tokens} that exceeds this model's {limit} positions"
        )


def check_heads(model: VLM, settings: GenerationConfig) -> None:
    """Raise `UsageError` where drafts are required and the model has no multi-token heads."""
    if settings.speculative == "on" and model.heads is None:
        raise UsageError(
            "--speculative on: this model has no multi-token heads "
            "(python -m tools.train_heads gives it some)"
        )


def _not_finite() -> UserError:
    return UserError(
        "the model's states or logits are not finite: its weights are damaged, or its training diverged"
    )
