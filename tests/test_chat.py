"""Conversations against the naive model over everything said so far, and the terminal's side of them."""

import io
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import TINY_MODEL, lively_model, random_tiles
from naive_dual_tower import Naive
from test_generation import naive_greedy

import eval.chat
from configs.errors import UsageError
from configs.model import GenerationConfig, MultiTokenConfig
from data.images import Tiles
from data.render import Renderer
from eval.answering import Answerer
from eval.chat import Chat, talk

SQUARE = (1, 1)


@pytest.mark.parametrize("context", ["image", "none"])
@pytest.mark.parametrize("heads", [0, 3])
def test_every_turn_is_what_the_naive_model_says_of_the_whole_conversation(tokenizer, context, heads):
    """Three turns, an image in the first and another in the third: token for token, and each image encoded once."""
    model = lively_model(tokenizer, replace(TINY_MODEL, left_context=context, multi_token=MultiTokenConfig(heads, 32)))
    renderer = Renderer(tokenizer, TINY_MODEL.tokens_per_tile, context)
    settings = GenerationConfig(max_new_tokens=6, speculative="on" if heads else "off")
    chat, naive = Chat(Answerer(model, renderer), settings), Naive(model)
    tiles, ids, told = [], [], []
    for turn, (text, new) in enumerate([("what is it?", 1), ("is it large?", 0), ("what color?", 1)]):
        images = [Tiles(SQUARE, random_tiles(1, seed=turn))] * new
        tiles += [image.pixels for image in images]
        ids += [tokenizer.turn_end, *tokenizer.encode("\n")] * (turn > 0)
        ids += [tokenizer.turn_start, *tokenizer.encode("user\n"), *renderer.image_block() * new, *tokenizer.encode(text), tokenizer.turn_end, *tokenizer.encode("\n")]
        ids += [tokenizer.turn_start, *tokenizer.encode("assistant\n")]
        answer = chat.ask(text, images)
        expected = naive_greedy(naive, ids, torch.cat(tiles), tokenizer.turn_end, 6)
        assert answer.text == tokenizer.decode(expected) and answer.tokens == len(expected)
        assert answer.image_kv == ("computed" if new and context == "image" else "none")
        told.append(expected)
        ids += expected
    assert told[0] != told[1] and len({token for tokens in told for token in tokens}) > 4
    again = chat.ask("and this?", [Tiles(SQUARE, random_tiles(1, seed=0))])
    assert again.image_kv == ("reused" if context == "image" else "none")


def test_an_answer_that_ends_by_itself_is_gone_on_from(tokenizer, renderer, monkeypatch):
    """Its last token is in the cache already, and must not be there twice."""
    model = lively_model(tokenizer)
    naive, settings, tiles = Naive(model), GenerationConfig(max_new_tokens=6), random_tiles(1)
    prompt = renderer.prompt([SQUARE], [{"user": "what is it?"}])
    ids = dict(zip([*prompt.left_positions, *prompt.right_positions], [*prompt.left_ids, *prompt.right_ids], strict=True))
    ids = [ids[p] for p in sorted(ids)]
    answer = naive_greedy(naive, ids, tiles, -1, 6)
    stop = next(token for i, token in enumerate(answer) if i >= 2 and token not in answer[:i])
    original = eval.chat.generate
    monkeypatch.setattr(eval.chat, "generate", lambda *arguments, **more: original(*arguments, **more | {"stop": stop}))
    chat = Chat(Answerer(model, renderer), settings)
    assert chat.ask("what is it?", [Tiles(SQUARE, tiles)]).tokens == answer.index(stop)
    follow = renderer.follow_up([], "is it large?", chat.last, chat.position)
    said = [*ids, *answer[: answer.index(stop)]]
    assert follow.right_positions[0] == len(said) - 1 and follow.right_ids[0] == said[-1]
    expected = naive_greedy(naive, [*said, *follow.right_ids[1:]], tiles, stop, 6)
    assert chat.ask("is it large?", []).text == tokenizer.decode(expected)


def test_a_turn_that_is_stopped_is_forgotten(model, renderer, monkeypatch):
    settings = GenerationConfig(max_new_tokens=5)
    chats = [Chat(Answerer(model, renderer), settings) for _ in range(2)]
    for chat in chats:
        chat.ask("what is it?", [Tiles(SQUARE, random_tiles(1))])
    original = eval.chat.generate

    def interrupted(*arguments, on_tokens, **more):
        original(*arguments, on_tokens=on_tokens, **more)
        raise KeyboardInterrupt

    monkeypatch.setattr(eval.chat, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        chats[0].ask("is it small?", [])
    monkeypatch.undo()
    assert chats[0].ask("what color?", []).text == chats[1].ask("what color?", []).text


def test_the_terminals_side(model, renderer, image_file, monkeypatch, capsys):
    """Turns until an empty line; /image shows one; what is wrong is said and the conversation goes on."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/image {image_file}\nwhat is it?\n/image nowhere.png\n{'long ' * 400}\nand now?\n\nnever read\n"))
    answerer = Answerer(model, renderer)
    talk(answerer, Chat(answerer, GenerationConfig(max_new_tokens=4)), [], stats=True)
    out, err = capsys.readouterr()
    alone = answerer.answer([([answerer.tiles(image_file)], "what is it?")], GenerationConfig(max_new_tokens=4))[0]
    assert out.startswith(alone.text + "\n") and err.count("[first token") == 2
    assert "image KV computed" in err and "nowhere.png does not exist" in err and "positions" in err


def test_models_that_read_text_left_do_not_chat(tokenizer):
    model = lively_model(tokenizer, replace(TINY_MODEL, left_context="prefix", image_isolation=False))
    with pytest.raises(UsageError, match="single questions"):
        Chat(Answerer(model, Renderer(tokenizer, TINY_MODEL.tokens_per_tile, "prefix")), GenerationConfig())


def test_stop_strings_and_streaming(tokenizer, renderer):
    """What is streamed grows to the answer, which ends before the stop string; half a stop string waits."""
    model = lively_model(tokenizer)
    answerer, asked = Answerer(model, renderer), [([], "what is it?")]
    whole = answerer.answer(asked, GenerationConfig(max_new_tokens=12))[0]
    stop = whole.text[len(whole.text) // 2 :][:3]
    seen: list[str] = []
    cut = answerer.answer(asked, GenerationConfig(max_new_tokens=12, stop=stop), seen.append)[0]
    assert cut.text == whole.text.split(stop)[0] and cut.tokens < whole.tokens
    assert seen[-1] == cut.text and all(b.startswith(a) for a, b in pairwise(seen)) and not any(stop in s for s in seen)
