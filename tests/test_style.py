"""Names are the field's: no word of the first edition's private language is an identifier. And limits of size."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("utils", "configs", "data", "models", "hf", "eval", "training", "tools", "benchmarks")
SOURCES = [*sorted(ROOT.glob("*.py")), *(p for name in PACKAGES for p in sorted((ROOT / name).rglob("*.py")))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# As a part of any name: `answers_told` is none either.
PARTS = set(
    ["told", "said", "heard", "learnt", "unlearnt", "found", "made", "kept", "shown", "wanted", "beside", "aside", "gone", "fresh", "cut", "least", "most", "purse", "hopes", "hope", "doubted", "owes", "spared", "barren", "lap", "laps", "settled", "settle", "ancestor", "ancestors", "looks", "pictures", "drawings", "averages", "stands", "stood", "planned", "agreed", "answerer"]
)
# As a whole name.
WHOLE = set(
    ["place", "places", "where", "room", "spans", "passed", "passes", "one_pass", "in_turn", "complete", "fitted", "origin", "pieces", "floor", "details", "achieved", "accumulation", "remote", "read_head", "Answerer", "World", "Past", "Best", "Achieved", "Task", "Run", "Pick", "Listed", "DraftShape", "SpanPlan", "Passed", "Details", "Told", "Shown", "Kept"]
)
CACHES = {"turn", "grow", "keep"}  # of tensors and caches: in models/


def bound_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every name that a file gives: functions, classes, parameters, variables, attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno


def private(name: str, in_models: bool) -> bool:
    parts = {part.lower() for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}
    return bool(parts & PARTS) or name.strip("_") in WHOLE or (in_models and name.strip("_") in CACHES)


def names_of(path: Path) -> list[str]:
    in_models = path.is_relative_to(ROOT / "models")
    return [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for name, line in bound_names(ast.parse(path.read_text()))
        if private(name, in_models)
    ]


def long_lines(path: Path) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{n}"
        for n, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 110
    ]


def long_functions(path: Path, most: int = 60) -> list[str]:
    nodes = [
        n
        for n in ast.walk(ast.parse(path.read_text()))
        if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return [
        f"{path.relative_to(ROOT)}:{n.lineno} {n.name}: {n.end_lineno - n.lineno + 1} lines"
        for n in nodes
        if n.end_lineno - n.lineno + 1 > most
    ]


def long_file(path: Path, most: int = 400) -> list[str]:
    lines = len(path.read_text().splitlines())
    return [f"{path.relative_to(ROOT)}: {lines} lines"] if lines > most else []


@pytest.mark.parametrize("find", [names_of, long_functions, long_file])
def test_sources(find):
    assert [problem for path in SOURCES for problem in find(path)] == []


def test_lines():
    assert [problem for path in SOURCES + TESTS for problem in long_lines(path)] == []


def test_the_check_itself():
    """It sees each kind of name, and leaves the field's own alone."""
    tree = ast.parse(
        "def told(where): self.kept_rows = found = 1\nclass Past: most: int = 3\nmost_common = max_rows = turn_end = 2"
    )
    names = [name for name, _ in bound_names(tree)]
    assert {name for name in names if private(name, False)} == {
        "told",
        "where",
        "kept_rows",
        "found",
        "Past",
        "most",
        "most_common",
    }
