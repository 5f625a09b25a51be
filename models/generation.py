"""One generate for every model: prefill, then passes that verify drafts of the multi-token heads, or none, and choose one more token."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.errors import UsageError, UserError
from configs.model import GenerationConfig
from models.kv_cache import DecodingCache, ImageKV
from models.layers import Rotary
from models.masks import NEVER, cache_mask


@dataclass(frozen=True)
class Generation:
    tokens: list[list[int]]  # a row's new tokens, end-of-turn left out
    logprobs: list[list[float]]  # of each token, before temperature and all that follows; empty unless asked for
    first_token_s: float  # seconds from the call to the first token of every row
    seconds: float  # of the whole call
    passes: list[int]  # of the right tower over a row, prefill included


@dataclass
class Row:
    """An answer in the making."""

    number: int  # in the caller's batch
    position: int  # of the token that was chosen last
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    passes: int = 1
    done: bool = False

    def take(self, tokens: list[int], logits: Tensor, stop: int, settings: GenerationConfig, on_tokens: Callable[[int, list[int]], bool | None] | None) -> None:
        """What a pass gave: tokens, and the logits (T, V) that each was chosen from; up to the answer's end."""
        self.position += len(tokens)
        for token, row in zip(tokens, logits, strict=False):  # behind the last accepted draft there are more logits
            if token == stop:
                self.done = True
                return
            self.tokens.append(token)
            if settings.logprobs:
                self.logprobs.append(row.float().log_softmax(-1)[token].item())
            ended = on_tokens is not None and on_tokens(self.number, self.tokens)
            if ended or len(self.tokens) == settings.max_new_tokens:
                self.done = True
                return


def probabilities(logits: Tensor, settings: GenerationConfig, seen: Tensor | None = None) -> Tensor:
    """Logits (…, V) → the distribution (…, V) that tokens are drawn from; all on the likeliest where `settings.sampling` is off.

    In this order: repetition penalty on tokens `seen` (…, V), temperature, top-k, top-p, min-p.
    """
    logits = logits.float()
    if seen is not None and settings.repetition_penalty != 1.0:  # arXiv 1909.05858: ÷ where positive, × where negative
        logits = torch.where(seen, torch.where(logits > 0, logits / settings.repetition_penalty, logits * settings.repetition_penalty), logits)
    if not settings.sampling:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    logits = logits / settings.temperature
    if settings.top_k and settings.top_k < logits.shape[-1]:
        # By rank, not by value: of equal ones no more than k stay.
        kept = logits.topk(settings.top_k).indices
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept, logits.gather(-1, kept))
    if settings.top_p < 1:
        ranked, ids = logits.softmax(-1).sort(dim=-1, descending=True)
        before = ranked.cumsum(-1) - ranked  # the probability of all likelier tokens; the likeliest always stays, for before it there is nothing
        logits = logits.masked_fill((before >= settings.top_p).gather(-1, ids.argsort(-1)), -torch.inf)
    made = logits.softmax(-1)
    if settings.min_p:
        made = made.masked_fill(made < settings.min_p * made.amax(-1, keepdim=True), 0)
        made = made / made.sum(-1, keepdim=True)
    return made


def choose(distribution: Tensor, settings: GenerationConfig, generator: torch.Generator | None) -> Tensor:
    """Distributions (…, V) → tokens (…): the likeliest, or drawn."""
    if not settings.sampling:
        return distribution.max(-1).indices  # a quarter of argmax's time on a CPU
    return torch.multinomial(distribution.flatten(0, -2), 1, generator=generator).view(distribution.shape[:-1])


