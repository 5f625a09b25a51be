"""Multi-token heads and self-speculation.

Losses against loops over positions, answers against plain decoding, draws against the exact distribution.
"""

import io
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import models.generation
from configs.model import GenerationConfig, ModelConfig, MultiTokenConfig
from configs.train import TrainConfig
from data.collators import collate, collate_prompts
from data.conversations import ask, text_of
from data.datasets import Sample
from eval.predictor import Predictor
from models.generation import DecodingBatch, generate
from models.kernels.packed_block import PackedBlock
from models.kv_cache import DecodingCache, compact_rows
from models.masks import NEVER
from models.multi_token import Drafts, chains
from models.sampling import (
    DraftGuard,
    accept_greedy,
    accept_sampled,
    best_draft_length,
    probabilities,
    seen_after_drafts,
)
from tests.conftest import TINY, TINY_MODEL, TURNS, lively_model, random_tiles, tiny_model
from tests.naive_dual_tower import Naive
from tests.programs import run_program
from tests.test_dual_tower import block_starts, make_sample
from tests.test_generation import naive_greedy, prompt_ids
from tools.train_heads import HeadsConfig, collect, question_batches
from training.optim import head_weights
from utils.errors import UsageError

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
WITH_HEADS = replace(TINY_MODEL, multi_token=MultiTokenConfig(heads=3, mlp_size=32))


def batch_of(renderer) -> dict[str, torch.Tensor]:
    return collate(
        [
            [
                make_sample(renderer, 1, [TURNS[:2]]),
                make_sample(renderer, 2, [[TURNS[2]], [TURNS[3]]], seed=1),
            ],
            [make_sample(renderer, 1, [TURNS], seed=2)],
        ],
        renderer.tokenizer.global_image,
    )


class TestLosses:
    def test_chains_stop_at_a_documents_end_and_at_unsupervised_tokens(self):
        labels = torch.tensor([[-100, 5, 6, 7, -100, 8, 9, 3, 4, -100]])
        documents = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 1, 1, -1]])
        expected = [
            [5, 6, 7, -1],
            [6, 7, -1, -1],
            [7, -1, -1, -1],
            [8, 9, -1, -1],
            [9, -1, -1, -1],
            [3, 4, -1, -1],
            [4, -1, -1, -1],
        ]
        assert chains(labels, documents, 3).tolist() == expected
        assert chains(labels[:, :2], documents[:, :2], 3).tolist() == [
            [5, -1, -1, -1]
        ]  # more heads than the row is long

    @pytest.mark.parametrize("vocabulary", [0, 151])
    def test_losses_are_those_of_a_loop_over_positions(self, tokenizer, renderer, vocabulary):
        """Head by head and position by position, with the whole logits.

        Tokens that cannot be drafted add nothing.
        """
        model = tiny_model(tokenizer, replace(TINY_MODEL, multi_token=MultiTokenConfig(3, 32, vocabulary)))
        heads, right, batch = model.heads, model.right, batch_of(renderer)
        torch.nn.init.normal_(heads.down.weight)
        if vocabulary:
            heads.draft_ids.copy_(torch.arange(0, 302, 2))
        output = model(**batch)
        expected = [0.0] * 3
        ids, labels, documents = batch["right_ids"], batch["labels"], batch["right_documents"]
        drafted = heads.draft_ids.tolist()
        for b in range(len(ids)):
            for t in range(ids.shape[1]):
                if labels[b, t] == -100:
                    continue
                state, known = output.hidden[b, t], labels[b, t]
                for k in range(3):
                    there = t + 1 + k
                    if (
                        there >= ids.shape[1]
                        or documents[b, there] != documents[b, t]
                        or labels[b, there] == -100
                    ):
                        break
                    state = heads.step(state, right.embed_tokens.weight[known])
                    known = labels[b, there]
                    if int(known) in drafted:
                        logits = (right.embed_tokens.weight @ heads.norm(state))[drafted]
                        expected[k] += float(-logits.log_softmax(0)[drafted.index(int(known))].detach())
        assert expected[0] > 0 and (vocabulary or min(expected) > 0)
        torch.testing.assert_close(
            output.head_loss_sums.detach(), torch.tensor(expected), rtol=1e-4, atol=1e-4
        )

    def test_heads_alone_learn_where_the_rest_is_frozen(self, tokenizer, renderer):
        model = tiny_model(tokenizer, WITH_HEADS)
        for p in (model.heads.down.weight, model.heads.carry.weight):
            torch.nn.init.normal_(p)  # at first parts of them are 0
        for name, part in model.parts().items():
            part.requires_grad_(name == "heads")
        model(**batch_of(renderer)).head_loss_sums.sum().backward()
        moved = {
            name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
        }
        assert moved == {name for name, _ in model.named_parameters() if name.startswith("heads.")}

    def test_heads_join_one_after_the_other(self):
        config = TrainConfig(head_weight=0.5, head_decay=0.5, head_warmup=10)
        assert head_weights(0, 3, config) == [0, 0, 0] and head_weights(5, 3, config) == [0.25, 0, 0]
        assert head_weights(15, 3, config) == [0.5, 0.125, 0] and head_weights(40, 3, config) == [
            0.5,
            0.25,
            0.125,
        ] == head_weights(0, 3, replace(config, head_warmup=0))

    def test_parts_hold_every_parameter_once(self, tokenizer):
        for config in (WITH_HEADS, replace(WITH_HEADS, left_context="none")):
            model = tiny_model(tokenizer, config)
            held = [id(p) for part in model.parts().values() for p in part.parameters()]
            assert sorted(held) == sorted(id(p) for p in model.parameters()) and "heads" in model.parts()


