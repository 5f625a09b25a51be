"""Model folders: a model is saved to one and loaded from one."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from configs.model import ModelConfig, Vocabulary, source_layers
from configs.serialization import from_dict
from models.weights.folder import FORMAT, INDEX, ModelFiles, checked_config, find_files, is_nanovlm
from models.weights.language_models import take_layers
from models.weights.nanovlm import read_nanovlm
from models.weights.tensors import load_tensors, read_safetensors
from utils.errors import UsageError, UserError
from utils.files import replacing, write_text
from utils.hub import AUXILIARY_FILES, WEIGHTS

# Largest weight file: the Hub refuses larger ones for some accounts, and a broken upload of one starts again.
SHARD_SIZE = "5GB"
# Keys of config.json by which transformers finds code and tokens.
OF_TRANSFORMERS = ("architectures", "auto_map", "eos_token_id", "pad_token_id")
# Tensor names of transformers, and in folders of format 3 → current names.
RENAMED = (
    (r"^model\.", ""),
    (r"^right\.heads\.stands$", "heads.acceptance_rates"),
    (r"^right\.heads\.", "heads."),
)


def save_model(model: Any, folder: Path) -> None:
    """Write `config.json` and the weights.

    Weights go to `model.safetensors`, or above `SHARD_SIZE` to several files with an index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in model.state_dict().items()}
    config = {
        "model_type": model.model_type,
        "format": FORMAT,
        "vocabulary": asdict(model.vocabulary),
        "model": asdict(model.config),
    } | model.code
    shards = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD_SIZE)
    for file, names in shards.filename_to_tensors.items():
        try:
            with replacing(folder / file) as temp_path:
                save_file({name: tensors[name] for name in names}, temp_path)
        except SafetensorError as error:  # a full disk, for one
            raise UserError(f"{folder / file} could not be written: {error}") from error
    written = {folder / file for file in shards.filename_to_tensors}
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
        written.add(folder / INDEX)
    for old in {path for pattern in WEIGHTS for path in folder.glob(pattern)} - written:
        old.unlink()  # of the model that the folder held before
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def load_model(classes: dict[str, Any], source: str | Path | ModelFiles) -> Any:
    """Load a model of this project or of nanoVLM as one of `classes` (model type → class).

    `source`: a model folder, a Hub id, or what `find_files` found.

    `extra_files` of the model holds the small files next to the weights, tokenizer and settings: saving
    writes them again. `dropped_tensors` lists the tensors of a nanoVLM left tower that no output depends on.
    """
    files = source if isinstance(source, ModelFiles) else find_files(source)
    raw_config, kind, config, vocabulary, tensors = _read_model(files)
    if kind not in classes:
        raise UserError(f"{files.config} describes a model of type {kind!r}, not '{next(iter(classes))}'")
    try:
        with torch.device("meta"):
            model = classes[kind](config, vocabulary)
    except UsageError as error:
        raise UserError(f"{files.config}: {error}") from None
    model.extra_files = {
        path.name: path.read_bytes()
        for pattern in AUXILIARY_FILES
        for path in files.folder.glob(pattern)
        if path.name not in ("config.json", INDEX)
    }
    model.dropped_tensors = []
    if is_nanovlm(raw_config):
        own = model.state_dict()
        model.dropped_tensors = [
            name for name in tensors if name.startswith("left.decoder.") and name not in own
        ]
    else:
        model.code = {key: raw_config[key] for key in OF_TRANSFORMERS if key in raw_config}
    used = {name: tensor for name, tensor in tensors.items() if name not in model.dropped_tensors}
    load_tensors(model, used, _name(files))
    return model.eval()


def _name(files: ModelFiles) -> str:
    """The model's name in errors: its folder, or its weights file."""
    return str(files.weights[0] if files.config.parent != files.weights[0].parent else files.folder)


def _read_model(files: ModelFiles) -> tuple[dict[str, Any], str, ModelConfig, Vocabulary, dict[str, Tensor]]:
    """Read a model's files → `config.json`, model type, configuration, vocabulary, tensors."""
    raw_config = checked_config(files.config)
    tensors = {
        _current_name(name): tensor
        for file in files.weights
        for name, tensor in read_safetensors(file).items()
    }
    if is_nanovlm(raw_config):
        return raw_config, *read_nanovlm(raw_config, tensors, _name(files))
    try:
        config = from_dict(ModelConfig, raw_config.get("model"), "model")
        vocabulary = from_dict(Vocabulary, raw_config.get("vocabulary"), "vocabulary")
    except UsageError as error:
        raise UserError(f"{files.config}: {error}") from None
    return raw_config, raw_config["model_type"], config, vocabulary, tensors


def _current_name(name: str) -> str:
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def nanovlm_tokenizer(config: Path) -> tuple[str, int] | None:
    """Return the language model whose tokenizer a nanoVLM checkpoint uses, and its vocabulary size.

    None for a model of this project.
    """
    raw_config = checked_config(config)
    if not is_nanovlm(raw_config):
        return None
    return str(raw_config.get("lm_tokenizer")), int(raw_config["lm_base_vocab_size"])


def read_model(source: str) -> tuple[str, ModelConfig, Vocabulary, dict[str, Tensor]]:
    """Read a model folder or Hub id → model type, configuration, vocabulary, tensors."""
    return _read_model(find_files(source))[1:]


def left_tower_of(source: str) -> tuple[ModelConfig, Vocabulary, dict[str, Tensor]]:
    """Read the initial weights of a left tower: a dual tower's left one, or all parts of a vanilla model.

    → the configuration, whose `left` is that decoder's; the vocabulary; tensors under the left tower's names.
    """
    kind, config, vocabulary, tensors = read_model(source)
    if kind == "dual_tower":
        left = {name.removeprefix("left."): t for name, t in tensors.items() if name.startswith("left.")}
        return config, vocabulary, left
    renamed = {
        re.sub(r"^right\.(?!embed_tokens)", "decoder.", name).removeprefix("right."): t
        for name, t in tensors.items()
    }
    return replace(config, left=config.right), vocabulary, renamed


def load_left_tower(
    left: Any, config: ModelConfig, vocabulary: Vocabulary, tensors: dict[str, Tensor], context: str
) -> list[str]:
    """Fill a `LeftTower` with the result of `left_tower_of`; → names of the unused tensors."""
    table = "embed_tokens.weight"
    markers = left.vocabulary.markers
    if vocabulary.markers < markers:
        raise UserError(
            f"{context} has {vocabulary.markers} image markers, this model {markers}: "
            "they do not belong together"
        )
    if left.first_id == 0:
        raise UserError(
            f"{context}: a left tower that reads text (left_context = prefix) cannot start from another "
            "model's yet; use left_context = image"
        )
    first = len(tensors[table]) - vocabulary.markers
    layers, own, gates = source_layers(left.config, config.left), left.state_dict(), "bridge.gates"
    used, unused = take_layers(tensors, own, layers)
    if gates in own:  # a source without a bridge leaves the identity
        used[gates] = tensors[gates][layers] if gates in tensors else own[gates]
    load_tensors(left, used | {table: tensors[table][first : first + markers].clone()}, context)
    return unused
