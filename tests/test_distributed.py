"""Two ranks on one machine have the losses of one process, under DDP and FSDP2.

Also: resuming with another number of ranks, lost ranks, and contradictory settings.
"""

import json
import os
import shlex
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from configs.train import Config, DataConfig, TrainConfig
from data.loader import merged
from tests.programs import Program, run_program, run_ranks, start_ranks
from tests.test_training import command
from training.checkpoint import checkpoints
from training.distributed import check_world
from training.optim import grad_scaler, load_scale, scale_state
from training.script import TORCHRUN
from utils.errors import UsageError
from utils.ranks import DistributedContext

# One process with two streams has the batches of two ranks. The optimizer is AdamW in fp32: on some machines
# Muon's steps are in bf16, where sums depend on their order.
# Three layers: two do not show what FSDP does to a block's arguments.
PARALLEL = pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
STEPS = "24"
SHARED = [
    "--data.streams",
    "2",
    "--train.global_batch_size",
    "4",
    "--train.optimizer",
    "adamw",
    "--train.dtype",
    "fp32",
    "--train.ema",  # validation and the exported model show the averages
    "0.9",
    "--cache_dir",
    "cache",
    "--model.left.layers",
    "3",
    "--model.right.layers",
    "3",
]


def logged_losses(folder: Path) -> dict[tuple[int, str], float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = {
        (line["step"], key): line[key]
        for line in lines
        for key in ("loss", "validation_loss", "validation_accuracy")
        if key in line
    }
    return losses | {
        (line["step"], name): value for line in lines for name, value in line.get("source_losses", {}).items()
    }


def assert_near(
    got: dict[tuple[int, str], float], expected: dict[tuple[int, str], float], tolerance: float = 1e-5
) -> None:
    assert got.keys() == expected.keys() and expected
    assert max(abs(got[key] - expected[key]) for key in expected) <= tolerance


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    done = run_program(command(*SHARED, "--max_steps", STEPS, "--output_dir", "run"), folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@PARALLEL
def test_two_ranks_reach_the_losses_of_one_process(alone, tmp_path, parallel):
    done = run_ranks(
        2, command(*SHARED, "--max_steps", STEPS, "--output_dir", "run", "--parallel", parallel), tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert_near(logged_losses(tmp_path / "run"), logged_losses(alone))
    assert done.stdout.count("validation loss") == 5  # one rank tells
    a, b = (load_file(folder / "model" / "model.safetensors") for folder in (alone, tmp_path / "run"))
    assert a.keys() == b.keys() and max((a[name] - b[name]).abs().max().item() for name in a) < 1e-3


def wait_until_logged(step: int, process: Program, folder: Path) -> None:
    """Wait until the run in `folder` has logged `step`, or `process` has ended."""
    metrics = folder / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and f'"step": {step},' in metrics.read_text()):
        time.sleep(0.002)


def test_one_process_goes_on_where_two_stopped_and_the_reverse(alone, tmp_path):
    """Two with FSDP2, one with `--parallel ddp`, because FSDP2 needs two, and two with FSDP2 again."""
    end = ["--output_dir", "run", "--max_steps", STEPS]
    two = start_ranks(2, command(*SHARED, *end, "--parallel", "fsdp"), tmp_path)
    wait_until_logged(5, two[0], tmp_path)
    os.kill(two[1].pid, signal.SIGUSR1)  # one rank gets the signal: both stop
    stopped = [process.wait() for process in two]
    assert [done.returncode for done in stopped] == [0, 0], stopped[0].stderr
    assert any("stopped after step" in done.stdout for done in stopped)
    assert 5 <= int(checkpoints(tmp_path / "run" / "checkpoints")[-1].name.removeprefix("step_")) < 12
    end += ["--resume", "auto", "--parallel"]
    one = Program(command(*SHARED, *end, "ddp"), tmp_path)
    wait_until_logged(13, one, tmp_path)
    os.kill(one.pid, signal.SIGTERM)
    done = one.wait()
    assert done.returncode == 0 and "SIGTERM: stopped after step" in done.stdout, done.stderr
    done = run_ranks(2, command(*SHARED, *end, "fsdp"), tmp_path)
    assert done.returncode == 0 and "resumed from" in done.stdout, done.stderr
    assert_near(logged_losses(tmp_path / "run"), logged_losses(alone))


def test_torchrun_stopped_and_killed_ends_bit_for_bit_as_a_whole_run(tmp_path):
    """torchrun passes a signal on; the command that the run prints goes on; a rank of it is killed.

    That command says nothing of the settings, which the run keeps. With FSDP2; `benchmarks.kill` has DDP, and
    kills at any time.
    """
    end = ["--output_dir", "run", "--max_steps", STEPS, "--parallel", "fsdp"]
    (tmp_path / "whole").mkdir()
    done = run_ranks(2, command(*SHARED, *end), tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", *TORCHRUN, "--"]
    process = Program([*torchrun, *command(*SHARED, *end)[1:]], tmp_path)
    wait_until_logged(5, process, tmp_path)
    os.kill(process.pid, signal.SIGUSR1)
    stopped = process.wait()
    # torchrun that got the signal itself ends so, whatever its ranks did.
    assert stopped.returncode == 1 and "SIGUSR1: stopped after step" in stopped.stdout, stopped.stderr
    process = Program(shlex.split(stopped.stdout.strip().splitlines()[-1]), tmp_path)
    wait_until_logged(14, process, tmp_path)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)  # one rank: torchrun ends the other
    lost = process.wait()
    assert lost.returncode != 0 and "resumed from" in lost.stdout, lost.stderr
    assert not (tmp_path / "run" / "model").exists()
    done = run_ranks(2, command(*SHARED, *end, "--resume", "auto"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model").is_dir()
    assert logged_losses(tmp_path / "run") == logged_losses(tmp_path / "whole" / "run")


@pytest.mark.parametrize(
    ("number", "flags"),
    [("bf16", []), ("fp32", ["--lora.right.r", "1", "--train.optimizer", "muon"])],
)
def test_shares_of_weights_learn_what_whole_ones_do(tmp_path, number, flags):
    """FSDP2 gives the results of DDP, within the type's rounding.

    An encoder with batch statistics, in two types, and matrices with fewer rows than ranks.
    """
    runs = []
    for parallel in ("ddp", "fsdp"):
        more = [
            *flags,
            "--train.dtype",
            number,
            "--train.lr_vision",
            "1e-3",
            "--max_steps",
            "3",
            "--train.eval_every",
            "0",
            "--parallel",
            parallel,
            "--output_dir",
            parallel,
        ]
        done = run_ranks(2, command(*SHARED, *more), tmp_path)
        assert done.returncode == 0, done.stderr
        runs.append(
            {key: value for key, value in logged_losses(tmp_path / parallel).items() if value is not None}
        )
    assert_near(*runs, tolerance=5e-3)


def test_the_command_for_several_nodes_is_theirs(tmp_path):
    """No rank knows the flags of their torchruns."""
    processes = start_ranks(2, command(*SHARED, "--output_dir", "run"), tmp_path, local=1)
    wait_until_logged(5, processes[0], tmp_path)
    os.kill(processes[0].pid, signal.SIGUSR1)
    done = [process.wait() for process in processes]
    out = "".join(d.stdout for d in done)
    assert (
        [d.returncode for d in done] == [0, 0]
        and "stopped after step" in out
        and "go on with the same torchrun on each of the 2 nodes" in out
    )


def with_variables(variables: dict[str, str]) -> None:
    """Set these of torchrun's variables, and no other."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ |= variables


@pytest.mark.parametrize(
    ("variables", "code", "message"),
    [
        ({"RANK": "1"}, 1, "RANK = 1 and WORLD_SIZE = 1 do not fit"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, 2, "the environment has WORLD_SIZE = 2, but no MASTER_ADDR"),
    ],
)
def test_ranks_without_torchrun_are_one_line(tmp_path, variables, code, message):
    flags = ["--train.global_batch_size", "4"]
    done = run_program(command(*flags), tmp_path, before=partial(with_variables, variables))
    assert done.returncode == code and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_rows_that_differ_between_ranks_and_hold_no_image_dead_lock_nobody(tmp_path):
    """Text alone, images, and damaged images; more rows than one rank's share."""
    from PIL import Image

    lines = []
    for i in range(24):
        record = {"texts": [{"user": f"{i} and {i}?", "assistant": str(2 * i)}]}
        if i >= 16:
            Image.new("RGB", (64, 64), (9 * i, 0, 0)).save(tmp_path / f"{i}.png")
            record["image"] = f"{i}.png"
        lines.append(json.dumps(record))
    for i in (20, 21, 22):
        (tmp_path / f"{i}.png").write_bytes(b"\x89PNG cut")
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    data = [
        "--data.sources",
        "jsonl=mine.jsonl,easy_vqa:8",
        "--data.validation_images",
        "4",
        "--data.streams",
        "1",
        "--train.lr_vision",
        "1e-4",
        "--train.local_batch_size",
        "1",
        "--train.global_batch_size",
        "2",
        "--data.right_length",
        "32",
        "--max_steps",
        "8",
    ]
    for number, parallel in ((1, "ddp"), (2, "ddp"), (2, "fsdp")):
        flags = [*data, "--output_dir", f"run{number}{parallel}", "--parallel", parallel]
        done = run_ranks(number, command(*SHARED, *flags), tmp_path)
        assert done.returncode == 0, done.stderr
        assert_near(logged_losses(tmp_path / f"run{number}{parallel}"), logged_losses(tmp_path / "run1ddp"))
    assert {"jsonl", "easy_vqa"} <= {
        key for _, key in logged_losses(tmp_path / "run1ddp")
    }  # losses by source


@pytest.mark.parametrize(
    ("size", "config", "message"),
    [
        (1, Config(parallel="fsdp"), "there is one: start the script with torchrun"),
        (2, Config(), "2 ranks cannot share the forwards of a step equally: .* makes 1;"),
        (
            3,
            Config(data=DataConfig(streams=2), train=TrainConfig(global_batch_size=48)),
            "3 ranks cannot take the data's 2 streams",
        ),
        (
            2,
            Config(data=DataConfig(streams=4), train=TrainConfig(global_batch_size=48)),
            "4 streams cannot share the forwards",
        ),
    ],
)
def test_contradictions_are_one_line(size, config, message):
    with pytest.raises(UsageError, match=message):
        check_world(config, DistributedContext(0, size))
    if "cannot share" in message:  # which a run that is resumed keeps
        with pytest.raises(UsageError, match="resume with a number of ranks that divides it"):
            check_world(config, DistributedContext(0, size), resumed=True)


def test_states_of_all_ranks_are_one_of_each_stream():
    """Two ranks that share a stream: the damaged images of each are added up."""
    shared = [
        {0: {"epoch": 1, "damaged": [["a", "image_damaged", 2]]}},
        {0: {"epoch": 1, "damaged": [["a", "image_damaged", 3], ["b", "image_missing", 1]]}},
    ]
    assert merged(shared) == [{"epoch": 1, "damaged": [["a", "image_damaged", 5], ["b", "image_missing", 1]]}]
    assert [
        state["epoch"]
        for state in merged(
            [
                {0: {"epoch": 4, "damaged": []}, 2: {"epoch": 6, "damaged": []}},
                {1: {"epoch": 5, "damaged": []}},
            ]
        )
    ] == [4, 5, 6]


def test_fp16_holds_the_same_numbers_on_any_number_of_ranks(tmp_path):
    """The fp16 loss scale is logged and saved as by one process.

    Gradients are averaged over ranks, so losses are multiplied by their number and the scale is divided by
    it.
    """
    config, cpu = TrainConfig(dtype="fp16"), torch.device("cpu")
    alone, four = (grad_scaler(config, cpu, ranks) for ranks in (1, 4))
    assert 4 * four.get_scale() == alone.get_scale() == 65536
    for ranks in (1, 2, 8):
        again = grad_scaler(config, cpu, ranks)
        load_scale(again, scale_state(four, 4) | {"scale": 1024.0}, ranks)
        assert again.get_scale() * ranks == 1024
    off = grad_scaler(TrainConfig(), cpu, 2)
    load_scale(off, scale_state(off, 2), 4)
    flags = ["--train.dtype", "fp16", "--max_steps", "2", "--output_dir", "run"]
    for number, step in ((2, 2), (1, 3)):
        done = run_ranks(
            number, command(*SHARED, *flags, "--resume", "auto", "--max_steps", str(step)), tmp_path
        )
        assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss_scale"] for line in lines if "grad_norm" in line] == [65536] * 3


def test_what_fails_on_rank_0_ends_the_others():
    """Whatever it is: none of them waits for a message that will not come."""
    from queue import Queue
    from threading import Thread

    def on_rank_0(error: BaseException) -> Any:
        raise error

    for error, code in ((KeyError("a"), 1), (UsageError("b"), 2), (KeyboardInterrupt(), 1)):
        for use in (
            lambda world, error=error: world.run_on_rank0(lambda: on_rank_0(error)),
            lambda world, error=error: world.rank0_first(),
        ):
            messages, ends = Queue(), {}

            class Ranks(DistributedContext):
                def broadcast(self, value: Any, messages: Any = messages) -> Any:
                    if not self.is_rank0:
                        return messages.get(timeout=10)
                    messages.put(value)
                    return value

            def rank(
                number: int, use: Any = use, error: Any = error, ends: Any = ends, Ranks: Any = Ranks
            ) -> None:
                try:
                    block = use(Ranks(number, 2))
                    with block:
                        if number == 0:
                            raise error
                except BaseException as end:
                    ends[number] = end

            other = Thread(target=rank, args=(1,))
            other.start()
            rank(0)
            other.join(timeout=20)
            assert ends[0] is error and isinstance(ends[1], SystemExit) and ends[1].code == code
