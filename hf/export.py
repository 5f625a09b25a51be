"""What makes an exported model folder one that `transformers` loads with `trust_remote_code=True`.

transformers takes code as flat files that import one another relatively. They are the project's own modules, the few that
the three of `ROOTS` need: models/layers.py becomes models_layers.py, and of its text only the imports change.
"""

import ast
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.model import GenerationConfig, ModelConfig
from configs.serialization import from_dict
from data.tokenizer import Tokenizer
from models.weights.folder import is_nanovlm, read_model_config
from utils.errors import UserError
from utils.files import write_text

HOME = Path(__file__).parent.parent
PACKAGES = ("configs", "data", "hf", "models", "utils")
ROOTS = ("hf.configuration", "hf.modeling", "hf.processing")
CLASSES = {"dual_tower": "DualTower", "vanilla": "Vanilla"}  # model type → how its classes in hf/ begin


def flat(module: str) -> str:
    return module.replace(".", "_")


def code_files() -> dict[str, str]:
    """File name → text, of `ROOTS` and all of the project that they import."""
    texts, imports = {}, {}
    for root in ROOTS:
        reached, waiting = {root}, [root]
        while waiting:
            module = waiting.pop()
            if module not in texts:
                path = f"{module.replace('.', '/')}.py"
                text, imports[module] = flattened((HOME / path).read_text(encoding="utf-8"))
                texts[module] = f"# {path} of DualTowerVLM, with relative imports\n{text}"
            waiting += set(imports[module]) - reached
            reached |= set(imports[module])
        if others := "".join(
            f"    from .{flat(module)} import *  # noqa: F403\n" for module in sorted(reached - {root})
        ):
            texts[root] += (
                f"\n\nif False:  # older transformers, 5.0 to 5.8 at least, look for files in this one's own imports alone\n{others}"
            )
    return {f"{flat(module)}.py": text for module, text in texts.items()}


def flattened(text: str) -> tuple[str, list[str]]:
    """A module's text with `from models.layers import …` turned into `from .models_layers import …`; and the modules it so imports."""
    lines, needed = text.splitlines(keepends=True), []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] in PACKAGES for alias in node.names), (
                f"line {node.lineno}: import names from the module instead"
            )
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in PACKAGES:
            before, line = f"from {node.module} import", lines[node.lineno - 1]
            assert line[node.col_offset :].startswith(before), f"line {node.lineno}: {line}"
            lines[node.lineno - 1] = (
                f"{line[: node.col_offset]}from .{flat(node.module)} import{line[node.col_offset + len(before) :]}"
            )
            needed.append(node.module)
    return "".join(lines), needed


def add_hf_code(folder: Path, tokenizer: Tokenizer) -> None:
    """Add to a model folder the code, and the keys and files by which transformers finds it. What is not a complete folder of ours raises `UserError`."""
    head = read_model_config(folder)
    if is_nanovlm(head):
        raise UserError(
            f"{folder} holds an ancestor's checkpoint, which has no place for code: load it and save it with save_pretrained first"
        )
    kind, model = (
        CLASSES[head["model_type"]],
        from_dict(ModelConfig, head["model"], f"{folder / 'config.json'}: model"),
    )
    names = {
        "AutoConfig": f"configuration.{kind}Config",
        "AutoModelForImageTextToText": f"modeling.{kind}ForConditionalGeneration",
    }
    auto_map = {auto: f"hf_{name}" for auto, name in names.items()}
    for name, text in code_files().items():
        (folder / name).write_text(text, encoding="utf-8")  # config.json, written last, makes them count
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
        head | {"architectures": [f"{kind}ForConditionalGeneration"], "auto_map": auto_map},
    )


def processor_config(model: ModelConfig) -> dict[str, Any]:
    return {
        "processor_class": "DualTowerProcessor",
        "auto_map": {"AutoProcessor": "hf_processing.DualTowerProcessor"},
        "vision": asdict(model.vision),
        "tokens_per_tile": model.tokens_per_tile,
    }


def _write(path: Path, values: dict[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=2) + "\n")
