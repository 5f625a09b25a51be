"""The README's commands run as they stand (shortened by flags), its Python blocks too; the set-up script does what it says."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import hub
from hub_uploads import Uploads
from programs import run_program

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORT = ["--max_steps", "2", "--data.limit", "20", "--data.validation_images", "4", "--train.rows", "2", "--data.window", "8"]


def commands() -> list[str]:
    """Every command of the README's shell blocks, continued lines joined."""
    blocks = re.findall(r"```(?:bash)?\n(.*?)```", README, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines = [line.removeprefix("$ ").split("  #")[0].strip() for line in lines]
    return [line for line in lines if re.match(r"(\w+=\S+ )*(bash \w+\.sh|\.venv/bin/python (\w+\.py|-m))", line)]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """An empty folder with a model where the README has one, and an image."""
    place = tmp_path_factory.mktemp("readme")
    run_program([ROOT / "train_dual_tower.py", *SHORT], place).check_returncode()
    from PIL import Image

    for name in ("FILE", "photo.png"):
        Image.new("RGB", (64, 64), "red").save(place / name, format="PNG")
    return place


def test_there_are_commands():
    assert len(commands()) >= 9 and len({c.split()[1] for c in commands()}) >= 4


@pytest.mark.parametrize("command", [c for c in commands() if c not in ("bash test.sh", "bash train.sh dual_tower_smollm2") and "site-packages" not in c])
def test_a_command_of_the_readme(command, place):
    """`bash x.sh` stands for the script it runs: the set-up itself is not repeated."""
    words = shlex.split(command)
    values = dict(w.split("=", 1) for w in words if re.match(r"[A-Z_]+=", w))
    words = [w for w in words if not re.match(r"[A-Z_]+=", w)]
    if words[1] == "train.sh":
        script = "train_vanilla.py" if "vanilla" in command else "train_dual_tower.py"
        config = ["--config", words[2]] if len(words) > 2 and not words[2].startswith("-") else []
        flags = words[2 + len(config) // 2 :]
        words = [script, *config, *flags] if "--resume" in flags else [script, *config, *flags, *SHORT]
    elif words[1] == "evaluate.sh":
        model = values.get("CHECKPOINT", "runs/dual_tower_easyvqa/model")
        words = [
            "evaluation.py",
            "--model",
            model,
            "--tasks",
            values.get("TASKS", "mmstar"),
            "--batch_size",
            values.get("BATCH_SIZE", "32"),
            *words[2:],
            "--limit",
            "40",
            "--output",
            str(Path(model).parent / "evaluation"),
        ]
    elif words[2:3] == ["training.heads"]:
        words = ["training/heads.py", *words[3:], "--sources", "easy_vqa:20", "--tokens", "100", "--epochs", "1", "--rows", "8", "--answer_tokens", "8"]
    elif words[2:3] == ["models.hub"]:
        with hub({}, uploads=Uploads(place / "store", {"hf_me": "me"})) as address:
            env = os.environ | {
                "PYTHONPATH": str(ROOT),
                "HF_ENDPOINT": address,
                "HF_TOKEN": "hf_me",
                "HF_HOME": str(place / "hf"),
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_OFFLINE": "0",
            }
            subprocess.run([sys.executable, *words[1:]], cwd=place, env=env, check=True)
        return
    elif words[2:3] == ["eval.report"]:
        words = ["eval/report.py", *words[3:]]
    elif words[1] == "-m":
        words = [words[2].replace(".", "/") + ".py", *words[3:], "--data.limit", "20", "--samples", "8"]
    else:
        words = words[1:] + SHORT * (words[1].startswith("train_") and "--help" not in words)
    done = run_program(["-m", "training.heads", *words[1:]] if words[0] == "training/heads.py" else [ROOT / words[0], *words[1:]], place)
    assert done.returncode == 0, done.stderr


def test_the_python_blocks(place, tmp_path):
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, re.S))
    done = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT), "HF_MODULES_CACHE": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    assert "image_kv='computed'" in first and "image_kv='reused'" in second and "'role': 'assistant'" in third


def test_setup_installs_once_again_for_a_new_lock_and_after_a_failure(tmp_path):
    """With a stand-in for uv that writes down what it is asked for."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "scripts" / "setup.sh").write_text((ROOT / "scripts" / "setup.sh").read_text())
    (tmp_path / "requirements.lock").write_text("numpy==2.0 \\\n    --hash=sha256:00\n")
    uv = tmp_path / "bin" / "uv"
    uv.write_text('#!/bin/sh\necho "$@" >> uv.log\ntest ! -e refuse\n')
    uv.chmod(0o755)

    def setup() -> subprocess.CompletedProcess:
        env = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        return subprocess.run(["bash", "scripts/setup.sh"], cwd=tmp_path, capture_output=True, text=True, env=env)

    def asked() -> int:
        return len((tmp_path / "uv.log").read_text().splitlines())

    first = setup()
    assert first.returncode == 0 and "making .venv" in first.stdout and (tmp_path / ".venv" / "bin" / "python").exists()
    assert "--require-hashes requirements.lock" in (tmp_path / "uv.log").read_text()
    again = setup()
    assert (again.returncode, again.stdout, asked()) == (0, "", 1)
    (tmp_path / "requirements.lock").write_text("numpy==2.1 \\\n    --hash=sha256:00\n")
    (tmp_path / "refuse").touch()
    assert setup().returncode != 0  # nothing counts as installed now
    (tmp_path / "refuse").unlink()
    after = setup()
    assert after.returncode == 0 and "has changed" in after.stdout and asked() == 3
