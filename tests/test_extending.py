"""The worked example of docs/extending.md, run as it stands."""

import re
import shlex
from pathlib import Path

from tests.programs import run_program

ROOT = Path(__file__).parent.parent


def test_the_worked_example_trains(tmp_path):
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    script, command = (re.search(rf"```{kind}\n(.*?)```", page, re.S)[1] for kind in ("python", "bash"))
    (tmp_path / "my_train.py").write_text(script)
    python, name, *flags = shlex.split(command.replace("\\\n", " "))
    assert (python, name) == (".venv/bin/python", "my_train.py")
    done = run_program([name, *flags, "--output_dir", "run"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        "52 training and 8 validation records of stripes" in done.stdout
        and (tmp_path / "run" / "model" / "model.safetensors").is_file()
    )
    assert "how many stripes?" in done.stdout