class Oracle:
    """Heads that know plain decoding's answers, and are wrong at every `wrong`-th draft."""

    compiled_draft = None

    def __init__(self, answers: dict[tuple[int, ...], list[int]], wrong: int) -> None:
        self.count, self.wrong, self.drafted, self.answers = 3, wrong, 0, answers
        self.acceptance_rates = torch.full((3,), 0.9)

    def draftable(self, unembedding):
        return unembedding

    def draft(self, embedding, draftable, hidden, tokens, count, settings, generator):
        drafts = []
        for token, row in zip(tokens.tolist(), hidden, strict=True):
            answer, position = next(
                (a, i)
                for a in self.answers
                for i, h in enumerate(a[1])
                if torch.allclose(h, row, atol=1e-4) and i < len(a[0]) and a[0][i] == token
            )
            new = [*answer[0][position + 1 : position + 1 + count], *[0] * count][:count]
            for k in range(count):
                self.drafted += 1
                if self.drafted % self.wrong == 0:
                    new[k] = (new[k] + 1) % 290
            drafts.append(new)
        return Drafts(torch.tensor(drafts), None)


@pytest.mark.parametrize("mode", ["on", "auto"])
@pytest.mark.parametrize("wrong", [2, 3, 100])
def test_speculation_changes_no_token(tokenizer, renderer, monkeypatch, mode, wrong):
    """Speculation gives the naive model's tokens, in fewer passes.

    Ragged rows with none to three images, rows that end early, and drafts that are sometimes wrong.
    """
    model = lively_model(tokenizer)
    naive = Naive(model)
    asked = [
        (1, "what color?"),
        (3, "is there a red circle in the image?"),
        (2, "what is it"),
        (0, "what is it"),
    ]
    tiles = [random_tiles(n, seed=10 + n) for n, _ in asked]
    prompts = [prompt_ids(renderer, n, q) for n, q in asked]
    block = torch.tensor(renderer.image_block())
    images = [
        list(zip(model.encode_images(t, [block] * len(t)), block_starts(p), strict=True)) if len(t) else []
        for t, (p, _) in zip(tiles, prompts, strict=True)
    ]
    stop = int(naive.logits(prompts[0][1], tiles[0])[-1].argsort()[-3])
    expected = [naive_greedy(naive, ids, t, stop, 14) for (_, ids), t in zip(prompts, tiles, strict=True)]
    seen: list = []
    original = models.generation.decode_step
    monkeypatch.setattr(models.generation, "decode_step", lambda *a: seen.append(original(*a)) or seen[-1])
    batch = collate_prompts([p for p, _ in prompts])
    plain = generate(
        model,
        images=images,
        turn_end=stop,
        settings=GenerationConfig(max_new_tokens=14, speculative="off", logprobs=True),
        **batch,
    )
    assert plain.tokens == expected
    answers = []
    for (prompt, _), row in zip(
        prompts, images, strict=True
    ):  # each alone: its hidden states along the answer
        seen.clear()
        one = collate_prompts([prompt])
        result = generate(
            model,
            images=[row],
            turn_end=-1,
            settings=GenerationConfig(max_new_tokens=20, speculative="off"),
            **one,
        )
        first = models.generation.prefill(model, one["ids"], one["positions"], [row], 0)[1][0, -1]
        answers.append((result.tokens[0], [first, *[s[0, 0] for s in seen]]))
    model.heads = Oracle(answers, wrong)
    result = generate(
        model,
        images=images,
        turn_end=stop,
        settings=GenerationConfig(max_new_tokens=14, speculative=mode, logprobs=True),
        **batch,
    )
    assert result.tokens == expected
    for one, other in zip(result.logprobs, plain.logprobs, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    if mode == "on" and wrong > 2:
        assert sum(result.decode_steps) < 0.7 * sum(plain.decode_steps)


def test_every_draft_counts_as_seen_after_it():
    seen = torch.zeros(2, 6, dtype=torch.bool)
    seen[:, 5] = True
    rows = [[3, 0, 1], [2, 2, 4]]
    actual = seen_after_drafts(seen, torch.tensor(rows))
    expected = [[{5, *row[:k]} for k in range(4)] for row in rows]
    assert [[set(step.nonzero().flatten().tolist()) for step in row] for row in actual] == expected


def test_a_rejected_draft_rejects_those_after_it():
    """Greedy: drafts as long as each equals the model's choice, then that choice."""
    target = torch.nn.functional.one_hot(torch.tensor([3, 1, 4, 2]), 6).float().expand(4, 4, 6)
    drafts = torch.tensor([[3, 1, 4], [3, 0, 4], [0, 1, 4], [0, 0, 0]])
    tokens, counts = accept_greedy(drafts, target)
    assert counts.tolist() == [4, 2, 1, 1]
    assert [row[:n] for row, n in zip(tokens.tolist(), counts, strict=True)] == [
        [3, 1, 4, 2],
        [3, 1],
        [3],
        [3],
    ]
    tokens, counts = accept_greedy(drafts[:, :0], target[:, :1])  # without drafts
    assert counts.tolist() == [1] * 4 and tokens.tolist() == [[3]] * 4


def test_the_cache_forgets_rejected_drafts():
    """Rows of other lengths, each truncated to its own; later queries see none of the other slots."""
    cache = DecodingCache(2, 3, 1, 12, 4, torch.float32, torch.device("cpu"))
    cache.lengths = start = [2, 4, 3]
    cache.reserve(torch.tensor([[10, 11, 12, 13]]).expand(3, 4))
    keys, values = torch.randn(2, 2, 3, 1, 4, 4)
    for layer in range(2):
        cache.update(layer, keys[layer], values[layer], None)
    counts = [4, 1, 2]
    cache.truncate([n + count for n, count in zip(start, counts, strict=True)])
    assert cache.lengths == [6, 5, 5]
    for row, (at, count) in enumerate(zip(start, counts, strict=True)):
        for cached, new in ((cache.keys, keys), (cache.values, values)):
            assert torch.equal(torch.stack(cached)[:, row, :, at : at + count], new[:, row, :, :count])
        expected = [NEVER] * at + [10, 11, 12, 13][:count]
        assert cache.positions[row].tolist() == expected + [NEVER] * (12 - len(expected))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_draft_is_accepted_as_often_as_it_may(seed):
    """First and second tokens together have the target's distribution, for any proposal.

    300,000 draws.
    """
    g = torch.Generator().manual_seed(seed)
    N, V = 300_000, 4
    first, second = torch.rand(V, generator=g).softmax(0), (3 * torch.rand(V, V, generator=g)).softmax(-1)
    proposed = [(2 * torch.rand(V, generator=g)).softmax(0), (2 * torch.rand(V, V, generator=g)).softmax(-1)]
    a = torch.multinomial(proposed[0], N, replacement=True, generator=g)
    b = torch.multinomial(proposed[1][a], 1, generator=g)[:, 0]
    target = torch.stack(
        [first.expand(N, V), second[a], second[b]], 1
    )  # behind two drafts: the chain goes on
    tokens, counts = accept_sampled(
        torch.stack([a, b], 1), torch.stack([proposed[0].expand(N, V), proposed[1][a]], 1), target, g
    )
    assert torch.equal(tokens[counts > 1, 0], a[counts > 1]) and torch.equal(
        tokens[counts > 2, 1], b[counts > 2]
    )
    x, y = tokens[:, 0], torch.where(counts > 1, tokens[:, 1], -1)
    y = torch.where(
        y < 0, torch.multinomial(second[x], 1, generator=g)[:, 0], y
    )  # rows that stopped after one: what comes next is plain
    share = torch.bincount(x * V + y, minlength=V * V) / N
    expected = (first[:, None] * second).flatten()
    assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / N).sqrt()).all(), (share, expected)
    assert counts.float().mean() > 0.5


