"""Conversations against the naive model over the whole context, and the terminal's side of them."""

import io
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import eval.chat
from configs.model import GenerationConfig, MultiTokenConfig
from data.collators import collate_prompts
from data.conversations import ask
from data.images import Tiles
from data.render import Renderer
from eval.chat import Chat, answer_all, talk
from eval.predictor import Predictor
from models.generation import generate
from tests.conftest import TINY_MODEL, lively_model, random_tiles
from tests.naive_dual_tower import Naive
from tests.test_generation import naive_greedy
from utils.errors import UsageError

SQUARE = (1, 1)


@pytest.mark.parametrize("context", ["image", "none"])
@pytest.mark.parametrize("heads", [0, 3])
def test_every_turn_is_what_the_naive_model_says_of_the_whole_conversation(tokenizer, context, heads):
    """Three turns, with images in the first and the third.

    The tokens equal the naive model's, and each image is encoded once.
    """
    model = lively_model(
        tokenizer, replace(TINY_MODEL, left_context=context, multi_token=MultiTokenConfig(heads, 32))
    )
    renderer = Renderer(tokenizer, TINY_MODEL.tokens_per_tile, context)
    settings = GenerationConfig(max_new_tokens=6, speculative="on" if heads else "off")
    chat, naive = Chat(Predictor(model, renderer), settings), Naive(model)
    tiles, ids, answers = [], [], []
    for turn, (text, new) in enumerate([("what is it?", 1), ("is it large?", 0), ("what color?", 1)]):
        images = [Tiles(SQUARE, random_tiles(1, seed=turn))] * new
        tiles += [image.pixels for image in images]
        ids += [tokenizer.turn_end, *tokenizer.encode("\n")] * (turn > 0)
        ids += [
            tokenizer.special["<|im_start|>"],
            *tokenizer.encode("user\n"),
            *renderer.image_block() * new,
            *tokenizer.encode(text),
            tokenizer.turn_end,
            *tokenizer.encode("\n"),
        ]
        ids += [tokenizer.special["<|im_start|>"], *tokenizer.encode("assistant\n")]
        answer = chat.ask(text, images)
        expected = naive_greedy(naive, ids, torch.cat(tiles), tokenizer.turn_end, 6)
        assert answer.text == tokenizer.decode(expected) and answer.tokens == len(expected)
        assert answer.image_kv == ("computed" if new and context == "image" else "none")
        answers.append(expected)
        ids += expected
    assert answers[0] != answers[1] and len({token for tokens in answers for token in tokens}) > 4
    again = chat.ask("and this?", [Tiles(SQUARE, random_tiles(1, seed=0))])
    assert again.image_kv == ("reused" if context == "image" else "none")


def test_an_answer_that_ends_by_itself_is_continued(tokenizer, renderer, monkeypatch):
    """Its last token is in the cache already, and must not be there twice."""
    model = lively_model(tokenizer)
    naive, settings, tiles = Naive(model), GenerationConfig(max_new_tokens=6), random_tiles(1)
    prompt = renderer.prompt(ask("what is it?", 1), [SQUARE])
    ids = dict(
        zip(
            [*prompt.left_positions, *prompt.right_positions],
            [*prompt.left_ids, *prompt.right_ids],
            strict=True,
        )
    )
    ids = [ids[p] for p in sorted(ids)]
    answer = naive_greedy(naive, ids, tiles, -1, 6)
    stop = next(token for i, token in enumerate(answer) if i >= 2 and token not in answer[:i])
    original = eval.chat.generate
    monkeypatch.setattr(
        eval.chat, "generate", lambda *arguments, **more: original(*arguments, **more | {"turn_end": stop})
    )
    chat = Chat(Predictor(model, renderer), settings)
    assert chat.ask("what is it?", [Tiles(SQUARE, tiles)]).tokens == answer.index(stop)
    follow = renderer.follow_up([*chat.messages, *ask("is it large?")], [], chat.last, chat.position)
    prefix = [*ids, *answer[: answer.index(stop)]]
    assert follow.right_positions[0] == len(prefix) - 1 and follow.right_ids[0] == prefix[-1]
    expected = naive_greedy(naive, [*prefix, *follow.right_ids[1:]], tiles, stop, 6)
    assert chat.ask("is it large?", []).text == tokenizer.decode(expected)


