"""--fit-memory: the global batch size stays, and the selected sizes fit.

The run equals one with the same numbers set by hand.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import training.memory
from benchmarks.kill import results_of
from benchmarks.memory import compared
from configs.train import Config, DataConfig, TrainConfig
from models.dual_tower.dual_tower import DualTowerVLM
from models.vision_language_model import VisionLanguageModel
from tests.conftest import TINY
from tests.programs import run_program, without_local_batch_size
from tests.test_estimate import make_config
from tests.test_training import command, losses
from training.memory import choose, fit_batch_size, peak
from utils.errors import UsageError, UserError
from utils.ranks import DistributedContext


def shallow(context: str) -> Config:
    config = make_config(context)
    return replace(config, model=replace(config.model, left=TINY, right=TINY))


@pytest.mark.parametrize(
    ("model_class", "recompute"), [(DualTowerVLM, False), (DualTowerVLM, True), (VisionLanguageModel, False)]
)
def test_the_estimate_is_what_real_steps_hold(tokenizer, model_class, recompute):
    """The estimate is never below a real step's memory (to 1 %), and only slightly above.

    It is compared on rows that it was not measured on. Recomputed blocks of both towers count, although they
    run one after the other.
    """
    config = shallow("none" if model_class is VisionLanguageModel else "image")
    config = replace(config, train=replace(config.train, recompute=recompute))
    ((_, estimate, measured),) = compared(config, model_class, tokenizer.vocabulary, [4])
    assert 0.99 * measured <= estimate <= (1.15 if recompute else 1.04) * measured


def of(rows: int, forwards: int, streams: int = 0) -> Config:
    return Config(
        data=DataConfig(streams=streams),
        train=TrainConfig(local_batch_size=rows, global_batch_size=rows * forwards),
    )


@pytest.mark.parametrize(
    ("config", "ranks", "limit", "chosen"),
    [
        (of(8, 16), 1, 4.5, (4, 32)),
        (of(8, 16), 1, 0.99 + 0.01, (1, 128)),
        (of(8, 16), 1, 1000, (128, 1)),
        (of(8, 16), 4, 1000, (32, 4)),  # a micro-batch for each rank
        (of(4, 16, streams=16), 1, 1000, (4, 16)),
        (of(5, 3), 1, 4.5, (3, 5)),
        (of(7, 1), 1, 6.9, (1, 7)),
    ],
)
def test_the_maximum_of_rows_that_fit_and_divide_the_batch(config, ranks, limit, chosen):
    """A row takes a GB."""
    new, line = choose(
        config, lambda rows: rows * 1e9, limit * 1e9, "given", "told", DistributedContext(0, ranks)
    )
    assert (new.train.local_batch_size, new.train.micro_batches) == chosen and replace(
        new, train=config.train
    ) == config
    assert (
        f"train.local_batch_size {chosen[0]} of train.global_batch_size {math.prod(chosen)}, "
        f"{chosen[0]:.1f} GB (told) of the {limit:.1f} GB given" in line
    )


@pytest.mark.parametrize(
    ("recompute", "turn"), [(False, "turn on --train.recompute"), (True, "shorten data.left_length")]
)
def test_nothing_fits(recompute, turn):
    config = replace(of(8, 16), train=TrainConfig(recompute=recompute))
    with pytest.raises(
        UserError, match=rf"one row takes 3.0 GB \(told\), more than the 2.0 GB given: {turn}"
    ):
        choose(config, lambda rows: rows * 3e9, 2e9, "given", "told")
    with pytest.raises(UserError, match="= 6 rows cannot be shared by 4 ranks or streams"):
        choose(of(3, 2), lambda rows: 0, 1, "given", "told", DistributedContext(0, 4))


def test_on_a_gpu_it_is_what_two_steps_had_in_use(tokenizer, monkeypatch):
    """On a GPU, the estimate comes from two measured steps.

    The CPU's counter replaces CUDA's. Also: no memory for a second row, and no memory for one.
    """
    config = replace(make_config("image"), fit_memory="auto")
    config = replace(
        config, train=replace(config.train, local_batch_size=4, global_batch_size=8, device="cpu")
    )
    monkeypatch.setattr(training.memory, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(training.memory, "free_memory", lambda device: 1e9)
    peaks = {1: 0.1e9, 2: 0.2e9}
    monkeypatch.setattr(
        training.memory, "peak", lambda config, model_class, vocabulary, rows, device: peaks[rows]
    )
    new, line = fit_batch_size(config, DualTowerVLM, tokenizer.vocabulary)
    assert (
        new.train.local_batch_size == 2
        and "measured with one row and two" in line
        and "of the 1.0 GB that are free on cuda; 4 rows would take 1.1" in line
    )  # (0.7 + 1.05 × 0.4 GB)
    peaks[2] = math.inf
    assert fit_batch_size(config, DualTowerVLM, tokenizer.vocabulary)[0].train.local_batch_size == 1
    peaks[1] = math.inf
    with pytest.raises(UserError, match="one row takes more"):
        fit_batch_size(config, DualTowerVLM, tokenizer.vocabulary)


def test_a_trial_leaves_the_random_state_alone_and_tells_where_memory_ends(tokenizer):
    config, state = shallow("image"), torch.get_rng_state()
    assert (
        peak(
            config,
            DualTowerVLM,
            tokenizer.vocabulary,
            1,
            torch.device("cpu"),
            lambda steps, device: steps() or 7.0,
        )
        == 7
    )
    assert torch.equal(torch.get_rng_state(), state)

    def none_left(steps: object, device: torch.device) -> float:
        raise torch.OutOfMemoryError

    assert peak(config, DualTowerVLM, tokenizer.vocabulary, 1, torch.device("cpu"), none_left) == math.inf


@pytest.mark.parametrize("given", ["much", "0", "-3", "inf", "nan", "1e3", "12GB"])
def test_what_is_no_number_of_gigabytes(given):
    with pytest.raises(UsageError, match="must be a number of GB, or auto"):
        Config(fit_memory=given)


def test_unknown_memory_must_be_given(tokenizer, monkeypatch):
    monkeypatch.setattr(training.memory, "free_memory", lambda device: None)
    with pytest.raises(UsageError, match="say how many GB"):
        fit_batch_size(replace(make_config("image"), fit_memory="auto"), DualTowerVLM, tokenizer.vocabulary)


def fitting(*flags: str) -> list[str]:
    """The command of a small run whose local batch size `--fit-memory` chooses."""
    return without_local_batch_size(command(*flags))


def settings(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_a_fitted_run_is_the_run_of_the_same_numbers_and_resumes_with_them(tmp_path):
    """2 × 3 rows, where 6 fit, equal 6 × 1 bit for bit.

    The same command with --resume continues with the selected sizes.
    """
    flags = ("--cache_dir", "cache", "--train.global_batch_size", "6", "--output_dir", "fitted")
    dry = run_program(fitting(*flags, "--fit-memory", "9", "--dry_run"), tmp_path)
    assert (
        dry.returncode == 0
        and "train.local_batch_size 6 of train.global_batch_size 6" in dry.stdout
        and "a micro-batch: 6 full rows" in dry.stdout
    ), dry.stderr
    small = run_program(fitting(*flags, "--fit_memory", "0.1"), tmp_path)
    assert (
        small.returncode == 1
        and "one row takes 0.7 GB" in small.stderr
        and small.stderr.count("\n") == 1
        and not (tmp_path / "fitted").exists()
    ), small.stderr
    done = run_program(fitting(*flags, "--fit-memory", "--max_steps", "4"), tmp_path)
    assert (
        done.returncode == 0
        and "--fit-memory: train.local_batch_size 6 of train.global_batch_size 6, " in done.stdout
    ), done.stderr
    assert (
        settings(tmp_path / "fitted")["train"]["local_batch_size"],
        settings(tmp_path / "fitted")["train"]["global_batch_size"],
    ) == (6, 6)
    by_hand = run_program(
        command(
            "--cache_dir",
            "cache",
            "--train.local_batch_size",
            "6",
            "--train.global_batch_size",
            "6",
            "--output_dir",
            "hand",
            "--max_steps",
            "4",
        ),
        tmp_path,
    )
    assert (
        by_hand.returncode == 0
        and losses(tmp_path / "fitted") == losses(tmp_path / "hand")
        and results_of(tmp_path / "fitted") == results_of(tmp_path / "hand")
    )
    again = run_program(fitting(*flags, "--fit-memory", "--resume", "auto", "--max_steps", "5"), tmp_path)
    assert (
        again.returncode == 0
        and "resumed from" in again.stdout
        and settings(tmp_path / "fitted")["train"]["local_batch_size"] == 6
    ), again.stderr
    other = run_program(
        fitting(
            *flags, "--fit-memory", "--resume", "auto", "--max_steps", "5", "--train.global_batch_size", "12"
        ),
        tmp_path,
    )
    assert (
        other.returncode == 2 and "cannot change train.global_batch_size (was 6, now 12)" in other.stderr
    ), other.stderr