def test_sampled_speculation_has_the_models_distribution(tokenizer, renderer):
    """Second tokens of 20,000 answers against the exact distribution.

    They are drafted by heads; χ² is within its bound, with a fixed seed.
    """
    model = lively_model(tokenizer, WITH_HEADS)
    torch.manual_seed(3)
    torch.nn.init.normal_(model.heads.down.weight, std=0.3)
    prompt = renderer.prompt(ask("what is it?"))
    settings = GenerationConfig(
        sampling=True, temperature=1.5, top_k=6, max_new_tokens=3, speculative="on", seed=5
    )
    rows = 10_000
    batch = {k: v.expand(rows, -1) for k, v in collate_prompts([prompt]).items()}
    result = generate(model, images=[[]] * rows, turn_end=-1, settings=settings, **batch)
    drawn = torch.tensor(result.tokens)  # (rows, 3)
    ids = torch.tensor(prompt.right_ids)
    naive = Naive(model)

    def after(tokens: list[int]) -> torch.Tensor:
        return probabilities(naive.logits([*ids.tolist(), *tokens], random_tiles(0))[-1], settings)

    first = after([])
    expected = torch.zeros(len(first), len(first))
    for token in first.nonzero()[:, 0].tolist():
        expected[token] = first[token] * after([token])
    seen = torch.zeros_like(expected).index_put_(
        (drawn[:, 0], drawn[:, 1]), torch.ones(rows), accumulate=True
    )
    cells = expected > 0
    assert seen[~cells].sum() == 0
    chi = ((seen - rows * expected) ** 2 / (rows * expected))[cells].sum()
    freedom = int(cells.sum()) - 1
    assert chi < freedom + 5 * (2 * freedom) ** 0.5, (chi, freedom)
    assert sum(result.decode_steps) < 3 * rows  # some drafts were accepted


