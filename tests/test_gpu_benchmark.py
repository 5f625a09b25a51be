"""benchmarks/gpu.sh at toy size on the CPU, as on a machine without the packages that train a real run."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from benchmarks.gpu import PARTS, in_process

ROOT = Path(__file__).parent.parent
HIDE = """
import sys
from importlib.machinery import PathFinder

HIDDEN = {"datasets", "tyro", "wandb", "pycocoevalcap", "lmms_eval", "easy_vqa", "pyarrow", "pandas", "gguf"}


class Installed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in HIDDEN else super().find_spec(name, path, target)


sys.meta_path = [Installed if finder is PathFinder else finder for finder in sys.meta_path]
"""


def run(tmp_path: Path, *flags: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [
        "bash",
        "benchmarks/gpu.sh",
        "--device",
        "cpu",
        "--quick",
        "--json",
        str(tmp_path / "gpu.json"),
    ]
    done = subprocess.run(
        [*command, *flags], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    return done, json.loads((tmp_path / "gpu.json").read_text())


def test_every_part_and_one_that_fails(tmp_path: Path) -> None:
    done, document = run(tmp_path, "--nanovlm", str(tmp_path / "missing"))
    parts = document["parts"]
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("device cpu; dtype ") and "; kernels " in done.stdout.splitlines()[0]
    assert list(parts) == list(PARTS) and all(name in done.stdout for name in PARTS)
    not_run = {"flex_attention": "it needs CUDA and Triton"}
    assert {name: part["reason"] for name, part in parts.items() if part["status"] == "not run"} == not_run
    assert [name for name, part in parts.items() if part["status"] == "failed"] == ["nanovlm"]
    assert "ModuleNotFoundError" in parts["nanovlm"]["reason"]
    assert all(part["figures"] for part in parts.values() if part["status"] == "ok")
    assert parts["packed"]["figures"]["dual_tower"]["leak"] == 0
    assert 1 < parts["drafts"]["figures"]["batch 8"]["tokens_per_step"] < 4  # some were rejected
    assert {"torch", "commit", "device_name", "device_memory_gb"} <= set(document)


def test_parts_that_are_not_run_have_a_reason(tmp_path: Path) -> None:
    done, document = run(tmp_path, "--minutes", "0", "--parts", "sdpa,nanovlm")
    assert done.returncode == 0, done.stderr
    reasons = {name: part["reason"] for name, part in document["parts"].items()}
    assert reasons.pop("sdpa") == "the 0 minutes are spent"
    assert reasons.pop("nanovlm") == "it needs a nanoVLM checkout: --nanovlm DIR"
    assert set(reasons.values()) == {"it is not among --parts"}


def hang() -> dict:
    subprocess.Popen(["sleep", "60"])
    time.sleep(60)
    return {}


def fail() -> dict:
    raise ValueError("no")


@pytest.mark.parametrize(
    ("function", "limit", "reason"),
    [
        (hang, 0.5, "longer than 0.5 s"),
        (fail, 30, "ValueError: no"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), 30, "its process ended with signal SIGKILL: most"),
    ],
)
def test_a_part_that_hangs_fails_or_dies(function, limit, reason) -> None:
    started = time.perf_counter()
    result = in_process(function, (), limit)
    assert result.status == "failed" and result.reason.startswith(reason)
    assert time.perf_counter() - started < 20
