"""train.sh picks the script; set-up is replaced by nothing, Python by an echo of its arguments."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], "train_dual_tower.py"),
        (
            ["dual_tower_smollm2", "--max_steps", "3"],
            "train_dual_tower.py --config dual_tower_smollm2 --max_steps 3",
        ),
        (["vanilla_easyvqa"], "train_vanilla.py --config vanilla_easyvqa"),
        (["--config", "vanilla-easyvqa"], "train_vanilla.py --config vanilla-easyvqa"),
        (["--config=config_vanilla_easyvqa"], "train_vanilla.py --config=config_vanilla_easyvqa"),
        (["--output_dir", "/tmp/vanilla"], "train_dual_tower.py --output_dir /tmp/vanilla"),
    ],
)
def test_train_sh_runs_the_script_of_its_config(tmp_path: Path, given: list[str], expected: str) -> None:
    shutil.copy(ROOT / "train.sh", tmp_path)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/setup.sh").write_text("true\n")
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", str(tmp_path / "train.sh"), *given], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == expected