def test_repetition_penalty_and_logprobs_are_those_of_plain_decoding(tokenizer, renderer):
    model = lively_model(tokenizer, WITH_HEADS, seed=1)
    torch.nn.init.normal_(model.heads.down.weight, std=0.3)
    prompt, ids = prompt_ids(renderer, 0, "what is it?")
    results = [
        generate(
            model,
            images=[[]],
            turn_end=-1,
            settings=GenerationConfig(
                max_new_tokens=12, repetition_penalty=4.0, logprobs=True, speculative=mode
            ),
            **collate_prompts([prompt]),
        )
        for mode in ("on", "off")
    ]
    assert results[0].tokens == results[1].tokens
    naive, tokens = Naive(model), results[0].tokens[0]
    for i, (token, logprob) in enumerate(zip(tokens, results[0].logprobs[0], strict=True)):
        logits = naive.logits([*ids, *tokens[:i]], random_tiles(0))[-1]
        assert (
            abs(logits.log_softmax(-1)[token] - logprob) < 1e-4
            and abs(results[1].logprobs[0][i] - logprob) < 1e-4
        )
        for seen in {*ids, *tokens[:i]}:
            logits[seen] = logits[seen] / 4.0 if logits[seen] > 0 else logits[seen] * 4.0
        assert int(logits.argmax()) == token
    free = generate(
        model,
        images=[[]],
        turn_end=-1,
        settings=GenerationConfig(max_new_tokens=12),
        **collate_prompts([prompt]),
    )
    assert free.tokens != results[0].tokens


def test_drafts_are_of_the_draft_vocabulary(tokenizer):
    """Ids, not indices in the list of what can be drafted; and the distribution lies on them alone."""
    heads = tiny_model(tokenizer, replace(TINY_MODEL, multi_token=MultiTokenConfig(2, 32, 20))).heads
    heads.draft_ids.copy_(torch.arange(200, 220))
    embedding, hidden = torch.nn.Embedding(302, 48), torch.randn(5, 48)
    indices = torch.tensor([0, 3, 19, 7, 7])
    settings = GenerationConfig(sampling=True)
    drafts, proposed = heads.draft(
        embedding, heads.draftable(embedding.weight), hidden, indices, 2, settings, torch.Generator()
    )
    assert drafts.shape == (5, 2) and ((drafts >= 200) & (drafts < 220)).all()
    assert (
        proposed.shape == (5, 2, 302)
        and torch.allclose(proposed[..., 200:220].sum(-1), torch.ones(5, 2))
        and proposed[..., :200].sum() == proposed[..., 220:].sum() == 0
    )


