"""The commands of the README and of `docs/` are parsed by their programs, and five of the README's are run.

So are the README's Python blocks, and the set-up script.

Elsewhere: the Python of docs/transformers.md in test_transformers.py, docs/extending.md in test_extending.py,
docs/hub.md in test_hub_model.py, docs/serving.md in test_serving_docs.py.
"""

import importlib
import os
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import NoReturn

import pytest

from configs.cli import FlagParser
from tests.hub_server import hub
from tests.hub_uploads import Uploads
from tests.programs import run_program, with_modules_in

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
NOT_HERE = ("bash test.sh", "bash .ci/run")  # these very tests


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
    if not command.startswith(NOT_HERE)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An empty folder with a model where the README has one, and an image."""
    folder = tmp_path_factory.mktemp("readme")
    run_program([ROOT / "train_dual_tower.py", *SHORT], folder).check_returncode()
    from PIL import Image

    for name in ("FILE", "photo.png"):
        Image.new("RGB", (64, 64), "red").save(folder / name, format="PNG")
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


def arguments_of(command: str) -> tuple[str, list[str]]:
    """A page's command → the program's module and its arguments; `bash x.sh` stands for what it runs."""
    words = shlex.split(command)
    values = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    words = words[len(values) :]
    if words[0].endswith("torchrun"):
        words = words[words.index("--") :]
    if words[1] == "train.sh":
        config = ["--config", words[2]] if len(words) > 2 and not words[2].startswith("-") else []
        script = "train_vanilla" if "vanilla" in command else "train_dual_tower"
        return script, [*config, *words[2 + len(config) // 2 :]]
    if words[1] == "evaluate.sh":
        model = values.get("CHECKPOINT", "runs/dual_tower_easyvqa/model")
        tasks, batch_size = values.get("TASKS", "mmstar"), values.get("BATCH_SIZE", "32")
        return "evaluation", ["--model", model, "--tasks", tasks, "--batch_size", batch_size, *words[2:]]
    if words[1] == "-m":
        return words[2], words[3:]
    return words[1].removesuffix(".py"), words[2:]


class Parsed(Exception):
    """Raised when a command line has been parsed."""


@pytest.mark.parametrize(
    ("page", "command"), [(page, c) for page, c in ALL if page != "extending.md" and "--help" not in c]
)
def test_a_command_of_a_page_is_parsed(page, command, monkeypatch):
    """By the program's own parser, types, choices and configs included."""
    module, arguments = arguments_of(command)
    parse = FlagParser.parse

    def parsed(self: FlagParser, argv: list[str]) -> NoReturn:
        parse(self, argv)
        raise Parsed

    monkeypatch.setattr(FlagParser, "parse", parsed)
    with pytest.raises(Parsed):
        importlib.import_module(module).main(arguments)


# Beginnings of commands that are run, in the order of the page, and what shortens them.
RUN = {
    "bash train.sh --resume auto": [],
    ".venv/bin/python generate.py --checkpoint runs/dual_tower_easyvqa/model --image FILE --prompt": [],
    "CHECKPOINT=runs/dual_tower_easyvqa/model TASKS=easy_vqa": [
        "--limit",
        "20",
        "--output",
        "runs/dual_tower_easyvqa/evaluation",
    ],
    ".venv/bin/python -m tools.evaluation_report": [],
    ".venv/bin/python -m tools.hub push": [],
}


@pytest.mark.parametrize(("beginning", "short"), RUN.items(), ids=lambda value: str(value)[:60])
def test_a_command_of_the_readme_runs(beginning, short, folder):
    command = next(command for command in commands(README) if command.startswith(beginning))
    module, arguments = arguments_of(command)
    if module == "tools.hub":
        return in_a_hub(["-m", module, *arguments], folder)
    words = ["-m", module, *arguments] if "." in module else [ROOT / f"{module}.py", *arguments]
    done = run_program([*words, *short], folder)
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
    (tmp_path / "blocks.py").write_text(code, encoding="utf-8")
    done = run_program([tmp_path / "blocks.py"], folder, before=partial(with_modules_in, tmp_path))
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    assert "image_kv='computed'" in first and "image_kv='reused'" in second and "'role': 'assistant'" in third


def test_setup_installs_once_again_for_a_new_lock_and_after_a_failure(tmp_path):
    """With stand-ins for Python, which makes an empty environment, and for uv, which logs its arguments."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "scripts" / "setup.sh").write_text((ROOT / "scripts" / "setup.sh").read_text())
    for name in ("requirements", "requirements-dev"):
        (tmp_path / f"{name}.lock").write_text("numpy==2.0 \\\n    --hash=sha256:00\n" + f"# {name}\n")
    uv = tmp_path / "bin" / "uv"
    uv.write_text('#!/bin/sh\necho "$@" >> uv.log\ntest ! -e refuse\n')
    uv.chmod(0o755)
    python = tmp_path / "bin" / "python3"
    python.write_text('#!/bin/sh\n[ "$2" != venv ] || { mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; }\n')
    python.chmod(0o755)

    def setup(*what: str) -> subprocess.CompletedProcess:
        env = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        return subprocess.run(
            ["bash", "scripts/setup.sh", *what], cwd=tmp_path, capture_output=True, text=True, env=env
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
    assert after.returncode == 0 and "updating .venv" in after.stdout and asked() == 3
    tests = setup("dev")
    assert tests.returncode == 0 and "requirements-dev.lock" in tests.stdout and asked() == 4
    for what in (["dev"], []):  # with the packages of tests, training has its own too
        again = setup(*what)
        assert (again.returncode, again.stdout, asked()) == (0, "", 4)
