"""The code and files by which `transformers` loads a model folder, with `trust_remote_code=True`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.model import GenerationConfig, ModelConfig
from configs.serialization import from_dict
from data.tokenizer import Tokenizer
from hf.flat_code import code_files
from models.weights.folder import is_nanovlm, read_model_config
from utils.errors import UserError
from utils.files import write_text
from utils.hub import CODE

CLASSES = {"dual_tower": "DualTower", "vanilla": "Vanilla"}  # model type → prefix of its classes in hf/


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
        "AutoModel": f"modeling.{kind}Model",
        "AutoModelForImageTextToText": f"modeling.{kind}ForConditionalGeneration",
    }
    auto_map = {auto: f"hf_{name}" for auto, name in names.items()}
    code = code_files()
    for pattern in CODE:
        for old in folder.glob(pattern):
            if old.name not in code and " of DualTowerVLM" in old.read_text(encoding="utf-8")[:200]:
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
        raw_config
        | {"architectures": [f"{kind}ForConditionalGeneration"], "auto_map": auto_map}
        | {"eos_token_id": tokenizer.turn_end, "pad_token_id": tokenizer.turn_end},
    )


def processor_config(model: ModelConfig) -> dict[str, Any]:
    """Return the content of `processor_config.json`."""
    return {
        "processor_class": "DualTowerProcessor",
        "auto_map": {"AutoProcessor": "hf_processing.DualTowerProcessor"},
        "tokens_per_tile": model.tokens_per_tile,
        "image_processor": {
            "image_processor_type": "DualTowerImageProcessor",
            "auto_map": {"AutoImageProcessor": "hf_image_processing.DualTowerImageProcessor"},
            "vision": asdict(model.vision),
        },
    }


def _write(path: Path, values: dict[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=2) + "\n")
