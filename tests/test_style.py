"""Names are the field's, not the first edition's private words; lines have at most 110 characters."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("utils", "configs", "data", "models", "hf", "eval", "training", "serving", "tools", "benchmarks")
SOURCES = [*sorted(ROOT.glob("*.py")), *(p for name in PACKAGES for p in sorted((ROOT / name).rglob("*.py")))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# Not even as a part of a name.
PARTS = """
    told said heard learnt unlearnt found made kept shown wanted beside aside gone fresh cut least
    most purse hopes hope doubted owes spared barren lap laps settled settle ancestor ancestors
    looks pictures drawings averages stands stood planned agreed answerer
"""
WHOLE = """
    place places where room spans passed passes one_pass in_turn complete fitted origin pieces floor
    details achieved accumulation remote read_head Answerer World Past Best Achieved Task Run Pick
    Listed DraftShape SpanPlan Passed Details Told Shown Kept
"""
CACHES = "turn grow keep"  # of tensors and caches: in models/


def bound_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every name that a file defines, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno


def is_private(name: str, in_models: bool = False) -> bool:
    parts = {part.lower() for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}
    whole = set(WHOLE.split()) | (set(CACHES.split()) if in_models else set())
    return bool(parts & set(PARTS.split())) or name.strip("_") in whole


def names_of(path: Path) -> list[str]:
    in_models = path.is_relative_to(ROOT / "models")
    names = bound_names(ast.parse(path.read_text()))
    return [f"{path.relative_to(ROOT)}:{line} {name}" for name, line in names if is_private(name, in_models)]


def long_lines(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    return [f"{path.relative_to(ROOT)}:{n}" for n, line in enumerate(lines, 1) if len(line) > 110]


def test_names():
    assert [problem for path in SOURCES for problem in names_of(path)] == []


def test_lines():
    assert [problem for path in SOURCES + TESTS for problem in long_lines(path)] == []


def test_the_check_itself():
    """It sees each kind of name, and leaves the field's own alone."""
    code = "def told(where): self.kept_rows = found = 1\nclass Past: most: int = 3\nmax_rows = turn_end = 2"
    names = [name for name, _ in bound_names(ast.parse(code))]
    assert {name for name in names if is_private(name)} == {
        "told",
        "where",
        "kept_rows",
        "found",
        "Past",
        "most",
    }
