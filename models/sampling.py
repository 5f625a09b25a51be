"""Logits → tokens: the distribution, the choice of a token, the acceptance of drafts, and their number."""

from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.model import GenerationConfig

NUCLEUS = 512  # top-p sorts this many of the likeliest tokens first, and all only where they are too few

# Cost of drafting and verifying one token, as a share of a decode step of one row without drafts
# (docs/benchmarks.md). Sampled drafts need two distributions over the vocabulary each.
DRAFT_COST, SAMPLED_DRAFT_COST = 0.1, 0.2


def probabilities(logits: Tensor, settings: GenerationConfig, seen: Tensor | None = None) -> Tensor:
    """Logits (…, V) → the distribution (…, V) to draw from; one-hot without `settings.sampling`.

    In this order: repetition penalty on the tokens `seen` (…, V), temperature, top-k, top-p, min-p.
    """
    logits = logits.float()
    penalty = settings.repetition_penalty
    if seen is not None and penalty != 1.0:  # arXiv 1909.05858
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if not settings.sampling:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    logits = logits / settings.temperature
    if settings.top_k and settings.top_k < logits.shape[-1]:
        # By rank, not by value: equal logits never leave more than k tokens.
        ids = logits.topk(settings.top_k).indices
        logits = torch.full_like(logits, -torch.inf).scatter(-1, ids, logits.gather(-1, ids))
    if settings.top_p < 1:
        logits = _top_p(logits, settings.top_p)
    distribution = logits.softmax(-1)
    if settings.min_p:
        threshold = settings.min_p * distribution.amax(-1, keepdim=True)
        distribution = distribution.masked_fill(distribution < threshold, 0)
        distribution = distribution / distribution.sum(-1, keepdim=True)
    return distribution


