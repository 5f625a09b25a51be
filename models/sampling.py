"""Sampling: the distribution that tokens are drawn from, the choice of a token, and the acceptance of drafts."""

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.model import GenerationConfig
from models.multi_token import Drafts

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


def seen_with(seen: Tensor, tokens: Tensor, sees: Tensor) -> Tensor:
    """Tokens seen (B, V) → seen at each of N + 1 places (B, N + 1, V): also those of `tokens` (B, N + 1) that the place `sees` (B, N + 1, N + 1)."""
    also = torch.where(sees, tokens[:, None], tokens[:, :1, None])  # every place sees the first
    return seen[:, None].repeat(1, tokens.shape[1], 1).scatter_(2, also, True)


def draw(
    logits: Tensor, settings: GenerationConfig, generator: torch.Generator | None
) -> tuple[Tensor, Tensor | None]:
    """A head's logits (B, V) → drafts (B,) and the distribution that they were drawn from; none where the likeliest is taken."""
    if not settings.sampling:
        return logits.max(-1).indices, None
    distribution = probabilities(logits, settings)
    return choose(distribution, settings, generator), distribution
