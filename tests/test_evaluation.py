"""lmms-eval through the adapter.

Its results are compared with direct answers, a plain forward pass, scores computed by hand, and the stock
tasks' own data paths.
"""

import contextlib
import io
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tomllib
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TextIO
from unittest.mock import patch

import pytest
import torch
import yaml
from PIL import Image

from configs.model import GenerationConfig
from data.collators import collate
from data.conversations import ask, text_of
from data.datasets import Sample
from data.render import Renderer
from data.synthetic import SKILLS
from eval.predictor import Predictor
from models.image_store import ImageStore
from tests.conftest import TINY_MODEL, chat, lively_model, random_tiles
from tests.hub_server import hub
from tests.programs import at_hub, run_program, run_ranks
from utils.errors import UsageError, UserError, run_script

pytest.importorskip("lmms_eval", reason="the group eval is not installed")

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.tasks import TaskManager

from eval.captions import caption_scores
from eval.lmms_eval_wrapper import DualTower
from eval.results import standard_error
from eval.tasks import Tasks, run_tasks, scores_of
from evaluation import main as evaluation_main

ROOT = Path(__file__).parent.parent
MMSTAR = {  # category → its l2 categories, as in MMStar
    "coarse perception": ["image scene and topic", "image emotion"],
    "fine-grained perception": ["object counting", "recognition"],
    "instance reasoning": ["single-instance reasoning", "cross-instance relation reasoning"],
    "logical reasoning": ["diagram reasoning", "common reasoning"],
    "science & technology": ["biology & chemistry & physics", "geography & earth science & agriculture"],
    "math": ["geometry", "statistical reasoning"],
}
QUESTIONS = [
    "what is it?",
    "is there a red circle in the image?",
    "what color is the shape?",
    "is it large or is it small?",
]


def png(seed: int, side: int = 64) -> bytes:
    held = io.BytesIO()
    Image.fromarray(random_tiles(1, seed, side)[0].permute(1, 2, 0).numpy()).save(held, "png")
    return held.getvalue()


