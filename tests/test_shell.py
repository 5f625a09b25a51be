"""train.sh picks the script; set-up is replaced by nothing, Python by an echo of its arguments."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            ["vanilla_easyvqa"],
            "-m torch.distributed.run --standalone --nproc-per-node 4 "
            "--signals-to-handle SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout 600 -- "
            "train_vanilla.py --config vanilla_easyvqa",
        ),
        (["--dry_run"], "train_dual_tower.py --dry_run"),
        (["--dry-run"], "train_dual_tower.py --dry-run"),
        (["-h"], "train_dual_tower.py -h"),
        (["--help"], "train_dual_tower.py --help"),
    ],
)
def test_train_sh_starts_a_process_for_each_gpu(tmp_path: Path, given: list[str], expected: str) -> None:
    shutil.copy(ROOT / "train.sh", tmp_path)
    for name, text in {
        "scripts/setup.sh": "true\n",
        ".venv/bin/python": '#!/bin/sh\nif [ "$1" = -c ]; then echo 4; else echo "$@"; fi\n',
        "bin/nvidia-smi": "#!/bin/sh\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", str(tmp_path / "train.sh"), *given],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
    )
    first, *rest = done.stdout.splitlines()
    assert [first, *rest][-1] == expected
    assert (first == "train.sh: 4 GPUs, one process for each") == bool(rest)


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