def accept(drafts: Tensor, proposed: Tensor | None, target: Tensor, settings: GenerationConfig, generator: torch.Generator | None) -> tuple[list[int], Tensor]:
    """How many of each row's drafts stand, and the token after them (B,).

    `drafts` (B, K) were drawn from `proposed` (B, K, V), None where all is greedy; `target` (B, K + 1, V) is the model's own distribution at each of
    them and behind the last. A draft x stands with probability min(1, target(x) ÷ proposed(x)); at the first that
    does not, a token is drawn from what target has more than proposed. So tokens have exactly the target's
    distribution (arXiv 2211.17192, 2302.01318); with both distributions on one token it is: as long as they agree.
    """
    B, K = drafts.shape
    if not settings.sampling:
        wanted = target.max(-1).indices  # (B, K + 1)
        counts = (drafts == wanted[:, :K]).long().cumprod(1).sum(1)  # (B,)
        return counts.tolist(), wanted.gather(1, counts[:, None])[:, 0]
    assert proposed is not None, "sampled drafts come with their distribution"
    ratio = target[:, :K].gather(-1, drafts[..., None])[..., 0] / proposed.gather(-1, drafts[..., None])[..., 0]  # (B, K)
    uniform = torch.rand(B, K, generator=generator, device=drafts.device)
    counts = (uniform < ratio).long().cumprod(1).sum(1)
    beyond = F.pad(proposed, (0, 0, 0, 1))  # behind the last draft nothing was proposed
    rest = (target - beyond).clamp(min=0)[torch.arange(B), counts]  # (B, V)
    empty = rest.sum(-1, keepdim=True) <= 0  # equal to the last bit: then rejection has probability 0, but for rounding
    rest = torch.where(empty, target[torch.arange(B), counts], rest)
    return counts.tolist(), torch.multinomial(rest, 1, generator=generator)[:, 0]


class DraftLength:
    """How many tokens to draft: what gives most tokens a second, by what was accepted and what passes took.

    The k-th draft's chance, and what a pass with k drafts takes, are running means. Where no draft pays, none is made,
    but now and then one, so that a change in the text is noticed.
    """

    AGAIN = 48  # passes after which drafting is tried again where it did not pay

    def __init__(self, stands: Sequence[float], mode: str) -> None:
        """`stands`: the chance of each draft to stand where those before it do, to begin with."""
        self.stands, self.mode = list(stands), mode
        self.seconds: list[float | None] = [None] * (len(stands) + 1)  # of a pass with that many drafts
        self.idle = 0

    def __call__(self) -> int:
        most = len(self.stands)
        if self.mode != "auto" or not most:
            return most if self.mode != "off" else 0
        plain, full = self.seconds[0], self.seconds[most]
        if full is None or plain is None:
            return most if full is None else 0
        best, rate, tokens, chance = 0, 1 / plain, 1.0, 1.0
        for k, stands in enumerate(self.stands, start=1):
            chance *= stands
            tokens += chance
            cost = self.seconds[k] or plain + (full - plain) * k / most
            if tokens / cost > 1.02 * rate:
                best, rate = k, tokens / cost
        self.idle = self.idle + 1 if best == 0 else 0
        if self.idle > self.AGAIN:
            self.idle = 0
            return 1
        return best

    def told(self, drafted: int, counts: Sequence[int], seconds: float) -> None:
        """A pass over drafts, of which `counts` stood in each row."""
        before = self.seconds[drafted]
        self.seconds[drafted] = seconds if before is None else min(0.9 * before + 0.1 * seconds, 2 * before)  # one disturbed pass says little
        for count in counts:
            for k in range(min(drafted, count + 1)):
                self.stands[k] += 0.06 * ((k < count) - self.stands[k])


def draft_length(heads: Any, rows: int, settings: GenerationConfig) -> DraftLength:
    """For greedy answers one that goes on learning from call to call. Sampled answers must depend on the seed alone: theirs begins anew."""
    most = min(settings.draft_tokens or heads.count, heads.count)
    new = DraftLength(heads.stands[:most].tolist(), settings.speculative)
    return new if settings.sampling else heads.lengths.setdefault((rows, most, settings.speculative), new)


NOMINAL = 0.15  # what a draft costs, in passes, where the clock must not count


