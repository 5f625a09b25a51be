"""Multi-token heads: head k predicts token t+1+k from the right tower's hidden state at t.

    hidden state at t ─┐
    token t+1 ─────────┴→ head 1 → state, token t+2 ─┐
                          token t+2 ─────────────────┴→ head 2 → state, token t+3 …

All heads are one small module, applied K times: a recurrent drafter (arXiv 2403.09919). It is sequential
like DeepSeek-V3's (arXiv 2412.19437 §2.2), but has no attention and so no cache. docs/log/experiments.md has
the alternatives.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.model import DecoderConfig, GenerationConfig, ModelConfig, MultiTokenConfig
from models.layers import RMSNorm
from models.losses import cross_entropy
from models.sampling import draw_draft


class Drafts(NamedTuple):
    """K drafted tokens after each row's last one."""

    tokens: Tensor  # (B, K)
    proposed: Tensor | None  # (B, K, V), the distributions they were drawn from; None where not sampled


class MultiTokenHeads(nn.Module):
    """`config.heads` heads over hidden states (…, D), with the right tower's embedding and unembedding.

    With `config.vocabulary` they draft only that many tokens, `draft_ids`: the unembedding is most of a
    draft's cost (arXiv 2502.14856).
    """

    draft_ids: Tensor  # (V′,)
    acceptance_rates: Tensor  # (K,)
    compiled_draft: Callable[..., Drafts] | None = None  # `draft` by torch.compile, without sampling

    def __init__(self, config: MultiTokenConfig, decoder: DecoderConfig, vocab_size: int) -> None:
        super().__init__()
        self.count, D, M = config.heads, decoder.hidden_size, config.mlp_size
        self.state_norm, self.token_norm = RMSNorm(D, decoder.norm_eps), RMSNorm(D, decoder.norm_eps)
        self.carry = nn.Linear(2 * D, D, bias=False)
        self.gate_up = nn.Linear(2 * D, 2 * M, bias=False)
        self.down = nn.Linear(M, D, bias=False)
        self.norm = RMSNorm(D, decoder.norm_eps)
        # The first merges of a BPE tokenizer are its commonest.
        self.register_buffer("draft_ids", torch.arange(min(config.vocabulary or vocab_size, vocab_size)))
        # Of each draft, given that those before it are accepted.
        self.register_buffer("acceptance_rates", torch.full((self.count,), 0.5))
        with torch.no_grad():  # an untrained head passes its state on unchanged
            self.carry.weight.zero_()[:, :D].fill_diagonal_(1.0)
            nn.init.normal_(self.gate_up.weight, std=0.02)
            self.down.weight.zero_()

    def step(self, state: Tensor, embedding: Tensor) -> Tensor:
        """Apply one head: the state before it and the next token's embedding, (…, D) both → its state."""
        token = self.token_norm(embedding)
        both, normed = torch.cat((state, token), -1), torch.cat((self.state_norm(state), token), -1)
        gate, up = self.gate_up(normed).chunk(2, -1)
        return self.carry(both) + self.down(F.silu(gate) * up)

    def losses(
        self, hidden: Tensor, labels: Tensor, documents: Tensor, embedding: nn.Embedding, unembedding: Tensor
    ) -> Tensor:
        """Cross-entropy of every head, summed over its targets: (K,).

        `hidden` (B, R, D); `labels`, `documents` (B, R) as in the batch. Head k's target is the label k
        positions on, where it and all before it are supervised and of one document (`chains`). Targets that
        cannot be drafted count 0. Heads run one after another, so memory is that of one head.
        """
        targets = chains(labels, documents, self.count)  # (S, K + 1)
        state = hidden[labels != -100]  # (S, D)
        # Token id → index in `draft_ids`; −100 for tokens that cannot be drafted.
        draft_index = torch.full((len(unembedding),), -100, device=labels.device)  # (V,)
        draft_index[self.draft_ids] = torch.arange(len(self.draft_ids), device=labels.device)
        draftable = self.draftable(unembedding)
        sums = []
        for k in range(1, self.count + 1):
            state, targets = state[targets[:, k] >= 0], targets[targets[:, k] >= 0]
            state = self.step(state, embedding(targets[:, k - 1]))
            sums.append(cross_entropy(self.norm(state), draftable, draft_index[targets[:, k]]).sum())
        return torch.stack(sums)

    def draftable(self, unembedding: Tensor) -> Tensor:
        """The rows of the unembedding (V, D) for `draft_ids`, (V′, D): a copy, unless they are all."""
        return unembedding[self.draft_ids] if len(self.draft_ids) < len(unembedding) else unembedding

    def draft(
        self,
        embedding: nn.Embedding,
        draftable: Tensor,
        hidden: Tensor,
        tokens: Tensor,
        count: int,
        settings: GenerationConfig,
        generator: torch.Generator | None = None,
    ) -> Drafts:
        """Draft `count` tokens after `tokens` (B,), which were chosen from `hidden` (B, D).

        `draftable` as returned by the method of that name, which copies: once for all drafts.
        """
        drafts, proposed = tokens.new_empty(len(tokens), count), None
        if settings.sampling:
            proposed = hidden.new_zeros(*drafts.shape, embedding.num_embeddings, dtype=torch.float32)
        for k in range(count):
            hidden = self.step(hidden, embedding(tokens))
            index, distribution = draw_draft(F.linear(self.norm(hidden), draftable), settings, generator)
            tokens = drafts[:, k] = self.draft_ids[index]
            if proposed is not None and distribution is not None:
                proposed[:, k, self.draft_ids] = distribution
        return Drafts(drafts, proposed)


