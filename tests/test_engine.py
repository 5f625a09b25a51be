"""The server's engine: rows join and leave at any time, and every answer is `generate.py`'s."""

import random
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

from configs.model import GenerationConfig, MultiTokenConfig
from data.images import Tiles
from data.render import Renderer
from eval.predictor import Predictor
from models.generation import new_cache
from models.image_store import block_key
from models.masks import NEVER
from serving import engine as engine_module
from serving.batch import Row, SharedCache
from serving.engine import Engine
from serving.metrics import Metrics
from serving.requests import Delta, Done, Event, Refused, Request, StoredImage, left_blocks
from tests.conftest import TINY_MODEL, lively_model, random_tiles

WITH_HEADS = replace(TINY_MODEL, multi_token=MultiTokenConfig(heads=3, mlp_size=32))
PREFIX = {"left_context": "prefix", "image_isolation": False}
QUESTIONS = (
    "what is it?",
    "what color is the shape, and why is it not another one?",
    "is it?",
    "describe the image " * 6,
    "a shape or an image of a shape?",
)


class Client:
    """Collects a request's events."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.over = threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if not isinstance(event, Delta):
            self.over.set()

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Delta))

    @property
    def end(self) -> Done | Refused:
        assert self.over.wait(60), "no answer"
        return self.events[-1]


def request_of(predictor: Predictor, images: list, question: str, settings: GenerationConfig, **options: Any):
    client = Client()
    prompt = predictor.prompt(images, question)
    blocks = left_blocks(predictor, prompt, images)
    tiles = predictor.tiles_of([[image for image in images if isinstance(image, Tiles)]])
    return Request(prompt, blocks, settings, client, tiles=tiles, **options), client


def run(engine: Engine, turns: int = 10_000) -> None:
    """Take turns in this thread until there is nothing to do."""
    while engine.waiting or engine.ready or engine.prefill or engine.batch.rows:
        engine.turn()
        turns -= 1
        assert turns, "the engine does not end"


@pytest.fixture(scope="module", params=["image", "none", "prefix", "drafts"])
def predictor(request, tokenizer) -> Predictor:
    contexts = {"image": {}, "none": {"left_context": "none"}, "prefix": PREFIX, "drafts": {}}
    config = replace(WITH_HEADS if request.param == "drafts" else TINY_MODEL, **contexts[request.param])
    model = lively_model(tokenizer, config)
    if model.heads is not None:
        torch.nn.init.normal_(model.heads.down.weight, std=0.3)
    return Predictor(model, Renderer(tokenizer, config.tokens_per_tile, config.left_context))


@pytest.mark.parametrize("seed", [0, 1])
def test_answers_equal_those_alone_whatever_runs_beside_them(predictor, monkeypatch, seed):
    """Requests come at random turns, some are cancelled; pieces are short, and so is the cache."""
    monkeypatch.setattr(engine_module, "PIECE", 16)
    draw = random.Random(seed)
    engine = Engine(predictor, Metrics(), drafts="on", max_rows=5, cache_bytes=5 * 384 * 4096)
    images = [Tiles((1, 1), random_tiles(1, seed=n)) for n in range(3)]
    asked = []
    for _ in range(24):
        settings = GenerationConfig(
            max_new_tokens=draw.choice([1, 3, 12, 30]), repetition_penalty=draw.choice([1.0, 1.0, 1.3])
        )
        shown, question = draw.sample(images, draw.choice([0, 1, 1, 2])), draw.choice(QUESTIONS)
        request, client = request_of(predictor, shown, question, settings, stops=draw.choice([(), ("e",)]))
        asked.append((shown, question, settings, request, client))
    for n, (*_, request, _) in enumerate(asked):
        engine.submit(request)
        for _ in range(draw.choice([0, 0, 1, 4])):
            engine.turn()
        if n % 6 == 5:
            engine.cancel(asked[n - 2][3])
    run(engine)
    plain = "off" if predictor.model.heads is None else "on"
    for shown, question, settings, request, client in asked:
        if request.cancelled and not client.over.is_set():
            continue
        expected = predictor.answer(
            [(shown, question)], replace(settings, speculative=plain), stops=request.stops
        )[0]
        assert isinstance(client.end, Done), client.end
        assert client.text == expected.text and (client.end.reason == "length") == expected.truncated
    assert not engine.answers and not engine.joining and not engine.batch.rows
    assert sum(not client.over.is_set() for *_, client in asked) <= 4


def test_a_sampled_answer_depends_on_its_seed_alone(predictor):
    """The same tokens as alone without drafts, beside greedy and sampled rows."""
    settings = GenerationConfig(
        max_new_tokens=12, sampling=True, temperature=0.8, top_p=0.9, speculative="off"
    )
    engine = Engine(predictor, Metrics(), drafts="off")
    image = Tiles((1, 1), random_tiles(1))
    asked = [
        request_of(predictor, [image], QUESTIONS[n % 3], replace(settings, seed=n // 2, sampling=n != 5))
        for n in range(6)
    ]
    for request, _ in asked:
        engine.submit(request)
    run(engine)
    for n, (request, client) in enumerate(asked):
        expected = predictor.answer([([image], QUESTIONS[n % 3])], request.settings)[0].text
        assert client.text == expected
    assert asked[0][1].text != asked[2][1].text or asked[1][1].text != asked[3][1].text


def test_sampled_drafts_keep_the_distribution():
    """The first token after one draft: drawn as without the draft, however likely the draft was."""
    g = torch.Generator().manual_seed(0)
    logits, N = 2 * torch.randn(1, 2, 6, generator=g), 2500
    settings = GenerationConfig(sampling=True, temperature=0.7, seed=3)
    expected = (logits[0, 0] / 0.7).softmax(-1)
    for draft in (int(expected.argmax()), int(expected.argmin())):
        row = Row(settings, 8, on_step=lambda row, step: False)
        first = [int(row.accept(torch.tensor([[draft]]), logits)[0][0, 0]) for _ in range(N)]
        share = torch.bincount(torch.tensor(first), minlength=6) / N
        assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / N).sqrt()).all(), draft


def test_prompts_in_pieces_do_not_stop_running_answers(predictor, monkeypatch):
    """While a long prompt is prefilled in pieces, every turn gives a running answer a token or more."""
    monkeypatch.setattr(engine_module, "PIECE", 8)
    engine = Engine(predictor, Metrics(), drafts="off")
    settings = GenerationConfig(max_new_tokens=40)
    running, first = request_of(predictor, [], "what is it?", replace(settings, repetition_penalty=1.2))
    engine.submit(running)
    while not first.events:
        engine.turn()
    long, second = request_of(predictor, [], "a long question, " * 5, settings)
    engine.submit(long)
    pieces = 0
    while not second.events and not first.over.is_set():
        before = len(first.events)
        engine.turn()
        pieces += 1
        assert len(first.events) > before
    assert pieces >= len(long.prompt.right_ids) // 8
    run(engine)
    assert isinstance(second.end, Done)


def test_a_stored_image_needs_no_tiles_and_a_lost_one_is_refused(tokenizer):
    predictor = Predictor(lively_model(tokenizer), Renderer(tokenizer, TINY_MODEL.tokens_per_tile))
    engine, image = Engine(predictor, Metrics()), Tiles((1, 1), random_tiles(1))
    settings = GenerationConfig(max_new_tokens=5)
    request, first = request_of(predictor, [image], "what is it?", settings)
    key = block_key(predictor.model, request.blocks[0])
    stored = StoredImage(key, (1, 1))
    lost, missing = request_of(predictor, [stored], "what is it?", settings)
    engine.submit(lost)
    run(engine)
    assert isinstance(missing.end, Refused) and missing.end.status == 404
    again, second = request_of(predictor, [stored], "what is it?", settings)
    engine.submit(request)
    engine.submit(again)
    run(engine)
    assert second.text == first.text and isinstance(second.end, Done)
    assert (first.end.image_kv, second.end.image_kv) == ("computed", "reused")
    assert (first.end.cached_tokens, second.end.cached_tokens) == (0, len(request.prompt.left_ids))


def test_what_fails_is_told_and_the_rest_goes_on(tokenizer, monkeypatch):
    """A failed turn ends the answers of its batch with an error; the next request is answered."""
    predictor, errors = (
        Predictor(lively_model(tokenizer), Renderer(tokenizer, TINY_MODEL.tokens_per_tile)),
        [],
    )
    engine, settings = Engine(predictor, Metrics(errors.append)), GenerationConfig(max_new_tokens=5)
    engine.start()
    step = engine.batch.step
    monkeypatch.setattr(engine.batch, "step", lambda: 1 / 0)
    request, client = request_of(predictor, [], "what is it?", settings)
    engine.submit(request)
    assert isinstance(client.end, Refused) and client.end.status == 500
    assert isinstance(errors[0], ZeroDivisionError)
    monkeypatch.setattr(engine.batch, "step", step)
    request, client = request_of(predictor, [], "what is it?", settings)
    engine.submit(request)
    assert isinstance(client.end, Done)
    assert engine.close(10)
    with pytest.raises(Refused, match="stopping"):
        engine.submit(request)


def test_a_full_queue_and_a_prompt_that_never_fits_are_refused(predictor):
    engine = Engine(predictor, Metrics(), max_waiting=2, cache_bytes=1 << 16)
    small, _ = request_of(predictor, [], "what is it?", GenerationConfig(max_new_tokens=2))
    large, _ = request_of(predictor, [], "what is it?", GenerationConfig(max_new_tokens=100_000))
    with pytest.raises(Refused, match="larger than the server's cache"):
        engine.submit(large)
    if engine.batch.could_fit(engine.capacity(small)):
        engine.submit(small)
        engine.submit(small)
        with pytest.raises(Refused, match="queue is full") as refusal:
            engine.submit(small)
        assert refusal.value.status == 429


def test_a_constraint_holds_with_drafts_beside_it(predictor):
    """Every token is an allowed one, whatever the heads draft; the row beside it is not touched."""
    allowed = torch.arange(20, 40)

    def mask(tokens: list[int], logits: torch.Tensor) -> None:
        kept = logits[allowed].clone()
        logits.fill_(-torch.inf)
        logits[allowed] = kept

    engine, settings = Engine(predictor, Metrics(), drafts="on"), GenerationConfig(max_new_tokens=12)
    bound, first = request_of(predictor, [], "what is it?", settings, constraint=mask)
    free, second = request_of(predictor, [], "what is it?", settings)
    for request in (bound, free):
        engine.submit(request)
    run(engine)
    tokens = [t for event in first.events if isinstance(event, Delta) for t in event.step.tokens]
    assert len(tokens) == 12 and set(tokens) <= set(allowed.tolist())
    expected = predictor.answer([([], "what is it?")], replace(settings, speculative="off"))[0]
    assert second.text == expected.text


def test_a_constrained_row_takes_one_token():
    """Also where a draft after it would be accepted; the logits that others read stay as they are."""
    row = Row(
        GenerationConfig(),
        8,
        lambda row, step: False,
        constraint=lambda _, logits: logits[:3].fill_(-torch.inf),
    )
    logits = (
        torch.eye(6)[None, [2, 5, 4]] + torch.eye(6)[3] / 2
    )  # position 0: token 2, and 3 where 2 is masked
    before = logits.clone()
    tokens, counts = row.accept(torch.tensor([[3, 5]]), logits)
    assert tokens.tolist() == [[3]] and counts.tolist() == [1] and torch.equal(logits, before)


def test_a_row_that_joins_sees_nothing_of_the_one_before(predictor):
    """It takes the slots of a row that has left, whose last ones are empty again."""
    right = predictor.model.right
    cache, one = SharedCache(predictor.model), new_cache(predictor.model, 1, 8)
    cache.store_anew(1, 8)
    for length in (6, 2):
        one.reserve(torch.arange(length)[None])
        for layer in range(right.config.layers):
            one.update(layer, *torch.randn(2, 1, right.config.kv_heads, length, right.config.head_size), None)
        cache.join(one, 0)
        assert cache.lengths == [length]
        assert cache.positions.tolist() == [[*range(length), *[NEVER] * (8 - length)]]
        assert torch.equal(cache.keys[0][0, :, :length], one.keys[0][0, :, :length])
        cache.select_rows([])
        one.truncate([0])