def test_a_turn_that_is_stopped_is_forgotten(model, renderer, monkeypatch):
    settings = GenerationConfig(max_new_tokens=5)
    chats = [Chat(Predictor(model, renderer), settings) for _ in range(2)]
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
    """Turns until an empty line; /image shows one; errors are reported and the conversation goes on."""
    monkeypatch.setattr(
        sys,
        "stdin",
        io.StringIO(
            f"/image {image_file}\nwhat is it?\n/image nowhere.png\n{'long ' * 400}\nand now?\n\nnever read\n"
        ),
    )
    predictor = Predictor(model, renderer)
    talk(predictor, Chat(predictor, GenerationConfig(max_new_tokens=4)), [], stats=True)
    out, err = capsys.readouterr()
    alone = predictor.answer(
        [([predictor.tiles(image_file)], "what is it?")], GenerationConfig(max_new_tokens=4)
    )[0]
    assert out.startswith(alone.text + "\n") and err.count("[first token") == 2
    assert "image KV computed" in err and "nowhere.png does not exist" in err and "positions" in err


def test_a_turn_that_fails_does_not_fail_the_next(model, renderer, image_file, monkeypatch, capsys):
    """More images than the model has positions for; a byte that is no UTF-8; /image without a file."""
    lines = (
        f"/image {image_file}\n" * 200 + "what is it?\nand now?\n" + "a\udcffb\nand then?\n/image\n/image \n"
    )
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode(errors="surrogateescape")), encoding="utf-8")
    )
    predictor = Predictor(model, renderer)
    talk(predictor, Chat(predictor, GenerationConfig(max_new_tokens=4)), [], stats=True)
    out, err = capsys.readouterr()
    assert (
        err.count("[first token") == 2 == out.count("\n")
        and "(200 images dropped: give them again with /image)" in err
        and "not Unicode" in err
    )
    assert err.count("give a file behind /image") == 2 and err.count("error: ") == 4


def test_the_repetition_penalty_counts_earlier_turns(tokenizer, renderer, monkeypatch):
    """A turn is what it would be at the end of one long prompt."""
    model, settings = lively_model(tokenizer), GenerationConfig(max_new_tokens=6, repetition_penalty=3.0)
    chat = Chat(Predictor(model, renderer), settings)
    original, counted = eval.chat.generate, []

    def noted(*arguments, **more):
        counted.append(set(more["seen"]))
        return original(*arguments, **more)

    monkeypatch.setattr(eval.chat, "generate", noted)
    history = []
    for text in ("what is it?", "is it large?"):
        history += [{"user": text, "assistant": chat.ask(text, []).text}]
    first = renderer.prompt(ask("what is it?"))
    generated = generate(
        model, images=[[]], turn_end=tokenizer.turn_end, settings=settings, **collate_prompts([first])
    ).tokens[0]
    assert counted == [set(), {*first.right_ids, *generated}]
    follow = renderer.follow_up(
        [*chat.messages[:2], *ask("is it large?")],
        [],
        generated[-1:],
        first.right_positions[-1] + len(generated),
    )
    ids = [*first.right_ids, *generated[:-1], *follow.right_ids]
    again = generate(
        model,
        torch.tensor([ids]),
        torch.arange(len(ids))[None],
        images=[[]],
        turn_end=tokenizer.turn_end,
        settings=settings,
    )
    assert tokenizer.decode(again.tokens[0]) == history[1]["assistant"]
    plain = Chat(Predictor(model, renderer), GenerationConfig(max_new_tokens=6))
    assert [plain.ask(turn["user"], []).text for turn in history] != [turn["assistant"] for turn in history]