def test_sampled_answers_depend_on_the_seed_alone(tokenizer, renderer, monkeypatch):
    """Not on what passes took, nor on what was asked before."""
    model = lively_model(tokenizer, WITH_HEADS)
    batch = collate_prompts([renderer.prompt(ask("what is it?"))])
    settings = GenerationConfig(sampling=True, temperature=2.0, max_new_tokens=40, speculative="auto", seed=7)
    first = generate(model, images=[[]], turn_end=-1, settings=settings, **batch)
    generate(model, images=[[]], turn_end=-1, settings=replace(settings, sampling=False), **batch)
    original = models.generation.decode_step
    monkeypatch.setattr(models.generation, "decode_step", lambda *a: (time.sleep(0.02), original(*a))[1])
    assert generate(model, images=[[]], turn_end=-1, settings=settings, **batch).tokens == first.tokens


def simulate(acceptance_rates: list[float], cost: float, tokens: int, after: int = 0) -> float:
    """Tokens per second of a guarded decoder, in those of plain decoding, over `tokens` tokens.

    Drafts are accepted with these rates, but none of the first `after` tokens'.
    """
    generator, guard = torch.Generator().manual_seed(0), DraftGuard(len(acceptance_rates), cost)
    generated, seconds = 0, 0.0
    while generated < after + tokens:
        if generated < after:
            seconds, accepted = 0.0, [False] * len(acceptance_rates)
        else:
            accepted = (
                torch.rand(len(acceptance_rates), generator=generator) < torch.tensor(acceptance_rates)
            ).tolist()
        drafts = guard.next_length()
        count = next((k for k in range(drafts) if not accepted[k]), drafts)
        guard.record(drafts, [1 + count])
        seconds, generated = seconds + 1 + cost * drafts, generated + 1 + count
    return tokens / seconds