def _top_p(logits: Tensor, top_p: float) -> Tensor:
    """Set logits (…, V) outside the nucleus to −∞ (arXiv 1904.09751). The likeliest token always stays."""
    distribution = logits.softmax(-1)
    # A full sort takes many times as long as this top-k.
    ranked, ids = distribution.topk(min(NUCLEUS, distribution.shape[-1]))
    # A GPU sorts sooner than it answers.
    if ranked.device.type != "cpu" or (ranked.sum(-1) < top_p).any():
        ranked, ids = distribution.sort(dim=-1, descending=True)
    before = ranked.cumsum(-1) - ranked  # the probability of all likelier tokens
    inside = (before < top_p) | (before <= 0)
    nucleus = logits.gather(-1, ids).masked_fill(~inside, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(-1, ids, nucleus)


def choose(distribution: Tensor, settings: GenerationConfig, generator: torch.Generator | None) -> Tensor:
    """Distributions (…, V) → tokens (…): drawn, or the likeliest without `settings.sampling`."""
    if not settings.sampling:
        return distribution.max(-1).indices  # a quarter of argmax's time on a CPU
    drawn = torch.multinomial(distribution.flatten(0, -2), 1, generator=generator)
    return drawn.view(distribution.shape[:-1])


def draw_draft(
    logits: Tensor, settings: GenerationConfig, generator: torch.Generator | None
) -> tuple[Tensor, Tensor | None]:
    """Choose a draft per row from a head's logits (B, V′).

    Returns the drafts (B,), as indices into V′, and the distribution (B, V′) they were drawn from, or None
    without `settings.sampling`, where they are the likeliest.
    """
    if not settings.sampling:
        return logits.max(-1).indices, None
    distribution = probabilities(logits, settings)
    return choose(distribution, settings, generator), distribution


def accept_greedy(drafts: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Accept drafts while they equal the model's own choice.

    `drafts` (B, K); `target` (B, K + 1, V), where the largest value is the choice: logits or a distribution.
    Returns tokens (B, K + 1) and how many of each row's count (B,): the accepted drafts, and one more.
    """
    choices = target.max(-1).indices  # (B, K + 1)
    return choices, 1 + (drafts == choices[:, :-1]).long().cumprod(1).sum(1)


def accept_sampled(
    drafts: Tensor, proposed: Tensor, target: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Accept sampled drafts; returns as `accept_greedy`.

    `drafts` (B, K) were drawn from `proposed` (B, K, V). `target` (B, K + 1, V) is the model's own
    distribution at each draft and after the last. A draft x is accepted with probability
    min(1, target(x) ÷ proposed(x)). After the first rejection a token is drawn from the positive part of
    target − proposed. So tokens have exactly the target's distribution (arXiv 2211.17192, 2302.01318).
    """
    B, K = drafts.shape
    ids = drafts[..., None]
    ratio = target[:, :K].gather(-1, ids)[..., 0] / proposed.gather(-1, ids)[..., 0]  # (B, K)
    uniform = torch.rand(B, K, generator=generator, device=drafts.device)
    accepted = (uniform < ratio).long().cumprod(1).sum(1, keepdim=True)  # (B, 1)
    padded = F.pad(proposed, (0, 0, 0, 1))  # nothing is proposed after the last draft
    own = target.take_along_dim(accepted[..., None], 1)[:, 0]  # (B, V)
    residual = (own - padded.take_along_dim(accepted[..., None], 1)[:, 0]).clamp(min=0)
    # Without a residual the two are equal: a rejection has probability 0, but for rounding.
    residual = torch.where(residual.sum(-1, keepdim=True) <= 0, own, residual)
    drawn = torch.multinomial(residual, 1, generator=generator)  # (B, 1)
    return F.pad(drafts, (0, 1)).scatter(1, accepted, drawn), accepted[:, 0] + 1


def seen_after_drafts(seen: Tensor, drafts: Tensor) -> Tensor:
    """Tokens `seen` (B, V) before the drafts (B, K), and after each of them: (B, K + 1, V)."""
    added = F.one_hot(drafts, seen.shape[1]).cumsum(1) > 0  # (B, K, V)
    return seen[:, None] | F.pad(added, (0, 0, 1, 0))


def best_draft_length(acceptance_rates: Sequence[float], cost: float) -> int:
    """The number of drafts with the most tokens per second; 0 where drafts do not pay.

    `acceptance_rates` as in `MultiTokenHeads`; `cost`: of drafting and verifying a token, in decode steps.
    """
    tokens = list(accumulate(accumulate(acceptance_rates, mul), initial=1.0))  # of a step with k drafts
    return max(range(len(tokens)), key=lambda k: tokens[k] / (1 + cost * k))


class DraftGuard:
    """Turns drafts off while too few are accepted, and tries again later.

    It counts tokens and has no clock, so that a sampled answer depends on its batch and seed alone. `balance`
    is what drafts have won, in decode steps: accepted drafts minus `cost` for every draft, at most `LIMIT`.
    """

    LIMIT = 2.0  # decode steps that drafts may lose before they are turned off, half of it in a later trial
    PAUSE = 64  # decode steps without drafts before a trial

    def __init__(self, draft_length: int, cost: float, always: bool = False, growth: float = 0.0) -> None:
        """`growth`: how much of `cost` each further row of the batch adds."""
        self.draft_length, self.cost, self.always, self.growth = draft_length, cost, always, growth
        self.balance, self.pause = 0.0, 0

    @classmethod
    def of(cls, heads: Any, settings: GenerationConfig, rows: int, device: torch.device) -> "DraftGuard":
        """A guard for one call of `rows`. Without `heads`, or with `speculative = off`, it is idle."""
        if heads is None or settings.speculative == "off":
            return cls(0, 0.0)
        cost = SAMPLED_DRAFT_COST if settings.sampling else DRAFT_COST
        # A CPU's time grows with the tokens of a step; a GPU waits for the weights, and a few more are free.
        growth = 0.5 if device.type == "cpu" else 0.0
        guard = cls(0, cost, settings.speculative == "on", growth)
        if guard.cost_in(rows) < 1 or guard.always:  # else even accepted drafts would not pay
            rates = heads.acceptance_rates.tolist()
            length = settings.draft_tokens or best_draft_length(rates, guard.cost_in(rows))
            # At least one: this text may be easier than what `acceptance_rates` were measured on.
            guard.draft_length = min(max(length, 1), heads.count)
        return guard

    def cost_in(self, rows: int) -> float:
        """Cost of one draft for each of `rows`, in decode steps of all of them."""
        return self.cost * (1 + self.growth * (rows - 1))

    def next_length(self) -> int:
        """Drafts of the next decode step."""
        return 0 if self.pause else self.draft_length

    def record(self, drafts: int, tokens: Sequence[int]) -> None:
        """Record a decode step of `drafts` per row, and how many `tokens` each row's answer got."""
        if not drafts or self.always:
            self.pause = max(0, self.pause - 1)
            return
        gain = sum(tokens) / len(tokens) - 1 - self.cost_in(len(tokens)) * drafts
        self.balance = min(self.balance + gain, self.LIMIT)
        if self.balance <= -self.LIMIT:
            self.pause, self.balance = self.PAUSE, -self.LIMIT / 2
