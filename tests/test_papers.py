"""The papers of the repository say what is so."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent


def test_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)  # what version 1.2.0 of the format requires
    assert (citation["cff-version"], citation["type"], citation["title"], citation["license"]) == ("1.2.0", "software", "DualTowerVLM", "Apache-2.0")
    assert f'version = "{citation["version"]}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (nanovlm,) = citation["references"]
    assert {"type", "title", "authors"} <= set(nanovlm) and nanovlm["url"] == "https://github.com/huggingface/nanoVLM"


def test_hooks_before_a_commit_use_the_locked_ruff():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (ruff,) = (repo["rev"] for repo in hooks["repos"] if repo["repo"].endswith("ruff-pre-commit"))
    assert ruff == "v" + re.search(r"^ruff==(\S+)", (ROOT / "requirements.lock").read_text(encoding="utf-8"), re.M)[1]


def test_contributing_names_what_there_is():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = set(re.findall(r"[\w./-]+\.(?:sh|py|md|toml|lock)|\.ci/run", page))
    assert len(paths) > 8 and not [path for path in paths if not (ROOT / path).exists()]
