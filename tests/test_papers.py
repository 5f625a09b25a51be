"""The papers of the repository say what is so."""

import re
from pathlib import Path

import yaml

from tools.diagrams import DIAGRAMS

ROOT = Path(__file__).parent.parent


def test_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(
        citation
    )  # what version 1.2.0 of the format requires
    assert (citation["cff-version"], citation["type"], citation["title"], citation["license"]) == (
        "1.2.0",
        "software",
        "DualTowerVLM",
        "Apache-2.0",
    )
    assert f'version = "{citation["version"]}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (nanovlm,) = citation["references"]
    assert {"type", "title", "authors"} <= set(nanovlm) and nanovlm[
        "url"
    ] == "https://github.com/huggingface/nanoVLM"


def test_diagrams_are_what_the_script_draws():
    for name, draw in DIAGRAMS.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == draw(), (
            f"python -m tools.diagrams draws another {name}"
        )
    named = {
        name
        for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
        for name in re.findall(r"(\w+\.svg)", page.read_text(encoding="utf-8"))
    }
    assert named == {*DIAGRAMS} == {path.name for path in (ROOT / "docs").glob("*.svg")}


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for link in re.findall(
            r"\]\(([^)#]+)(?:#[\w-]+)?\)", re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S)
        ):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_hooks_before_a_commit_are_what_ci_runs():
    """The hooks are local and use the locked tools of .venv, as in CI.

    Nothing is downloaded, and both run the same checks.
    """
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    entries = {
        hook["id"]: hook["entry"]
        for repo in hooks["repos"]
        for hook in repo["hooks"]
        if repo["repo"] == "local" and hook["language"] == "system"
    }
    assert sum(len(repo["hooks"]) for repo in hooks["repos"]) == len(entries) == 4
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for name, command in {
        "ruff-check": ".venv/bin/ruff check",
        "ruff-format": ".venv/bin/ruff format --check",
        "mypy": ".venv/bin/mypy",
    }.items():
        assert entries[name].startswith(command) and f"\n{command}" in ci
    assert (ROOT / entries["layering"].split()[-1]).is_file()


def test_contributing_names_what_there_is():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = set(re.findall(r"[\w./-]+\.(?:sh|py|md|toml|lock)|\.ci/run", page))
    assert len(paths) > 8 and not [path for path in paths if not (ROOT / path).exists()]
