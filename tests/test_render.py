"""The one renderer: against transformers' chat template, and its loss mask against a reading of the text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data.conversations import ask
from data.render import IGNORE, Renderer
from data.tokenizer import CHAT_TOKENS, IMAGE_TOKENS, Tokenizer
from tests.conftest import TURNS, chat

SPECIAL = (*CHAT_TOKENS, *IMAGE_TOKENS)
words = (
    st.text(max_size=12)
    | st.sampled_from(SPECIAL)
    | st.sampled_from(["user\n", "assistant\n", " ", "\n", "Zoë 漢字 🙂"])
)
texts = st.lists(words, min_size=1, max_size=4).map("".join)
turns = st.lists(st.fixed_dictionaries({"user": texts, "assistant": texts}), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def hf_tokenizer(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("length", [1, 2, 4])
def test_equals_the_chat_template(renderer, tokenizer, hf_tokenizer, length):
    """Rendered text equals transformers' apply_chat_template with the saved template.

    For training and for prompting.
    """
    conversation = TURNS[:length]
    document = renderer.conversation(chat(conversation))
    whole = hf_tokenizer.apply_chat_template(chat(conversation), return_dict=False)
    assert [*document.right_ids, tokenizer.turn_end] == whole[
        :-1
    ]  # the template ends with a newline that nobody learns
    prompt = [*conversation[:-1], {"user": conversation[-1]["user"]}]
    expected = hf_tokenizer.apply_chat_template(chat(prompt), add_generation_prompt=True, return_dict=False)
    assert renderer.prompt(chat(prompt)).right_ids == expected


@settings(max_examples=150, deadline=None)
@given(conversation=turns, images=st.integers(0, 3))
def test_loss_mask_is_the_answers_and_their_end(renderer, tokenizer, conversation, images):
    document = renderer.conversation(chat(conversation, images), [(1, 1)] * images)
    supervised = [label for label in document.labels if label != IGNORE]
    expected = [
        token for turn in conversation for token in (*tokenizer.encode(turn["assistant"]), tokenizer.turn_end)
    ]
    assert supervised == expected
    following = [*document.right_ids[1:], tokenizer.turn_end]
    assert all(label in (IGNORE, after) for label, after in zip(document.labels, following, strict=True))


@settings(max_examples=150, deadline=None)
@given(conversation=turns, images=st.integers(0, 3))
def test_positions_count_both_streams_once(renderer, conversation, images):
    document = renderer.conversation(chat(conversation, images), [(1, 1)] * images)
    block = len(renderer.image_block())
    assert sorted(document.left_positions + document.right_positions) == list(range(document.length))
    assert document.left_ids == renderer.image_block() * images
    assert [b.stop - b.start for b in document.blocks(isolated=True)] == [block] * images and len(
        document.blocks(isolated=False)
    ) == min(images, 1)
    without = renderer.conversation(chat(conversation))
    assert without.right_ids == document.right_ids and without.labels == document.labels


@settings(max_examples=200, deadline=None)
@given(text=texts)
def test_text_never_becomes_a_special_token_and_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert not set(tokenizer.special.values()) & set(ids)
    assert tokenizer.decode(ids) == text


def test_a_prompt_is_the_beginning_of_the_training_document(renderer):
    prompt = renderer.prompt(ask(TURNS[0]["user"], 2), [(1, 1)] * 2)
    document = renderer.conversation(chat(TURNS[:1], 2), [(1, 1)] * 2)
    n = len(prompt.right_ids)
    assert (
        document.right_ids[:n] == prompt.right_ids and document.right_positions[:n] == prompt.right_positions
    )
    assert document.labels[: n - 1] == [IGNORE] * (n - 1) and document.labels[n - 1] != IGNORE


def test_tokenizer_survives_saving(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    text = "<|im_end|> what color? Zoë"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.vocabulary == tokenizer.vocabulary


def test_an_image_block_names_its_tiles_row_by_row(renderer, tokenizer):
    names = (
        tokenizer.backend.decode(renderer.image_block((2, 3)), skip_special_tokens=False)
        .replace("<|image|>", "")
        .replace(" ", "")
    )
    assert names == "<|global_image|>" + "".join(
        f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2, 3)
    )
    assert (
        len(renderer.image_block((2, 3))) == 7 * (1 + renderer.tokens_per_tile)
        and len(renderer.image_block()) == 1 + renderer.tokens_per_tile
    )


def test_images_stand_at_the_head_of_the_first_turn(renderer):
    turns = [{"user": "one?", "assistant": "a"}, {"user": "two?", "assistant": "b"}]
    image = f"<|global_image|>[{renderer.tokens_per_tile} image tokens]"
    whole = (
        f"<|im_start|>user\n{image * 2}one?<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
        "<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\nb"
    )
    assert renderer.preview(renderer.conversation(chat(turns, 2), [(1, 1)] * 2)) == whole


def test_with_prefix_routing_all_goes_left_up_to_the_last_image_token(tokenizer):
    document = Renderer(tokenizer, 4, "prefix").prompt(ask("what?", 2), [(1, 1)] * 2)
    assert (
        document.left_ids[-5:] == [tokenizer.global_image, *[tokenizer.image] * 4]
        and document.left_ids.count(tokenizer.global_image) == 2
    )
    assert document.left_positions == list(range(len(document.left_ids))) and document.right_positions[
        0
    ] == len(document.left_ids)
