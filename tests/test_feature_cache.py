"""`train.feature_cache = auto`: features are cached where a look-up is faster than encoding."""

import json
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from torch import Tensor

import training.setup
from tests.conftest import random_tiles
from tests.programs import run_program
from tests.test_training import command, die_in_save, losses
from training.feature_cache import cache_seconds


def slow(tiles: Tensor) -> Tensor:
    time.sleep(0.02)
    return fast(tiles)


def fast(tiles: Tensor) -> Tensor:
    return tiles[:, :1, :1, :1]


@pytest.mark.parametrize(("encode", "pays"), [(slow, True), (fast, False)])
def test_a_cache_pays_where_encoding_is_slow(encode, pays):
    encoding, look_up = cache_seconds(encode, random_tiles(20), 1 << 20)
    assert (look_up < encoding) == pays


def test_the_encoder_is_called_for_a_full_cache_as_well_where_nothing_fits():
    encoding, look_up = cache_seconds(slow, random_tiles(20), 0)
    assert look_up > encoding >= 0.02


def measuring(encoding: float, look_up: float, then: Callable[[], None] | None = None) -> None:
    training.setup.cache_seconds = lambda *_: (encoding, look_up)
    if then is not None:
        then()


def decision(folder: Path) -> str:
    decided: str = json.loads((folder / "config.json").read_text())["train"]["feature_cache"]
    return decided


def test_a_resumed_run_keeps_what_its_start_decided(tmp_path):
    """Bit for bit what a run without interruption gives, even if it would measure otherwise now."""
    flags = ("--cache_dir", "cache", "--train.feature_cache")
    done = run_program(command("--output_dir", "whole", *flags, "off"), tmp_path)
    assert done.returncode == 0 and "vision features" not in done.stdout, done.stderr
    flags = ("--output_dir", "run", *flags, "auto")
    kill = partial(die_in_save, "_files")
    killed = run_program(command(*flags), tmp_path, before=partial(measuring, 0.001, 0.25, kill))
    line = r"vision features are not cached: encoding a batch of \d+ tiles takes 1 ms, a look-up 250 ms"
    assert re.search(line, killed.stdout)
    assert decision(tmp_path / "run") == "off"
    done = run_program(command(*flags, "--resume", "auto"), tmp_path, before=partial(measuring, 0.25, 0.001))
    assert done.returncode == 0 and "resumed from" in done.stdout, done.stderr
    assert "vision features" not in done.stdout and decision(tmp_path / "run") == "off"
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert not (tmp_path / "cache" / "features").exists()


def test_a_run_that_caches_writes_its_features(tmp_path):
    flags = ("--output_dir", "run", "--cache_dir", "cache", "--max_steps", "2")
    done = run_program(command(*flags), tmp_path, before=partial(measuring, 0.25, 0.001))
    assert done.returncode == 0 and "vision features are cached" in done.stdout, done.stderr
    assert decision(tmp_path / "run") == "on" and list((tmp_path / "cache").glob("features/*/*.safetensors"))
