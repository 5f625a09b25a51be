"""Logits → tokens: the distribution, the choice of a token, and the acceptance of drafts."""

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.model import GenerationConfig

NUCLEUS = 512  # top-p sorts this many of the likeliest tokens first, and all only where they are too few


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