def test_the_next_answer_begins_on_its_own_line(model, renderer, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("what is it?\nand now?\n\n"))
    chat = Chat(Predictor(model, renderer), GenerationConfig(max_new_tokens=4))
    whole, asked = chat.ask, []

    def ask(text, images, on_text):
        asked.append(text)
        if len(asked) == 1:
            on_text("half", " an")
            raise KeyboardInterrupt
        return whole(text, images, on_text)

    monkeypatch.setattr(chat, "ask", ask)
    talk(chat.predictor, chat, [], stats=False)
    out, err = capsys.readouterr()
    assert (
        out.startswith("half an\n") and out.count("\n") == 2 and err == "[stopped: this turn is forgotten]\n"
    )


def test_a_generated_image_token_is_not_read(tokenizer, monkeypatch):
    """As a model may that knows nothing yet."""
    model = lively_model(tokenizer, replace(TINY_MODEL, left_context="none"))
    chat = Chat(
        Predictor(model, Renderer(tokenizer, TINY_MODEL.tokens_per_tile, "none")),
        GenerationConfig(max_new_tokens=1, repetition_penalty=1.5),
    )
    with torch.no_grad():
        model.right.unembedding[model.vocabulary.image_token_id] *= 50
    original, kinds = eval.chat.generate, []

    def generate_image_token(*arguments, **more):
        result = original(*arguments, **more)
        result.tokens[0][:] = [model.vocabulary.image_token_id]
        kinds.append(result)
        return result

    monkeypatch.setattr(eval.chat, "generate", generate_image_token)
    assert [
        chat.ask(text, [Tiles(SQUARE, random_tiles(1))] * (n == 1)).tokens for n, text in enumerate("abc")
    ] == [1, 1, 1] and len(kinds) == 3


def test_images_that_are_read_together_are_of_one_turn(tokenizer):
    model = lively_model(tokenizer, replace(TINY_MODEL, image_isolation=False))
    chat, image = (
        Chat(
            Predictor(model, Renderer(tokenizer, TINY_MODEL.tokens_per_tile, "image")),
            GenerationConfig(max_new_tokens=2),
        ),
        Tiles(SQUARE, random_tiles(1)),
    )
    chat.ask("and before?", [])
    chat.ask("what are they?", [image, image])
    chat.ask("is it large?", [])
    with pytest.raises(UsageError, match="begin a new one"):
        chat.ask("and this?", [image])


def test_a_chat_with_drafts_needs_heads(model, renderer):
    with pytest.raises(UsageError, match="no multi-token heads"):
        Chat(Predictor(model, renderer), GenerationConfig(speculative="on"))


def test_models_that_read_text_left_do_not_chat(tokenizer):
    model = lively_model(tokenizer, replace(TINY_MODEL, left_context="prefix", image_isolation=False))
    with pytest.raises(UsageError, match="single questions"):
        Chat(Predictor(model, Renderer(tokenizer, TINY_MODEL.tokens_per_tile, "prefix")), GenerationConfig())


