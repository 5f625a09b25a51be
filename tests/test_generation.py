"""Generation and sampling.

Generation against the naive model, rerun on the whole sequence for every token; sampling against its
definition.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import models.generation
from configs.model import GenerationConfig
from data.collators import collate_prompts
from data.conversations import ask
from data.images import Tiles
from eval.predictor import Predictor
from models.generation import generate
from models.image_store import ImageStore, image_kv_fingerprint
from models.kv_cache import DecodingCache
from models.sampling import choose, probabilities
from tests.conftest import lively_model, random_tiles
from tests.naive_dual_tower import Naive
from tests.test_dual_tower import block_starts
from utils.errors import UsageError, UserError


def naive_greedy(naive, ids: list[int], tiles, stop: int, new_tokens: int) -> list[int]:
    generated: list[int] = []
    while len(generated) < new_tokens:
        token = int(naive.logits([*ids, *generated], tiles)[-1].argmax())
        if token == stop:
            break
        generated.append(token)
    return generated


def prompt_ids(renderer, images: int, question: str) -> tuple[object, list[int]]:
    prompt = renderer.prompt(ask(question, images), [(1, 1)] * images)
    ids = dict(zip(prompt.right_positions, prompt.right_ids, strict=True))
    ids |= dict(zip(prompt.left_positions, prompt.left_ids, strict=True))
    return prompt, [ids[p] for p in sorted(ids)]


@pytest.mark.parametrize("seed", [0, 1])
def test_ragged_greedy_batch_equals_the_naive_model(tokenizer, renderer, seed):
    """Rows of different lengths, one to three images: token for token what full recomputation gives."""
    model = lively_model(tokenizer, seed=seed)
    naive = Naive(model)
    asked = [(1, "what color?"), (3, "is there a red circle in the image?"), (2, "what is it")]
    tiles = [random_tiles(n, seed=10 + n) for n, _ in asked]
    prompts = [prompt_ids(renderer, n, q) for n, q in asked]
    block = torch.tensor(renderer.image_block())
    images = [
        list(zip(model.encode_images(t, [block] * len(t)), block_starts(prompt), strict=True))
        for t, (prompt, _) in zip(tiles, prompts, strict=True)
    ]
    stop = int(naive.logits(prompts[0][1], tiles[0])[-1].argsort()[-3])  # a token that may well come up
    settings = GenerationConfig(max_new_tokens=6)
    result = generate(
        model, images=images, turn_end=stop, settings=settings, **collate_prompts([p for p, _ in prompts])
    )
    expected = [naive_greedy(naive, ids, t, stop, 6) for (_, ids), t in zip(prompts, tiles, strict=True)]
    assert result.tokens == expected
    assert any(expected)


def test_an_answer_may_be_empty(model, renderer):
    """Where the first token is the end of turn, and in a row next to one that goes on."""
    prompts = [
        prompt_ids(renderer, 0, question)[0] for question in ("what is it?", "is it large or is it small?")
    ]
    free = generate(
        model,
        images=[[], []],
        turn_end=-1,
        settings=GenerationConfig(max_new_tokens=4),
        **collate_prompts(prompts),
    ).tokens
    for row, (first, *_) in enumerate(free):
        result = generate(
            model,
            images=[[], []],
            turn_end=first,
            settings=GenerationConfig(max_new_tokens=4),
            **collate_prompts(prompts),
        )
        assert (
            result.tokens == [tokens[: tokens.index(first)] if first in tokens else tokens for tokens in free]
            and result.tokens[row] == []
            and result.decode_steps[row] == 1
        )


def test_every_decoded_logit_equals_the_naive_model(tokenizer, renderer, monkeypatch):
    """Tokens can agree by luck; the logits of each decoding step cannot."""
    model, seen = lively_model(tokenizer), []
    naive, tiles = Naive(model), random_tiles(2, seed=5)
    prompt, ids = prompt_ids(renderer, 2, "what color?")
    images = list(
        zip(
            model.encode_images(tiles, [torch.tensor(renderer.image_block())] * 2),
            block_starts(prompt),
            strict=True,
        )
    )
    verify = models.generation.decode_step
    monkeypatch.setattr(
        models.generation, "decode_step", lambda *arguments: seen.append(verify(*arguments)) or seen[-1]
    )
    result = generate(
        model,
        images=[images],
        turn_end=-1,
        settings=GenerationConfig(max_new_tokens=5),
        **collate_prompts([prompt]),
    )
    assert len(seen) == 4 and len(result.tokens[0]) == 5
    for step, hidden in enumerate(seen, start=1):
        expected = naive.logits([*ids, *result.tokens[0][:step]], tiles)[-1]
        torch.testing.assert_close(
            F.linear(hidden.clone(), model.right.unembedding.detach())[0, 0], expected, atol=1e-4, rtol=0
        )


def test_text_only_prompts_work_together_with_image_prompts(model, renderer):
    predictor = Predictor(model, renderer)
    tiles = Tiles((1, 1), random_tiles(1))
    settings = GenerationConfig(max_new_tokens=5)
    together = predictor.answer([([], "what is it?"), ([tiles], "what color is the shape?")], settings)
    alone = predictor.answer([([], "what is it?")], settings) + predictor.answer(
        [([tiles], "what color is the shape?")], settings
    )
    assert [a.text for a in together] == [a.text for a in alone]
    assert [a.image_kv for a in together + alone] == ["none", "computed", "none", "reused"]


def test_the_same_image_is_encoded_once(model, renderer, monkeypatch):
    size = model.encode_image(random_tiles(1), torch.tensor(renderer.image_block())).data.nbytes
    predictor = Predictor(model, renderer, ImageStore(memory_bytes=2 * size))
    encoded = []
    original = model.encode_images
    monkeypatch.setattr(
        model,
        "encode_images",
        lambda tiles, blocks, images: encoded.append(len(blocks)) or original(tiles, blocks, images),
    )
    a, b, c = (Tiles((1, 1), random_tiles(1, seed)) for seed in range(3))
    settings = GenerationConfig(max_new_tokens=2)
    assert [x.image_kv for x in predictor.answer([([a], "x"), ([a], "y"), ([b], "x")], settings)] == [
        "computed",
        "reused",
        "computed",
    ]
    assert [x.image_kv for x in predictor.answer([([b], "y"), ([c], "y")], settings)] == [
        "reused",
        "computed",
    ]
    assert [x.image_kv for x in predictor.answer([([a], "y")], settings)] == [
        "computed"
    ]  # a was the least recently used of three
    assert encoded == [2, 1, 1]


def test_an_image_is_the_same_at_any_position(model, renderer):
    predictor, settings = Predictor(model, renderer), GenerationConfig(max_new_tokens=2)
    a, b = (Tiles((1, 1), random_tiles(1, seed)) for seed in range(2))
    assert [
        predictor.answer([(images, "x")], settings)[0].image_kv for images in ([a], [b], [b, a], [a, a])
    ] == ["computed", "computed", "reused", "reused"]


def test_seeds_repeat_and_differ(model, renderer):
    predictor = Predictor(model, renderer)
    asked = [([Tiles((1, 1), random_tiles(1))], "what color?")]
    answers = [
        predictor.answer(asked, GenerationConfig(sampling=True, temperature=3.0, max_new_tokens=12, seed=s))[
            0
        ].text
        for s in (1, 1, 2)
    ]
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.69}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.71}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"top_k": 3, "top_p": 0.5}, [4 / 7, 3 / 7, 0, 0]),  # of the three left, the first holds 0.44
        ({"temperature": 0.5, "top_p": 0.6}, [16 / 25, 9 / 25, 0, 0]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_p": 1e-300}, [1, 0, 0, 0]),
        ({"min_p": 0.74}, [4 / 7, 3 / 7, 0, 0]),
        ({"min_p": 0.5, "top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"temperature": 0.5, "min_p": 0.26}, [16 / 25, 9 / 25, 0, 0]),
    ],
)
def test_sampling_has_the_distribution_it_says(settings, expected):
    """Temperature, then top-k, then top-p.

    20,000 draws are within five standard deviations, and none is outside the support.
    """
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()[torch.tensor([2, 0, 3, 1])].repeat(20_000, 1)
    settings = GenerationConfig(sampling=True, **settings)
    drawn = choose(probabilities(logits, settings), settings, torch.Generator().manual_seed(0))
    expected = torch.tensor(expected)[torch.tensor([2, 0, 3, 1])]
    share = drawn.bincount(minlength=4) / len(drawn)
    bound = 5 * (expected * (1 - expected) / len(drawn)).sqrt()
    assert ((share - expected).abs() <= bound + 1e-9).all(), (share, expected)


def test_repetition_penalty_lowers_what_was_seen_whatever_its_sign():
    """arXiv 1909.05858: a positive logit is divided, a negative one multiplied; unseen ones stay."""
    logits, seen = torch.tensor([2.0, -2.0, 0.5, -0.5]), torch.tensor([True, True, False, False])
    settings = GenerationConfig(sampling=True, repetition_penalty=1.6)
    torch.testing.assert_close(
        probabilities(logits, settings, seen), torch.tensor([1.25, -3.2, 0.5, -0.5]).softmax(-1)
    )


def test_a_ragged_batch_is_penalised_as_each_row_alone(tokenizer, renderer):
    """Also for the token that is 0, which stands in the padding too."""
    model = lively_model(tokenizer)
    prompts = [
        prompt_ids(renderer, 0, question)[0]
        for question in (
            f"what is it{tokenizer.decode([0])}?",
            "is it large, or is it not so large as the other one?",
            "is it?",
        )
    ]
    assert 0 in prompts[0].right_ids and not {0} & {
        *prompts[1].right_ids,
        *prompts[2].right_ids,
    }  # and the first and the third are padded
    with torch.no_grad():
        model.right.unembedding[0] += (
            0.2
            * model.right.unembedding.std()
            * torch.randn(model.right.unembedding.shape[1], generator=torch.Generator().manual_seed(0))
        )
    seen = []
    original = models.generation.probabilities
    settings = GenerationConfig(max_new_tokens=8, repetition_penalty=5.0, speculative="off")

    def noted(logits, settings, counted=None):
        seen.append(counted[:, 0].clone())
        return original(logits, settings, counted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.generation, "probabilities", noted)
        result = generate(model, images=[[]] * 3, turn_end=-1, settings=settings, **collate_prompts(prompts))
    for row, prompt in enumerate(prompts):
        assert seen[0][row].nonzero()[:, 0].tolist() == sorted(set(prompt.right_ids))
        assert (
            result.tokens[row]
            == generate(
                model, images=[[]], turn_end=-1, settings=settings, **collate_prompts([prompt])
            ).tokens[0]
        )


def test_a_cache_of_earlier_turns_is_of_one_row(model, renderer):
    prompts = [prompt_ids(renderer, 0, question)[0] for question in ("a", "b")]
    cache = DecodingCache(1, 2, 1, 0, 2, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="2 prompts: a given cache goes on with one"):
        generate(
            model,
            images=[[], []],
            turn_end=-1,
            settings=GenerationConfig(),
            cache=cache,
            **collate_prompts(prompts),
        )


def test_an_image_store_in_memory_is_of_one_model(tokenizer, renderer):
    """The same image has another image KV in another model."""
    store, asked = ImageStore(), [([Tiles((1, 1), random_tiles(1))], "what color?")]
    one, other = (Predictor(lively_model(tokenizer, seed=seed), renderer, store) for seed in (0, 1))
    settings = GenerationConfig(max_new_tokens=2)
    assert [one.answer(asked, settings)[0].image_kv for _ in range(2)] == ["computed", "reused"]
    with pytest.raises(ValueError, match="image KVs of another model"):
        other.answer(asked, settings)
    for model, image_kv in ((one.model, "computed"), (one.model, "reused"), (other.model, "")):
        store = store if image_kv == "reused" else ImageStore(fingerprint=image_kv_fingerprint(one.model))
        predictor = Predictor(model, renderer, store)
        if image_kv:
            assert predictor.answer(asked, settings)[0].image_kv == image_kv
            continue
        with pytest.raises(ValueError, match="image KVs of another model"):
            predictor.answer(asked, settings)


def test_pieces_are_the_answer(tokenizer, renderer):
    """Each token's text and log-probability, up to the start of a stop string.

    A character of several tokens comes with its last token.
    """
    predictor = Predictor(lively_model(tokenizer), renderer)
    whole = predictor.answer([([], "what is it?")], GenerationConfig(max_new_tokens=12, logprobs=True))[0]
    assert (
        len(whole.token_logprobs) == whole.tokens == 12
        and "".join(text for text, _ in whole.token_logprobs) == whole.text
    )
    stop = whole.text[len(whole.text) // 2 :][:3]
    truncated = predictor.answer(
        [([], "what is it?")], GenerationConfig(max_new_tokens=12, logprobs=True), stops=[stop]
    )[0]
    assert (
        "".join(text for text, _ in truncated.token_logprobs) == truncated.text
        and len(truncated.token_logprobs) < truncated.tokens
    )
    assert [logprob for _, logprob in truncated.token_logprobs] == [
        logprob for _, logprob in whole.token_logprobs
    ][: len(truncated.token_logprobs)]
    tokens = [*tokenizer.encode("x 💡"), tokenizer.turn_end]
    token_logprobs = predictor.token_logprobs(tokens, [0.0] * len(tokens))
    assert (
        len(token_logprobs) == len(tokens) > 4
        and "".join(text for text, _ in token_logprobs) == "x 💡"
        and token_logprobs[-2][0] == "💡"
    )  # the last says nothing


def test_tokens_a_pass_are_those_behind_the_first(tokenizer, renderer):
    predictor = Predictor(lively_model(tokenizer), renderer)
    for tokens, expected in ((1, 0.0), (5, 1.0)):
        assert (
            predictor.answer([([], "what is it?")], GenerationConfig(max_new_tokens=tokens))[
                0
            ].tokens_per_step
            == expected
        )


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"max_new_tokens": 0},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e-300},
        {"draft_tokens": -1},
    ],
)
def test_bad_settings(bad):
    with pytest.raises(UsageError, match=next(iter(bad))):
        GenerationConfig(sampling=True, **bad)


def test_a_prompt_too_long_says_so(model, renderer):
    with pytest.raises(UsageError, match=r"the prompt has \d+ tokens.*256 positions"):
        Predictor(model, renderer).answer([([], "long " * 300)], GenerationConfig())


@pytest.mark.parametrize("sampling", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_ends_the_answer_wherever_it_begins(
    tokenizer, renderer, monkeypatch, sampling, bad
):
    model, original, decode_steps = lively_model(tokenizer), models.generation.decode_step, []

    def verify(*arguments: Any) -> torch.Tensor:
        decode_steps.append(original(*arguments))
        return decode_steps[-1] if len(decode_steps) < 3 else decode_steps[-1] * bad

    monkeypatch.setattr(models.generation, "decode_step", verify)
    batch = collate_prompts([renderer.prompt(ask("what is it?"))])
    with pytest.raises(UserError, match="not finite"):
        generate(
            model,
            images=[[]],
            turn_end=-1,
            settings=GenerationConfig(max_new_tokens=8, sampling=sampling),
            **batch,
        )
    assert len(decode_steps) == 3


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("top_p", [1e-300, 0.3, 0.9, 0.999])
def test_top_p_in_a_vocabulary_of_any_size(spread, top_p):
    """Among 2,000 tokens, flat and steep: those that a loop over them keeps, few or nearly all."""
    logits = spread * torch.randn(3, 2000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results = probabilities(logits, GenerationConfig(sampling=True, top_p=top_p))
    for row, actual in zip(logits.float().softmax(-1).tolist(), results, strict=True):
        retained, before = [], 0.0
        for token in sorted(range(2000), key=lambda token, row=row: -row[token]):
            if before >= top_p and retained:
                break
            retained.append(token)
            before += row[token]
        differ = set(retained) ^ set(actual.nonzero()[:, 0].tolist())
        assert len(differ) <= 1  # the last one, by rounding
        assert torch.allclose(
            actual[retained[:-1]] / actual[retained[0]],
            torch.tensor([row[token] / row[retained[0]] for token in retained[:-1]]),
            rtol=1e-4,
        )
