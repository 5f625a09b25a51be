"""One generate for every model: prefill, then passes that verify drafts of the multi-token heads, or none, and choose one more token."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.model import GenerationConfig
from models.kv_cache import DecodingCache, ImageKV
from models.layers import Rotary
from models.masks import NEVER, cache_mask
from models.multi_token import Drafts, draft_tree_mask
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


NUCLEUS = 512  # likeliest tokens among which those of top-p are looked for first


def probabilities(logits: Tensor, settings: GenerationConfig, seen: Tensor | None = None) -> Tensor:
    """Logits (…, V) → the distribution (…, V) that tokens are drawn from; all on the likeliest where `settings.sampling` is off.

    In this order: repetition penalty on tokens `seen` (…, V), temperature, top-k, top-p, min-p.
    """
    logits = logits.float()
    if (
        seen is not None and settings.repetition_penalty != 1.0
    ):  # arXiv 1909.05858: ÷ where positive, × where negative
        logits = torch.where(
            seen,
            torch.where(
                logits > 0, logits / settings.repetition_penalty, logits * settings.repetition_penalty
            ),
            logits,
        )
    if not settings.sampling:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    logits = logits / settings.temperature
    if settings.top_k and settings.top_k < logits.shape[-1]:
        # By rank, not by value: of equal ones no more than k stay.
        kept = logits.topk(settings.top_k).indices
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept, logits.gather(-1, kept))
    if settings.top_p < 1:
        made = logits.softmax(-1)
        ranked, ids = made.topk(min(NUCLEUS, made.shape[-1]))  # a full sort takes many times as long
        if (ranked.sum(-1) < settings.top_p).any():
            ranked, ids = made.sort(dim=-1, descending=True)
        before = ranked.cumsum(-1) - ranked  # the probability of all likelier tokens
        stays = (before < settings.top_p) | (
            before <= 0
        )  # the likeliest always, for before it there is nothing
        logits = torch.full_like(logits, -torch.inf).scatter(
            -1, ids, logits.gather(-1, ids).masked_fill(~stays, -torch.inf)
        )
    made = logits.softmax(-1)
    if settings.min_p:
        made = made.masked_fill(made < settings.min_p * made.amax(-1, keepdim=True), 0)
        made = made / made.sum(-1, keepdim=True)
    return made


def choose(distribution: Tensor, settings: GenerationConfig, generator: torch.Generator | None) -> Tensor:
    """Distributions (…, V) → tokens (…): the likeliest, or drawn."""
    if not settings.sampling:
        return distribution.max(-1).indices  # a quarter of argmax's time on a CPU
    return torch.multinomial(distribution.flatten(0, -2), 1, generator=generator).view(
        distribution.shape[:-1]
    )


def follow(drafts: Drafts, wanted: Tensor) -> list[list[int]]:
    """Greedy: each row's places from the token chosen last (0) on, as long as a draft is the token that is `wanted` (B, N + 1) at its parent."""
    paths = []
    for tokens, parents, want in zip(
        drafts.tokens.tolist(), drafts.parents.tolist(), wanted.tolist(), strict=True
    ):
        path = [0]
        for place, (token, parent) in enumerate(zip(tokens, parents, strict=True), start=1):
            if parent == path[-1] and token == want[parent]:
                path.append(place)
        paths.append(path)
    return paths


def accept(
    drafts: Tensor, proposed: Tensor, target: Tensor, generator: torch.Generator | None
) -> tuple[list[int], Tensor]:
    """Sampling: how many of each row's drafts stand, and the token after them (B,).

    `drafts` (B, K), a chain, were drawn from `proposed` (B, K, V); `target` (B, K + 1, V) is the model's own distribution at each of
    them and behind the last. A draft x stands with probability min(1, target(x) ÷ proposed(x)); at the first that
    does not, a token is drawn from what target has more than proposed. So tokens have exactly the target's
    distribution (arXiv 2211.17192, 2302.01318).
    """
    B, K = drafts.shape
    ratio = (
        target[:, :K].gather(-1, drafts[..., None])[..., 0] / proposed.gather(-1, drafts[..., None])[..., 0]
    )  # (B, K)
    uniform = torch.rand(B, K, generator=generator, device=drafts.device)
    counts = (uniform < ratio).long().cumprod(1).sum(1)
    beyond = F.pad(proposed, (0, 0, 0, 1))  # behind the last draft nothing was proposed
    rest = (target - beyond).clamp(min=0)[torch.arange(B), counts]  # (B, V)
    empty = (
        rest.sum(-1, keepdim=True) <= 0
    )  # equal to the last bit: then rejection has probability 0, but for rounding
    rest = torch.where(empty, target[torch.arange(B), counts], rest)
    return counts.tolist(), torch.multinomial(rest, 1, generator=generator)[:, 0]


