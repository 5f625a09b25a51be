"""The layers, read from the imports; the files have no import cycle.

utils ← configs ← {data, models} ← {eval, hf} ← {training, serving} ← {tools, scripts}
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "utils": {"utils"},
    "configs": {"utils", "configs"},
    "data": {"utils", "configs", "data"},
    "models": {"utils", "configs", "models"},
    "hf": {"utils", "configs", "data", "models", "hf"},
    "eval": {"utils", "configs", "data", "models", "eval"},
    "training": {"utils", "configs", "data", "models", "hf", "eval", "training"},
    "serving": {"utils", "configs", "data", "models", "eval", "serving"},
    "tools": {"utils", "configs", "data", "models", "hf", "eval", "training", "tools"},
}
SCRIPTS = {p.stem for p in ROOT.glob("*.py")}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {name for alias in node.names for name in (alias.name.split(".")[0], alias.name)}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {
                node.module.split(".")[0],
                node.module,
                *(f"{node.module}.{alias.name}" for alias in node.names),
            }
    return names


def modules() -> dict[str, Path]:
    """Dotted name → file, of every module of the packages."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for package in ALLOWED
        for path in sorted((ROOT / package).rglob("*.py"))
    }


def test_layers():
    for name, path in modules().items():
        wrong = imported(path) & ((set(ALLOWED) | SCRIPTS) - ALLOWED[name.split(".")[0]])
        assert not wrong, f"{name} imports {wrong}"


def test_no_circle():
    """No file is reached from itself, type-checking imports included."""
    names = modules()
    arrows = {name: imported(path) & names.keys() for name, path in names.items()}
    for start in names:
        reached, waiting = set(), list(arrows[start])
        while waiting:
            name = waiting.pop()
            if name not in reached:
                reached.add(name)
                waiting += arrows[name]
        assert start not in reached, (
            f"{start} is in a circle of imports with {sorted(n for n in reached if start in arrows[n])}"
        )


def test_models_take_tensors():
    for path in (ROOT / "models").rglob("*.py"):
        assert not imported(path) & {"PIL", "tokenizers", "transformers"}, path


def test_scripts_are_wiring():
    assert {
        p.stem: len(p.read_text().splitlines())
        for p in ROOT.glob("*.py")
        if len(p.read_text().splitlines()) > 120
    } == {}


def test_nothing_from_outside_is_executed():
    """No `eval`, no `exec`, no pickle, and `torch.load` of weights alone. (`model.eval()` is a method.)"""
    for path in (
        p
        for folder in ("", *ALLOWED, "benchmarks")
        for p in ((ROOT / folder).rglob("*.py") if folder else ROOT.glob("*.py"))
    ):
        assert not imported(path) & {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}, path
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            name, options = (
                ast.unparse(call.func),
                {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords},
            )
            assert name not in ("eval", "exec", "builtins.eval", "builtins.exec"), f"{path}:{call.lineno}"
            assert name != "torch.load" or options.get("weights_only") == "True", f"{path}:{call.lineno}"
            assert name not in ("np.load", "numpy.load") or options.get("allow_pickle", "False") == "False", (
                f"{path}:{call.lineno}"
            )