def mmstar_rows(count: int) -> list[dict]:
    rows = []
    for i in range(count):
        category = list(MMSTAR)[i % 6]
        question = f"{QUESTIONS[i % 4]} \nOptions: A: red, B: blue, C: no, D: small"
        about = {"source": "made", "split": "val", "image_path": f"{i}.png"}
        rows.append(
            {
                "index": i,
                "question": question,
                "image": {"bytes": png(i // 2, 64 + i % 3), "path": None},
                "answer": "ABCD"[i * 7 % 4],
                "category": category,
            }
        )
        rows[-1] |= {"l2_category": MMSTAR[category][i // 6 % 2], "meta_info": about}
    return rows


def write_mmstar(folder: Path, rows: list[dict]) -> None:
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    text = Value("string")
    about = {"source": text, "split": text, "image_path": text}
    features = Features(
        {
            "index": Value("int64"),
            "question": text,
            "image": ImageFeature(),
            "answer": text,
            "category": text,
            "l2_category": text,
            "meta_info": about,
        }
    )
    (folder / "data").mkdir(parents=True)
    Dataset.from_list(rows, features=features).to_parquet(folder / "data" / "val-00000-of-00001.parquet")


@pytest.fixture(scope="module", autouse=True)
def datasets_cache(tmp_path_factory):
    import datasets

    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    patch.setenv("HF_DATASETS_CACHE", str(datasets.config.HF_DATASETS_CACHE))
    yield
    patch.undo()


@pytest.fixture(scope="module", autouse=True)
def index_read_once():
    """Each class reads lmms-eval's 1,900 YAML files once, not once a test."""
    read, known = TaskManager.initialize_tasks, {}

    def initialize_tasks(self: TaskManager, include_path: str | None = None, include_defaults: bool = True):
        key = type(self), include_path, include_defaults
        if key not in known:
            known[key] = read(self, *key[1:])
        return deepcopy(known[key])

    with patch.object(TaskManager, "initialize_tasks", initialize_tasks):
        yield


def stock_tasks() -> TaskManager:
    """lmms-eval's own, and ours among them."""
    return TaskManager("ERROR", include_path=str(ROOT / "eval" / "tasks"))


@pytest.fixture(scope="module")
def data_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("copies")
    write_mmstar(root / "Lin-Chen" / "MMStar", mmstar_rows(36))
    return root


@pytest.fixture
def predictor(tokenizer, renderer) -> Predictor:
    return Predictor(lively_model(tokenizer), renderer)


def adapter(predictor: Predictor, documents: list[dict], **options) -> DualTower:
    result = DualTower(predictor=predictor, **options)
    result.task_dict = {"task": {"test": documents}}
    return result


def request(
    number: int, text: str, second, visuals=lambda d: d["images"], kind: str = "generate_until", *more
) -> Instance:
    return Instance(
        kind,
        (text, second, visuals, *more, number, "task", "test"),
        0,
        {"task": "task", "doc_id": number, "repeats": 1},
    )


@pytest.mark.parametrize("context", ["image", "none"])
def test_ragged_batches_answer_as_single_questions_do(tokenizer, context):
    """Batched answers equal single ones on the whole small set, in fp32, dual tower and vanilla.

    Images of different sizes, no image and two images, and questions of many lengths.
    """
    predictor = Predictor(
        lively_model(tokenizer, replace(TINY_MODEL, left_context=context)),
        Renderer(tokenizer, TINY_MODEL.tokens_per_tile, context),
    )
    documents = [
        {"images": [Image.open(io.BytesIO(png(i + j, 64 + 8 * i))) for j in range(i % 3)]} for i in range(12)
    ]
    texts = [" ".join(QUESTIONS[: 1 + i % 4]) for i in range(12)]
    settings = GenerationConfig(max_new_tokens=7)
    alone = [
        predictor.answer([([predictor.tiles(i) for i in d["images"]], t)], settings)[0].text
        for d, t in zip(documents, texts, strict=True)
    ]
    assert len(set(alone)) > 6
    for size in (1, 5, 12):
        evaluated = adapter(predictor, documents, batch_size=size, max_new_tokens=7)
        answers = evaluated.generate_until([request(n, t, {}) for n, t in enumerate(texts)])
        assert [f.text for f in answers] == alone, size


def test_log_likelihood_is_that_of_a_packed_row_in_training(tokenizer, predictor, renderer):
    documents = [{"images": [Image.open(io.BytesIO(png(i)))] * (i % 2)} for i in range(5)]
    question, greedy = next(  # what the model says, in so few tokens that the text is spelt with them again
        (question, text)
        for question in [*QUESTIONS, "blue", "red", "no", "a", "small", "circle"]
        if tokenizer.encode(
            text := predictor.answer([([], question)], GenerationConfig(max_new_tokens=1))[0].text
        )
        and text == text.strip()
        and "\ufffd" not in text
    )
    answers, questions = [" blue", " a rectangle", " no", " it is small", greedy], [*QUESTIONS, question]
    results = adapter(predictor, documents, batch_size=3).loglikelihood(
        [request(n, questions[n], a, kind="loglikelihood") for n, a in enumerate(answers)]
    )
    for n, (document, answer) in enumerate(zip(documents, answers, strict=True)):
        tiles = [predictor.tiles(image) for image in document["images"]]
        conversation = renderer.conversation(
            chat([{"user": questions[n], "assistant": answer.strip()}], len(tiles)), [t.grid for t in tiles]
        )
        batch = collate(
            [
                [
                    Sample(
                        (0, 0, 0),
                        torch.cat([t.pixels for t in tiles]) if tiles else random_tiles(0),
                        [conversation],
                    )
                ]
            ],
            tokenizer.global_image,
        )
        with torch.no_grad():
            logprobs = predictor.model.logits(predictor.model(**batch).hidden[0]).log_softmax(-1)
        labels = batch["labels"][0]
        positions = (labels != -100).nonzero()[:-1, 0]
        assert results[n].text[0] == pytest.approx(
            -logprobs[positions, labels[positions]].sum().item(), abs=1e-3
        )
        assert results[n].text[1] == bool((logprobs[positions].argmax(-1) == labels[positions]).all())
    assert [result.text[1] for result in results] == [False] * 4 + [True]
    with pytest.raises(UserError, match="an empty answer has no likelihood"):
        predictor.loglikelihoods([([], "what is it?", "")])
    with pytest.raises(UsageError, match="256 positions"):
        predictor.loglikelihoods([([], "what is it?" * 90, "no")])


def test_multi_round(predictor, monkeypatch):
    """The task asks on until it has enough; each round's question is the task's."""
    asked = []

    def next_round(document, previous_output, round_idx, previous_round_info):
        asked.append((list(previous_output), round_idx, previous_round_info))
        return (
            document["images"],
            QUESTIONS[round_idx],
            round_idx == document["rounds"],
            list(previous_output),
            f"after {round_idx}",
        )

    documents = [{"images": [Image.open(io.BytesIO(png(3 + i)))], "rounds": 1 + i} for i in range(3)]
    evaluated = adapter(predictor, documents)
    requests = [
        Instance(
            "generate_until_multi_round",
            (QUESTIONS[0], {"max_new_tokens": 4}, lambda d: d["images"], next_round, i, "task", "test"),
            0,
            {"task": "task", "doc_id": i, "repeats": 1},
        )
        for i in range(3)
    ]
    batches, original = [], predictor.answer
    monkeypatch.setattr(
        predictor,
        "answer",
        lambda questions, *more, **named: (
            batches.append(len(questions)),
            original(questions, *more, **named),
        )[1],
    )
    outputs = evaluated.generate_until_multi_round(requests)
    assert batches == [3, 2, 1]  # a round of all at once
    for document, answers in zip(documents, outputs, strict=True):
        tiles = predictor.tiles(document["images"][0])
        messages, expected = [], []
        for number, text in enumerate(QUESTIONS[: document["rounds"]], 1):
            messages += ask(text, 1)
            shown = [tiles] * number  # the task shows its image in every round
            expected.append(original([(shown, messages)], GenerationConfig(max_new_tokens=4))[0].text)
            messages += [{"role": "assistant", "content": expected[-1]}]
        assert answers == expected
    rounds = [(len(previous), number, info) for previous, number, info in asked]
    assert rounds == [(1, 1, None)] * 3 + [(2, 2, "after 1")] * 2 + [(3, 3, "after 2")]


def test_an_image_is_encoded_once(predictor, monkeypatch):
    encoded = []
    original = predictor.model.encode_images
    monkeypatch.setattr(
        predictor.model,
        "encode_images",
        lambda tiles, *more: (encoded.append(len(tiles)), original(tiles, *more))[1],
    )
    image = Image.open(io.BytesIO(png(1)))
    adapter(predictor, [{"images": [image]}] * 9, batch_size=2, max_new_tokens=2).generate_until(
        [request(n, QUESTIONS[n % 4], {}) for n in range(9)]
    )
    assert sum(encoded) == 1


@pytest.mark.parametrize(
    "arguments, sampling, tokens",
    [
        ({}, False, 64),
        (
            {
                "max_new_tokens": 5,
                "temperature": 0,
                "top_p": None,
                "num_beams": 1,
                "do_sample": False,
                "until": ["\n\n"],
            },
            False,
            5,
        ),
        ({"stop_sequences": ["."]}, False, 64),
        ({"temperature": 0.7, "top_p": 0.9}, True, 64),
        ({"do_sample": True, "temperature": 0}, False, 64),
        ({"until": [".", "\n"], "image_aspect_ratio": "pad"}, False, 64),
    ],
)
def test_generation_arguments(predictor, arguments, sampling, tokens):
    settings, ends = DualTower(predictor=predictor).settings(arguments)
    assert (settings.sampling, settings.max_new_tokens) == (sampling, tokens)
    assert list(ends) == arguments.get("until", arguments.get("stop_sequences", []))
    assert not sampling or (settings.temperature, settings.top_p) == (0.7, 0.9)


def test_answers_end_before_any_of_the_strings(predictor):
    documents = [{"images": []}]
    (whole,) = adapter(predictor, documents, max_new_tokens=12).generate_until(
        [request(0, "what is it?", {})]
    )
    ends = [whole.text[5:7], whole.text[3:4], "never"]
    (truncated,) = adapter(predictor, documents, max_new_tokens=12).generate_until(
        [request(0, "what is it?", {"until": ends})]
    )
    assert (
        DualTower(predictor=predictor, max_new_tokens=7).settings({"max_new_tokens": 999})[0].max_new_tokens
        == 7
    )
    assert truncated.text == whole.text[: min(whole.text.index(end) for end in ends[:2])] and len(
        truncated.text
    ) < len(whole.text)
    assert (
        truncated.token_counts.output_tokens < whole.token_counts.output_tokens == 12
    )  # and it was not made to its longest first


def test_answers_at_their_longest_length_are_counted(predictor):
    evaluated = adapter(predictor, [{"images": []}], max_new_tokens=3)
    (answer,) = evaluated.generate_until([request(0, "what is it?", {})])
    evaluated.generate_until([request(0, "what is it?", {"until": ["never", answer.text[-1]]})])
    assert evaluated.truncated == {"task": 1}


@pytest.mark.parametrize(
    "second, visuals, error",
    [
        ({"num_beams": 4}, lambda d: [], "num_beams = 4 is not supported"),
        ({"grammar": "x", "penalty_alpha": 1}, lambda d: [], "not supported: grammar, penalty_alpha"),
        (
            {},
            lambda d: [d["image"].convert("RGB")],
            "task task: row 0 has no image that can be used (KeyError",
        ),
        ({}, lambda d: [None], "task task: row 0 has no image"),
        ({}, lambda d: ["clip.mp4"], "has a str for an image: this model reads images alone"),
        ({}, lambda d: [b"no image"], "task task: row 0: "),
    ],
)
def test_a_request_that_fails_is_raised(predictor, second, visuals, error):
    with pytest.raises(UserError, match=re.escape(error)):
        adapter(predictor, [{}]).generate_until([request(0, "what is it?", second, visuals)])


def test_an_image_with_many_questions_is_encoded_once(tokenizer):
    """Though questions are sorted by length, and though the store holds a quarter of the images."""
    model = lively_model(tokenizer)
    one = (
        4
        * 2
        * model.config.left.layers
        * model.config.left.kv_heads
        * model.config.left.head_size
        * (model.config.tokens_per_tile + 1)
    )
    predictor = Predictor(
        model, Renderer(tokenizer, TINY_MODEL.tokens_per_tile, "image"), ImageStore(memory_bytes=10 * one)
    )
    documents = [{"images": [Image.open(io.BytesIO(png(n // 3)))]} for n in range(120)]
    kinds: list[str] = []
    answer = predictor.answer
    predictor.answer = lambda *a, **more: [kinds.append(one.image_kv) or one for one in answer(*a, **more)]
    requests = [request(n, QUESTIONS[n % 3] + " now" * (n * 7 % 5), {}) for n in range(120)]
    adapter(predictor, documents, batch_size=6, max_new_tokens=1).generate_until(requests)
    assert (kinds.count("computed"), len(kinds)) == (40, 120)


def test_out_of_memory_halves_the_batch_once_and_says_so(predictor, monkeypatch):
    original, sizes, messages = predictor.answer, [], []
    limit = 4

    def answer(questions, settings, stops):
        sizes.append(len(questions))
        if len(questions) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(questions, settings, stops=stops)

    monkeypatch.setattr(predictor, "answer", answer)
    requests = [request(n, QUESTIONS[n % 4], {}) for n in range(12)]
    plain = [
        f.text
        for f in adapter(predictor, [{"images": []}] * 12, batch_size=4, max_new_tokens=3).generate_until(
            requests
        )
    ]
    sizes.clear()
    evaluated = adapter(predictor, [{"images": []}] * 12, batch_size=8, max_new_tokens=3, say=messages.append)
    assert [f.text for f in evaluated.generate_until(requests)] == plain
    assert (
        evaluated.batch_size == 4
        and sizes == [8, 4, 4, 4]
        and messages == ["out of memory at batch size 8: going on with 4"]
    )
    limit = 3
    with pytest.raises(UserError, match="out of memory at batch size 4 too"):  # once is enough
        evaluated.generate_until(requests)
    limit = 1
    with pytest.raises(UserError, match="out of memory at batch size 2 too: give a smaller --batch_size"):
        adapter(
            predictor, [{"images": []}] * 12, batch_size=4, max_new_tokens=3, say=messages.append
        ).generate_until(requests)


def scripted(predictor: Predictor, answers: dict[str, str], monkeypatch) -> DualTower:
    """An adapter whose model says what we want, by the letters of the question's first line."""
    result = DualTower(predictor=predictor)
    real = result.answer

    def answer(questions, settings, ends):
        return [
            a._replace(text=answers[text_of(messages[-1])])
            for a, (_, messages) in zip(
                real(questions, replace(settings, max_new_tokens=1), ends), questions, strict=True
            )
        ]

    monkeypatch.setattr(result, "answer", answer)
    return result


README = """---
configs:
- config_name: val
  default: true
  data_files:
  - split: val
    path: data/val-*
---
"""


def test_a_copy_that_changes_is_read_anew(predictor, tmp_path):
    """Changed data is read again even if `datasets` takes it for the same data.

    Two copies with the same README.md, and one whose file is rewritten.
    """
    for name, count in (("a", 12), ("b", 8)):
        write_mmstar(tmp_path / name / "MMStar", mmstar_rows(count))
        (tmp_path / name / "MMStar" / "README.md").write_text(README)

    def rows(name: str) -> int:
        tasks = Tasks(tmp_path / name)
        tasks.load("mmstar")
        return len(tasks.load_task_or_group(["mmstar"])["mmstar"].dataset["val"])

    assert (rows("a"), rows("b"), rows("a")) == (12, 8, 12)
    shutil.rmtree(tmp_path / "a" / "MMStar" / "data")
    write_mmstar(tmp_path / "a" / "MMStar", mmstar_rows(10))
    assert rows("a") == 10


def test_the_hash_of_the_data_is_of_the_images_too(predictor, tmp_path):
    """And an earlier run's results stay until there are new ones, which is reported."""
    model, runs = exported(tmp_path / "model", predictor), []
    (tmp_path / "mine.jsonl").write_text(
        "".join(
            json.dumps({"image": f"{i}.png", "texts": [{"user": "what?", "assistant": "it"}]}) + "\n"
            for i in range(3)
        )
    )
    for first in (0, 0, 5):
        for i in range(3):
            (tmp_path / f"{i}.png").write_bytes(png(first + i))
        done = evaluation_here(
            "--model",
            str(model),
            "--tasks",
            "questions:jsonl=mine.jsonl",
            "--max_new_tokens",
            "2",
            "--output",
            "out",
            cwd=tmp_path,
        )
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        runs.append(
            (
                results["tasks"]["questions:jsonl=mine.jsonl"]["data_hash"],
                "results of an earlier run" in done.stdout,
            )
        )
    assert runs[0][0] == runs[1][0] != runs[2][0] and [earlier for _, earlier in runs] == [False, True, True]


def test_mmstar_of_known_answers(predictor, tmp_path, monkeypatch):
    """Average and categories against their definition: the mean accuracy over the level-2 categories."""
    rows = mmstar_rows(36)
    for i, row in enumerate(rows):  # no two alike
        row["question"] = f"{i}: {row['question']}"
    write_mmstar(tmp_path / "MMStar", rows)
    rng = random.Random(1)
    predicted = {
        row["question"].strip()
        + "\nAnswer with the option's letter from the given choices directly": rng.choice("ABCD")
        for row in rows
    }
    metrics = run_tasks(scripted(predictor, predicted, monkeypatch), Tasks(tmp_path), ["mmstar"])["results"][
        "mmstar"
    ]
    for name, among in [("average", [c for l2 in MMSTAR.values() for c in l2]), *MMSTAR.items()]:
        shares = []
        for l2 in among:
            right = [
                a == row["answer"]
                for row, a in zip(rows, predicted.values(), strict=True)
                if row["l2_category"] == l2
            ]
            shares += [sum(right) / len(right)] if right else []
        assert metrics[f"{name},none"] == pytest.approx(sum(shares) / len(shares)), name
    assert 0 < metrics["average,none"] < 1


def test_synthetic_has_an_accuracy_of_each_skill():
    """Of a model that knows all answers but those about tables."""
    pytest.importorskip("matplotlib", reason="the group synthetic is not installed")

    class Oracle(lmms):
        is_simple = True

        def generate_until(self, requests):
            rows = [self.task_dict["synthetic"]["test"][r.args[3]] for r in requests]
            skills = [list(SKILLS)[row["record"] % len(SKILLS)] for row in rows]
            self.known = [skill != "table" for skill in skills]
            answers = [
                row["references"][0] if known else "none" for row, known in zip(rows, self.known, strict=True)
            ]
            return [GenerationResult(answer, TokenCounts(1)) for answer in answers]

        loglikelihood = generate_until_multi_round = None

    oracle = Oracle()
    scores = run_tasks(oracle, Tasks(), ["synthetic"], limit=90)["results"]["synthetic"]
    assert {skill: scores[f"{skill},none"] for skill in SKILLS} == {s: float(s != "table") for s in SKILLS}
    assert scores["accuracy,none"] == pytest.approx(sum(oracle.known) / 90)


def test_random_states_and_the_model_stay_as_they_are(predictor, data_root):
    states = random.getstate(), torch.get_rng_state()
    weights = {name: w.clone() for name, w in predictor.model.state_dict().items()}
    run_tasks(DualTower(predictor=predictor, max_new_tokens=2), Tasks(data_root), ["mmstar"], limit=4)
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert all(torch.equal(w, weights[name]) for name, w in predictor.model.state_dict().items())


def test_sampled_answers_do_not_depend_on_the_batch(predictor):
    """Nor are repetitions of a question all the same."""
    documents, arguments = [{"images": []}] * 4, {"do_sample": True, "temperature": 5.0, "max_new_tokens": 4}
    outputs = []
    for size in (1, 3):
        requests = [request(n // 2, QUESTIONS[0], dict(arguments)) for n in range(8)]
        outputs.append(
            [f.text for f in adapter(predictor, documents, batch_size=size).generate_until(requests)]
        )
    assert outputs[0] == outputs[1] and len(set(outputs[0])) == 8


def test_half_an_image_is_refused(predictor):
    """lmms-eval lets Pillow read half images, everywhere in the process."""
    from PIL import ImageFile

    assert not ImageFile.LOAD_TRUNCATED_IMAGES  # after all these imports
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    half = Image.open(io.BytesIO(png(1)[:2000]))
    with pytest.raises(UserError, match="row 0"):
        adapter(predictor, [{}]).generate_until(
            [request(0, "what is it?", {}, lambda d: [half.convert("RGB")])]
        )
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    Tasks().load("easy_vqa")
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_a_stock_multiple_choice_task_takes_the_likeliest(predictor, tmp_path, monkeypatch):
    """seedbench_ppl, its choices scored by a stand-in: right exactly where the truth is the likeliest."""
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    text = Value("string")
    rows = [
        {
            "question": f"what is it? {i}",
            "image": [{"bytes": png(i), "path": None}],
            "answer": "ABCD"[i % 4],
            "data_type": "image",
            "question_type_id": 1,
            "question_id": str(i),
            "data_id": str(i),
            "segment": [0],
        }
        | {f"choice_{c}": f"thing {c} {i}" for c in "abcd"}
        for i in range(6)
    ]
    features = dict.fromkeys(
        ("question", "answer", "data_type", "question_id", "data_id", *(f"choice_{c}" for c in "abcd")), text
    )
    features |= {
        "image": List(ImageFeature()),
        "question_type_id": Value("int64"),
        "segment": List(Value("int64")),
    }
    (tmp_path / "seedbench_ppl" / "data").mkdir(parents=True)
    Dataset.from_list(rows, features=Features(features)).to_parquet(
        tmp_path / "seedbench_ppl" / "data" / "test-00000-of-00001.parquet"
    )

    def likelihoods(questions):  # the first three rows' truths, and three wrong choices
        return [
            (-1.0 if choice[6] == "abc"[int(text_of(messages[-1]).split()[3]) % 3] else -2.0, False)
            for _, messages, choice in questions
        ]

    monkeypatch.setattr(predictor, "loglikelihoods", likelihoods)
    metrics = run_tasks(DualTower(predictor=predictor), Tasks(tmp_path), ["seedbench_ppl"])["results"][
        "seedbench_ppl"
    ]
    assert metrics["acc,none"] == 0.5


@pytest.mark.parametrize(
    "matcher, answer, references, right",
    [
        ("exact", "Two dogs", ["two dogs"], 0), ("exact", "two dogs ", ["two dogs"], 1),
        ("normalised", "The 2 dogs.", ["two dogs"], 1), ("normalised", "2 cats", ["two dogs"], 0),
        ("vqa", "yes", ["yes"] * 3 + ["no"] * 7, (3 * 2 / 3 + 7 * 1) / 10),
        ("vqa", "yes", ["yes"] + ["no"] * 9, (0 + 9 / 3) / 10), ("vqa", "Yes!", ["yes"], 1),
    ],
)  # fmt: skip
def test_matchers(matcher, answer, references, right):
    """Each matcher against scores computed by hand.

    VQA's soft accuracy with three matches of ten: leaving out one of the three leaves two (2/3); leaving out
    one of the others leaves three (1).
    """
    import importlib.util

    module_spec = importlib.util.spec_from_file_location(
        "source_task", ROOT / "eval" / "tasks" / "source_task.py"
    )
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    assert module.MATCHERS[matcher](answer, references) == pytest.approx(right)


CAPTIONS = [
    {
        "pred": "a red bus (two)",
        "answer": ["a red bus on a street", "the bus is red"],
        "instruction": "press the red bus",
        "ann_id": "1",
    },
    {
        "pred": "two dogs run",
        "answer": ["two dogs are running", "dogs in a park"],
        "instruction": "two dogs run here",
        "ann_id": "2",
    },
    {
        "pred": "a cat sits on a mat",
        "answer": ["a cat sits on the mat"],
        "instruction": "a cat sits on it",
        "ann_id": "3",
    },
]


@pytest.mark.parametrize(
    "name",
    [
        "coco2014_cap_val",
        "flickr30k_test",
        "nocaps_val",
        "textcaps_val",
        "refcoco_bbox_val",
        "screenspot_reg_test",
        "vatex_val_zh",
    ],
)
def test_stock_caption_tasks_need_no_java(name, monkeypatch):
    """All but METEOR, which is named as left out."""
    monkeypatch.setattr("eval.tasks.shutil.which", lambda program: None)
    tasks = Tasks()
    metrics = tasks._get_config(name)["metric_list"]
    assert any(metric["metric"].endswith("_CIDEr") for metric in metrics) and all(
        metric["metric"] in tasks.captions for metric in metrics
    )
    assert all(left.endswith("METEOR") for left in tasks.left_out)
    key = "instruction" if "screenspot" in name else "answer"
    rows = [{"pred": row["pred"], key: row[key]} for row in CAPTIONS]
    for metric in metrics:
        ours = caption_scores(
            [row["pred"] for row in rows],
            [[row[key]] if isinstance(row[key], str) else row[key] for row in rows],
            [tasks.captions[metric["metric"]]],
        )
        assert metric["aggregation"](rows) == next(iter(ours.values())), metric["metric"]


@pytest.mark.skipif(shutil.which("java") is None, reason="no Java on this machine")
@pytest.mark.parametrize(
    "name, chosen", [("refcoco_bbox_val", "refcoco_Bleu_2"), ("screenspot_reg_test", "screenspot_CIDEr")]
)
def test_stock_caption_tasks_score_as_their_own_code_does(name, chosen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours, theirs = (
        {m["metric"]: m["aggregation"] for m in config["metric_list"]}[chosen]
        for config in (Tasks()._get_config(name), stock_tasks()._get_config(name))
    )
    assert ours(
        CAPTIONS if "refcoco" in name else [row | {"answer": None} for row in CAPTIONS]
    ) == pytest.approx(theirs(CAPTIONS), abs=1e-4)


def test_standard_error_of_a_mean_over_uneven_groups():
    """MMStar's average, against averages of samples drawn anew within each category."""
    rng = random.Random(0)
    groups = {"a": [0, 1, 1, 1, 0, 1] * 4, "b": [0, 1, 0] * 3, "c": [1] * 5}
    average = statistics.fmean(map(statistics.fmean, groups.values()))
    samples = [
        {"average": {"question_id": i, "l2_category": name, "score": score}}
        for name, scores in groups.items()
        for i, score in enumerate(scores)
    ]
    drawn = [
        statistics.fmean(statistics.fmean(rng.choices(scores, k=len(scores))) for scores in groups.values())
        for _ in range(3000)
    ]
    assert standard_error("average", average, samples) == pytest.approx(statistics.stdev(drawn), rel=0.1)
    plain = [{"acc": right} for right in groups["a"]]
    assert standard_error("acc", statistics.fmean(groups["a"]), plain) == pytest.approx(
        statistics.stdev(groups["a"]) / 24**0.5
    )
    assert standard_error("acc", 0.1, plain) is None and standard_error("acc", 1.0, [{"acc": 1}] * 9) is None


def test_a_metric_is_announced_by_its_final_name(predictor, tmp_path, capfd):
    """Also where a filter's name stands behind it; and of lmms-eval's progress bars nothing is seen."""
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    text = Value("string")
    rows = [
        {
            "question": f"what is it? {i}",
            "options": ["red", "blue"],
            "answer": str(i % 2),
            "image": {"bytes": png(i), "path": None},
        }
        for i in range(4)
    ]
    (tmp_path / "ai2d" / "data").mkdir(parents=True)
    features = Features({"question": text, "options": List(text), "answer": text, "image": ImageFeature()})
    Dataset.from_list(rows, features=features).to_parquet(
        tmp_path / "ai2d" / "data" / "test-00000-of-00001.parquet"
    )
    tasks = Tasks(tmp_path)
    known = dict(tasks.load("ai2d"))
    results = run_tasks(DualTower(predictor=predictor, max_new_tokens=2), tasks, ["ai2d"])
    assert (
        {f"{task}_{metric}" for task, metric, _ in scores_of(results)}
        == known.keys()
        == {"ai2d_exact_match (flexible-extract)"}
    )
    assert "it/s" not in capfd.readouterr().err


def test_tasks_are_those_that_lmms_eval_lists():
    ours, theirs = Tasks(), stock_tasks()
    assert (
        ours.task_index == theirs.task_index
        and ours.all_tasks == theirs.all_tasks
        and len(ours.all_tasks) > 1900
    )
    assert yaml.full_load("a: 1") == {"a": 1} and yaml.full_load.__module__ == "yaml"


def test_unknown_tasks():
    with pytest.raises(UsageError, match="did you mean 'mmstar'"):
        Tasks().add("mmstr")
    with pytest.raises(UsageError, match="captions needs a source: captions:NAME=PATH"):
        Tasks().add("captions")
    with pytest.raises(UsageError, match="no source 'cocoo'"):
        Tasks().add("captions:cocoo=x")


def exported(folder: Path, predictor: Predictor) -> Path:
    predictor.model.save_pretrained(folder)
    predictor.renderer.tokenizer.save(folder)
    return folder


EVALUATION = str(ROOT / "evaluation.py")


def evaluation_here(*flags: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    """The same in this process, which has imported lmms-eval already."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    around = (
        contextlib.chdir(cwd),
        patch.dict(os.environ, env),
        patch.object(sys, "argv", ["evaluation.py", *flags]),
    )
    with contextlib.ExitStack() as stack:
        for context in (*around, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)):
            stack.enter_context(context)
        try:
            run_script(evaluation_main)
        except SystemExit as ended:
            code = ended.code
    return subprocess.CompletedProcess(flags, code, out.getvalue(), err.getvalue())


def test_twice_the_same_and_two_ranks_too(predictor, data_root, tmp_path):
    """results.json apart from times, and the samples to the byte; by one process, again, and by two."""
    model = exported(tmp_path / "model", predictor)
    (tmp_path / "mine.jsonl").write_text(
        "".join(
            json.dumps(
                {"image": f"{i}.png", "texts": [{"user": QUESTIONS[i % 4], "assistant": f"a red thing {i}"}]}
            )
            + "\n"
            for i in range(5)
        ),
        encoding="utf-8",
    )
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    flags = [
        "--model",
        str(model),
        "--tasks",
        "mmstar,captions:jsonl=mine.jsonl,questions:jsonl=mine.jsonl",
        "--limit",
        "13",
        "--data-root",
        str(data_root),
        "--max_new_tokens",
        "5",
        "--random_baseline",
    ]
    assert evaluation_here(*flags, "--output", "b", cwd=tmp_path).returncode == 0
    done, two = (
        run_program([EVALUATION, *flags, "--output", "a"], tmp_path),
        run_ranks(2, [EVALUATION, *flags, "--output", "c"], tmp_path),
    )
    assert (done.returncode, two.returncode) == (0, 0), done.stderr + two.stderr
    held = []
    for out in "abc":
        results = json.loads((tmp_path / out / "results.json").read_text())
        for entry in results["tasks"].values():
            assert entry.pop("seconds") >= 0 and entry.pop("tokens_per_s") > 0
        held.append((results, {p.name: p.read_text() for p in sorted((tmp_path / out).glob("samples_*"))}))
    assert held[0] == held[1]
    assert held[0] == held[2]
    tasks = held[0][0]["tasks"]
    assert (
        tasks["mmstar"]["samples"] == 13
        and tasks["mmstar"]["random_baseline"].keys() == tasks["mmstar"]["scores"].keys()
    )
    assert (
        tasks["captions:jsonl=mine.jsonl"]["warnings"]
        and "CIDEr" in tasks["captions:jsonl=mine.jsonl"]["scores"]
    )
    sample = json.loads(held[0][1]["samples_mmstar.jsonl"].splitlines()[0])
    assert (tmp_path / "a" / sample["images"][0]).is_file() and sample["reference"] == "A"
    assert (
        tasks["mmstar"]["first_prompt"].startswith(
            "<|im_start|>user\n<|global_image|>[4 image tokens]what is it?"
        )
        and "mmstar" in done.stdout
    )


def with_site(folder: Path) -> None:
    """Import lmms-eval anew, with packages in `folder`; and let it read its YAML files in a second."""

    class Loader(yaml.CFullLoader):
        def __init__(self, file: TextIO) -> None:
            super().__init__(file)
            self.name = file.name

    def full_load(file: TextIO) -> object:
        Loader.yaml_constructors = yaml.FullLoader.yaml_constructors
        return yaml.load(file, Loader)

    yaml.full_load = full_load
    sys.path.insert(0, str(folder))
    for name in [name for name in sys.modules if name.partition(".")[0] in ("lmms_eval", "eval")]:
        del sys.modules[name]


def test_lmms_eval_s_own_command_line(predictor, data_root, tmp_path):
    """Through the entry point that pyproject.toml declares."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installed = tmp_path / "site" / "dualtowervlm-0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: dualtowervlm\nVersion: 0\n")
    points = "".join(
        f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items())
        for group, entries in project["entry-points"].items()
    )
    (installed / "entry_points.txt").write_text(points)
    task = tmp_path / "tasks" / "mmstar_here.yaml"
    task.parent.mkdir()
    import lmms_eval

    stock = Path(lmms_eval.__file__).parent / "tasks" / "mmstar" / "mmstar.yaml"
    task.write_text(
        f"include: {stock}\ntask: mmstar_here\n"
        f"dataset_path: {data_root / 'Lin-Chen' / 'MMStar'}\ndataset_kwargs: {{}}\n"
    )
    flags = [
        "--model",
        "dualtower",
        "--model_args",
        f"pretrained={exported(tmp_path / 'model', predictor)},max_new_tokens=3",
        "--tasks",
        "mmstar_here",
        "--limit",
        "6",
        "--device",
        "cpu",
    ]
    flags += ["--include_path", str(task.parent), "--output_path", str(tmp_path / "out"), "--batch_size", "4"]
    done = run_program(["-m", "lmms_eval", *flags], tmp_path, before=partial(with_site, tmp_path / "site"))
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = (tmp_path / "out").rglob("*results.json")
    expected = run_tasks(
        DualTower(predictor=predictor, max_new_tokens=3), Tasks(data_root), ["mmstar"], limit=6
    )["results"]["mmstar"]
    assert json.loads(path.read_text())["results"]["mmstar_here"]["average,none"] == expected["average,none"]


def test_the_stock_task_through_the_hub(predictor, data_root, tmp_path):
    """lmms-eval's own mmstar task gives the scores of the local copy.

    Its data comes from a Hub on loopback, without a token.
    """
    flags = [
        "--model",
        str(exported(tmp_path / "model", predictor)),
        "--tasks",
        "mmstar",
        "--limit",
        "9",
        "--max_new_tokens",
        "4",
        "--output",
        "out",
    ]
    expected = run_tasks(
        DualTower(predictor=predictor, max_new_tokens=4), Tasks(data_root), ["mmstar"], limit=9
    )["results"]["mmstar"]
    with hub({"datasets/Lin-Chen/MMStar": data_root / "Lin-Chen" / "MMStar"}) as address:
        there = partial(at_hub, str(address), str(tmp_path / "hf"))
        done = run_program([EVALUATION, *flags], tmp_path, there)
        assert done.returncode == 0, done.stderr
        assert any("parquet" in path for path in address.served)
        missing = run_program([EVALUATION, *flags[:3], "mme"], tmp_path, there)
    scores = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]["mmstar"]["scores"]
    assert scores == {
        key.split(",")[0]: value
        for key, value in expected.items()
        if key.endswith(",none") and "stderr" not in key
    }
    assert (
        missing.returncode == 1
        and "error: mme: the data cannot be had" in missing.stderr
        and "--data-root" in missing.stderr
    )


@pytest.mark.parametrize(
    "flags, code, message",
    [
        (["--tasks", "mmstr"], 2, "no task named 'mmstr' (did you mean 'mmstar'"),
        (["--tasks", "mmstar", "--data-root", "nowhere"], 2, "--data_root: nowhere is no folder"),
        (["--tasks", "openmoji_captions", "--caption_metrics", "METEOR"], 1, "Java"),
        (["--tasks", "openmoji_captions", "--caption_metrics", "CIDERr"], 2, "no caption metric 'CIDERr'"),
        (["--tasks", "mmstar", "--max_new_tokens", "-1"], 2, "--max_new_tokens = -1 must be at least 0"),
        (["--tasks", "mmstar", "--limit", "-3"], 2, "--limit = -3 must be at least 0"),
        (["--tasks", "mmstar", "--batch_size", "0"], 2, "--batch_size = 0 must be at least 1"),
        (["--tasks", ","], 2, "--tasks needs a name"),
        (["--tasks", "mmstar", "--data-root", "broken"], 1, "README.md says which files are which split"),
        (["--tasks", "ocrbench_v2"], 1, "task ocrbench_v2 needs the package"),
    ],
)
def test_bad_flags(predictor, tmp_path, flags, code, message):
    (tmp_path / "broken" / "mmstar").mkdir(parents=True)
    (tmp_path / "broken" / "mmstar" / "other.jsonl").write_text('{"question": "?"}\n')
    done = evaluation_here(
        "--model", str(exported(tmp_path / "model", predictor)), *flags, cwd=tmp_path, PATH=str(tmp_path)
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (code, 1), done.stderr
    assert message in done.stderr


def test_a_missing_model_is_reported_before_data_are_searched(tmp_path, monkeypatch):
    monkeypatch.setattr(Tasks, "load", lambda self, name: pytest.fail("data first"))
    done = evaluation_here("--model", "nowhere", "--tasks", "mmstar", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "error: no model folder at nowhere\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be a whole number from 1"),
        ({"batch_size": "-1"}, "batch_size=-1"),
        ({"batch_size": "many"}, "batch_size=many"),
        ({"max_new_tokens": "-3"}, "max_new_tokens=-3"),
        ({"speculative": "perhaps"}, "speculative=perhaps"),
        ({"predictor": None, "pretrained": "x", "dtype": "half"}, "dtype = 'half' is none of"),
    ],
)
def test_wrong_model_args_are_one_line(predictor, options, message):
    with pytest.raises(UsageError, match=message):
        DualTower(**{"predictor": predictor} | options)


def test_model_args_by_others_names(predictor, tmp_path):
    assert DualTower(predictor=predictor, batch_size="auto").batch_size == 32
    predictor.model.save_pretrained(tmp_path)
    predictor.renderer.tokenizer.save(tmp_path)
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        assert Predictor.from_pretrained(tmp_path, name).model.right.norm.weight.dtype == dtype


def test_a_question_beyond_the_models_positions_costs_only_itself(predictor):
    """It counts as cut, with its row named; one with too little room gets a shorter answer."""
    said: list[str] = []
    limit = predictor.model.right.config.max_positions  # 256
    texts = ["what is it?", "red " * limit, "is it large or is it small?", "no " * 70]
    documents = [{"images": []} for _ in texts]
    evaluated = adapter(predictor, documents, batch_size=4, say=said.append)
    answers = evaluated.generate_until(
        [request(n, text, {"max_new_tokens": limit - 30}) for n, text in enumerate(texts)]
    )
    for n in (0, 2):
        settings = GenerationConfig(max_new_tokens=limit - 30)
        assert answers[n].text == predictor.answer([([], texts[n])], settings)[0].text
    prompt = predictor.prompt([], texts[3])
    assert 30 < prompt.length < limit
    short = predictor.answer([([], texts[3])], GenerationConfig(max_new_tokens=limit - prompt.length))[0]
    assert answers[3].text == short.text and answers[1].text == ""
    assert evaluated.truncated["task"] >= 1
    assert any("row 1" in line and "counts as cut" in line for line in said)
    assert any("row 3" in line for line in said)


def test_a_task_leaves_others_logs_and_bars_alone(predictor, tmp_path):
    import datasets
    from loguru import logger

    (tmp_path / "a.jsonl").write_text(
        '{"texts": [{"user": "what is it?", "assistant": "blue"}, {"user": "and?", "assistant": null}]}\n'
        '{"texts": [{"user": "what?", "assistant": "red"}], "references": ["red", null]}\n'
    )
    lines: list[str] = []
    sink = logger.add(lines.append)
    datasets.enable_progress_bars()
    name = f"questions:jsonl={tmp_path / 'a.jsonl'}"
    results = run_tasks(DualTower(predictor=predictor, max_new_tokens=3), Tasks(), [name])
    logger.warning("still here")
    logger.remove(sink)
    assert "still here" in "".join(lines) and not datasets.are_progress_bars_disabled()
    assert len(results["samples"][name]) == 2  # a null answer costs its own turn alone


def test_shots_go_before_the_question(predictor, tmp_path):
    """Answered questions about other images, each with its image; the row's system message stays first."""
    lines = []
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(png(number))
        messages = [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": f"what is {number}"}, {"type": "image"}]},
            {"role": "assistant", "content": f"it is {number}"},
        ]
        lines.append(json.dumps({"image": f"{number}.png", "messages": messages}))
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    name, tasks = f"questions:jsonl={tmp_path / 'mine.jsonl'}", Tasks(shots=2)
    tasks.add(name)
    evaluated = DualTower(predictor=predictor, max_new_tokens=2)
    run_tasks(evaluated, tasks, [name])
    _, prompt = evaluated.first_prompts[name]
    assert prompt.startswith("<|im_start|>system\nbe brief<|im_end|>") and prompt.count("be brief") == 1
    asked = re.findall(r"what is (\d)<\|global_image\|>\[4 image tokens\]<\|im_end\|>", prompt)
    answered = re.findall(r"it is (\d)<\|im_end\|>", prompt)
    assert asked[:2] == answered and asked[2] == "0" and len(set(asked)) == 3
    too_many = Tasks(shots=4)
    too_many.add(name)
    with pytest.raises(UserError, match="--shots 4: .* has only 3 records on other images"):
        too_many.load(name)
    with pytest.raises(UsageError, match="--shots is for tasks of our own; mmstar is lmms-eval's"):
        Tasks(shots=1).load("mmstar")
