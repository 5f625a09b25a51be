"""configs ← {data, models} ← {training, eval} ← scripts, read from the imports."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "configs": {"configs"},
    "data": {"configs", "data"},
    "models": {"configs", "models"},
    "training": {"configs", "data", "models", "eval", "training"},
    "eval": {"configs", "data", "models", "eval"},
}
SCRIPTS = {p.stem for p in ROOT.glob("*.py")}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module.split(".")[0])
    return names


def test_layers():
    for package, allowed in ALLOWED.items():
        files = list((ROOT / package).rglob("*.py"))
        assert files, package
        for path in files:
            wrong = imported(path) & (set(ALLOWED) | SCRIPTS) - allowed
            assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_models_take_tensors():
    for path in (ROOT / "models").rglob("*.py"):
        assert not imported(path) & {"PIL", "tokenizers", "transformers"}, path


def test_scripts_are_wiring():
    assert {p.stem: len(p.read_text().splitlines()) for p in ROOT.glob("*.py") if len(p.read_text().splitlines()) > 90} == {}