TREE = 11  # drafts of a tree: with the token before them 12 rows (docs/experiments.md)
TREE_ROWS = 32  # a batch's most for trees: `Packed.MOST`


class Shape(NamedTuple):
    """Of drafts: a chain of `depth`, or where `width` is above 1 a tree."""

    depth: int
    width: int = 1


class DraftScheduler:
    """What to draft: what gives most tokens a second, by what was accepted and what passes took, as far as it may lose.

    The k-th draft's chance is a running mean, a shape's seconds the median of its last passes, for some are disturbed; before there are any, what
    `stands` says, and a guess. `purse` holds the plain passes that drafts may still lose: `LOSS` of the time so far, and what they gained, at most `PURSE`, of which
    the next answer gets no more than `CARRY`. A shape is made where all its drafts could fall without overdrawing it, as far as its cost is known. What is not tried
    is slowly hoped for again, so that a change in the text is noticed.
    """

    RECOVERY = 0.0003  # of the way back, at each pass
    LOSS, BUDGET, CARRY = (
        0.02,
        2.0,
        0.6,
    )  # 3 % is what answers may lose: plain passes between others take a little longer, too
    GUESS = 0.08  # what a draft costs, in plain passes; in trees twice that (docs/benchmarks.md)
    LAST, AGAIN = (
        5,
        64,
    )  # passes of a shape that are remembered; of all kinds, after which a plain one is timed again

    def __init__(
        self,
        acceptance_rates: Sequence[float],
        mode: str,
        width: int = 1,
        costs: dict[Shape, float] | None = None,
    ) -> None:
        """`stands`: a chain's chance of each draft to stand where those before it do; `width`: of a tree, 1 where only chains are made; `costs`: of passes, in plain ones, where they are not to be measured."""
        self.mode, self.most, self.width = mode, len(acceptance_rates), width
        self.prior_rates = [(1 + stood) / 2 for stood in acceptance_rates]
        self.acceptance_rates = {width: list(self.prior_rates)} | {
            1: list(acceptance_rates)
        }  # only what is made teaches, so a tree is believed to be better than it may be
        self.measured = costs is None
        self.seconds = {shape: deque([cost], self.LAST) for shape, cost in (costs or {}).items()}
        self.loss_budget, self.prompt_s, self.since_plain = 0.0, 0.0, 0
        self.retried: set[Shape] = set()  # whose first pass was forgotten

    def __call__(self) -> Shape:
        best, rate = Shape(0), 1.0
        if self.mode != "auto" or not self.most:
            return best if self.mode == "off" else Shape(self.most, self.width)
        if self.measured and (len(self.seconds.get(best, ())) < 3 or self.since_plain >= self.AGAIN):
            return best
        for width, acceptance_rates in self.acceptance_rates.items():
            tokens, chance = 1.0, 1.0
            for k, stood in enumerate(acceptance_rates, start=1):
                chance *= stood
                tokens += chance
                shape = Shape(k, width)
                if width > 1 and k < self.most and shape not in self.seconds:
                    continue
                cost = self.cost(shape)
                if tokens / cost > 1.02 * rate and cost - 1 <= self.loss_budget:
                    best, rate = shape, tokens / cost
        return best

    def cost(self, shape: Shape) -> float:
        """Of a pass, in plain ones: what is not measured follows from the nearest chain that is."""
        plain = _usual(self.seconds[Shape(0)])
        if shape in self.seconds:
            return _usual(self.seconds[shape]) / plain
        if shape.width > 1:
            return 2 * self.cost(Shape(shape.depth)) - 1
        known = [s.depth for s in self.seconds if s.depth and s.width == 1]
        if not known:
            return 1 + self.GUESS * shape.depth
        near = min(known, key=lambda depth: abs(depth - shape.depth))
        return 1 + (_usual(self.seconds[Shape(near)]) / plain - 1) * shape.depth / near

    def start_answer(self, seconds: float) -> None:
        """An answer begins; its first token took so long."""
        self.loss_budget, self.prompt_s = min(self.loss_budget, self.CARRY), seconds if self.measured else 0.0
        for shape in [
            shape
            for shape, times in self.seconds.items()
            if self.measured and shape.depth and len(times) == 1 and shape not in self.retried
        ]:
            del self.seconds[shape]  # one pass may have been disturbed: it is guessed, and tried, once again
            self.retried.add(shape)

    def record_step(self, shape: Shape, counts: Sequence[int], tokens: Sequence[int], seconds: float) -> None:
        """A pass over drafts of a shape: of each row the drafts that stood, and the tokens that its answer got."""
        known = shape in self.seconds
        if self.measured:
            self.seconds.setdefault(shape, deque(maxlen=self.LAST)).append(seconds)
        self.since_plain = self.since_plain + 1 if shape.depth else 0
        mean, gain = sum(tokens) / len(tokens), 0.0
        if Shape(0) in self.seconds:
            plain = _usual(self.seconds[Shape(0)])
            if shape.depth:  # the first pass of a shape, which prepares kernels, costs what it took; later ones may be disturbed
                gain = mean - (
                    min(seconds / plain, 2 * self.cost(shape) if known else 8.0)
                    if self.measured
                    else self.cost(shape)
                )
            gain, self.prompt_s = gain + self.LOSS * self.prompt_s / plain, 0.0
        self.loss_budget = max(-1.0, min(self.loss_budget + gain + self.LOSS * mean, self.BUDGET))
        for acceptance_rates in self.acceptance_rates.values():
            for k, prior in enumerate(self.prior_rates):
                acceptance_rates[k] += self.RECOVERY * max(0.0, prior - acceptance_rates[k])
        for count in counts:
            for k in range(min(shape.depth, count + 1)):
                self.acceptance_rates[shape.width][k] += 0.06 * (
                    (k < count) - self.acceptance_rates[shape.width][k]
                )