class TestDraftGuard:
    @pytest.mark.parametrize("cost", [0.03, 0.1, 0.3])
    def test_rejected_drafts_lose_little(self, cost):
        assert simulate([0.0] * 3, cost, 3000) > 0.97
        assert simulate([0.02] * 3, cost, 3000) > 0.97
        for tokens in (16, 64, 256):  # each answer starts anew
            lost = DraftGuard.LIMIT + 3 * cost + 0.04 * tokens
            assert simulate([0.0] * 3, cost, tokens) > tokens / (tokens + lost)

    def test_accepted_drafts_gain_what_they_can(self):
        for rate, cost in ((0.9, 0.1), (0.7, 0.1), (0.5, 0.1), (0.6, 0.2)):
            whole = sum(rate**k for k in range(4)) / (1 + 3 * cost)
            assert simulate([rate] * 3, cost, 3000) > 0.95 * whole

    def test_an_easy_text_after_a_hard_one_is_drafted_soon(self):
        assert simulate([1.0] * 3, 0.1, 300, after=1000) > 0.75 * 4 / 1.3

    def test_rows_of_a_batch_are_averaged(self):
        guard = DraftGuard(3, 0.1)
        for _ in range(50):
            guard.record(3, [1, 1, 1, 4])  # 0.75 accepted, 0.3 spent
            assert guard.next_length() == 3
        for _ in range(85):
            guard.record(3, [1, 1, 1, 2])  # 0.25 accepted
        assert guard.next_length() == 0

    def test_a_cpu_pays_for_each_row(self, tokenizer):
        """Drafts that pay for one row do not pay for eight on a CPU; on a GPU they do."""
        heads, settings = tiny_model(tokenizer, WITH_HEADS).heads, GenerationConfig(draft_tokens=2)
        for rows, device, drafts in ((1, CPU, 2), (8, CPU, 0), (8, torch.device("cuda"), 2)):
            guard = DraftGuard.of(heads, settings, rows, device)
            for _ in range(10):
                guard.record(2, [1, 2] * (rows // 2) or [2])  # half of the first drafts are accepted
            assert guard.next_length() == drafts
        heads.acceptance_rates.fill_(0.6)
        lengths = [DraftGuard.of(heads, GenerationConfig(), n, CPU).draft_length for n in (1, 4, 8, 32)]
        assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[2] == 1 and lengths[3] == 0

    def test_on_and_off(self, tokenizer):
        heads, settings = tiny_model(tokenizer, WITH_HEADS).heads, GenerationConfig()
        guard = DraftGuard.of(heads, replace(settings, speculative="on"), 1, CPU)
        for _ in range(50):
            guard.record(3, [1])
            assert guard.next_length() > 0
        for off in (
            DraftGuard.of(None, settings, 1, CPU),
            DraftGuard.of(heads, replace(settings, speculative="off"), 1, CPU),
        ):
            assert off.next_length() == 0

    def test_the_length_follows_the_acceptance_rates(self, tokenizer):
        """Compared with simulated decoding at each length; `draft_tokens` overrides it."""
        for rates in ([0.9, 0.9, 0.9], [0.5, 0.5, 0.5], [0.3, 0.9, 0.1], [0.02, 0.5, 0.5]):
            by_length = [1.0]
            for k in range(1, 4):
                accepted = torch.rand(100_000, k, generator=torch.Generator().manual_seed(k)) < torch.tensor(
                    rates[:k]
                )
                by_length.append(float(1 + accepted.long().cumprod(1).sum(1).float().mean()) / (1 + 0.1 * k))
            assert best_draft_length(rates, 0.1) == max(range(4), key=by_length.__getitem__), rates
        heads = tiny_model(tokenizer, WITH_HEADS).heads
        heads.acceptance_rates.copy_(torch.tensor([0.9, 0.9, 0.9]))
        assert DraftGuard.of(heads, GenerationConfig(), 1, CPU).next_length() == 3
        heads.acceptance_rates.copy_(torch.tensor([0.9, 0.0, 0.0]))
        assert DraftGuard.of(heads, GenerationConfig(), 1, CPU).next_length() == 1
        assert DraftGuard.of(heads, GenerationConfig(draft_tokens=2), 1, CPU).next_length() == 2
        assert DraftGuard.of(heads, GenerationConfig(draft_tokens=9), 1, CPU).next_length() == 3


def test_drafts_after_an_answers_end_do_not_count(tokenizer, renderer, monkeypatch):
    """Drafts at or after the end of an answer.

    An end-of-turn token among accepted drafts or after them, an end set by the caller, and a token limit for
    one row of two.
    """
    model = tiny_model(tokenizer, WITH_HEADS)
    prompt, stop, recorded = renderer.prompt(ask("what is it?")), 7, []
    monkeypatch.setattr(DraftGuard, "record", lambda self, *arguments: recorded.append(arguments))
    accept = DecodingBatch.accept

    def answers(
        accepted: list[list[list[int]]],
        limit: int,
        rows: int = 1,
        on_tokens: Callable[[int, list[int]], bool] | None = None,
    ) -> list[list[int]]:
        """Answers without their first tokens, where each decode step accepts the next of `accepted`."""

        def scripted(batch: DecodingBatch, drafts: Drafts, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
            if not batch.rows[0].tokens:
                return accept(batch, drafts, logits)
            new, width = accepted.pop(0), logits.shape[1]
            counts = torch.tensor([len(tokens) for tokens in new])
            return torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in new]), counts

        monkeypatch.setattr(DecodingBatch, "accept", scripted)
        output = generate(
            model,
            images=[[]] * rows,
            turn_end=stop,
            settings=GenerationConfig(max_new_tokens=limit, speculative="on", draft_tokens=3),
            on_tokens=on_tokens,
            **collate_prompts([prompt] * rows),
        )
        assert not accepted
        return [tokens[1:] for tokens in output.tokens]  # the first is the model's own

    assert answers([[[5, stop, 6, 8]]], 30) == [[5]] and recorded.pop() == (3, [2])
    assert answers([[[stop, 5, 6, 8]]], 30) == [[]] and recorded.pop() == (3, [1])
    assert answers([[[5, 6, 8, stop]]], 30) == [[5, 6, 8]] and recorded.pop() == (3, [4])
    ended = answers([[[5, 6, 8, 9]]], 30, on_tokens=lambda _, tokens: tokens[-1] == 6)
    assert ended == [[5, 6]] and recorded.pop() == (3, [2])
    assert answers([[[5, 6], [5]], [[8, 9], [6, 8]]], 4, rows=2) == [[5, 6, 8], [5, 6, 8]]
    assert recorded == [(2, [2, 1]), (1, [1, 2])]


def test_rows_that_are_done_leave_the_cache():
    """The last rows move into the free rows, and hold what they held."""
    for done in (
        [False] * 5,
        [True, False, True, False, False],
        [False, False, False, True, True],
        [True, True, True, True, False],
    ):
        cache = DecodingCache(2, 5, 1, 8, 4, torch.float32, torch.device("cpu"))
        cache.lengths = [3, 5, 1, 8, 2]
        cache.keys, cache.values = (list(x) for x in torch.randn(2, 2, *cache.keys[0].shape))
        cache.positions = torch.stack(
            [torch.where(torch.arange(8) < n, torch.arange(8), NEVER) for n in cache.lengths]
        )
        before, order = (
            (cache.lengths, torch.stack(cache.keys), torch.stack(cache.values), cache.positions.clone()),
            compact_rows(done),
        )
        assert sorted(order) == [i for i in range(5) if not done[i]] and sum(
            new != old for new, old in enumerate(order)
        ) == sum(done[: len(order)])
        cache.select_rows(order)
        assert cache.lengths == [before[0][i] for i in order] and torch.equal(
            cache.positions, before[3][order]
        )
        for now, was in ((torch.stack(cache.keys), before[1]), (torch.stack(cache.values), before[2])):
            assert now.shape[1] == len(order) and all(
                torch.equal(now[:, new, :, :n], was[:, old, :, :n])
                for new, (old, n) in enumerate(zip(order, cache.lengths, strict=True))
            )


@pytest.mark.parametrize("mode", ["on", "off"])
def test_rows_that_end_at_different_times_say_what_they_say_alone(tokenizer, renderer, mode):
    """Six prompts of different lengths, ended from outside: the first, the last and those in the middle."""
    model = lively_model(tokenizer, WITH_HEADS)
    torch.nn.init.normal_(model.heads.down.weight, std=0.3)
    prompts = [
        renderer.prompt(ask(text))
        for text in (
            "what is it?",
            "what?",
            "what color is the shape, and why?",
            "is it?",
            "the color?",
            "a shape or an image of a shape?",
        )
    ]
    settings, ends = GenerationConfig(max_new_tokens=16, speculative=mode), [3, 16, 5, 9, 16, 4]
    alone = [
        generate(model, images=[[]], turn_end=-1, settings=settings, **collate_prompts([prompt])).tokens[0]
        for prompt in prompts
    ]
    assert len({tuple(tokens) for tokens in alone}) == len(prompts)
    result = generate(
        model,
        images=[[]] * 6,
        turn_end=-1,
        settings=settings,
        on_tokens=lambda row, tokens: len(tokens) >= ends[row],
        **collate_prompts(prompts),
    )
    assert result.tokens == [tokens[:end] for tokens, end in zip(alone, ends, strict=True)]


def test_speculation_needs_heads(model, renderer):
    with pytest.raises(UsageError, match="no multi-token heads"):
        generate(
            model,
            images=[[]],
            turn_end=-1,
            settings=GenerationConfig(speculative="on"),
            **collate_prompts([renderer.prompt(ask("x"))]),
        )


@pytest.mark.parametrize("kernels", ["own", "none"])
def test_bf16_weights_answer_with_and_without_kernels_for_them(tokenizer, tmp_path, monkeypatch, kernels):
    """With this CPU's kernels and without bf16 instructions, with drafts and without.

    Weights are packed only where a kernel can use them.
    """
    tiny_model(tokenizer, WITH_HEADS).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    if kernels == "none":
        monkeypatch.setattr("torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda: False)
    predictor = Predictor.from_pretrained(tmp_path, dtype="bf16")
    packed = isinstance(predictor.model.right.layers[0].forward, PackedBlock)
    assert packed == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    for mode in ("on", "off"):
        answer = predictor.answer(
            [([], "what is it?")], GenerationConfig(max_new_tokens=8, speculative=mode)
        )[0]
        assert answer.tokens == 8 or answer.text


def test_layers_without_rotary_embedding_decode_as_they_train(tokenizer, renderer):
    decoder = replace(TINY, no_rope_interval=2)
    model = lively_model(tokenizer, replace(TINY_MODEL, left=decoder, right=decoder))
    tiles = random_tiles(2, seed=5)
    prompt, _ = prompt_ids(renderer, 2, "what color?")
    images = list(
        zip(
            model.encode_images(tiles, [torch.tensor(renderer.image_block())] * 2),
            block_starts(prompt),
            strict=True,
        )
    )
    generated = generate(
        model,
        images=[images],
        turn_end=-1,
        settings=GenerationConfig(max_new_tokens=6),
        **collate_prompts([prompt]),
    ).tokens[0]
    last = prompt.right_positions[-1] + 1
    whole = replace(
        prompt,
        right_ids=[*prompt.right_ids, *generated],
        right_positions=[*prompt.right_positions, *range(last, last + 6)],
        labels=[-100] * (len(prompt.labels) + 6),
    )
    with torch.no_grad():
        hidden = model(**collate([[Sample((0, 0, 0), tiles, [whole])]], tokenizer.global_image)).hidden[0]
        assert model.logits(hidden)[-7:-1].argmax(-1).tolist() == generated


SMALL = [
    "--model.vision.image_size",
    "64",
    "--data.limit",
    "40",
    "--data.validation_images",
    "8",
    "--data.right_length",
    "64",
    "--train.local_batch_size",
    "2",
    "--train.global_batch_size",
    "2",
    "--data.window",
    "6",
]
for tower in ("left", "right"):
    SMALL += (
        f"--model.{tower}.layers 2 --model.{tower}.hidden_size 32 --model.{tower}.mlp_size 64 "
        f"--model.{tower}.heads 2 --model.{tower}.kv_heads 1"
    ).split()


def test_heads_train_with_the_model_and_behind_it(tmp_path):
    """Heads are trained jointly, with their losses in the metrics, or added to a finished model.

    In the second case all other tensors stay bit for bit the same, and answers do not change.
    """
    train = [
        sys.executable,
        str(ROOT / "train_dual_tower.py"),
        "--max_steps",
        "6",
        *SMALL,
        "--cache_dir",
        "cache",
    ]
    done = run_program(
        [*train, "--output_dir", "joint", "--model.multi_token.heads", "2", "--train.head_warmup", "2"],
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    metrics = [json.loads(line) for line in (tmp_path / "joint/metrics.jsonl").read_text().splitlines()]
    assert all(len(m["head_losses"]) == 2 and m["head_losses"][0] > 0 for m in metrics if "loss" in m)
    assert any(name.startswith("heads.") for name in load_file(tmp_path / "joint/model/model.safetensors"))
    run_program([*train, "--output_dir", "plain"], tmp_path).check_returncode()
    give = [
        sys.executable,
        "-m",
        "tools.train_heads",
        "--checkpoint",
        "plain/model",
        "--output",
        "with_heads",
        "--sources",
        "easy_vqa:20",
        "--tokens",
        "300",
        "--answer_tokens",
        "12",
    ]
    done = run_program([*give, "--heads", "2", "--rows", "16", "--epochs", "2", "--dtype", "bf16"], tmp_path)
    assert done.returncode == 0 and "tokens per decode step" in done.stdout, done.stderr
    before, after = (
        load_file(tmp_path / folder / "model.safetensors") for folder in ("plain/model", "with_heads")
    )
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items()) and len(after) > len(
        before
    )
    image = sorted((tmp_path / "cache").parent.rglob("*.png"))[0]
    ask = ["--image", str(image), "--prompt", "what color is the shape?", "--json", "--max_new_tokens", "24"]
    outputs = [
        json.loads(
            run_program(
                [sys.executable, str(ROOT / "generate.py"), "--checkpoint", folder, *ask, *more], tmp_path
            ).stdout
        )
        for folder, more in (
            ("plain/model", []),
            ("with_heads", ["--speculative", "on"]),
            ("with_heads", ["--speculative", "off"]),
        )
    ]
    assert (
        outputs[0]["answer"] == outputs[1]["answer"] == outputs[2]["answer"]
        and outputs[1]["decode_steps"] <= outputs[2]["decode_steps"] == outputs[0]["decode_steps"]
    )


def test_questions_on_images_that_cannot_be_used_are_left_out_and_counted(
    tmp_path, model, renderer, image_file
):
    """One of two images is damaged, one record has none: the model answers the other's questions alone."""
    (tmp_path / "cut.png").write_bytes(b"\x89PNG cut")
    lines = [
        {"image": name, "texts": [{"user": "what is it?", "assistant": "x"}]}
        for name in ("cut.png", image_file.name)
    ] * 8
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = io.StringIO()
    config = HeadsConfig(
        sources=f"jsonl={tmp_path / 'mine.jsonl'}", validation_images=2, tokens=20, answer_tokens=6, rows=5
    )
    samples = collect(Predictor(model, renderer), config, Console(file=out, width=200))
    assert (
        sum(len(t.tokens) for t in samples) >= 20 and len({tuple(t.tokens.tolist()) for t in samples}) == 1
    )  # one image, one question
    assert "questions left out" in out.getvalue()


def test_held_out_questions_are_of_images_that_heads_do_not_learn_from(tmp_path, model, renderer, image_file):
    copies = [tmp_path / f"{i}.png" for i in range(6)]
    for path in copies:
        path.write_bytes(image_file.read_bytes())
    lines = [
        {"image": path.name, "texts": [{"user": f"q{i}", "assistant": "x"}]} for i, path in enumerate(copies)
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = HeadsConfig(sources=f"jsonl={tmp_path / 'mine.jsonl'}", validation_images=2, rows=12)
    supervised, held_out = (
        {
            text_of(messages[-1])
            for _, messages in next(question_batches(Predictor(model, renderer), config, held_out=which))
        }
        for which in (False, True)
    )
    assert (len(supervised), len(held_out)) == (4, 2) and supervised | held_out == {f"q{i}" for i in range(6)}


def test_bad_heads():
    for bad in ({"heads": -1}, {"mlp_size": 0}, {"vocabulary": -5}):
        with pytest.raises(UsageError, match="multi_token"):
            ModelConfig(multi_token=MultiTokenConfig(**bad))