def head_predictions(
    heads: MultiTokenHeads,
    hidden: Tensor,
    labels: Tensor,
    documents: Tensor,
    embedding: nn.Embedding,
    unembedding: Tensor,
) -> tuple[Tensor, Tensor]:
    """Each head's likeliest token at each supervised position, and its target: (S, K) both.

    The tokens in between are the true ones. −1 where there is no target. Arguments as in `losses`.
    """
    all_targets = targets = chains(labels, documents, heads.count)  # (S, K + 1)
    predicted = torch.full_like(all_targets[:, 1:], -1)
    at = torch.arange(len(all_targets), device=labels.device)
    state, draftable = hidden[labels != -100], heads.draftable(unembedding)
    for k in range(1, heads.count + 1):
        has_target = targets[:, k] >= 0
        state, targets, at = state[has_target], targets[has_target], at[has_target]
        state = heads.step(state, embedding(targets[:, k - 1]))
        predicted[at, k - 1] = heads.draft_ids[F.linear(heads.norm(state), draftable).argmax(-1)]
    return predicted, all_targets[:, 1:]


def make_heads(config: ModelConfig, vocab_size: int) -> MultiTokenHeads | None:
    """The heads of a model's configuration, or None."""
    return MultiTokenHeads(config.multi_token, config.right, vocab_size) if config.multi_token.heads else None


def chains(labels: Tensor, documents: Tensor, heads: int) -> Tensor:
    """The next token and the heads' targets at every supervised position, (S, heads + 1).

    Positions are in the order of `labels[labels != -100]`. A chain ends with its document or before an
    unsupervised token; from there on it is −1.

        labels     . . a b c | d .        chains of two heads:  a b c   b c −   c − −   d − −
        documents  0 0 0 0 0 | 1 1
    """
    B, R = labels.shape
    out = labels.new_full((B, R, heads + 1), -1)
    supervised = labels != -100  # and so all labels before it in the chain
    out[..., 0] = labels
    for k in range(1, heads + 1):
        if k >= R:
            break
        same_document = documents[:, k:] == documents[:, :-k]
        supervised = supervised[:, :-1] & (labels[:, k:] != -100) & same_document
        out[:, : R - k, k] = labels[:, k:].masked_fill(~supervised, -1)
    return out[labels != -100]