def test_stop_strings_and_streaming(tokenizer, renderer):
    """What is streamed grows to the answer, which ends before the stop string; half a stop string waits."""
    model = lively_model(tokenizer)
    predictor, asked = Predictor(model, renderer), [([], "what is it?")]
    whole = predictor.answer(asked, GenerationConfig(max_new_tokens=12))[0]
    stop = whole.text[len(whole.text) // 2 :][:3]
    seen: list[str] = []
    truncated = predictor.answer(
        asked, GenerationConfig(max_new_tokens=12), lambda text, _: seen.append(text), ["never", stop]
    )[0]
    assert truncated.text == whole.text.split(stop)[0] and truncated.tokens < whole.tokens
    assert (
        seen[-1] == truncated.text
        and all(b.startswith(a) for a, b in pairwise(seen))
        and not any(stop in s for s in seen)
    )


def test_tokens_after_a_stop_string_are_not_in_the_context(tokenizer, renderer):
    """The next turn goes on from the last token before it, and not from those behind."""
    model = lively_model(tokenizer)
    settings, first = (
        GenerationConfig(max_new_tokens=12, repetition_penalty=1.3),
        renderer.prompt(ask("what is it?")),
    )
    generated = generate(
        model, images=[[]], turn_end=-1, settings=settings, **collate_prompts([first])
    ).tokens[0]
    for retained in (0, 1, 5):
        text = tokenizer.decode(generated[:retained])
        stop = tokenizer.decode(generated)[len(text) :][:4]
        chat = Chat(Predictor(model, renderer), settings, ["", "never", stop])
        assert (
            tokenizer.decode(generated).index(stop) == len(text) and chat.ask("what is it?", []).text == text
        )
        follow = renderer.follow_up(
            [*chat.messages, *ask("is it large?")],
            [],
            generated[:retained][-1:],
            first.right_positions[-1] + max(1, retained),
        )
        ids = [*first.right_ids, *generated[: max(0, retained - 1)], *follow.right_ids]
        expected = generate(
            model,
            torch.tensor([ids]),
            torch.arange(len(ids))[None],
            images=[[]],
            turn_end=tokenizer.turn_end,
            settings=settings,
        ).tokens[0]
        assert (
            chat.ask("is it large?", []).text == tokenizer.decode(expected).split(stop)[0].split("never")[0]
        )
        assert not set(generated[retained:]) & chat.seen - {*ids, *expected}


def test_an_answer_is_out_before_the_next_begins(model, renderer, monkeypatch):
    """Through a pipe too, which Python buffers: a kill behind it does not lose it."""
    predictor = Predictor(model, renderer)
    for as_json in (False, True):
        whole, seen = predictor.answer, []
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out := io.BytesIO(), "utf-8"))
        with monkeypatch.context() as patched:
            patched.setattr(
                predictor,
                "answer",
                lambda *a, whole=whole, seen=seen, out=out: (seen.append(out.getvalue()), whole(*a))[1],
            )
            answer_all(
                predictor,
                ["what is it?", "is it large?"],
                [],
                GenerationConfig(max_new_tokens=2),
                [],
                as_json,
                stats=False,
            )
        assert seen[0] == b"" and b"what is it?" in seen[1] and b"is it large?" in out.getvalue()


def test_lines_that_fail_are_counted(model, renderer, monkeypatch, capsys):
    chat = Chat(Predictor(model, renderer), GenerationConfig(max_new_tokens=4))
    for lines, failed in (
        ("what is it?\n", 0),
        ("/image nowhere.png\nwhat is it?\n\nnever read\n", 1),
        ("/image\n/image nowhere.png\n", 2),
    ):
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        assert talk(chat.predictor, chat, [], stats=False) == failed
    monkeypatch.setattr(sys, "stdin", io.StringIO("what is it?\nand now?\n"))
    assert (
        talk(chat.predictor, Chat(chat.predictor, GenerationConfig(max_new_tokens=10**6)), [], stats=False)
        == 2
    )
    assert capsys.readouterr().err.count("error: ") == 5
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match="no standard input"):
        talk(chat.predictor, chat, [], stats=False)


def test_half_a_stop_string_waits_whatever_its_bytes(tokenizer, renderer):
    """A partial stop string is held back even if its characters take several tokens."""
    predictor, visible = Predictor(lively_model(tokenizer), renderer), []
    on_tokens = predictor.stream(lambda text, _: visible.append(text), ["é💡"], 1)
    tokens = tokenizer.encode("caé💥 aé💡x")
    ended = [on_tokens(0, tokens[:n]) for n in range(1, len(tokens) + 1)]
    assert all(b.startswith(a) for a, b in pairwise(visible)) and "\ufffd" not in "".join(visible)
    assert ended.index(True) < len(ended) - 1 and visible[ended.index(True)] == "caé💥 a"
