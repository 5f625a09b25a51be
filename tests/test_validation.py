"""Evaluation inside training does not affect training.

Its figures equal those of evaluation.py afterwards.
"""

import gc
import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

from configs.model import GenerationConfig
from configs.train import EvalConfig
from data.packing import Budget
from eval.captions import cider
from eval.predictor import Predictor
from eval.validation import BestCheckpoint, TrainingTasks, Validation
from tests.conftest import dataset_of, lively_model
from tests.programs import run_program
from tests.test_training import ROOT, SMALL
from utils.errors import UsageError, UserError
from utils.ranks import DistributedContext


def captions(folder: Path, count: int) -> Path:
    """A file of captioned pictures, half of them with a second reference."""
    lines = []
    for i in range(count):
        Image.new("RGB", (64, 64), (i * 9 % 256, 40, 90)).save(folder / f"{i}.png")
        record = {
            "image": f"{i}.png",
            "texts": [{"user": "what is it?", "assistant": f"a red shape {i % 7}"}],
            "references": [f"a red shape {i % 7}", f"blue {i % 5} shapes"][: 1 + i % 2],
        }
        lines.append(json.dumps(record) + "\n")
    if count > 12:  # half an image is left out, whatever libraries let Pillow do
        whole = (folder / "12.png").read_bytes()
        (folder / "12.png").write_bytes(whole[: len(whole) // 2])
    path = folder / "captions.jsonl"
    path.write_text("".join(lines))
    return path


def run(folder: Path, *flags: str) -> list[dict]:
    command = [
        sys.executable,
        str(ROOT / "train_dual_tower.py"),
        "--max_steps",
        "6",
        *SMALL,
        "--data.sources",
        f"jsonl={folder / 'captions.jsonl'}",
        "--data.vocab_size",
        "300",
    ]
    done = run_program(
        [*command, "--output_dir", str(folder / "run"), "--cache_dir", str(folder / "cache"), *flags], folder
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def losses(lines: list[dict]) -> list[tuple]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> tuple[Path, list[dict]]:
    """A run with every kind of evaluation, each at its own cadence.

    Captions after every third step, lmms-eval's tasks on a file after every second.
    """
    pytest.importorskip("lmms_eval", reason="the group eval is not installed")
    folder = tmp_path_factory.mktemp("evaluated")
    captions(folder, 30)
    task = f"questions:jsonl={folder / 'captions.jsonl'}"
    flags = [
        "--train.eval_every",
        "3",
        "--eval.tasks",
        task,
        "--eval.tasks_every",
        "2",
        "--eval.limit",
        "8",
        "--eval.best",
        "validation_loss",
        "--eval.caption_tokens",
        "6",
    ]
    return folder, run(folder, *flags)


def test_training_does_not_notice(evaluated, tmp_path):
    """Losses and gradient norms equal, bit for bit, those of a run that evaluates only at its end.

    So does the exported model.
    """
    captions(tmp_path, 30)
    plain = run(tmp_path, "--train.eval_every", "0", "--eval.captions", "0")
    folder, lines = evaluated
    assert losses(plain) == losses(lines) and len(losses(lines)) == 6
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == (
        folder / "run" / "model" / "model.safetensors"
    ).read_bytes()
    assert "validation_cider" not in plain[-1] and [
        line["step"] for line in lines if "validation_cider" in line
    ] == [2, 3, 4, 6]
    assert [line["step"] for line in lines if any(key.startswith("questions:") for key in line)] == [2, 4, 6]


def test_the_best_model_is_stored(evaluated):
    folder, lines = evaluated
    values = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    step = min(values, key=values.get)
    assert json.loads((folder / "run" / "best.json").read_text()) == {
        "step": step,
        "metric": "validation_loss",
        "value": values[step],
    }
    assert Predictor.from_pretrained(folder / "run" / "best").answer(
        [([], "what is it?")], GenerationConfig(max_new_tokens=2)
    )
    same = (folder / "run" / "best" / "model.safetensors").read_bytes() == (
        folder / "run" / "model" / "model.safetensors"
    ).read_bytes()
    assert same == (step == 6)


def test_tasks_score_as_evaluation_does_afterwards(evaluated):
    folder, lines = evaluated
    task = f"questions:jsonl={folder / 'captions.jsonl'}"
    done = run_program(
        [ROOT / "evaluation.py", "--model", "run/model", "--tasks", task, "--limit", "8", "--output", "out"],
        folder,
    )
    assert done.returncode == 0, done.stderr
    scores = json.loads((folder / "out" / "results.json").read_text())["tasks"][task]["scores"]
    assert {f"{task}_{key}": value for key, value in scores.items()} == {
        key: value for key, value in lines[-1].items() if key.startswith("questions:")
    }


def test_cider_is_that_of_the_captions(tokenizer, renderer, tmp_path):
    """Against answers one at a time."""
    records = [json.loads(line) for line in captions(tmp_path, 12).read_text().splitlines()]
    records = [
        {
            "images": [str(tmp_path / r["image"])],
            "texts": r["texts"],
            "references": r["references"],
            "id": str(i),
        }
        for i, r in enumerate(records)
    ]
    model = lively_model(tokenizer)
    validation = Validation(dataset_of(records, renderer), Budget(64, 128, renderer.left_unit), 2, 0)
    result = validation.cider(model, 10, 5)
    predictor, answers = Predictor(model, renderer), {}
    for record in records:
        answers[record["images"][0]] = predictor.answer(
            [([predictor.tiles(record["images"][0])], "what is it?")], GenerationConfig(max_new_tokens=5)
        )[0].text
    asked = validation.captions[:10]
    assert len(result.each) == 10 and result.score == pytest.approx(
        cider([answers[images[0]] for images, _, _ in asked], [r for _, _, r in asked]).score
    )
    assert validation.cider(model, 0, 5) is None


def held() -> int:
    """Bytes of all tensors that are alive in this process."""
    gc.collect()
    tensors = [
        thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)
    ]  # those that other tests left to the compiler have no memory
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_nothing_remains_in_memory(tokenizer, renderer, tmp_path):
    """An evaluation frees its image KVs and decoding caches.

    The memory that validation itself holds for the next one does not grow.
    """
    pytest.importorskip("lmms_eval", reason="the group eval is not installed")
    records = [json.loads(line) for line in captions(tmp_path, 10).read_text().splitlines()]
    records = [
        {
            "images": [str(tmp_path / r["image"])],
            "texts": r["texts"],
            "references": r["references"],
            "id": str(i),
        }
        for i, r in enumerate(records)
    ]
    validation, model = (
        Validation(dataset_of(records, renderer), Budget(64, 128, renderer.left_unit), 2, 0),
        lively_model(tokenizer),
    )
    tasks = TrainingTasks(EvalConfig(tasks=f"questions:jsonl={tmp_path / 'captions.jsonl'}"))
    for work in (
        validation.score,
        lambda model: validation.cider(model, 10, 5),
        lambda model: validation.predictions(model, 8),
        lambda model: tasks.score(model, renderer),
    ):
        allocated = []
        for _ in range(3):
            with torch.no_grad():
                work(model)
            allocated.append(held())
        assert allocated[1] == allocated[2] and allocated[0] > sum(p.nbytes for p in model.parameters()), (
            allocated
        )


class Meeting(DistributedContext):
    """A rank of several in threads of this process."""

    def gather(self, value):
        self.table[self.rank] = value
        self.barrier.wait()
        return [self.table[rank] for rank in range(self.size)]


def test_ranks_share_captions_and_predictions(tokenizer, renderer, tmp_path, monkeypatch):
    """Each answers about half; together they say what one says alone."""
    records = [json.loads(line) for line in captions(tmp_path, 9).read_text().splitlines()]
    records = [
        {
            "images": [str(tmp_path / r["image"])],
            "texts": r["texts"],
            "references": r["references"],
            "id": str(i),
        }
        for i, r in enumerate(records)
    ]
    validation, model = (
        Validation(dataset_of(records, renderer), Budget(64, 128, renderer.left_unit), 2, 0),
        lively_model(tokenizer),
    )
    asked, original = [], Predictor.answer
    monkeypatch.setattr(
        Predictor,
        "answer",
        lambda self, questions, *more: (asked.append(len(questions)), original(self, questions, *more))[1],
    )
    for work in (
        lambda world: validation.cider(model, 9, 5, world),
        lambda world: validation.predictions(model, 7, world),
    ):
        alone = work(DistributedContext())
        asked.clear()
        table, barrier = {}, threading.Barrier(2)
        ranks = [Meeting(rank, 2) for rank in range(2)]
        for rank in ranks:
            object.__setattr__(rank, "table", table)
            object.__setattr__(rank, "barrier", barrier)
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(work, ranks)) == [alone, alone]
        assert sorted(asked) in ([4, 5], [3, 4])


def test_two_ranks_score_as_one_does(tmp_path):
    """Two processes under torchrun score as one process on the same batches.

    Validation, CIDEr and lmms-eval's tasks run during training.
    """
    pytest.importorskip("lmms_eval", reason="the group eval is not installed")
    captions(tmp_path, 20)
    flags = [
        "--data.streams",
        "2",
        "--train.global_batch_size",
        "4",
        "--train.optimizer",
        "adamw",
        "--train.dtype",
        "fp32",
        "--data.sources",
        f"jsonl={tmp_path / 'captions.jsonl'}",
    ]
    flags += [
        "--data.vocab_size",
        "300",
        "--eval.tasks",
        f"questions:jsonl={tmp_path / 'captions.jsonl'}",
        "--eval.limit",
        "5",
        "--eval.caption_tokens",
        "6",
        "--max_steps",
        "3",
    ]
    metrics = []
    for start in ([], ["-m", "torch.distributed.run", "--nproc-per-node", "2"]):
        done = run_program(
            [
                *start,
                str(ROOT / "train_dual_tower.py"),
                *SMALL,
                *flags,
                "--output_dir",
                f"run{len(metrics)}",
                "--cache_dir",
                "cache",
            ],
            tmp_path,
        )
        assert done.returncode == 0, done.stderr
        last = json.loads((tmp_path / f"run{len(metrics)}" / "metrics.jsonl").read_text().splitlines()[-1])
        metrics.append(
            {key: value for key, value in last.items() if isinstance(value, float) and key != "seconds"}
        )
    assert (
        metrics[1] == pytest.approx(metrics[0], abs=1e-5)
        and {"validation_cider", "validation_loss"} < metrics[0].keys()
        and any(key.startswith("questions:") for key in metrics[0])
    )


def test_best_goes_by_the_metric_s_direction(tmp_path):
    best = BestCheckpoint(tmp_path, "mmstar_average", {"mmstar_average": True, "mmstar_error": False})
    steps = []
    for step, value in [(1, 0.2), (2, 0.1), (3, 0.3), (4, 0.3)]:
        if best.is_beaten(step, {"mmstar_average": value}):
            best.note(step, {"mmstar_average": value})
            steps.append(step)
    assert steps == [1, 3]
    assert best.is_beaten(2, {"mmstar_average": 0.0})  # the run was taken up again before step 3
    assert not best.is_beaten(5, {"validation_loss": 0.0}) and not best.is_beaten(
        5, {"mmstar_average": float("nan")}
    )
    lowest = BestCheckpoint(tmp_path, "mmstar_error", {"mmstar_average": True, "mmstar_error": False})
    assert lowest.is_beaten(9, {"mmstar_error": 0.9})  # what was stored by another metric does not count
    lowest.note(9, {"mmstar_error": 0.9})
    assert lowest.is_beaten(10, {"mmstar_error": 0.1}) and not lowest.is_beaten(10, {"mmstar_error": 1.0})
    never = BestCheckpoint(
        tmp_path, "mmstar_average", {"mmstar_average": True}
    )  # what is stored is another metric's
    assert (
        lowest.warning == ""
        and never.warning == "eval.best: mmstar_average never came with a number, so no best model was kept"
    )
    assert (
        BestCheckpoint(tmp_path / "new", "mmstar_average", {"mmstar_average": True}).warning == never.warning
        and not BestCheckpoint(tmp_path / "new", "", {}).warning
    )
    with pytest.raises(UsageError, match="no metric 'mmstar_averge' .did you mean 'mmstar_average'"):
        BestCheckpoint(tmp_path, "mmstar_averge", {"mmstar_average": True, "mmstar_error": False})


def test_impossible_tasks_are_reported_before_training(tmp_path):
    pytest.importorskip("lmms_eval", reason="the group eval is not installed")
    with pytest.raises(UserError, match="no task named 'mmstr'"):
        TrainingTasks(EvalConfig(tasks="mmstr"))
    with pytest.raises(UserError, match="nowhere"):
        TrainingTasks(EvalConfig(tasks="questions:jsonl=nowhere.jsonl"))


def test_a_wrong_image_folder_is_named(renderer):
    """One count would not tell a user where the program looked."""
    records = [{"images": ["/nowhere/cat.png"], "texts": [{"user": "a", "assistant": "b"}]}] * 2
    dataset, padding = dataset_of(records, renderer), renderer.tokenizer.global_image
    message = "none of the 2 validation records can be used: test: image_missing 2 "
    with pytest.raises(UserError, match=message + r"\(record 0: /nowhere/cat.png does not exist\)"):
        Validation(dataset, Budget(64, 128, 5), 2, padding)
