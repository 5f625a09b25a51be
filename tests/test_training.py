"""Training: the logged loss, exact resumption after SIGKILL, checkpoints, frozen parts, the feature cache.

A checkpoint is complete or absent.
"""

import ctypes
import json
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import training.checkpoint
import training.feature_cache
from benchmarks.kill import results_of
from configs.cli import resolve
from configs.model import VisionConfig
from configs.train import Config, TrainConfig
from data.collators import collate
from data.packing import Budget
from eval.predictor import Predictor
from eval.validation import Validation, save_samples
from models.language_model import DecoderBlock
from models.vision_encoder import VisionEncoder
from models.weights.tensors import module_fingerprint
from tests.conftest import TINY_MODEL, TURNS, dataset_of, random_tiles, tiny_model
from tests.programs import Program, run_program
from tests.test_dual_tower import make_sample
from training.checkpoint import FORMAT, Saver, checkpoints, load_checkpoint, read_state
from training.feature_cache import FeatureCache
from training.logging import RunLog
from training.memory import saved_tensor_bytes
from training.optim import make_optimizers, schedule
from training.signals import StopSignals
from training.trainer import Trainer
from utils.errors import UsageError, UserError
from utils.files import replacing_folder
from utils.ranks import SINGLE_PROCESS

ROOT = Path(__file__).parent.parent
SMALL = [
    "--model.vision.name",
    "test_efficientnet",  # timm's smallest
    "--model.vision.weights",
    "random",
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


SHARD = "shard-00001-model-00001-of-00001.safetensors"


def save(folder: Path, step: int, model: Any, optimizers: Any, state: dict[str, Any], keep: int = 2) -> None:
    saver = Saver(folder, keep, SINGLE_PROCESS)
    saver.save(step, model, optimizers, lambda: state, lambda: None)
    saver.wait()


def command(*flags: str) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "train_dual_tower.py"),
        "--max_steps",
        "14",
        "--train.checkpoint_every",
        "4",
        "--train.eval_every",
        "5",
        *SMALL,
        *flags,
    ]


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(x["step"], x.get("loss", x.get("validation_loss"))) for x in lines]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run_program(
        command("--output_dir", str(folder), "--cache_dir", str(folder / "cache")), folder.parent
    ).check_returncode()
    return folder


