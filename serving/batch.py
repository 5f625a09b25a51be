"""The decoding batch of a server: rows join and leave between decode steps, each with settings of its own.

Row by row the tokens are those of `models.generation.generate` on the row alone: greedy ones always, sampled
ones where no drafts are used. With drafts, which are always the heads' likeliest tokens, sampled answers keep
their distribution.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.model import GenerationConfig
from models.generation import VLM, decode_step
from models.kv_cache import DecodingCache, compact_rows
from models.masks import NEVER
from models.multi_token import Drafts
from models.sampling import (
    DraftGuard,
    accept_greedy,
    accept_sampled,
    probabilities,
    seen_after_drafts,
)

GREEDY = GenerationConfig()
SLOTS = 128  # the cache grows by multiples of these


class Step(NamedTuple):
    """What a decode step gave one row."""

    tokens: list[int]  # new ones; the last is the model's own choice after the accepted drafts
    drafts: list[int]  # proposed ones; the first len(tokens) − 1 were accepted
    logprobs: list[dict[int, float]]  # of each new token: the token's first, then the likeliest; often empty
    finite: bool  # False: the model's states are not, and the tokens mean nothing


@dataclass(eq=False)
class Row:
    """One answer in the batch."""

    settings: GenerationConfig
    capacity: int  # slots of the cache that it needs in all
    on_step: Callable[["Row", Step], bool]  # called after each decode step; True: the answer is over
    top_logprobs: int | None = None  # how many of the likeliest tokens to report; None: no logprobs at all
    # Masks logits (V,) in place to the tokens that may follow all tokens before; None: any.
    constraint: Callable[[list[int], Tensor], None] | None = None
    seen: Tensor | None = None  # (1, V), tokens that the repetition penalty counts
    tokens: list[int] = field(default_factory=list)
    done: bool = False
    generator: torch.Generator | None = None  # of a sampled answer

    @property
    def plain(self) -> bool:
        """Whether the largest logit decides alone."""
        return not self.settings.sampling and self.seen is None and self.constraint is None

    def accept(self, drafts: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Drafts (1, K) and their logits (1, K + 1, V) → as `accept_greedy`."""
        settings = self.settings
        if settings.sampling and self.generator is None:
            self.generator = torch.Generator(logits.device).manual_seed(settings.seed)
        if self.constraint is not None:  # it allows one token at a time
            drafts, logits = drafts[:, :0], logits[:, :1].clone()
            self.constraint(self.tokens, logits[0, 0])
        seen = seen_after_drafts(self.seen, drafts) if self.seen is not None else None
        target = probabilities(logits.nan_to_num(), settings, seen)
        if not settings.sampling:
            return accept_greedy(drafts, target)
        return accept_sampled(drafts, F.one_hot(drafts, target.shape[-1]).float(), target, self.generator)


class SharedCache(DecodingCache):
    """A decoding cache that rows join. Its storage has room for more rows than there are."""

    def __init__(self, model: VLM) -> None:
        c, weight = model.right.config, model.right.embed_tokens.weight
        super().__init__(c.layers, 0, c.kv_heads, 0, c.head_size, weight.dtype, weight.device)
        self.storage = [*self.keys, *self.values], self.positions

    def join(self, cache: DecodingCache, row: int) -> None:
        """Add a row of another cache, without its padding. The storage must have room for it."""
        (layers, positions), B = self.storage, len(self.lengths)
        used = (cache.positions[row] != NEVER).nonzero()[:, 0]
        n = len(used)
        for stored, new in zip(layers, (*cache.keys, *cache.values), strict=True):
            stored[B, :, :n] = new[row, :, used]
        positions[B] = NEVER
        positions[B, :n] = cache.positions[row, used]
        self._view([*self.lengths, n])

    def store_anew(self, rows: int, slots: int) -> None:
        """Move to storage of so many rows and slots."""
        (layers, positions), B, used = self.storage, len(self.lengths), max(self.lengths, default=0)
        new_layers = [old.new_zeros(rows, old.shape[1], slots, old.shape[3]) for old in layers]
        new_positions = positions.new_full((rows, slots), NEVER)
        for old, new in zip(layers, new_layers, strict=True):
            new[:B, :, :used] = old[:B, :, :used]
        new_positions[:B, :used] = positions[:B, :used]
        self.storage = new_layers, new_positions
        self._view(self.lengths)

    def _view(self, lengths: list[int]) -> None:
        layers, positions = self.storage
        B, half = len(lengths), len(layers) // 2
        self.keys, self.values = [x[:B] for x in layers[:half]], [x[:B] for x in layers[half:]]
        self.positions, self.lengths = positions[:B], lengths


