"""Predicted against true tokens: counts against loops over single tokens, and the picture's colours."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from configs.model import MultiTokenConfig
from data.collators import collate
from data.datasets import Sample
from data.packing import Budget
from eval.token_agreement import LEADING_TOKENS, answer_indices
from eval.validation import Validation, save_picture
from tests.conftest import TINY_MODEL, TURNS, dataset_of, lively_model
from utils.plotting import RIGHT, WRONG, agreement


def test_places_begin_anew_with_each_answer():
    labels = torch.tensor([[-100, 5, 6, 7, -100, 5, 6, 8, 9], [4, -100, -100, 4, 4, 4, -100, -100, -100]])
    documents = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1, -1, -1, -1]])
    assert answer_indices(labels, documents).tolist() == [0, 1, 2, 0, 1, 0, 1, 0, 0, 0, 1]


@pytest.fixture(params=[0, 2])
def scored(request, tokenizer, renderer, image_file):
    """A validation and its scores, by a model with heads and one without.

    The records have one to four chained turns.
    """
    heads = request.param
    config = replace(TINY_MODEL, multi_token=MultiTokenConfig(heads=heads, mlp_size=32))
    model = lively_model(tokenizer, config)
    records = [{"images": [str(image_file)], "texts": TURNS[: 1 + i % 4]} for i in range(6)]
    validation = Validation(
        dataset_of(records, renderer, turns="chain"), Budget(64, 128, renderer.left_unit), 2, 0
    )
    with torch.no_grad():
        scores = validation.score(model)
    return heads, model, validation, scores


def test_accuracy_by_position_and_by_head(scored, tokenizer):
    heads, model, validation, scores = scored
    right, every, by_head = {}, {}, [[0, 0] for _ in range(heads)]
    answers = []
    for chunk in validation.chunks:
        for document in [d for row in chunk for sample in row for d in sample.documents]:
            tiles = next(
                sample.tiles if sample.tiles is not None else validation.dataset.decoded(sample).tiles
                for row in chunk
                for sample in row
                if document in sample.documents
            )
            batch = one(document, tiles)
            with torch.no_grad():
                hidden = model(**batch).hidden
                logits = model.logits(hidden)[0]
            position = 0
            for i, label in enumerate(document.labels):
                if label == -100:
                    position = 0
                    continue
                if position == 0:
                    answers.append([])
                predicted = int(logits[i].argmax())
                answers[-1].append((label, predicted))
                right[position], every[position] = (
                    right.get(position, 0) + (predicted == label),
                    every.get(position, 0) + 1,
                )
                state = hidden[0, i]
                for k in range(1, heads + 1):
                    run = document.labels[i : i + k + 1]
                    if len(run) <= k or -100 in run:
                        break
                    with torch.no_grad():
                        state = model.heads.step(state, model.right.embed_tokens.weight[run[k - 1]])
                        guess = int((model.heads.norm(state) @ model.right.unembedding.T).argmax())
                    by_head[k - 1][0] += guess == run[k]
                    by_head[k - 1][1] += 1
                position += 1
    assert scores["position_accuracy"] == pytest.approx(
        [right[p] / every[p] for p in sorted(every) if p < LEADING_TOKENS]
    )
    assert (
        scores.get("head_accuracy", []) == pytest.approx([r / n for r, n in by_head])
        and len(by_head) == heads
    )
    retained = [(a.truth, a.predicted[0]) for a in validation.agreement.answers]
    assert (
        retained
        == [
            ([tokenizer.show(t) for t, _ in answer], [tokenizer.show(s) for _, s in answer])
            for answer in answers[: len(retained)]
        ]
        and len(retained) == 8
    )
    assert validation.agreement.answers[0].question == TURNS[0]["user"] and all(
        len(a.predicted) == 1 + heads for a in validation.agreement.answers
    )
    assert all(
        a.predicted[k][:k] == [None] * min(k, len(a.truth))
        for a in validation.agreement.answers
        for k in range(1 + heads)
    )


def one(document, tiles):
    return collate([[Sample((0, 0, 0), tiles, [document])]], 0)


def test_the_picture_is_green_where_tokens_agree():
    def areas(picture):
        pixels = np.asarray(picture)
        return [int((pixels == tuple(bytes.fromhex(colour[1:]))).all(-1).sum()) for colour in (RIGHT, WRONG)]

    truth = ["a", "·red", "·ball", "<|im_end|>"]
    all_right = areas(agreement([("what?", truth, [list(truth)])], ["next"]))
    none_right = areas(agreement([("what?", truth, [["x"] * 4])], ["next"]))
    nothing = areas(agreement([("what?", truth, [[None] * 4])], ["next"]))
    half = areas(agreement([("what?", truth, [[*truth[:2], "x", "x"]])], ["next"]))
    assert all_right[1] == none_right[0] == 0 and nothing == [0, 0] and min(half) > 0
    assert all_right[0] > 2000 and none_right[1] > 2000 and half[0] < half[1]
    long = agreement([("what?", ["word"] * 60, [["word"] * 60])], ["next"])
    assert (
        long.width == 960
        and long.height > agreement([("what?", ["word"] * 5, [["word"] * 5])], ["next"]).height
    )


def test_the_picture_of_a_validation(scored, tmp_path):
    _, _, validation, _ = scored
    path = save_picture(validation.agreement.picture(), tmp_path / "tokens.png")
    assert path.read_bytes().startswith(b"\x89PNG") and validation.agreement.picture().height > 400
