"""Language models by Hub id, over real HTTP on loopback: fetched, and errors reported in one line."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from data.tokenizer import Tokenizer
from tests.conftest import TURNS
from tests.hub_server import hub
from tests.programs import at_hub, run_program
from tests.test_language_models import reference

ROOT = Path(__file__).parent.parent
FLAGS = [
    "--max_steps",
    "2",
    "--data.limit",
    "20",
    "--data.validation_images",
    "4",
    "--train.local_batch_size",
    "2",
    "--train.global_batch_size",
    "2",
    "--model.vision.image_size",
    "64",
    "--train.eval_every",
    "0",
]


def tiny_llama(folder: Path, **changes: int) -> Path:
    """A tiny Llama with a tokenizer of 90 … tokens, as the Hub would hold it."""
    tokenizer = Tokenizer.train([t for turn in TURNS for t in turn.values()], 300)
    text = tokenizer.vocabulary.text_size
    reference("Llama", 0, folder, vocab_size=text, head_dim=16, num_hidden_layers=2, **changes)
    tokenizer.save(folder)
    backend = tokenizer.backend.to_str()
    values = json.loads(backend)
    values["added_tokens"] = [t for t in values["added_tokens"] if t["id"] < text]
    (folder / "tokenizer.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


def command(tmp_path: Path, source: str, *flags: str) -> list[str]:
    command = [
        sys.executable,
        str(ROOT / "train_dual_tower.py"),
        *FLAGS,
        "--output_dir",
        str(tmp_path / "run"),
        "--cache_dir",
        str(tmp_path / "cache"),
    ]
    return [*command, "--model.left.weights", source, "--model.right.weights", source, *flags]


def train_from_a_shell(tmp_path: Path, endpoint: str, *flags: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    environment |= {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    return subprocess.run(
        command(tmp_path, "org/tiny", *flags),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def train(tmp_path: Path, endpoint: str, source: str) -> subprocess.CompletedProcess:
    return run_program(
        command(tmp_path, source), tmp_path, partial(at_hub, str(endpoint), str(tmp_path / "hf"))
    )


def test_a_language_model_by_its_id(folder, tmp_path):
    """Fetched, trained in both towers, exported; the run goes on with the Hub out of reach."""
    with hub({"org/tiny": folder}) as endpoint:
        done = train_from_a_shell(tmp_path, endpoint)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    again = train_from_a_shell(tmp_path, "http://127.0.0.1:9", "--resume", "auto", "--max_steps", "3")
    assert again.returncode == 0 and "resumed from" in again.stdout, again.stderr


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("org/nothing", "org/nothing is neither a local folder nor on the Hub"),
        ("org/gated", "org/gated is gated"),
        ("org/tiny@v9", "org/tiny has no revision 'v9'"),
        ("org/bert", "architecture 'bert' is not supported; supported are llama, qwen2, qwen3, smollm3"),
        ("org/base", "has no chat template"),
        ("./nowhere", "no language model at ./nowhere"),
    ],
)
def test_what_goes_wrong_is_one_line_before_anything_is_written(folder, tmp_path, source, message):
    for name in ("bert", "base"):
        shutil.copytree(folder, tmp_path / name)
    config = tmp_path / "bert" / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"bert"'))
    (tmp_path / "base" / "tokenizer_config.json").write_text("{}")
    with hub(
        {"org/tiny": folder, "org/bert": tmp_path / "bert", "org/base": tmp_path / "base"},
        gated=("org/gated",),
    ) as endpoint:
        done = train(tmp_path, endpoint, source)
    assert done.returncode in (1, 2) and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "run").exists()


def test_a_hub_out_of_reach(tmp_path):
    done = train(tmp_path, "http://127.0.0.1:9", "org/tiny")
    assert (
        done.returncode == 1
        and "could not be fetched from the Hub" in done.stderr
        and "a local folder with the same files works as well" in done.stderr
    )
    assert done.stderr.count("\n") == 1
