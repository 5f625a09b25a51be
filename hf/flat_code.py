"""The project's modules as flat files with relative imports: the form in which transformers loads code.

models/layers.py becomes models_layers.py. A copy holds the definitions that `ROOTS` reach and the imports
that these use. Lines of comment are left out, and outside of hf/ docstrings are cut to their first line.
"""

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HOME = Path(__file__).parent.parent
PACKAGES = ("configs", "data", "hf", "models", "utils")
ROOTS = ("hf.configuration", "hf.modeling", "hf.image_processing", "hf.processing")
REPLACED = {  # module → its copy: what transformers itself does, and what is only faster
    "models.weights.hub_model": "from torch.nn import Module as HubModel  # transformers loads and saves\n",
    "models.kernels": '''from typing import Any

from torch import Tensor


def find_kernel(operation: str, x: Tensor) -> Any | None:
    """None: the plain form is computed."""
    return None
''',
}


def flat(module: str) -> str:
    """`models.layers` → `models_layers`."""
    return module.replace(".", "_")


@cache
def code_files() -> dict[str, str]:
    """Return file name → text."""
    needed: dict[str, set[str]] = {root: set(read_module(root).definitions) for root in ROOTS}
    waiting = [(root, name) for root in ROOTS for name in needed[root]]
    while waiting:
        module, name = waiting.pop()
        for other, used in read_module(module).uses(name):
            if used not in needed.setdefault(other, set()):
                needed[other].add(used)
                waiting += [] if other in REPLACED else [(other, used)]
    texts = {name: REPLACED.get(name) or read_module(name).text(used) for name, used in needed.items()}
    # transformers loads a file that is equal in two folders only once, with all that it imports.
    version = hashlib.sha256(repr(sorted(texts.items())).encode()).hexdigest()[:16]
    heads = {
        name: f"# {path_of(name)} of DualTowerVLM" + f", code {version}" * (name in ROOTS) for name in needed
    }
    return {f"{flat(name)}.py": f"{heads[name]}\n{texts[name]}" for name in sorted(needed)}


def path_of(module: str) -> str:
    """The file of a module, from the top of the repository."""
    path = module.replace(".", "/")
    return f"{path}/__init__.py" if (HOME / path).is_dir() else f"{path}.py"


@dataclass
class Module:
    """A module's source, and where its names come from."""

    source: str
    name: str
    statements: list[ast.stmt]
    definitions: dict[str, int]  # name → index of its statement
    imported: dict[str, tuple[str, str]]  # name → module of the project and its name there

    def uses(self, name: str) -> Iterator[tuple[str, str]]:
        """The definitions of the project that the definition `name` needs: module and name."""
        for used in names_in(self.statements[self.definitions[name]]):
            if used in self.definitions:
                yield self.name, used
            elif used in self.imported:
                yield self.imported[used]

    def text(self, needed: set[str]) -> str:
        """The source, of which only the definitions `needed` are left."""
        lines = self.source.splitlines(keepends=True)
        indices = sorted({self.definitions[name] for name in needed})
        used = {name for index in indices for name in names_in(self.statements[index])}
        shortened = without_comments(self.source, docstrings=self.name.startswith("hf."))
        docstring = (self.statements[0].lineno - 1, self.statements[0].end_lineno or 0)
        parts = [shortened.get(number, line) for number, line in enumerate(lines[slice(*docstring)], 1)] + [
            "\n"
        ]
        for statement in self.statements:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                names = [
                    alias for alias in statement.names if (alias.asname or alias.name.split(".")[0]) in used
                ]
                if names:
                    statement = ast.parse(ast.unparse(statement)).body[0]
                    statement.names = names
                    parts.append(relative(ast.unparse(statement)) + "\n")
        for index in indices:
            start, end = self.statements[index - 1].end_lineno or 0, self.statements[index].end_lineno or 0
            parts += [shortened.get(number, line) for number, line in enumerate(lines[start:end], start + 1)]
        return "".join(relative(line) for part in parts for line in part.splitlines(keepends=True))


@cache
def read_module(name: str) -> Module:
    source = (HOME / path_of(name)).read_text(encoding="utf-8")
    tree = ast.parse(source)
    definitions: dict[str, int] = {}
    for index, statement in enumerate(tree.body):
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            definitions[statement.name] = index
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            definitions |= {
                node.id: index
                for target in getattr(statement, "targets", [getattr(statement, "target", None)])
                for node in ast.walk(target)
                if isinstance(node, ast.Name)
            }
        else:
            is_docstring = isinstance(statement, ast.Expr) and index == 0
            assert is_docstring or isinstance(statement, ast.Import | ast.ImportFrom), (
                f"{path_of(name)}, line {statement.lineno}: only imports and definitions can be exported"
            )
    imported = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES
        for alias in node.names
    }
    return Module(source, name, tree.body, definitions, imported)


def without_comments(source: str, docstrings: bool) -> dict[int, str]:
    """Line number → what stands there without lines of comment; docstrings are whole, or their first line."""
    lines = enumerate(source.splitlines(), 1)
    shortened = {number: "" for number, line in lines if line.lstrip().startswith("#")}
    if docstrings:
        return shortened
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) or not ast.get_docstring(node):
            continue
        docstring = node.body[0]
        shortened |= dict.fromkeys(range(docstring.lineno, docstring.end_lineno + 1), "")
        first = ast.get_docstring(node).partition("\n")[0]
        shortened[docstring.lineno] = f'{" " * docstring.col_offset}"""{first}"""\n'
    return shortened


def names_in(node: ast.AST) -> set[str]:
    """The names that a statement uses, those in quoted annotations too."""
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    quoted = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return names | {text for text in quoted if text.isidentifier()}


def relative(line: str) -> str:
    """`from models.layers import …` → `from .models_layers import …`; another line as it is."""
    words = line.split(maxsplit=2)
    if words[:1] == ["from"] and len(words) == 3 and words[1].split(".")[0] in PACKAGES:
        return line.replace(words[1], f".{flat(words[1])}", 1)
    return line
