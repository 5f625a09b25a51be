"""Multi-token heads: head k predicts the token k places behind the next one, from the right tower's hidden state and the tokens in between.

    hidden state at t ─┐
    token t+1 ─────────┴→ head 1 → state, token t+2 ─┐
                          token t+2 ─────────────────┴→ head 2 → state, token t+3 …

The heads are one small module that is applied again and again (a recurrent drafter, as in arXiv 2403.09919; sequential
like DeepSeek-V3's, arXiv 2412.19437 §2.2, but without attention, so that there is no cache to keep). What else was tried,
and what it gave, stands in docs/experiments.md.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.model import DecoderConfig, ModelConfig, MultiTokenConfig
from models.layers import RMSNorm
from models.losses import cross_entropy


class Drafts(NamedTuple):
    """Guesses at what follows the token chosen last. They form a chain, or a tree: there several guesses at one place are followed.

    Places: 0 is the token chosen last, n the n-th draft. A draft's parent is the place of the token before it, and stands before it.
    """

    tokens: Tensor  # (B, N)
    parents: Tensor  # (B, N)
    proposed: Tensor | None = None  # (B, N, V): what each was drawn from; None where the likeliest are taken


class MultiTokenHeads(nn.Module):
    """`config.heads` heads over hidden states (…, D). They share the right tower's embedding and unembedding.

    With `config.vocabulary` they can only draft that many tokens, those in `draft_ids`: a draft is a guess, and the
    unembedding is most of what a guess costs (arXiv 2502.14856).
    """

    unembed: Callable[[Tensor], Tensor] | None = None  # a faster form of `unembedder`, set from outside
    draft_ids: Tensor  # (V′,)
    acceptance_rates: Tensor  # (K,)

    def __init__(self, config: MultiTokenConfig, decoder: DecoderConfig, vocab_size: int) -> None:
        super().__init__()
        self.count, D, M = config.heads, decoder.hidden_size, config.mlp_size
        self.state_norm, self.token_norm = RMSNorm(D, decoder.norm_eps), RMSNorm(D, decoder.norm_eps)
        self.carry = nn.Linear(2 * D, D, bias=False)
        self.gate_up = nn.Linear(2 * D, 2 * M, bias=False)
        self.down = nn.Linear(M, D, bias=False)
        self.norm = RMSNorm(D, decoder.norm_eps)
        ids = torch.arange(
            min(config.vocabulary or vocab_size, vocab_size)
        )  # the first merges of a BPE are its commonest
        self.register_buffer("draft_ids", ids)
        self.register_buffer(
            "acceptance_rates", torch.full((self.count,), 0.5)
        )  # each draft's chance where those before it stand, as far as it is known
        self.shapes: dict[Any, Any] = {}  # models/generation.py: which drafts pay
        with torch.no_grad():  # at first a head carries the state on as it is
            self.carry.weight.zero_()[:, :D].fill_diagonal_(1.0)
            nn.init.normal_(self.gate_up.weight, std=0.02)
            self.down.weight.zero_()

    def step(self, state: Tensor, embedding: Tensor) -> Tensor:
        """One head: the state before it and the embedding of the token just known, (…, D) both → its own state (…, D)."""
        token = self.token_norm(embedding)
        both, normed = torch.cat((state, token), -1), torch.cat((self.state_norm(state), token), -1)
        gate, up = self.gate_up(normed).chunk(2, -1)
        return self.carry(both) + self.down(F.silu(gate) * up)

    def losses(
        self, hidden: Tensor, labels: Tensor, documents: Tensor, embedding: nn.Embedding, unembedding: Tensor
    ) -> Tensor:
        """Every head's cross-entropy, summed over its targets: (K,).

        `hidden` (B, R, D), `labels` and `documents` (B, R) as in the batch. Head k's target is `labels` k places on, where it and
        all before it are supervised and of one document (`chains`); one that no head can draft counts nothing. Heads come in turn,
        their logits in chunks: the memory is that of one head.
        """
        targets = chains(labels, documents, self.count)  # (S, K + 1)
        state = hidden[labels != -100]  # (S, D)
        place = torch.full((len(unembedding),), -100, device=labels.device)
        place[self.draft_ids] = torch.arange(len(self.draft_ids), device=labels.device)
        rows = self.rows(unembedding)
        sums = []
        for k in range(1, self.count + 1):
            state, targets = state[targets[:, k] >= 0], targets[targets[:, k] >= 0]
            state = self.step(state, embedding(targets[:, k - 1]))
            sums.append(
                cross_entropy(self.norm(state), rows, place[targets[:, k]]).sum()
            )  # −100: a token that no head can draft
        return torch.stack(sums)

    def predictions(
        self, hidden: Tensor, labels: Tensor, documents: Tensor, embedding: nn.Embedding, unembedding: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What every head says at each supervised position where all tokens before are the true ones, and its targets: (S, K) both, −1 where there is none. Arguments as of `losses`."""
        every = targets = chains(labels, documents, self.count)
        said, at = torch.full_like(every[:, 1:], -1), torch.arange(len(every), device=labels.device)
        state, unembed = hidden[labels != -100], self.unembedder(unembedding)
        for k in range(1, self.count + 1):
            known = targets[:, k] >= 0
            state, targets, at = state[known], targets[known], at[known]
            state = self.step(state, embedding(targets[:, k - 1]))
            said[at, k - 1] = self.draft_ids[unembed(self.norm(state)).argmax(-1)]
        return said, every[:, 1:]

    def rows(self, unembedding: Tensor) -> Tensor:
        """What of the unembedding (V, D) drafts are made with, (V′, D): a copy, where not all tokens can be drafted."""
        return unembedding[self.draft_ids] if len(self.draft_ids) < len(unembedding) else unembedding

    def unembedder(self, unembedding: Tensor) -> Callable[[Tensor], Tensor]:
        """Normed states (…, D) → logits of the tokens that can be drafted (…, V′)."""
        if self.unembed is not None:
            return self.unembed
        rows = self.rows(unembedding)
        return lambda normed: F.linear(normed, rows)

    def draft(
        self,
        embedding: nn.Embedding,
        unembed: Callable[[Tensor], Tensor],
        hidden: Tensor,
        tokens: Tensor,
        count: int,
        pick: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    ) -> Drafts:
        """`hidden` (B, D) at the last verified token and the token chosen after it (B,) → a chain of `count` drafts. `unembed`: what `unembedder` gives.

        `pick` makes a token of each row's logits (B, V′), and says the distribution it was drawn from or None.
        """
        drafts, proposed = [], []
        for _ in range(count):
            hidden = self.step(hidden, embedding(tokens))
            place, distribution = pick(unembed(self.norm(hidden)))
            tokens = self.draft_ids[place]
            drafts.append(tokens)
            if distribution is not None:
                proposed.append(
                    distribution.new_zeros(len(tokens), embedding.num_embeddings).index_copy_(
                        1, self.draft_ids, distribution
                    )
                )
        parents = torch.arange(count, device=tokens.device).expand(len(tokens), count)
        return Drafts(torch.stack(drafts, 1), parents, torch.stack(proposed, 1) if proposed else None)

    def tree(
        self,
        embedding: nn.Embedding,
        unembed: Callable[[Tensor], Tensor],
        hidden: Tensor,
        tokens: Tensor,
        depth: int,
        width: int,
        size: int,
    ) -> Drafts:
        """As `draft`, but the `size` likeliest drafts, by what the heads believe, of all that are found on the way.

        At each of `depth` steps the `width` likeliest ways so far are followed, and of each the `width` likeliest next tokens (arXiv 2406.16858).
        """
        B, D = hidden.shape
        states, ways, place, belief = (
            hidden[:, None],
            tokens[:, None],
            tokens.new_zeros(B, 1),
            hidden.new_zeros(B, 1, dtype=torch.float32),
        )  # (B, w, …)
        found: list[
            tuple[Tensor, Tensor, Tensor]
        ] = []  # tokens, parents and log-probability of the whole way, (B, w · width) each
        count = 1  # places given away
        for _ in range(depth):
            states = self.step(states, embedding(ways))
            best, at = (
                unembed(self.norm(states)).float().log_softmax(-1).topk(min(width, len(self.draft_ids)))
            )  # (B, w, width)
            found.append(
                (
                    self.draft_ids[at].flatten(1),
                    place.repeat_interleave(best.shape[-1], 1),
                    (belief[..., None] + best).flatten(1),
                )
            )
            belief, top = found[-1][2].topk(min(width, found[-1][2].shape[1]))
            states = states.gather(1, (top // best.shape[-1])[..., None].expand(-1, -1, D))
            ways, place, count = found[-1][0].gather(1, top), count + top, count + found[-1][2].shape[1]
        every, parents, beliefs = (torch.cat(part, 1) for part in zip(*found, strict=True))  # (B, C)
        kept = (
            beliefs.sort(dim=1, descending=True, stable=True).indices[:, :size].sort(1).values
        )  # no draft is likelier than its parent, which comes first
        renamed = torch.zeros(B, count, dtype=torch.int64, device=tokens.device)
        renamed.scatter_(
            1, kept + 1, torch.arange(1, kept.shape[1] + 1, device=tokens.device).expand_as(kept)
        )
        return Drafts(every.gather(1, kept), renamed.gather(1, parents.gather(1, kept)))


def make_heads(config: ModelConfig, vocab_size: int) -> MultiTokenHeads | None:
    """The heads that a model's configuration asks for."""
    return MultiTokenHeads(config.multi_token, config.right, vocab_size) if config.multi_token.heads else None


def chains(labels: Tensor, documents: Tensor, heads: int) -> Tensor:
    """For every supervised position (in the order of `labels[labels != -100]`) the next token and what the heads are to predict, (S, heads + 1).

    −1 from where a chain ends: behind the document, or at a token that is not learnt.

        labels     . . a b c | d .        chains of two heads:  a b c   b c −   c − −   d − −
        documents  0 0 0 0 0 | 1 1
    """
    B, R = labels.shape
    out = labels.new_full((B, R, heads + 1), -1)
    whole = labels != -100
    out[..., 0] = labels
    for k in range(1, heads + 1):
        if k >= R:
            break
        whole = whole[:, :-1] & (labels[:, k:] != -100) & (documents[:, k:] == documents[:, :-k])
        out[:, : R - k, k] = labels[:, k:].masked_fill(~whole, -1)
    return out[labels != -100]


def draft_tree_mask(parents: Tensor) -> Tensor:
    """Parents (B, N) as in `Drafts` → (B, N + 1, N + 1): True where the second place is the first one, or comes before it on its way.

    parents 0 0 1      0 1 2 3
                    0  x
                    1  x x
                    2  x   x
                    3  x x   x
    """
    B, N = parents.shape
    steps = torch.eye(N + 1, device=parents.device).repeat(B, 1, 1)
    steps[:, 1:].scatter_(2, parents[..., None], 1.0)
    for _ in range(N.bit_length()):  # so many steps after one another; their number doubles each time
        steps = steps @ steps
    return steps > 0