class Batch:
    """The rows that are being answered, and their decode step."""

    def __init__(self, model: VLM, drafts: str, max_rows: int, cache_bytes: int) -> None:
        """`drafts` as in `GenerationConfig.speculative`. The cache takes at most `cache_bytes`."""
        self.model, self.drafts, self.max_rows = model, drafts, max_rows
        self.rows: list[Row] = []
        self.cache = SharedCache(model)
        c, weight = model.right.config, model.right.embed_tokens.weight
        self.max_slots = cache_bytes // (2 * c.layers * c.kv_heads * c.head_size * weight.element_size())
        self.guards: dict[int, DraftGuard] = {}  # by the number of rows
        self.draftable = model.heads.draftable(model.right.unembedding) if model.heads is not None else None
        D, device = model.config.right.hidden_size, model.device
        self.tokens = self.positions = torch.empty(0, dtype=torch.int64, device=device)  # (B,), the last ones
        # (B, D), the states that they were chosen from
        self.hidden = torch.empty(0, D, dtype=weight.dtype, device=device)

    @property
    def spare(self) -> int:
        """Slots that a row needs besides its prompt and answer: for rejected drafts."""
        return 1 + (self.model.heads.count if self.model.heads is not None else 0)

    def fits(self, *capacities: int) -> bool:
        """Whether rows of so many slots may join now."""
        rows, slots = len(self.rows) + len(capacities), self._slots(*capacities)
        return rows <= self.max_rows and rows * slots <= self.max_slots

    def could_fit(self, capacity: int) -> bool:
        """Whether a row of so many slots may join an empty batch."""
        return -(-capacity // SLOTS) * SLOTS <= self.max_slots

    def _slots(self, *capacities: int) -> int:
        longest = max(*capacities, 0, *(row.capacity for row in self.rows))
        return -(-longest // SLOTS) * SLOTS

    @torch.inference_mode()
    def join(self, row: Row, cache: DecodingCache, index: int, state: Tensor, position: int) -> None:
        """Add a row: its prompt is row `index` of `cache`, with the last state (1, 1, D) at `position`.

        It chooses the row's first token, and so a row may be over before it has joined.
        """
        logits = self.model.right.logits(state)
        no_drafts = torch.empty(1, 0, dtype=torch.int64, device=state.device)
        tokens, counts = self._accept([row], no_drafts, logits)
        self._report([row], Drafts(no_drafts, None), tokens, counts, state, logits)
        if row.done:
            return
        stored_rows, stored_slots = self.cache.storage[1].shape
        rows, slots = len(self.rows) + 1, self._slots(row.capacity)
        if self.rows and rows * stored_slots <= self.max_slots:
            slots = max(slots, stored_slots)
        if rows > stored_rows or slots != stored_slots:
            rows = max(rows, min(2 * rows, self.max_rows, self.max_slots // slots))
            self.cache.store_anew(rows, slots)
        self.cache.join(cache, index)
        self.rows.append(row)
        self.tokens = torch.cat((self.tokens, tokens[:, 0]))
        self.positions = torch.cat((self.positions, self.positions.new_tensor([position + 1])))
        self.hidden = torch.cat((self.hidden, state[:, 0]))

    @torch.inference_mode()
    def step(self) -> None:
        """One decode step of all rows; those that are done then leave."""
        guard = self._guard()
        drafts = self._draft(guard.next_length())
        ids = torch.cat((self.tokens[:, None], drafts.tokens), 1)  # (B, K + 1)
        offsets = torch.arange(ids.shape[1], device=ids.device)
        states = decode_step(self.model, self.cache, ids, self.positions[:, None] + offsets)
        logits = self.model.right.logits(states)
        tokens, counts = self._accept(self.rows, drafts.tokens, logits)
        T, last = ids.shape[1], counts[:, None] - 1
        taken = self._report(self.rows, drafts, tokens, counts, states, logits)
        self.cache.truncate([n - T + count for n, count in zip(self.cache.lengths, taken, strict=True)])
        self.tokens, self.positions = tokens.gather(1, last)[:, 0], self.positions + counts
        self.hidden = states.take_along_dim(last[..., None], 1)[:, 0]
        guard.record(drafts.tokens.shape[1], taken)
        self.leave()

    def clear(self) -> None:
        """Remove all rows, and what a failed step may have left."""
        self.rows, self.cache = [], SharedCache(self.model)
        self.tokens, self.positions, self.hidden = self.tokens[:0], self.positions[:0], self.hidden[:0]

    def leave(self) -> None:
        """Remove the rows that are done."""
        done = [row.done for row in self.rows]
        if not any(done):
            return
        keep = compact_rows(done)
        index = torch.tensor(keep, dtype=torch.int64, device=self.tokens.device)
        self.cache.select_rows(keep)
        self.rows = [self.rows[i] for i in keep]
        self.tokens, self.positions, self.hidden = (
            x[index] for x in (self.tokens, self.positions, self.hidden)
        )

    def _guard(self) -> DraftGuard:
        heads, rows = self.model.heads, len(self.rows)
        if rows not in self.guards:
            settings = GenerationConfig(speculative=self.drafts)  # type: ignore[arg-type]
            self.guards[rows] = DraftGuard.of(heads, settings, rows, self.tokens.device)
        return self.guards[rows]

    def _draft(self, count: int) -> Drafts:
        heads, right = self.model.heads, self.model.right
        left = max(row.settings.max_new_tokens - len(row.tokens) for row in self.rows) - 1
        count = 0 if all(row.constraint is not None for row in self.rows) else min(count, left)
        if heads is None or self.draftable is None or count <= 0:
            return Drafts(self.tokens.new_empty(len(self.rows), 0), None)
        return heads.draft(right.embed_tokens, self.draftable, self.hidden, self.tokens, count, GREEDY)

    @staticmethod
    def _accept(rows: Sequence[Row], drafts: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens (B, K + 1) that `logits` (B, K + 1, V) accept, and how many of each row's count (B,)."""
        tokens, counts = accept_greedy(drafts, logits)
        for i, row in enumerate(rows):
            if not row.plain:
                own, counts[i : i + 1] = row.accept(drafts[i : i + 1], logits[i : i + 1])
                tokens[i, : own.shape[1]] = own[0]
        return tokens, counts

    @staticmethod
    def _report(
        rows: Sequence[Row], drafts: Drafts, tokens: Tensor, counts: Tensor, states: Tensor, logits: Tensor
    ) -> list[int]:
        """Give each row its new tokens → how many there are. Arguments are of all rows."""
        finite = torch.isfinite(states).flatten(1).all(1, keepdim=True)  # (B, 1)
        report = torch.cat((finite, counts[:, None], tokens, drafts.tokens), 1).tolist()
        T, taken = tokens.shape[1], []
        for i, (row, (row_finite, count, *ids)) in enumerate(zip(rows, report, strict=True)):
            new, logprobs = ids[:count], []
            if row.top_logprobs is not None:
                logprobs = top_logprobs(logits[i, :count], new, row.top_logprobs)
            row.tokens += new
            if row.seen is not None:
                row.seen[0, new] = True
            row.done = row.on_step(row, Step(new, ids[T:], logprobs, bool(row_finite))) or row.done
            taken.append(count)
        return taken


def top_logprobs(logits: Tensor, tokens: list[int], count: int) -> list[dict[int, float]]:
    """Log-probabilities by `logits` (T, V) of each of T tokens, and of the `count` likeliest ones."""
    logprobs = logits.float().log_softmax(-1)
    values, ids = (x.tolist() for x in logprobs.topk(count)) if count else ([[]] * len(tokens),) * 2
    own = logprobs[torch.arange(len(tokens)), tokens].tolist()
    return [
        {token: value, **dict(zip(row_ids, row_values, strict=True))}
        for token, value, row_ids, row_values in zip(tokens, own, ids, values, strict=True)
    ]
