"""Exported folders in the trainers of others: transformers' Trainer, TRL and peft, against our own training."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from data.collators import collate
from data.conversations import images_of
from data.datasets import Sample
from models.losses import cross_entropy
from tests.test_transformers import Exported, exported, images, modules_cache  # noqa: F401  # fixtures


def chats(images: dict[str, str]) -> list[list[dict]]:
    """A system turn and images in two turns; text alone; one image, two questions."""

    def user(*parts: str) -> dict:
        shown = [
            {"type": "image", "path": images[part]} if part in images else {"type": "text", "text": part}
            for part in parts
        ]
        return {"role": "user", "content": shown}

    def answer(text: str) -> dict:
        return {"role": "assistant", "content": text}

    return [
        [
            {"role": "system", "content": "what is it?"},
            user("is it ", "a", " or ", "b", "?"),
            answer("a rectangle"),
            user("a", "what color is the shape?"),
            answer("blue"),
        ],
        [user("is it large or is it small?"), answer("it is small")],
        [user("b", "what is it?"), answer("no"), user("what color?"), answer("<|im_end|> is text")],
    ]


def inputs_of(processor: Any, many: list, side: str = "left") -> dict[str, Tensor]:
    """What TRL's collator makes of them, with `assistant_only_loss`."""
    inputs = processor.apply_chat_template(
        many,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding_side": side, "truncation": True, "max_length": 200},
    )
    labels = inputs["input_ids"].masked_fill(inputs.pop("assistant_masks") == 0, -100)
    return {**inputs, "labels": labels}


def own_batch(e: Exported, many: list) -> tuple[dict[str, Tensor], list]:
    """The batch of our own training, a conversation in each row, and its documents."""
    samples = []
    for messages in many:
        tiles = [e.own.tiles(part["path"]) for part in images_of(messages)]
        document = e.own.renderer.conversation(messages, [image.grid for image in tiles])
        pixels = torch.cat([torch.empty(0, 3, 64, 64, dtype=torch.uint8), *(t.pixels for t in tiles)])
        samples.append(Sample((0, 0), pixels, [document]))
    return collate([[sample] for sample in samples], e.own.model.vocabulary.first_marker_id), [
        sample.documents[0] for sample in samples
    ]


@pytest.mark.parametrize("side", ["left", "right"])
def test_forward_is_that_of_training(exported, side):  # noqa: F811
    """Loss, logits, states and gradients, for rows padded on either side; in fp64, to 1e-7."""
    many = chats(exported.images)
    batch, documents = own_batch(exported, many)
    own, theirs = (copy.deepcopy(model).double() for model in (exported.own.model, exported.model))
    expected = own(**batch)
    loss = cross_entropy(
        expected.hidden[batch["labels"] >= 0], own.right.unembedding, batch["labels"][batch["labels"] >= 0]
    ).mean()
    loss.backward()
    inputs = inputs_of(exported.processor, many, side)
    output = theirs(**inputs, output_hidden_states=True)
    output.loss.backward()
    torch.testing.assert_close(output.loss, loss)
    logits, length = own.logits(expected.hidden), inputs["input_ids"].shape[1]
    for row, document in enumerate(documents):
        whole = int(inputs["attention_mask"][row].sum())
        first = length - whole if side == "left" else 0
        columns = [first + position for position in document.right_positions]
        count = len(columns)
        torch.testing.assert_close(output.logits[row, columns, : logits.shape[-1]], logits[row, :count])
        torch.testing.assert_close(output.hidden_states[-1][row, columns], expected.hidden[row, :count])
        unseen = [*range(first), *range(first + whole, length), *(first + p for p in document.left_positions)]
        assert not output.hidden_states[-1][row, unseen].any()
    for (name, parameter), (other, theirs_) in zip(
        own.named_parameters(), theirs.model.named_parameters(), strict=True
    ):
        assert name == other
        if not name.startswith("heads."):  # they are not trained in transformers
            torch.testing.assert_close(theirs_.grad, parameter.grad)
    assert len(output.hidden_states) == own.config.right.layers + 1
    inputs.pop("labels")
    last = theirs(**inputs, logits_to_keep=3).logits
    torch.testing.assert_close(last, output.logits[:, -3:])
    some = theirs(**inputs, logits_to_keep=torch.tensor([1, 4]), return_dict=False)[0]
    torch.testing.assert_close(some, output.logits[:, [1, 4]])


def test_the_base_model(exported):  # noqa: F811
    """`AutoModel` gives the states that the output layer reads; none where no text token is predicted."""
    base = AutoModel.from_pretrained(exported.folder, trust_remote_code=True)
    inputs = inputs_of(exported.processor, chats(exported.images))
    labels = inputs.pop("labels")
    whole = exported.model(**inputs, output_hidden_states=True)
    states = base(**inputs).last_hidden_state
    assert torch.equal(states, exported.model.base_model(**inputs).last_hidden_state)
    head = exported.model.get_output_embeddings()
    logits = states @ head.weight.T + head.bias
    image_next = inputs["input_ids"].roll(-1, 1) >= exported.model.config.image_token_id
    image_next[:, -1] = False
    torch.testing.assert_close(logits[~image_next], whole.logits[~image_next])
    assert not states[image_next].any()
    assert head.weight.shape == (exported.model.config.vocab_size, states.shape[-1])
    assert exported.model.config.hidden_size == states.shape[-1]
    # All tokens as labels, TRL's default: what no text token predicts leaves no gradient.
    chosen = (labels != -100) | (inputs["input_ids"] >= exported.model.config.image_token_id)
    following = inputs["input_ids"].masked_fill(~chosen, -100)[:, 1:]
    grads = []
    for targets in (following, labels[:, 1:]):
        base.zero_grad()
        states = base(**inputs).last_hidden_state
        logits = states[:, :-1] @ head.weight.detach().T + head.bias
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
        grads.append([p.grad.clone() for p in base.parameters() if p.grad is not None])
    for first, second in zip(*grads, strict=True):
        torch.testing.assert_close(first, second)
