"""The code and files by which `transformers` loads a model folder, with `trust_remote_code=True`.

transformers expects code as flat files with relative imports. They are copies of the project's own modules,
those that `ROOTS` import: models/layers.py becomes models_layers.py, and only its imports change.
"""

import ast
import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from configs.model import GenerationConfig, ModelConfig
from configs.serialization import from_dict
from data.tokenizer import Tokenizer
from models.weights.folder import is_nanovlm, read_model_config
from utils.errors import UserError
from utils.files import write_text
from utils.hub import CODE

HOME = Path(__file__).parent.parent
PACKAGES = ("configs", "data", "hf", "models", "utils")
ROOTS = ("hf.configuration", "hf.modeling", "hf.processing")
CLASSES = {"dual_tower": "DualTower", "vanilla": "Vanilla"}  # model type → prefix of its classes in hf/


def flat(module: str) -> str:
    """`models.layers` → `models_layers`."""
    return module.replace(".", "_")


@cache
def code_files() -> dict[str, str]:
    """Return file name → text, of `ROOTS` and all modules of the project that they import."""
    texts: dict[str, str] = {}
    imports: dict[str, list[str]] = {}
    for root in ROOTS:
        reached, waiting = {root}, [root]
        while waiting:
            module = waiting.pop()
            if module not in texts:
                path = module.replace(".", "/")
                path += "/__init__.py" if (HOME / path).is_dir() else ".py"
                text, imports[module] = flattened((HOME / path).read_text(encoding="utf-8"))
                texts[module] = f"# {path} of DualTowerVLM, with relative imports\n{text}"
            waiting += set(imports[module]) - reached
            reached |= set(imports[module])
        lines = [f"    from .{flat(module)} import *  # noqa: F403\n" for module in sorted(reached - {root})]
        if lines:
            reason = "transformers 5.0 to 5.8, at least, look for files only in this one's own imports"
            texts[root] += f"\n\nif False:  # {reason}\n{''.join(lines)}"
    return {f"{flat(module)}.py": text for module, text in texts.items()}


def flattened(text: str) -> tuple[str, list[str]]:
    """Rewrite `from models.layers import …` as `from .models_layers import …` → text, imported modules."""
    lines = text.splitlines(keepends=True)
    needed: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] in PACKAGES for alias in node.names), (
                f"line {node.lineno}: import names from the module instead"
            )
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES:
            before, line = f"from {node.module} import", lines[node.lineno - 1]
            indent, statement = line[: node.col_offset], line[node.col_offset :]
            assert statement.startswith(before), f"line {node.lineno}: {line}"
            after = f"from .{flat(node.module)} import"
            lines[node.lineno - 1] = indent + after + statement.removeprefix(before)
            needed.append(node.module)
    return "".join(lines), needed


def add_hf_code(folder: Path, tokenizer: Tokenizer) -> None:
    """Add the code to a model folder, and the keys and files by which transformers finds it.

    A folder that is incomplete or not of this project raises `UserError`.
    """
    raw_config = read_model_config(folder)
    if is_nanovlm(raw_config):
        raise UserError(
            f"{folder} holds a nanoVLM checkpoint, to which no code can be added: "
            "load it and save it with save_pretrained first"
        )
    kind = CLASSES[raw_config["model_type"]]
    model = from_dict(ModelConfig, raw_config["model"], f"{folder / 'config.json'}: model")
    names = {
        "AutoConfig": f"configuration.{kind}Config",
        "AutoModelForImageTextToText": f"modeling.{kind}ForConditionalGeneration",
    }
    auto_map = {auto: f"hf_{name}" for auto, name in names.items()}
    code = code_files()
    for pattern in CODE:
        for old in folder.glob(pattern):
            if old.name not in code and " of DualTowerVLM, " in old.read_text(encoding="utf-8")[:200]:
                old.unlink()  # a module that an earlier version added
    for name, text in code.items():
        (folder / name).write_text(text, encoding="utf-8")  # not used before config.json, the last, names it
    _write(folder / "processor_config.json", processor_config(model))
    _write(
        folder / "generation_config.json",
        {
            "max_new_tokens": GenerationConfig().max_new_tokens,
            "eos_token_id": tokenizer.turn_end,
            "pad_token_id": tokenizer.turn_end,
        },
    )
    _write(
        folder / "config.json",
        raw_config | {"architectures": [f"{kind}ForConditionalGeneration"], "auto_map": auto_map},
    )


def processor_config(model: ModelConfig) -> dict[str, Any]:
    """Return the content of `processor_config.json`."""
    return {
        "processor_class": "DualTowerProcessor",
        "auto_map": {"AutoProcessor": "hf_processing.DualTowerProcessor"},
        "vision": asdict(model.vision),
        "tokens_per_tile": model.tokens_per_tile,
    }


def _write(path: Path, values: dict[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=2) + "\n")