def prefill(
    model: Any, ids: Tensor, positions: Tensor, images: list[list[tuple[ImageKV, int]]], slots: int, tiles: Tensor | None = None, cache: DecodingCache | None = None
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
        cache = DecodingCache(config.layers, B, config.kv_heads, L + ids.shape[1] + slots, config.head_size, dtype, ids.device)
    else:
        cache.grow(L + ids.shape[1] + slots)
    if L:
        keys = torch.zeros(config.layers, 2, B, config.kv_heads, L, config.head_size, dtype=dtype, device=ids.device)
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
    return cache, model.right(model.embed(ids, tiles), positions.clamp(min=0), _mask(cache, positions.clamp(min=0)), cache)


def verify(model: Any, cache: DecodingCache, tokens: Tensor, positions: Tensor) -> Tensor:
    """The right tower over `tokens` (B, T) at `positions` (B, T) → hidden states (B, T, D)."""
    cache.reserve(positions)
    return model.right(model.right.embed_tokens(tokens), positions, _mask(cache, positions), cache)


def _mask(cache: DecodingCache, positions: Tensor) -> Tensor:
    return cache_mask(positions, cache.positions[:, : cache.used])


class Passed(NamedTuple):
    """What a pass over B rows with K drafts gave."""

    logits: Tensor  # (B, K + 1, V)
    tokens: list[list[int]]  # of each row: the drafts that stand, and one more
    counts: list[int]  # of each row: the drafts that stand
    chosen: Tensor  # (B,), the one more
    hidden: Tensor  # (B, D), what it was chosen from


def one_pass(
    model: Any,
    cache: DecodingCache,
    positions: list[int],
    hidden: Tensor,
    chosen: Tensor,
    K: int,
    draft: Callable[..., tuple[Tensor, Tensor | None]] | None,
    seen: Tensor | None,
    settings: GenerationConfig,
    generator: torch.Generator | None,
) -> Passed:
    """Draft K tokens behind those `chosen` (B,) from `hidden` (B, D), verify them, keep in the cache what stands.

    `positions`: of the chosen tokens; `draft`: `MultiTokenHeads.draft` with its tables; `seen` (B, V): tokens that the repetition penalty counts.
    """
    if draft is not None:
        drafts, proposed = draft(hidden, chosen, K, lambda logits: _draw(logits, settings, generator))
    else:
        drafts, proposed = chosen.new_empty(len(chosen), 0), None
    tokens = torch.cat((chosen[:, None], drafts), 1)  # (B, K + 1)
    places = torch.tensor(positions, device=chosen.device)[:, None] + torch.arange(K + 1, device=chosen.device)
    states = verify(model, cache, tokens, places)  # (B, K + 1, D)
    logits = model.right.logits(states)  # (B, K + 1, V)
    also = _seen_with(seen, drafts) if seen is not None else None
    target = probabilities(logits, settings, also) if settings.sampling or also is not None else logits
    if K:
        counts, chosen = accept(drafts, proposed, target, settings, generator)
    else:
        counts, chosen = [0] * len(chosen), choose(target, settings, generator)[:, 0]
    cache.lengths = [now - K + count for now, count in zip(cache.lengths, counts, strict=True)]
    kept = [[*drafted[:count], last] for drafted, count, last in zip(drafts.tolist(), counts, chosen.tolist(), strict=True)]
    return Passed(logits, kept, counts, chosen, states[torch.arange(len(counts)), counts])


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
) -> Generation:
    """Answers to a ragged batch of prompts; arguments as in `prefill`, `stop` the end-of-turn token.

    `on_tokens` gets a row's number and all its tokens so far, each time there are more; where it returns True the row ends. A prompt that
    does not fit with its answer into `max_positions` raises `UsageError`. A given `cache`, which may hold earlier turns, holds
    prompts and answers afterwards, but for an answer's last token.
    """
    started = time.perf_counter()
    device, V = ids.device, model.right.unembedding.shape[0]
    longest, limit = int(positions.max()) + 1, model.right.config.max_positions
    if longest + settings.max_new_tokens > limit:
        raise UsageError(f"the prompt has {longest} tokens (image included); with max_new_tokens = {settings.max_new_tokens} that exceeds this model's {limit} positions")
    generator = torch.Generator(device).manual_seed(settings.seed) if settings.sampling else None
    heads = model.right.heads
    if settings.speculative == "on" and heads is None:
        raise UsageError("--speculative on: this model has no multi-token heads (python -m training.heads gives it some)")
    length = draft_length(heads, len(ids), settings) if heads is not None else DraftLength([], "off")
    going_on = cache is not None
    cache, states = prefill(model, ids, positions, images, settings.max_new_tokens + len(length.stands), tiles, cache)
    hidden = states[torch.arange(len(ids)), (positions >= 0).sum(1) - 1]  # (B, D), at the prompts' last tokens
    prompt_lengths = cache.lengths
    logits = model.right.logits(hidden)[:, None]  # (B, 1, V)
    if not torch.isfinite(logits).all():
        raise UserError("the model's logits are not finite: its weights are damaged, or its training diverged")
    seen = None
    if settings.repetition_penalty != 1.0:
        seen = torch.zeros(len(ids), V, dtype=torch.bool, device=device).scatter_(1, ids.clamp(max=V - 1), positions >= 0)
    rows = [Row(b, p) for b, p in enumerate(positions.amax(1).tolist())]
    active = list(rows)
    chosen = choose(probabilities(logits, settings, seen[:, None] if seen is not None else None), settings, generator)[:, 0]  # (B,)
    new = chosen[:, None].tolist()
    first_token_s = time.perf_counter() - started
    rows_of_heads = heads.rows(model.right.unembedding) if heads is not None and length.stands else None
    while True:
        for row, tokens, chosen_from in zip(active, new, logits, strict=True):
            row.take(tokens, chosen_from, stop, settings, on_tokens)
        if all(row.done for row in active):
            break
        if any(row.done for row in active) and not going_on:  # rows that are done cost nothing any more
            left = [i for i, row in enumerate(active) if not row.done]
            at = torch.tensor(left, device=device)
            cache.keep(left)
            active, chosen, hidden = [active[i] for i in left], chosen[at], hidden[at]
            seen = seen[at] if seen is not None else None
        if seen is not None:
            for i, row in enumerate(active):
                seen[i, row.tokens] = True
        pass_started = time.perf_counter()
        K = min(length(), max(settings.max_new_tokens - len(row.tokens) for row in active) - 1)
        draft = partial(heads.draft, model.right.embed_tokens, rows_of_heads) if K else None
        logits, new, counts, chosen, hidden = one_pass(model, cache, [row.position for row in active], hidden, chosen, K, draft, seen, settings, generator)
        for row in active:
            row.passes += 1
        length.told(K, counts, 1 + NOMINAL * K if settings.sampling else time.perf_counter() - pass_started)
    if going_on:
        cache.lengths = [length + max(0, len(row.tokens) - 1) for length, row in zip(prompt_lengths, rows, strict=True)]
    return Generation([row.tokens for row in rows], [row.logprobs for row in rows], first_token_s, time.perf_counter() - started, [row.passes for row in rows])


def _seen_with(seen: Tensor, drafts: Tensor) -> Tensor:
    """Tokens seen (B, V) → seen before each of K + 1 places (B, K + 1, V), the drafts (B, K) before it included."""
    K = drafts.shape[1]
    out = seen[:, None].repeat(1, K + 1, 1)
    for k in range(K):
        out[:, k + 1 :].scatter_(2, drafts[:, k, None, None].expand(-1, K - k, 1), True)
    return out


def _draw(logits: Tensor, settings: GenerationConfig, generator: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
    """A head's logits (B, V) → drafts (B,) and the distribution that they were drawn from; none where the likeliest is taken."""
    if not settings.sampling:
        return logits.max(-1).indices, None
    distribution = probabilities(logits, settings)
    return choose(distribution, settings, generator), distribution