def _usual(seconds: Sequence[float]) -> float:
    return sorted(seconds)[(len(seconds) - 1) // 2]


def check_heads(model: Any, settings: GenerationConfig) -> None:
    if settings.speculative == "on" and model.heads is None:
        raise UsageError(
            "--speculative on: this model has no multi-token heads (python -m tools.train_heads gives it some)"
        )


NOMINAL = 0.2  # what a draft costs, in passes, where the clock must not count: in drawn answers, with drawing (docs/benchmarks.md)


def draft_scheduler(heads: Any, rows: int, settings: GenerationConfig) -> DraftScheduler:
    """For greedy answers one that goes on learning from call to call. Sampled answers must depend on the seed alone: theirs begins anew."""
    most = min(settings.draft_tokens or heads.count, heads.count)
    width = 1 if settings.sampling or rows * (TREE + 1) > TREE_ROWS else settings.draft_width
    nominal = {Shape(k): 1 + NOMINAL * k for k in range(most + 1)} if settings.sampling else None
    new = DraftScheduler(heads.acceptance_rates[:most].tolist(), settings.speculative, width, nominal)
    return (
        new if settings.sampling else heads.shapes.setdefault((rows, most, width, settings.speculative), new)
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
    also = _seen_with(seen, tokens, sees) if seen is not None else None
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
    passed: tuple[Shape, float] | None = None  # the last pass: what it verified, and its seconds
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
        shape = Shape(
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
        passed = shape if shape.depth else Shape(0), time.perf_counter() - pass_started
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
    shape: Shape,
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
        embedding, unembed, hidden, chosen, shape.depth, lambda logits: _draw(logits, settings, generator)
    )


def _seen_with(seen: Tensor, tokens: Tensor, sees: Tensor) -> Tensor:
    """Tokens seen (B, V) → seen at each of N + 1 places (B, N + 1, V): also those of `tokens` (B, N + 1) that the place `sees` (B, N + 1, N + 1)."""
    also = torch.where(sees, tokens[:, None], tokens[:, :1, None])  # every place sees the first
    return seen[:, None].repeat(1, tokens.shape[1], 1).scatter_(2, also, True)


def _draw(
    logits: Tensor, settings: GenerationConfig, generator: torch.Generator | None
) -> tuple[Tensor, Tensor | None]:
    """A head's logits (B, V) → drafts (B,) and the distribution that they were drawn from; none where the likeliest is taken."""
    if not settings.sampling:
        return logits.max(-1).indices, None
    distribution = probabilities(logits, settings)
    return choose(distribution, settings, generator), distribution
