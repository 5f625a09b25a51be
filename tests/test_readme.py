"""The commands of the README and of `docs/` run as written, shortened by flags.

So do the README's Python blocks and the set-up script.

Elsewhere: the Python of docs/transformers.md in test_transformers.py, docs/extending.md in test_extending.py,
docs/hub.md in test_hub_model.py.
"""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from configs.cli import resolve
from tests.hub_server import hub
from tests.hub_uploads import Uploads
from tests.programs import run_program, without_local_batch_size

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
NO_FLAGS = (
    "nproc-per-node",
    "max-restarts",
    "signals-to-handle",
    "shutdown-timeout",
    "flag",
)  # torchrun's, and what stands for any
SHORT = [
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
    "--data.window",
    "8",
]


PAGES = {
    path.name: path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
NOT_HERE = (
    "bash test.sh",
    "bash .ci/run",
    "bash train.sh dual_tower_smollm2",
)  # these very tests; tests/test_smollm2.py


def commands(page: str) -> list[str]:
    """Every command of a page's shell blocks, continued lines joined."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.S | re.M)
    lines = (
        "\n".join(block for language, block in blocks if language in ("", "bash"))
        .replace("\\\n", " ")
        .splitlines()
    )
    lines = [line.removeprefix("$ ").split("  #")[0].strip() for line in lines]
    return [line for line in lines if re.match(r"(\w+=\S+ )*(bash \S+|\.venv/bin/(python|torchrun) )", line)]


ALL = [
    (name, command)
    for name, page in PAGES.items()
    for command in commands(page)
    if not command.startswith(NOT_HERE[:2]) and command != NOT_HERE[2]
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An empty folder with a model where the README has one, and an image."""
    folder = tmp_path_factory.mktemp("readme")
    run_program([ROOT / "train_dual_tower.py", *SHORT], folder).check_returncode()
    from PIL import Image

    for name in ("FILE", "photo.png"):
        Image.new("RGB", (64, 64), "red").save(folder / name, format="PNG")
    for name in "ab":
        shutil.copytree(folder / "runs/dual_tower_easyvqa", folder / "runs" / name)
    return folder


def in_a_hub(command: list[str], folder: Path) -> None:
    """A process whose Hub is a server on loopback, where it is logged in."""
    with hub({}, uploads=Uploads(folder / "store", {"hf_me": "me"})) as address:
        env = os.environ | {
            "PYTHONPATH": str(ROOT),
            "HF_ENDPOINT": address,
            "HF_TOKEN": "hf_me",
            "HF_HOME": str(folder / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }
        subprocess.run([sys.executable, *command], cwd=folder, env=env, check=True)


def test_there_are_commands():
    assert (
        len(commands(README)) >= 9
        and len({c.split()[1] for c in commands(README)}) >= 4
        and len({name for name, _ in ALL}) >= 6
    )


@pytest.mark.parametrize(
    ("page", "command"), [(page, c) for page, c in ALL if "site-packages" not in c and page != "extending.md"]
)
def test_a_command_of_a_page(page, command, folder):
    """`bash x.sh` stands for the script it runs: the set-up itself is not repeated."""
    words = shlex.split(command)
    values = dict(w.split("=", 1) for w in words if re.match(r"[A-Z_]+=", w))
    words = [w for w in words if not re.match(r"[A-Z_]+=", w)]
    if (
        "dual_tower_cauldron" in command
    ):  # weights and data from the Hub, several GPUs: the flags are read, no more
        torchrun = ["--nproc-per-node", "8", "--"] if words[0].endswith("torchrun") else []
        assert words[1 : len(torchrun) + 2] == [*torchrun, "train_dual_tower.py"]
        resolve(words[len(torchrun) + 2 :], "")
        return None
    if words[1] == "train.sh":
        script = "train_vanilla.py" if "vanilla" in command else "train_dual_tower.py"
        config = ["--config", words[2]] if len(words) > 2 and not words[2].startswith("-") else []
        flags = words[2 + len(config) // 2 :]
        short = without_local_batch_size(SHORT) if "--fit-memory" in flags else SHORT
        words = [script, *config, *flags] if "--resume" in flags else [script, *config, *flags, *short]
        if any(flag.startswith("--hub.") for flag in flags):
            return in_a_hub([str(ROOT / words[0]), *words[1:], "--output_dir", "runs/pushed"], folder)
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
    elif words[2:3] == ["tools.train_heads"]:
        words = [
            "tools/train_heads.py",
            *words[3:],
            "--sources",
            "easy_vqa:20",
            "--tokens",
            "100",
            "--epochs",
            "1",
            "--rows",
            "8",
            "--answer_tokens",
            "8",
        ]
    elif words[2:3] == ["tools.hub"]:
        return in_a_hub(words[1:], folder)
    elif words[2:3] == ["tools.evaluation_report"]:
        words = ["tools/evaluation_report.py", *words[3:]]
    elif words[2:3] == ["tools.training_report"]:
        words = ["tools/training_report.py", *words[3:]]
    elif words[1] == "-m":
        words = [words[2].replace(".", "/") + ".py", *words[3:], "--data.limit", "20", "--samples", "8"]
    elif words[1] == "evaluation.py":
        words = [*words[1:], "--limit", "8"]
    else:
        words = words[1:] + SHORT * (words[1].startswith("train_") and "--help" not in words)
    done = run_program(
        ["-m", "tools.train_heads", *words[1:]]
        if words[0] == "tools/train_heads.py"
        else [ROOT / words[0], *words[1:]],
        folder,
    )
    assert done.returncode == 0, done.stderr
    return None


def help_of(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    """`--help` of a program by its module's name; of `tools.hub` with that of its commands."""
    main, texts = importlib.import_module(name).main, []
    for command in [[], ["push"], ["pull"], ["info"], ["card"]] if name == "tools.hub" else [[]]:
        with pytest.raises(SystemExit) as ended:
            main([*command, "--help"])
        assert ended.value.code in (0, None)
        texts.append(capsys.readouterr().out)
    return " ".join(texts)


def test_every_flag_and_program_in_a_sentence_exists(capsys):
    """Each flag in `code` outside of blocks exists.

    It must belong to some program, or to the program that is named next to it.
    """
    programs = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts)
        for folder in (".", "*")
        for p in ROOT.glob(f"{folder}/*.py")
        if "run_script(main)" in p.read_text()
    ]
    known = {
        name: set(re.findall(r"--([\w.]+)", help_of(name, capsys)))
        for name in programs
        if not name.startswith("tests.")
    }
    every = set().union(*known.values())
    wrong, looked_at = [], 0
    for page, text in PAGES.items():
        for code in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S)):
            if code.startswith(("lmms-eval", ".venv/bin/pip", "hf ")):
                continue
            named = re.search(
                r"(?:-m |(?<!/)\b)((?:tools|training|data|eval|models|hf|benchmarks)\.\w+|\w+(?=\.py ))", code
            )
            flags = [
                flag.replace("-", "_")
                for flag in re.findall(r"--([a-z][\w.-]*)(?![\w.*-])", code.split("torchrun")[-1])
                if flag not in NO_FLAGS and not flag.endswith(".")
            ]
            if "-m " in code and named and named[1] not in known:
                wrong.append(f"{page}: no program {named[1]}")
            has = known.get(named[1], every) if named and "--" in code else every
            wrong += [
                f"{page}: {named[1] if named else 'no program'} has no --{flag}"
                for flag in flags
                if flag not in has
            ]
            looked_at += len(flags)
    assert not wrong and looked_at > 80


def test_the_python_blocks(folder, tmp_path):
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, re.S))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_MODULES_CACHE": str(tmp_path)},
    )
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
        return subprocess.run(
            ["bash", "scripts/setup.sh"], cwd=tmp_path, capture_output=True, text=True, env=env
        )

    def asked() -> int:
        return len((tmp_path / "uv.log").read_text().splitlines())

    first = setup()
    assert (
        first.returncode == 0
        and "making .venv" in first.stdout
        and (tmp_path / ".venv" / "bin" / "python").exists()
    )
    assert "--require-hashes requirements.lock" in (tmp_path / "uv.log").read_text()
    again = setup()
    assert (again.returncode, again.stdout, asked()) == (0, "", 1)
    (tmp_path / "requirements.lock").write_text("numpy==2.1 \\\n    --hash=sha256:00\n")
    (tmp_path / "refuse").touch()
    assert setup().returncode != 0  # nothing counts as installed now
    (tmp_path / "refuse").unlink()
    after = setup()
    assert after.returncode == 0 and "has changed" in after.stdout and asked() == 3