@pytest.mark.parametrize("kill_at", [3, 9, 13])
def test_killed_and_resumed_equals_uninterrupted(uninterrupted, tmp_path, kill_at):
    """All metrics except times and the final weights are equal bit for bit.

    Killed before the first checkpoint, between two, and near the end.
    """
    folder = tmp_path / "killed"
    flags = ("--output_dir", str(folder), "--cache_dir", str(folder / "cache"))
    process = Program(command(*flags), tmp_path)
    metrics = folder / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and f'"step": {kill_at},' in metrics.read_text()):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert (killed := process.wait()).returncode == -signal.SIGKILL, killed.stderr
    assert not (folder / "model").exists()
    done = run_program(command(*flags, "--resume", "auto"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert ("resumed from" in done.stdout) == (kill_at > 4)
    assert losses(folder) == losses(uninterrupted) and results_of(folder) == results_of(uninterrupted)


def die_in_save(function: str) -> None:
    """In the thread that saves, at step 8."""
    whole, calls = getattr(training.checkpoint, function), []

    def killed(*arguments: Any) -> Any:
        if (
            function != "sync" or arguments[0].name == "checkpoints"
        ):  # the folder, when the checkpoint has its name
            calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*arguments)

    setattr(training.checkpoint, function, killed)


@pytest.mark.parametrize(("function", "last"), [("_files", 4), ("_checksums", 4), ("sync", 8)])
def test_killed_in_mid_save_and_resumed_equals_uninterrupted(uninterrupted, tmp_path, function, last):
    """Killed before the tensors are written, before the state is written, or before the clean-up.

    In the last case the checkpoint already has its final name.
    """
    folder = tmp_path / "killed"
    flags = ("--output_dir", str(folder), "--cache_dir", str(folder / "cache"))
    killed = run_program(command(*flags), tmp_path, before=partial(die_in_save, function))
    assert (
        killed.returncode == -signal.SIGKILL
        and checkpoints(folder / "checkpoints")[-1].name == f"step_{last:06d}"
    ), killed.stderr
    assert (len(list((folder / "checkpoints").glob(".*"))) == 1) == (last == 4)
    done = run_program(command(*flags, "--resume", "auto"), tmp_path)
    assert done.returncode == 0 and f"after step {last}" in done.stdout, done.stderr
    assert losses(folder) == losses(uninterrupted) and results_of(folder) == results_of(uninterrupted)


def test_a_run_that_goes_on_is_not_joined_by_a_second(uninterrupted, tmp_path):
    """A second start is refused while the first run continues undisturbed.

    This happens if ranks outlive the torchrun that started them.
    """
    folder = tmp_path / "run"
    flags = ("--output_dir", str(folder), "--cache_dir", str(folder / "cache"))
    process = Program(command(*flags), tmp_path)
    while process.poll() is None and not (folder / "metrics.jsonl").is_file():
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        stored = (folder / "config.json").read_bytes()
        second = run_program(command(*flags, "--resume", "auto", "--max_steps", "99"), tmp_path)
        assert (folder / "config.json").read_bytes() == stored
    finally:
        os.kill(process.pid, signal.SIGCONT)
    assert (
        second.returncode == 1 and f"error: {folder} is in use: another process trains in it" in second.stderr
    )
    assert process.wait().returncode == 0
    assert losses(folder) == losses(uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_the_step_and_the_printed_command_goes_on(uninterrupted, tmp_path, number):
    """Exit status 0, no exported model yet; then the same losses and weights as without."""
    folder = tmp_path / "stopped run"
    flags = ("--output_dir", str(folder), "--cache_dir", str(folder / "cache"))
    process = Program(command(*flags), tmp_path)
    metrics = folder / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and '"step": 6,' in metrics.read_text()):
        time.sleep(0.002)
    os.kill(process.pid, number)
    stopped = process.wait()
    assert stopped.returncode == 0, stopped.stderr
    step = losses(folder)[-1][0]
    assert (
        6 <= step < 14
        and checkpoints(folder / "checkpoints")[-1].name == f"step_{step:06d}"
        and not (folder / "model").exists()
    )
    assert f"{number.name}: stopped after step {step}" in stopped.stdout
    again = stopped.stdout.strip().splitlines()[-1].strip()
    done = run_program(shlex.split(again)[1:], tmp_path)
    assert done.returncode == 0, done.stderr
    assert losses(folder) == losses(uninterrupted)
    a, b = ((f / "model" / "model.safetensors").read_bytes() for f in (folder, uninterrupted))
    assert a == b


def test_a_killed_data_worker_is_one_line_and_the_run_resumes(uninterrupted, tmp_path):
    """With workers, then without: bit for bit what a run without workers gives."""
    folder = tmp_path / "killed"
    flags = ("--output_dir", str(folder), "--cache_dir", str(folder / "cache"))
    process = Program(command(*flags, "--data.workers", "2", "--train.checkpoint_every", "1"), tmp_path)
    metrics = folder / "metrics.jsonl"
    while process.poll() is None and not (
        metrics.is_file() and '"step": 2,' in metrics.read_text()
    ):  # more steps are left than batches are ahead
        time.sleep(0.002)
    children = [int(c) for c in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    workers = [child for child in children if Path(f"/proc/{child}/comm").read_text() == "pt_data_worker\n"]
    assert len(workers) == 2, children
    os.kill(workers[0], signal.SIGKILL)
    done = process.wait()
    error = done.stderr
    assert (
        done.returncode == 1 and error.startswith("error: a data worker died") and error.count("\n") == 1
    ), error
    done = run_program(command(*flags, "--data.workers", "0", "--resume", "auto"), tmp_path)
    assert done.returncode == 0 and "resumed from" in done.stdout, done.stderr
    assert losses(folder) == losses(uninterrupted)


def test_own_images_in_tiles_from_file_to_answer(tmp_path):
    """A JSONL of images of many sizes, one of them damaged.

    The model trains on it, the damaged image is counted, and a question is asked about a wide one.
    """
    lines = []
    for i in range(24):
        Image.new("RGB", (40 + 12 * i, 60), (10 * i, 0, 99)).save(tmp_path / f"{i}.png")
        lines.append(
            json.dumps({"image": f"{i}.png", "texts": [{"user": "how wide?", "assistant": str(40 + 12 * i)}]})
        )
    (tmp_path / "20.png").write_bytes(b"\x89PNG cut")
    (tmp_path / "0.png").write_bytes(b"\x89PNG cut")  # the first records validate
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    flags = [
        "--data.sources",
        "easy_vqa:10,jsonl=mine.jsonl",
        "--model.vision.max_side",
        "256",
        "--data.left_length",
        "200",
        "--data.window",
        "30",
        "--output_dir",
        "run",
        "--cache_dir",
        "cache",
        "--max_steps",
        "6",
    ]
    done = run_program(command(*flags), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "training records dropped: jsonl: image_damaged 1 (record " in done.stdout
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [m["dropped"] for m in metrics if "dropped" in m] == [{"jsonl: image_damaged": 1}]
    validations = [m for m in metrics if "validation_loss" in m]
    assert validations and all(m["validation_dropped"] == {"jsonl: image_damaged": 1} for m in validations)
    assert (
        json.loads((tmp_path / "run" / "model" / "config.json").read_text())["model"]["vision"]["max_side"]
        == 256
    )
    ask = [
        sys.executable,
        str(ROOT / "generate.py"),
        "--checkpoint",
        "run/model",
        "--image",
        "23.png",
        "--prompt",
        "how wide?",
        "--json",
    ]
    done = run_program(ask, tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout)["image_kv"] == "computed", done.stderr


def test_resume_refuses_what_changes_the_run(uninterrupted, tmp_path):
    done = run_program(command("--resume", str(uninterrupted), "--seed", "5"), tmp_path)
    assert (
        done.returncode == 2
        and "cannot change seed (was 0, now 5)" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_resume_refuses_another_tokenizer_and_another_architecture(uninterrupted, tmp_path):
    """A different tokenizer of the same size, which no shape reveals, is refused.

    So is a configuration whose shapes differ from the checkpoint's.
    """
    shutil.copytree(uninterrupted, tmp_path / "run")
    path = tmp_path / "run" / "tokenizer" / "tokenizer.json"
    whole = path.read_text()
    tokenizer = json.loads(whole)
    a, b = "a", "b"
    tokenizer["model"]["vocab"] |= {a: tokenizer["model"]["vocab"][b], b: tokenizer["model"]["vocab"][a]}
    path.write_text(json.dumps(tokenizer))
    flags = ("--resume", "run", "--cache_dir", "cache", "--max_steps", "15")
    stored = (tmp_path / "run" / "config.json").read_bytes()
    done = run_program(command(*flags), tmp_path)
    assert (tmp_path / "run" / "config.json").read_bytes() == stored  # what is refused changes nothing
    assert (
        done.returncode == 1
        and "was made with another tokenizer than run/tokenizer holds" in done.stderr
        and done.stderr.count("\n") == 1
    ), done.stderr
    path.write_text(whole)
    other = run_program(
        command(*flags, "--model.left.layers", "3", "--model.right.layers", "3", "--data.vocab_size", "300"),
        tmp_path,
    )
    assert other.returncode == 2 and other.stderr.count("\n") == 1, other.stderr
    for message in (
        "model.left.layers (was 2, now 3)",
        "model.right.layers (was 2, now 3)",
        "data.vocab_size (was 512, now 300)",
    ):
        assert message in other.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["model"]["left"]["mlp_size"] = 48
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    wide = run_program(
        command("--resume", "run", "--cache_dir", "cache", "--model.left.mlp_size", "48"), tmp_path
    )
    assert (
        wide.returncode == 1
        and "does not fit this model: left.decoder.layers.0.mlp.down_proj.weight "
        "is (32, 64) in it, (32, 48) in the model"
        in wide.stderr
    ), wide.stderr


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.jsonl", "garbage\n", "metrics.jsonl is damaged"),
        ("metrics.jsonl", "[1]\n", "metrics.jsonl is damaged"),
        ("config.json", "{", "not valid JSON"),
        ("config.json", "[]", "expected an object"),
    ],
)
def test_a_damaged_run_is_one_line(uninterrupted, tmp_path, name, text, message):
    shutil.copytree(uninterrupted, tmp_path / "run")
    (tmp_path / "run" / name).write_text(text)
    done = run_program(command("--resume", "run", "--cache_dir", "cache", "--max_steps", "15"), tmp_path)
    assert done.returncode in (1, 2) and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("name", ["state.json", SHARD])
def test_a_damaged_checkpoint_is_passed_over(uninterrupted, tmp_path, name):
    """With one bit flipped, the run resumes from the checkpoint before and reports it.

    Given by name, a damaged checkpoint is refused. With none left, the run does not start again.
    """
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    path = folder / "checkpoints" / "step_000014" / name
    held = bytearray(path.read_bytes())
    held[len(held) // 2] ^= 1
    path.write_bytes(held)
    by_name = run_program(command("--resume", str(path.parent), "--cache_dir", "cache"), tmp_path)
    assert (
        by_name.returncode == 1
        and by_name.stderr.startswith("error: checkpoint")
        and "is damaged" in by_name.stderr
        and by_name.stderr.count("\n") == 1
    )
    done = run_program(command("--output_dir", "run", "--resume", "auto", "--cache_dir", "cache"), tmp_path)
    assert (
        done.returncode == 0
        and "step_000014 is damaged" in done.stderr
        and "step_000012 after step 12" in done.stdout
    ), done.stderr
    assert losses(folder) == losses(uninterrupted)
    for checkpoint in checkpoints(folder / "checkpoints"):
        (checkpoint / name).write_bytes(b"{}")
    none = run_program(command("--output_dir", "run", "--resume", "auto", "--cache_dir", "cache"), tmp_path)
    assert (
        none.returncode == 1
        and "every checkpoint in run/checkpoints is damaged" in none.stderr
        and (folder / "metrics.jsonl").is_file()
    )


@pytest.mark.parametrize("damaged", [False, True])
def test_what_a_run_goes_back_before_is_no_longer_its_own(uninterrupted, tmp_path, damaged):
    """Else the later checkpoint would be what is retained, and what "auto" goes on with."""
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    if damaged:
        (folder / "checkpoints" / "step_000014" / SHARD).write_bytes(b"")
    back = (
        ["--output_dir", "run", "--resume", "auto"]
        if damaged
        else ["--resume", "run/checkpoints/step_000012"]
    )
    done = run_program(command(*back, "--max_steps", "13", "--train.keep_checkpoints", "1"), tmp_path)
    assert done.returncode == 0 and "it is now run/checkpoints/abandoned/step_000014" in done.stdout, (
        done.stderr
    )
    assert [p.name for p in checkpoints(folder / "checkpoints")] == ["step_000013"]
    again = run_program(command("--resume", "run"), tmp_path)
    assert (
        again.returncode == 0 and "resumed from run/checkpoints/step_000013 after step 13" in again.stdout
    ), again.stderr
    assert sorted({step for step, _ in losses(folder)}) == list(range(1, 15))


def test_a_run_that_is_resumed_forgets_what_it_does_again(tmp_path):
    log = RunLog(tmp_path / "run")
    for name in ("metrics.jsonl", "skipped.jsonl"):
        (tmp_path / "run" / name).write_text("".join(f'{{"step": {step}}}\n' for step in (2, 4, 6)) + '{"st')
    log.truncate(log.read_until(5, logged=4))
    assert {(tmp_path / "run" / name).read_text() for name in ("metrics.jsonl", "skipped.jsonl")} == {
        '{"step": 2}\n{"step": 4}\n'
    }
    log.truncate(log.read_until(10, logged=10))
    log.start(4, 10)
    assert "metrics.jsonl ends at step 4: the lines up to step 10" in log.log_path.read_text()


def test_a_preset_or_script_other_than_the_run_s_is_refused(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    stored = (tmp_path / "run" / "config.json").read_bytes()
    done = run_program(
        [
            sys.executable,
            str(ROOT / "train_dual_tower.py"),
            "--config",
            "dual-tower-cauldron",
            "--resume",
            "run",
        ],
        tmp_path,
    )
    assert (
        done.returncode == 2
        and "cannot change config (was dual_tower_easyvqa, now dual_tower_cauldron)" in done.stderr
    ), done.stderr
    done = run_program([sys.executable, str(ROOT / "train_vanilla.py"), "--resume", "run"], tmp_path)
    assert (
        done.returncode == 2
        and "is trained by train_dual_tower.py" in done.stderr
        and done.stderr.count("\n") == 1
    ), done.stderr
    assert (tmp_path / "run" / "config.json").read_bytes() == stored


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "cache" not in path.parts
    }


@pytest.mark.parametrize(
    ("flags", "spoil", "message"),
    [
        (
            ["--resume", "run/checkpoints/step_000012", "--output_dir", "fork"],
            None,
            "--resume goes on with run, and --output_dir is fork",
        ),
        (
            ["--resume", "run", "--max_steps", "16", "--eval.best", "nonsense"],
            None,
            "this run logs no metric 'nonsense'",
        ),
        (
            ["--resume", "run/checkpoints/step_000012", "--max_steps", "16"],
            lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\n"),
            "metrics.jsonl is damaged",
        ),
        (
            ["--resume", "auto", "--output_dir", "run"],
            lambda run: (run / "config.json").unlink(),
            "run holds 'metrics.jsonl', of a run without its config.json",
        ),
        (
            ["--output_dir", "run"],
            lambda run: [path.unlink() for path in (run / "config.json", run / "metrics.jsonl")],
            "run holds 'checkpoints', of a run without",
        ),
        (
            ["--resume", "auto", "--output_dir", "run"],
            lambda run: [path.unlink() for path in run.glob("checkpoints/*/state.json")],
            "every checkpoint in run/checkpoints is damaged",
        ),
    ],
)
def test_what_a_start_refuses_leaves_the_folder_as_it_was(uninterrupted, tmp_path, flags, spoil, message):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    if spoil is not None:
        spoil(folder)
    before = contents(folder)
    done = run_program(command(*flags, "--cache_dir", str(uninterrupted / "cache")), tmp_path)
    assert done.returncode in (1, 2) and message in done.stderr and "Traceback" not in done.stderr, (
        done.stderr
    )
    assert contents(folder) == before and not (tmp_path / "fork").exists()


def test_a_new_run_leaves_what_it_finds(tmp_path):
    """Another program's model, whose tokenizer has the name of ours; and an empty folder."""
    (tmp_path / "foreign" / "tokenizer").mkdir(parents=True)
    (tmp_path / "foreign" / "tokenizer" / "tokenizer.json").write_text("{}")
    done = run_program(command("--output_dir", "foreign"), tmp_path)
    assert (
        done.returncode == 2
        and "foreign holds 'tokenizer'" in done.stderr
        and contents(tmp_path / "foreign") == {"tokenizer/tokenizer.json": b"{}"}
    )
    (tmp_path / "empty").mkdir()
    for flags in (["--data.validation_images", "100000"], ["--eval.best", "nonsense"]):
        assert run_program(command("--output_dir", "empty", *flags), tmp_path).returncode in (1, 2)
        assert list((tmp_path / "empty").iterdir()) == []


def test_a_checkpoint_without_its_state_is_passed_over_aloud(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step_000014" / "state.json").unlink()
    done = run_program(command("--resume", "run", "--cache_dir", "run/cache"), tmp_path)
    assert (
        done.returncode == 0 and "step_000014 is damaged" in done.stderr and "after step 12" in done.stdout
    ), done.stderr


def by_torchrun(restarts: int) -> None:
    os.environ |= {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": str(restarts)}


def test_what_torchrun_starts_again_goes_back_once(uninterrupted, tmp_path):
    """Not a second time; but where the first start died before it had gone back, the second one does."""
    shutil.copytree(uninterrupted, tmp_path / "run")
    flags = command(
        "--resume", "run/checkpoints/step_000012", "--max_steps", "13", "--cache_dir", "run/cache"
    )
    for restarts, behind in ((1, 12), (2, 13), (0, 12)):
        done = run_program(flags, tmp_path, before=partial(by_torchrun, restarts))
        assert done.returncode == 0 and f"after step {behind}" in done.stdout, done.stderr
    abandoned = {path.name for path in (tmp_path / "run" / "checkpoints" / "abandoned").iterdir()}
    assert abandoned == {
        "step_000014",
        "step_000013",
        "model",
        "model-2",
    }  # nothing that was abandoned before is lost


@pytest.mark.parametrize("folder", ["runs/dual_tower_easyvqa", "other"])
def test_what_torchrun_starts_again_goes_on_untold(tmp_path, folder):
    """A run that this torchrun began; one of somebody else's it leaves alone."""
    named = folder == "other"
    flags = command(*["--output_dir", folder] * named, "--cache_dir", "cache", "--max_steps", "2")
    first, again = (
        run_program(flags, tmp_path, before=partial(by_torchrun, restarts)) for restarts in (0, 1)
    )
    assert first.returncode == again.returncode == 0 and "resumed" not in first.stdout, (
        first.stderr + again.stderr
    )
    assert f"resumed from {folder}/checkpoints/step_000002" in again.stdout
    (tmp_path / folder / ".torchrun").write_text("none 1\n")
    other = run_program(flags, tmp_path, before=partial(by_torchrun, 1))
    assert (
        "resumed" not in other.stdout
        and (other.returncode != 0) == named != (tmp_path / "runs" / "dual_tower_easyvqa-2").exists()
    ), other.stderr


def test_changed_data_are_reported(tmp_path):
    lines = [
        json.dumps({"images": [], "texts": [{"user": f"what is {n}?", "assistant": f"it is {n}"}]})
        for n in range(30)
    ]
    flags = [
        "--data.sources",
        "jsonl=mine.jsonl",
        "--output_dir",
        "run",
        "--cache_dir",
        "cache",
        "--data.limit",
        "0",
    ]

    def run(count: int, steps: int) -> Any:
        (tmp_path / "mine.jsonl").write_text("\n".join(lines[:count]))
        return run_program(command(*flags, "--max_steps", str(steps), "--resume", "auto"), tmp_path)

    assert (first := run(29, 2)).returncode == 0, first.stderr
    before = contents(tmp_path / "run")
    done = run(30, 4)
    assert (
        done.returncode == 1
        and done.stderr.count("\n") == 1
        and "training records of jsonl, and there are" in done.stderr
    ), done.stderr
    assert contents(tmp_path / "run") == before and run(29, 4).returncode == 0


def failing_validation() -> None:
    import eval.validation

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a task that fails")

    eval.validation.Validation.score = fail


@pytest.mark.parametrize(("step", "every"), [(5, "5"), (14, "0")])
def test_a_failed_evaluation_is_repeated(uninterrupted, tmp_path, step, every):
    """Between steps, and at the end: what comes out is what comes out without a failure."""
    flags = command(
        "--output_dir", "run", "--cache_dir", str(uninterrupted / "cache"), "--train.eval_every", every
    )
    failed = run_program(flags, tmp_path, before=failing_validation)
    assert failed.returncode == 1 and "a task that fails" in failed.stderr
    for behind in (step, 14):  # a second time nothing is owed
        done = run_program([*flags, "--resume", "auto"], tmp_path)
        assert (
            done.returncode == 0 and f"after step {behind}" in done.stdout and "never came" not in done.stdout
        ), done.stderr
    whole = losses(uninterrupted)
    between = [
        line for line in whole if whole.count(line) == 1 and line in whole[:5] + whole[6:11] + whole[12:]
    ]
    assert losses(tmp_path / "run") == (whole if every == "5" else between)


def test_sigint_behind_another_signal_is_a_first_one():
    with StopSignals() as stop:
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop.name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_a_cache_that_cannot_be_written_costs_no_checkpoint(tmp_path):
    (tmp_path / "file").touch()
    done = run_program(command("--output_dir", "run", "--cache_dir", "file/cache"), tmp_path)
    assert (
        done.returncode == 0
        and done.stderr.count("could not be written") == done.stderr.count("\n") == 1
        and "--cache_dir DIR" in done.stderr
    ), done.stderr
    assert checkpoints(tmp_path / "run" / "checkpoints")


def test_best_and_samples_of_steps_that_are_done_again_go(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    (folder / "best").mkdir()
    (folder / "best.json").write_text('{"step": 14, "metric": "validation_loss", "value": 0.0}')
    flags = [
        "--resume",
        "run/checkpoints/step_000012",
        "--max_steps",
        "13",
        "--train.eval_every",
        "13",
        "--eval.best",
        "validation_loss",
    ]
    done = run_program(command(*flags, "--cache_dir", "run/cache"), tmp_path)
    assert done.returncode == 0 and json.loads((folder / "best.json").read_text())["step"] == 13, done.stderr
    assert {path.name for path in (folder / "checkpoints" / "abandoned").iterdir()} == {
        "step_000014",
        "best",
        "best.json",
        "model",
    }
    assert {path.name[:11] for path in (folder / "samples").iterdir() if path.name.startswith("step")} == {
        "step_000005",
        "step_000010",
        "step_000013",
    }


def test_a_second_start_takes_the_next_folder_while_the_first_loads(tmp_path):
    process = Program(command("--max_steps", "1"), tmp_path)
    while process.poll() is None and not (tmp_path / "runs" / "dual_tower_easyvqa" / ".tokenizer").is_dir():
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        auto = run_program(command("--max_steps", "1", "--resume", "auto"), tmp_path)
        second = run_program(command("--max_steps", "1", "--cache_dir", "other"), tmp_path)
    finally:
        os.kill(process.pid, signal.SIGCONT)
    assert (
        process.wait().returncode == 0
        and second.returncode == 0
        and (tmp_path / "runs" / "dual_tower_easyvqa-2" / "model").is_dir()
    ), second.stderr
    assert auto.returncode == 1 and "is in use" in auto.stderr


def test_a_second_signal_changes_nothing(tmp_path):
    process = Program(command("--output_dir", "run"), tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and '"step": 3,' in metrics.read_text()):
        time.sleep(0.002)
    while process.poll() is None:
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.005)
    done = process.wait()
    assert done.returncode == 0 and done.stdout.strip().endswith("--resume auto") and done.stderr == "", (
        done.stderr
    )


def test_a_start_that_is_stopped_leaves_nothing(tmp_path):
    flags = ("--output_dir", "run", "--max_steps", "2")
    process = Program(command(*flags), tmp_path)
    while process.poll() is None and not (tmp_path / "run" / ".tokenizer" / "tokenizer.json").is_file():
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGTERM)
    done = process.wait()
    assert (
        done.returncode == 128 + signal.SIGTERM
        and done.stderr == "SIGTERM before or after training: start again with --resume auto\n"
    ), done.stderr
    assert not (tmp_path / "run").exists()
    assert run_program(command(*flags, "--resume", "auto"), tmp_path).returncode == 0


def test_a_checkpoint_of_other_data_is_one_line(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "step_000014"
    data = {
        "window": [[0, [0, 99999, 0], True]],
        "number": 1,
        "epoch": 0,
        "cursor": 0,
        "part": 0,
        "dropped": [],
        "damaged": [],
        "images": 0,
    }
    state = {name: value for name, value in read_state(folder).items() if name != "checksums"} | {
        "data": [data]
    }
    (folder / "state.json").write_text(
        json.dumps(state | {"checksums": training.checkpoint._checksums(folder, state)})
    )
    done = run_program(command("--resume", "run", "--cache_dir", "cache", "--max_steps", "15"), tmp_path)
    assert (
        done.returncode == 1 and "does not fit this data set" in done.stderr and done.stderr.count("\n") == 1
    ), done.stderr


def test_a_run_past_its_end_says_so(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    done = run_program([*command("--resume", "run"), "--max_steps", "3"], tmp_path)
    assert done.returncode == 1 and "already past max_steps = 3: it has 14 steps" in done.stderr
    assert (
        json.loads((tmp_path / "run" / "config.json").read_text())["max_steps"] == 14
    )  # nothing was touched


def test_auto_finds_the_newest_run_whatever_its_folder_is_called(tmp_path):
    first = run_program(command("--output_dir", "runs/short", "--max_steps", "2"), tmp_path)
    assert first.returncode == 0, first.stderr
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "config.json").write_text("{")
    done = run_program(command("--resume", "auto", "--max_steps", "3"), tmp_path)
    assert (
        done.returncode == 0 and "resumed from runs/short/checkpoints/step_000002 after step 2" in done.stdout
    ), done.stderr
    assert "warning: runs/broken/config.json is not valid JSON" in done.stderr


def test_a_second_run_does_not_overwrite_the_first(uninterrupted, tmp_path):
    done = run_program(command("--output_dir", str(uninterrupted)), tmp_path)
    assert done.returncode == 2 and "already holds a run" in done.stderr


class Given:
    """Batches as the loop wants them."""

    def __init__(self, batches: list) -> None:
        self.batches, self.number = iter(batches), -1

    def __next__(self) -> dict:
        self.number += 1
        return next(self.batches)

    def sources(self) -> list[str]:
        return []

    def samples(self) -> list[str]:
        return [f"test {self.number}"]


@pytest.fixture
def batches(renderer, tokenizer):
    samples = [
        make_sample(renderer, 1, [[{"user": f"is it {c}?", "assistant": c}] * (1 + i % 3)], seed=i)
        for i, c in enumerate("abcdefgh")
    ]
    return [collate([[s]], tokenizer.global_image) for s in samples], collate(
        [[s] for s in samples], tokenizer.global_image
    )


def test_accumulated_gradients_equal_one_large_batch(tokenizer, batches):
    """Micro-batches with different numbers of supervised tokens.

    The loss is still the sum of losses ÷ supervised tokens of the whole step.
    """
    singles, whole = batches
    weights = []
    for source, forwards in ((Given(singles), 8), (Given([whole]), 1)):
        model = tiny_model(tokenizer)
        config = Config(
            model=TINY_MODEL,
            train=TrainConfig(global_batch_size=8 * forwards, dtype="fp32", warmup_steps=0, clip=0.0),
        )
        values = Trainer(config, model, source).train_step()
        gradients = {n: p.detach().clone() for n, p in model.named_parameters()}
        weights.append((values["loss"], values["grad_norm"], values["supervised_tokens"], gradients))
    assert weights[0][2] == weights[1][2] == int((whole["labels"] != -100).sum())
    assert weights[0][0] == pytest.approx(weights[1][0], rel=1e-5)
    assert weights[0][1] == pytest.approx(weights[1][1], rel=1e-4)


@pytest.mark.parametrize("spoil", [lambda loss: loss * float("nan"), lambda loss: loss + float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(tokenizer, batches, monkeypatch, spoil):
    """Four batches, the third of them spoilt: weights and optimizer are those of three."""
    held = []
    for poisoned in (True, False):
        model = tiny_model(tokenizer)
        config = Config(model=TINY_MODEL, train=TrainConfig(dtype="fp32"))
        given, logged = Given(batches[0][:4]), []
        trainer = Trainer(config, model, given)
        for step in range(1, 5):
            if step == 3 and not poisoned:
                next(given)
                trainer.step = step
                continue
            with monkeypatch.context() as patch:
                if step == 3:
                    loss = model.right.loss
                    patch.setattr(model.right, "loss", lambda *arguments, loss=loss: spoil(loss(*arguments)))
                logged.append(trainer.train_step())
        held.append((model.state_dict(), trainer.optimizers[0].state_dict()["state"]))
        assert [("skipped" in values, values.get("samples")) for values in logged] == [
            (False, None),
            (False, None),
            *[(True, ["test 2"])] * poisoned,
            (False, None),
        ]
    for name, weight in held[0][0].items():
        assert torch.equal(weight, held[1][0][name]), name
    for number, state in held[0][1].items():
        assert all(
            torch.equal(torch.as_tensor(value), torch.as_tensor(held[1][1][number][key]))
            for key, value in state.items()
        )


def spoil_losses(first: int, last: int) -> None:
    """Of the `first` to the `last` call of the process."""
    from models.language_model import LanguageModel

    calls, whole = [0], LanguageModel.loss

    def loss(*arguments: Any) -> torch.Tensor:
        calls[0] += 1
        return whole(*arguments) * (float("nan") if first <= calls[0] <= last else 1.0)

    LanguageModel.loss = loss


def test_steps_that_are_not_finite_are_skipped_counted_and_in_a_row_the_end(tmp_path):
    flags = [
        "--output_dir",
        "run",
        "--train.skips",
        "3",
        "--train.eval_every",
        "0",
        "--cache_dir",
        "cache",
        "--train.log_every",
        "14",
    ]
    done = run_program(command(*flags), tmp_path, before=partial(spoil_losses, 5, 6))
    assert done.returncode == 0 and done.stdout.count("skipped (loss nan, gradient norm nan)") == 2, (
        done.stderr
    )
    skipped = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert (
        [t["step"] for t in skipped] == [5, 6]
        and all(re.fullmatch(r"easy_vqa \d+", name) for t in skipped for name in t["samples"])
        and "loss nan" in skipped[0]["skipped"]
    )
    assert [step for step, loss in losses(tmp_path / "run") if loss is None] == [5, 6]
    flags[1] = "run2"
    done = run_program(command(*flags), tmp_path, before=partial(spoil_losses, 6, 99))
    assert (
        done.returncode == 1
        and "no finite loss and gradient in 3 steps, up to 8: look at run2/skipped.jsonl, or begin a new run"
        in done.stderr
        and done.stderr.count("\n") == 1
    ), done.stderr
    assert (
        checkpoints(tmp_path / "run2" / "checkpoints")[-1].name == "step_000004"
        and "the last checkpoint is run2/checkpoints/step_000004" in done.stderr
    )
    resumed = run_program(
        command("--output_dir", "run2", "--resume", "auto", "--cache_dir", "cache"), tmp_path
    )
    assert resumed.returncode == 0 and (tmp_path / "run2" / "skipped.jsonl").read_text() == "", resumed.stderr


def test_heads_may_learn_alone(tmp_path):
    """No other part has a gradient."""
    flags = [f"--train.lr_{part}" for part in ("vision", "projector", "left", "right")]
    done = run_program(
        command(
            "--output_dir",
            "run",
            "--max_steps",
            "2",
            "--model.multi_token.heads",
            "2",
            "--train.head_warmup",
            "0",
            *[x for flag in flags for x in (flag, "0")],
        ),
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["grad_norm"] > 0


def test_a_learning_rate_of_zero_freezes_a_part(tokenizer, batches):
    model = tiny_model(tokenizer)
    config = Config(
        model=TINY_MODEL, train=TrainConfig(lr_vision=0.0, lr_right=0.0, warmup_steps=0, dtype="fp32")
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    Trainer(config, model, Given(batches[0])).train_step()
    changed = {
        n.split(".")[0] + "." + n.split(".")[1]
        for n, p in model.named_parameters()
        if not torch.equal(p, before[n])
    }
    assert changed == {"left.modality_projector", "left.decoder", "left.embed_tokens"}


def test_cosine_schedule():
    config = TrainConfig(warmup_steps=10, final_lr=0.1)
    factors = [schedule(s, 110, config, "right") for s in range(110)]
    assert factors[0] == 0.1 and factors[9] == 1.0 and factors[109] == pytest.approx(0.1)
    assert factors[59] == pytest.approx(0.55) and sorted(factors[10:], reverse=True) == factors[10:]


def test_wsd_schedule_knows_its_end_in_the_decay_alone():
    """The schedule depends on the number of steps only in the decay.

    A run resumed before the decay with more steps therefore equals the longer run from its first step on.
    """
    config = TrainConfig(schedule="wsd", warmup_steps=10, final_lr=0.1, decay_share=0.25)
    factors = [schedule(s, 100, config, "right") for s in range(100)]
    assert factors[0] == 0.1 and set(factors[9:75]) == {1.0} and factors[99] == pytest.approx(0.1)
    assert factors[75] == pytest.approx(0.1 + 0.9 * (1 - 0.2)) and factors[83] == pytest.approx(
        0.1 + 0.9 * (1 - 0.6)
    )  # progress 1/25, 9/25
    assert sorted(factors[75:], reverse=True) == factors[75:]
    assert [schedule(s, 1000, config, "right") for s in range(75)] == factors[:75]
    short = [schedule(s, 8, config, "right") for s in range(8)]  # shorter than its warm-up
    assert max(short) < 0.7 and short[-1] == pytest.approx(0.8 * 0.1)


def test_parts_warm_up_for_their_own_number_of_steps(tokenizer, batches):
    """Each part has its own warm-up, and the logged rate is the one that the optimizer used.

    Right has its own number, left has none, the rest use the default.
    """
    train = TrainConfig(
        dtype="fp32",
        warmup_steps=4,
        warmup_right=8,
        warmup_left=0,
        lr_vision=1e-3,
        lr_projector=1e-3,
        lr_left=1e-3,
        lr_right=1e-3,
        schedule="wsd",
    )
    config = Config(model=TINY_MODEL, max_steps=100, train=train)
    model = tiny_model(tokenizer)
    trainer = Trainer(config, model, Given(batches[0]))
    rates = [trainer.train_step()["lr"], trainer.train_step()["lr"]]
    trainer.step = 5
    rates.append(trainer.train_step()["lr"])
    assert rates[0] == pytest.approx(
        {"vision": 0.25e-3, "projector": 0.25e-3, "left": 1e-3, "right": 0.125e-3}
    )
    assert rates[1]["projector"] == pytest.approx(0.5e-3) and rates[2] == pytest.approx(
        {"vision": 1e-3, "projector": 1e-3, "left": 1e-3, "right": 0.75e-3}
    )
    assert {group["part"]: group["lr"] for group in trainer.optimizers[0].param_groups} == rates[2]


@pytest.mark.parametrize(
    "wrong",
    [
        {"warmup_left": -2},
        {"decay_share": 0.0},
        {"decay_share": 0.5, "schedule": "cosine"},
        {"decay_share": 1.5},
        {"final_lr": -0.1},
        {"schedule": "linear"},
    ],
)
def test_schedules_that_cannot_be_are_one_line(wrong):
    flags = [part for name, value in wrong.items() for part in (f"--train.{name}", str(value))]
    with pytest.raises(UsageError, match=next(iter(wrong))):
        resolve(flags, "")


def test_minutes_also_save(tmp_path):
    flags = [
        "--output_dir",
        "run",
        "--cache_dir",
        "cache",
        "--train.checkpoint_every",
        "0",
        "--train.checkpoint_minutes",
        "0.00001",
        "--train.keep_checkpoints",
        "20",
    ]
    done = run_program(command(*flags, "--max_steps", "4"), tmp_path)
    assert done.returncode == 0 and [p.name for p in checkpoints(tmp_path / "run" / "checkpoints")] == [
        f"step_{i:06d}" for i in (1, 2, 3, 4)
    ], done.stderr


def test_a_disk_that_is_nearly_full_costs_old_checkpoints_but_not_the_newest(model, tmp_path, monkeypatch):
    optimizers = make_optimizers(model, TrainConfig())
    for step in (1, 2, 3):
        save(tmp_path, step, model, optimizers, {"data": []}, keep=3)
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    shutil.copytree(tmp_path / "step_000001", tmp_path / "abandoned" / "step_000009")
    free = [size // 2, size // 2, 2 * size]  # without the abandoned and the first one, there is enough
    monkeypatch.setattr(training.checkpoint.shutil, "disk_usage", lambda _: Mock(free=free.pop(0)))
    save(tmp_path, 4, model, optimizers, {"data": []}, keep=3)
    assert [p.name for p in checkpoints(tmp_path)] == [
        "step_000002",
        "step_000003",
        "step_000004",
    ] and not list((tmp_path / "abandoned").iterdir())
    (tmp_path / "abandoned").rmdir()
    monkeypatch.setattr(training.checkpoint.shutil, "disk_usage", lambda _: Mock(free=size // 2))
    with pytest.raises(
        UserError, match=r"step_000005 could not be written: it takes 0\.\d MiB, and 0\.\d MiB are free"
    ):
        save(tmp_path, 5, model, optimizers, {"data": []}, keep=3)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000004"]


def test_no_checkpoint_is_deleted_where_that_would_not_do(model, tmp_path, monkeypatch):
    optimizers = make_optimizers(model, TrainConfig())
    for step in (1, 2, 3):
        save(tmp_path, step, model, optimizers, {"data": []}, keep=3)
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    monkeypatch.setattr(training.checkpoint, "MARGIN", 2.5)  # two old ones hold two
    monkeypatch.setattr(training.checkpoint.shutil, "disk_usage", lambda _: Mock(free=size // 4))
    with pytest.raises(UserError, match="earlier checkpoints are untouched"):
        save(tmp_path, 4, model, optimizers, {"data": []}, keep=3)
    assert [p.name for p in checkpoints(tmp_path)] == ["step_000001", "step_000002", "step_000003"]
    free = [size, 2 * size, 3 * size]
    monkeypatch.setattr(training.checkpoint.shutil, "disk_usage", lambda _: Mock(free=free.pop(0)))
    monkeypatch.setattr(
        training.checkpoint.state_dict_saver, "save", Mock(side_effect=OSError(28, "No space left on device"))
    )
    with pytest.raises(
        UserError,
        match=r"No space left.*step_000001, step_000002 had been deleted to make room, others are untouched",
    ):
        save(tmp_path, 4, model, optimizers, {"data": []}, keep=3)
    assert [p.name for p in checkpoints(tmp_path)] == ["step_000003"]


def test_recomputed_blocks_give_the_same_gradients_for_less_memory(tokenizer, batches):
    grads, saved = [], []
    for recompute in (False, True):
        model = tiny_model(tokenizer).train()
        model.parts()["vision"].requires_grad_(False)  # no decoder blocks, but the bulk of the tensors
        for block in model.modules():
            if isinstance(block, DecoderBlock):
                block.recompute = recompute
        saved.append(saved_tensor_bytes(model, lambda model=model: model(**batches[0][0]).loss_sum))
        model(**batches[0][0]).loss_sum.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and all(
        torch.equal(grads[0][name], grads[1][name]) for name in grads[0]
    )
    assert saved[1] < 0.7 * saved[0]


def test_compiled_blocks_learn_the_same_and_are_compiled_once(renderer, tokenizer):
    """Not anew for every layer, or for a row with other documents; and evaluation leaves them alone."""
    a, b, c = (
        make_sample(renderer, 1, [[{"user": "is it a?", "assistant": "a"}] * turns], seed=turns)
        for turns in (1, 2, 3)
    )
    rows = [collate(rows, tokenizer.global_image) for rows in ([[a, b], [c]], [[c], [b, a]])]
    results = []
    for compiled in (False, True):
        model = tiny_model(tokenizer).train()
        for block in model.modules():
            if isinstance(block, DecoderBlock) and compiled:
                block.compiled = torch.compile(block.run, backend="aot_eager")  # no C++ compiler
        losses = []
        for number, batch in enumerate(rows):
            with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
                loss = model(**batch).loss_sum
                loss.backward()
            losses.append(loss.item())
        with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile"):
            model(**rows[0])
        results.append([*losses, *(p.grad.norm().item() for p in model.parameters() if p.grad is not None)])
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_features_that_come_while_others_are_saved_are_saved_the_next_time(tmp_path, monkeypatch):
    cache = FeatureCache(tmp_path, 1 << 20)
    tiles = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)

    def encode(pixels):
        return pixels.float()

    cache(tiles[:2], encode)
    real = training.feature_cache.save_file

    def slow(*args, **kwargs):
        cache(tiles[2:], encode)
        real(*args, **kwargs)

    monkeypatch.setattr(training.feature_cache, "save_file", slow)
    cache.before_checkpoint()
    monkeypatch.undo()
    cache.before_checkpoint()
    assert len(FeatureCache(tmp_path, 1 << 20).memory) == 3


def without_a_key() -> None:
    os.environ |= {"HOME": str(Path.cwd())}
    os.environ.pop("WANDB_API_KEY", None)


SECRETS = {"HF_TOKEN": "hf_" + "s3cret" * 6, "WANDB_API_KEY": "5ec0" * 10}


def with_secrets() -> None:
    os.environ |= SECRETS | {"HOME": str(Path.cwd()), "WANDB_MODE": "offline"}


def test_secrets_are_written_nowhere(tmp_path):
    """No output or file of a run contains the Hub's token or W&B's key.

    This includes the trackers' own files.
    """
    pytest.importorskip("wandb", reason="the group wandb is not installed")
    done = run_program(
        command("--output_dir", "run", "--log", "wandb", "--cache_dir", "cache", "--max_steps", "2"),
        tmp_path,
        before=with_secrets,
    )
    assert done.returncode == 0, done.stderr
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    names = {str(path.relative_to(tmp_path)) for path in written}
    assert {"run/config.json", "run/metrics.jsonl", "run/model/README.md", "run/train.log"} <= names and any(
        name.startswith("run/wandb/") for name in names
    )
    for secret in map(str.encode, SECRETS.values()):
        assert secret not in (done.stdout + done.stderr).encode() and not [
            path for path, data in written.items() if secret in data
        ]


def test_trackers_receive_what_metrics_jsonl_holds(tmp_path):
    """TensorBoard's events, read back; and W&B without a key, which asks nothing."""
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="the group tensorboard is not installed",
    )
    pytest.importorskip("wandb", reason="the group wandb is not installed")
    done = run_program(
        command("--output_dir", "run", "--log", "tensorboard,wandb", "--cache_dir", "cache"),
        tmp_path,
        before=without_a_key,
    )
    assert done.returncode == 0 and "wandb sync" in done.stdout, done.stderr
    read = events.EventAccumulator(str(tmp_path / "run" / "tensorboard"), {"scalars": 0})
    read.Reload()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(e.step, e.value) for e in read.Scalars("loss")] == [
        (line["step"], pytest.approx(line["loss"])) for line in lines if "loss" in line
    ]
    assert [event.step for event in read.Scalars("validation_loss")] == [5, 10, 14]
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    wrong = run_program(command("--output_dir", "no", "--log", "wandbb"), tmp_path)
    assert wrong.returncode == 2 and "wandb" in wrong.stderr and not (tmp_path / "no").exists()


def test_a_failed_save_leaves_the_last_checkpoint(model, tmp_path, monkeypatch):
    optimizers = make_optimizers(model, TrainConfig())
    save(tmp_path, 1, model, optimizers, {"data": []})

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training.checkpoint.state_dict_saver, "save", full_disk)
    with pytest.raises(UserError, match="step_000002 could not be written.*No space left"):
        save(tmp_path, 2, model, optimizers, {"data": []})
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]


@pytest.mark.parametrize(
    ("kilobytes", "what"),
    [(1, "tokenizer.json"), (32, "feature cache"), (100, "checkpoint"), (400, "checkpoint")],
)
def test_a_full_disk_is_one_line(tmp_path, kilobytes, what):
    """Files cannot grow beyond a limit.

    With the last two limits, writing a checkpoint's weights fails, or writing its optimizer state.
    """
    folder = tmp_path / "run"
    flags = [
        "--output_dir",
        str(folder),
        "--cache_dir",
        str(tmp_path / "cache"),
        "--train.local_batch_size",
        "8",
        "--train.global_batch_size",
        "8",
    ]

    done = run_program(
        command(*flags),
        tmp_path,
        before=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (kilobytes * 1024, kilobytes * 1024)),
    )
    assert (
        done.returncode == 1
        and f"{what} " in done.stderr
        and "could not be written" in done.stderr.splitlines()[-1]
    ), done.stderr
    assert done.stderr.count("\n") == 1 + (what == "feature cache"), (
        done.stderr
    )  # a warning, before what ends the run
    assert [p.name for p in tmp_path.rglob(".*")] == [] and checkpoints(folder / "checkpoints") == []


CLONE_NEWNS, CLONE_NEWUSER, MS_REMOUNT, MS_BIND, MS_RDONLY = 0x20000, 0x10000000, 32, 4096, 1


def own_mounts() -> bool:
    """This process mounts for itself alone from here on; where it may not, False."""
    libc = ctypes.CDLL(None, use_errno=True)
    return (
        sys.platform == "linux"
        and libc.unshare(CLONE_NEWNS if os.geteuid() == 0 else CLONE_NEWNS | CLONE_NEWUSER) == 0
    )


def make_read_only(folder: Path) -> None:
    """A mount that refuses root, too."""
    libc, at = ctypes.CDLL(None, use_errno=True), str(folder.absolute()).encode()
    for flags in (MS_BIND, MS_BIND | MS_REMOUNT | MS_RDONLY):
        assert libc.mount(at, at, None, flags, None) == 0, os.strerror(ctypes.get_errno())


def on_a_disk_that_turns_read_only(step: int) -> None:
    """The run folder's after `step`, or at once everything below the working folder."""
    assert own_mounts()
    if not step:
        make_read_only(Path.cwd())
        os.chdir(Path.cwd())  # into what is mounted now
        return
    whole = RunLog.step

    def step_of(self: Any, number: int, *values: float) -> None:
        whole(self, number, *values)
        while number == step and not checkpoints(Path("run/checkpoints")):
            time.sleep(0.01)
        if number == step:
            make_read_only(Path("run"))

    RunLog.step = step_of


def can_mount() -> None:
    sys.exit(0 if own_mounts() else 1)


@pytest.mark.parametrize("step", [0, 6])
def test_a_read_only_disk_is_one_line_and_keeps_what_was_saved(uninterrupted, tmp_path, step):
    """A read-only disk gives one line of error.

    At the start nothing is left over. In the middle of a run, the run resumes from its last checkpoint when
    the disk is writable again.
    """
    if run_program(["-c"], tmp_path, before=can_mount).returncode:
        pytest.skip("this process may not mount")
    flags = ("--output_dir", "run", "--cache_dir", str(uninterrupted / "cache"))
    done = run_program(command(*flags), tmp_path, before=partial(on_a_disk_that_turns_read_only, step))
    assert (
        done.returncode == 1
        and done.stderr.startswith("error: ")
        and "Read-only file system" in done.stderr
        and ("metrics.jsonl could not be written" in done.stderr) == bool(step)
        and done.stderr.count("\n") == 1
    ), done.stderr
    if not step:
        assert list(tmp_path.iterdir()) == []
        return
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000004"]
    done = run_program(command(*flags, "--resume", "auto"), tmp_path)
    assert done.returncode == 0 and "resumed from" in done.stdout, done.stderr
    assert losses(tmp_path / "run") == losses(uninterrupted) and results_of(tmp_path / "run") == results_of(
        uninterrupted
    )


def test_a_checkpoint_that_is_read_is_not_pruned(model, tmp_path):
    """One that is being pushed, until it is not any more."""
    optimizers, in_use = make_optimizers(model, TrainConfig()), [tmp_path / "step_000001"]
    saver = Saver(tmp_path, 1, SINGLE_PROCESS, in_use=lambda: in_use)
    for step in (1, 2, 3, 4):
        if step == 4:
            in_use.clear()
        saver.save(step, model, optimizers, lambda: {"data": []}, lambda: None)
        saver.wait()
        expected = ["step_000001"] * (step < 4) + [f"step_{step:06d}"] * (step > 1)
        assert [path.name for path in checkpoints(tmp_path)] == expected


def test_checkpoints_are_pruned_and_half_written_ones_ignored(model, tmp_path):
    optimizers = make_optimizers(model, TrainConfig())
    (tmp_path / ".step_000009.123").mkdir()
    for step in (1, 2, 3):
        save(tmp_path, step, model, optimizers, {"data": [{"x": step}]})
    assert (
        [p.name for p in checkpoints(tmp_path)]
        == ["step_000002", "step_000003"]
        == sorted(p.name for p in tmp_path.iterdir())
    )
    state = load_checkpoint(tmp_path / "step_000003", model, optimizers)
    assert (state["step"], state["data"], state["format"], state["ranks"]) == (3, [{"x": 3}], FORMAT, 1)
    (tmp_path / "step_000003" / SHARD).unlink()
    with pytest.raises(UserError, match="step_000003 is damaged"):
        read_state(tmp_path / "step_000003")
    (tmp_path / "step_000003" / "state.json").unlink()
    with pytest.raises(UserError, match="step_000003 is damaged"):
        read_state(tmp_path / "step_000003")


def test_the_best_checkpoint_stays_next_to_the_last(tmp_path):
    """Of step 5, where no other would be, for no later accuracy is above it."""
    flags = [
        "--output_dir",
        "run",
        "--cache_dir",
        "cache",
        "--train.keep_checkpoints",
        "1",
        "--eval.best",
        "validation_accuracy",
        "--train.lr_right",
        "1e-9",
        "--train.lr_left",
        "1e-9",
    ]
    done = run_program(command(*flags, "--train.lr_projector", "1e-9"), tmp_path)
    assert done.returncode == 0 and json.loads((tmp_path / "run" / "best.json").read_text())["step"] == 5, (
        done.stderr
    )
    assert [p.name for p in checkpoints(tmp_path / "run" / "checkpoints")] == ["step_000005", "step_000014"]


def test_memory_for_copies_is_allocated_before_the_first_save(model, tmp_path):
    optimizers = make_optimizers(model, TrainConfig())
    saver = Saver(tmp_path, 1, SINGLE_PROCESS)
    saver.prepare(model, optimizers)
    saver.copied()
    saver.wait()
    at = {name: copy.data_ptr() for name, copy in saver.memory.items()}
    saver.prepare(model, optimizers)
    assert saver.thread is None and len(at) == len(model.state_dict())
    saver.save(1, model, optimizers, lambda: {"data": []}, lambda: None)
    saver.wait()
    assert {name: copy.data_ptr() for name, copy in saver.memory.items()} == at and read_state(
        tmp_path / "step_000001"
    )["step"] == 1


def test_adapters_by_flag_resume_and_end_merged(tmp_path):
    """A run with LoRA on the right tower, resumed, equals the uninterrupted one.

    Dropout's random state is resumed too. The export is an ordinary model.
    """
    lora = ["--lora.right.r", "2", "--lora.right.dropout", "0.4", "--cache_dir", str(tmp_path / "cache")]
    for name, steps in (("whole", "4"), ("parts", "2"), ("parts", "4")):
        resume = ["--resume", "auto"] if (name, steps) == ("parts", "4") else []
        run_program(
            command(
                "--output_dir",
                str(tmp_path / name),
                *lora,
                *resume,
                "--max_steps",
                steps,
                "--train.final_lr",
                "1",
            ),
            tmp_path,
        ).check_returncode()
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts")]
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0]) and not any(
        "lora" in n for n in weights[0]
    )
    adapter = load_file(tmp_path / "whole" / "adapters" / "right" / "adapter_model.safetensors")
    assert len(adapter) == 2 * 7 * 2  # layers, linear layers, A and B
    assert (
        len(list((tmp_path / "cache" / "features").iterdir())) == 1
    )  # a resumed run knows its encoder by the weights
    Predictor.from_pretrained(tmp_path / "whole" / "model")


def test_a_failed_export_leaves_the_old_one_whole(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    with replacing_folder(folder) as staging:
        (staging / "config.json").write_text("old")
    with pytest.raises(RuntimeError), replacing_folder(folder) as staging:
        (staging / "config.json").write_text("new")
        raise RuntimeError("killed")
    assert [p.name for p in tmp_path.iterdir()] == ["model"] and (folder / "config.json").read_text() == "old"
    rename = Path.rename
    monkeypatch.setattr(
        Path,
        "rename",
        lambda self, to: (
            (_ for _ in ()).throw(OSError(5, "broken")) if ".new." in self.name else rename(self, to)
        ),
    )
    with (
        pytest.raises(UserError, match="model could not be written: broken"),
        replacing_folder(folder) as staging,
    ):
        (staging / "config.json").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["model"] and (folder / "config.json").read_text() == "old"
    monkeypatch.undo()
    with replacing_folder(folder) as staging:
        (staging / "other.json").write_text("new")
    assert [p.name for p in folder.iterdir()] == ["other.json"] and [p.name for p in tmp_path.iterdir()] == [
        "model"
    ]


def test_validation_records_that_cannot_be_read_are_left_out(model, renderer, tmp_path, image_file):
    """Neither scored nor among the predictions; counted."""
    (tmp_path / "bad.png").write_bytes(b"nothing")
    records = [
        {"images": [str(tmp_path / "bad.png")], "texts": TURNS[:2], "id": "bad"},
        {"images": [str(image_file)], "texts": [{"user": "", "assistant": "x"}, TURNS[0]], "id": "half"},
        {"images": [str(image_file)], "texts": TURNS[:2], "id": "good"},
    ]
    dataset, budget = dataset_of(records, renderer), Budget(64, 128, 5)
    validation = Validation(dataset, budget, 2, renderer.tokenizer.global_image)
    assert dataset.dropped == {("test", "image_not_an_image"): 1, ("test", "empty_text"): 1}
    predictions = validation.predictions(model, 8)
    assert [p["question"] for p in predictions] == [TURNS[0]["user"], TURNS[0]["user"]]
    save_samples(tmp_path / "samples", 1, predictions)
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [
        "step_000001.jsonl",
        "step_000001.png",
    ]
    with pytest.raises(UserError, match="none of the 1 validation records"):
        Validation(dataset_of(records[:1], renderer), budget, 2, renderer.tokenizer.global_image)


class TestFeatureCache:
    def encode(self, tiles):
        self.seen += int((tiles != 0).flatten(1).any(1).sum())  # the black ones fill up a chunk
        return tiles.float().mean((2, 3), keepdim=True)

    def test_each_tile_is_encoded_once(self, tmp_path):
        self.seen = 0
        cache, tiles = FeatureCache(tmp_path, 1 << 20), random_tiles(40)
        twice = torch.cat((tiles, tiles[:5]))
        for _ in range(2):
            assert torch.equal(cache(twice, self.encode), twice.float().mean((2, 3), keepdim=True))
        assert self.seen == 40
        cache.before_checkpoint()
        again = FeatureCache(tmp_path, 1 << 20)
        assert (
            torch.equal(again(tiles, self.encode), tiles.float().mean((2, 3), keepdim=True))
            and self.seen == 40
        )

    def test_a_feature_does_not_depend_on_its_company(self, tmp_path):
        """Bit for bit, alone or among others, in bf16 and in fp32, by the real encoder."""
        encoder, tiles = (
            VisionEncoder(VisionConfig("tf_efficientnet_lite0", "random", level=3, image_size=32)),
            random_tiles(21, side=32),
        )
        for bf16 in (False, True):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                together = FeatureCache(tmp_path, 1 << 24)(tiles, encoder.encode)
                for part in (slice(20, 21), slice(3, 9)):
                    assert torch.equal(
                        FeatureCache(tmp_path, 1 << 24)(tiles[part], encoder.encode), together[part]
                    )

    def test_features_come_back_in_their_own_type(self, tmp_path):
        """Training computes in bf16, the previewed predictions in fp32; one cache holds both."""
        self.seen = 0
        cache, tiles = FeatureCache(tmp_path, 1 << 20), random_tiles(4)

        def encode(x):
            return self.encode(x).to(torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32)

        computed = {}
        for again in (cache, None):
            if again is None:
                cache.before_checkpoint()
                again = FeatureCache(tmp_path, 1 << 20)
            for bf16 in (True, False):
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    features = again(tiles, encode)
                assert features.dtype == (torch.bfloat16 if bf16 else torch.float32) and torch.equal(
                    computed.setdefault(bf16, features), features
                )
        assert self.seen == 8

    def test_beyond_its_limit_it_still_answers(self, tmp_path):
        self.seen = 0
        cache, tiles = FeatureCache(tmp_path, 12 * 10), random_tiles(40)
        for _ in range(2):
            assert torch.equal(cache(tiles, self.encode), tiles.float().mean((2, 3), keepdim=True))
        assert self.seen == 70 and cache.bytes == 120

    def test_a_damaged_shard_is_computed_again_and_reported(self, tmp_path, capsys):
        self.seen = 0
        cache, tiles = FeatureCache(tmp_path, 1 << 20), random_tiles(4)
        cache(tiles, self.encode)
        cache.before_checkpoint()
        (shard,) = tmp_path.iterdir()
        shard.write_bytes(shard.read_bytes()[:50])
        again = FeatureCache(tmp_path, 1 << 20)
        assert "cannot be read" in capsys.readouterr().err
        assert (
            torch.equal(again(tiles, self.encode), tiles.float().mean((2, 3), keepdim=True))
            and self.seen == 8
        )

    def test_the_fingerprint_knows_weights_and_constants(self):
        a, b = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        assert module_fingerprint(a) == module_fingerprint(b)
        b.running_mean[1] = 0.5
        assert module_fingerprint(a) != module_fingerprint(b)
