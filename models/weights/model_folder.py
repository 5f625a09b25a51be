"""Model folders: a model is saved to one and loaded from one."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from configs.model import ModelConfig, Vocabulary
from configs.serialization import from_dict
from models.weights.folder import FORMAT, INDEX, find_model, is_nanovlm, read_model_config, weight_files
from models.weights.nanovlm import read_nanovlm
from models.weights.tensors import load_tensors, read_safetensors, without_values
from utils.errors import UsageError, UserError
from utils.files import replacing, write_text
from utils.hub import BESIDE, WEIGHTS

SHARD_SIZE = "5GB"  # of weights in a file, at most: larger ones are refused by some accounts, and begin anew when an upload breaks
RENAMED = (
    (r"^right\.heads\.stands$", "heads.acceptance_rates"),
    (r"^right\.heads\.", "heads."),
)  # names in folders of format 3 → today's


def save_model(model: Any, folder: Path) -> None:
    """`config.json`, and the weights: `model.safetensors`, or where they are more than `SHARD_SIZE` several files and their index."""
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
            with replacing(folder / file) as beside:
                save_file({name: tensors[name] for name in names}, beside)
        except SafetensorError as error:  # a full disk, for one
            raise UserError(f"{folder / file} could not be written: {error}") from error
    if shards.is_sharded:
        write_text(
            folder / INDEX,
            json.dumps({"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}, indent=2)
            + "\n",
        )
    for old in {path for pattern in WEIGHTS for path in folder.glob(pattern)} - {
        folder / file for file in (*shards.filename_to_tensors, *[INDEX] * shards.is_sharded)
    }:
        old.unlink()  # another model's that stood here
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def load_model(classes: dict[str, Any], source: str | Path, token: str | None = None) -> Any:
    """A folder or Hub id, our own or an ancestor's, as one of `classes` (by model type). What an ancestor's left tower computes for nobody is left out, and listed in `dropped_tensors`.

    Small files beside the weights, tokenizer and settings, are kept in `beside`: the model is saved with them.
    """
    folder = find_model(source, token)
    head, kind, config, vocabulary, tensors = _read_model(folder)
    if kind not in classes:
        raise UserError(
            f"{folder / 'config.json'} describes a model of type {kind!r}, not '{next(iter(classes))}'"
        )
    try:
        with without_values():
            model = classes[kind](config, vocabulary)
    except UsageError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None
    model.beside = {
        path.name: path.read_bytes()
        for pattern in BESIDE
        for path in folder.glob(pattern)
        if path.name not in ("config.json", INDEX)
    }
    model.code = {
        key: head[key] for key in ("architectures", "auto_map") if key in head and not is_nanovlm(head)
    }
    own = model.state_dict()
    model.dropped_tensors = [
        name for name in tensors if is_nanovlm(head) and name.startswith("left.decoder.") and name not in own
    ]
    load_tensors(
        model,
        {name: tensor for name, tensor in tensors.items() if name not in model.dropped_tensors},
        str(folder),
        assign=True,
    )
    return model.eval()


def _read_model(folder: Path) -> tuple[dict[str, Any], str, ModelConfig, Vocabulary, dict[str, Tensor]]:
    """Our own folder or an ancestor's → `config.json`, model type, configuration, vocabulary, tensors."""
    head = read_model_config(folder)
    tensors = {
        _current_name(name): tensor
        for file in weight_files(folder)
        for name, tensor in read_safetensors(file).items()
    }
    if is_nanovlm(head):
        return head, *read_nanovlm(head, tensors, str(folder))
    try:
        config, vocabulary = (
            from_dict(ModelConfig, head.get("model"), "model"),
            from_dict(Vocabulary, head.get("vocabulary"), "vocabulary"),
        )
    except UsageError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None
    return head, head["model_type"], config, vocabulary, tensors


def _current_name(name: str) -> str:
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def nanovlm_tokenizer(folder: Path) -> tuple[str, int] | None:
    """For an ancestor's folder: the language model whose tokenizer it takes, and that model's vocabulary size."""
    head = read_model_config(folder)
    return (str(head.get("lm_tokenizer")), int(head["lm_base_vocab_size"])) if is_nanovlm(head) else None


def left_tower_of(source: str) -> tuple[ModelConfig, Vocabulary, dict[str, Tensor]]:
    """What a left tower can start from: a vanilla model's encoder, projector and decoder, or a dual tower's left one.

    → the configuration (its `left` is that decoder's), the vocabulary, and tensors under the left tower's names.
    """
    folder = find_model(source)
    _, kind, config, vocabulary, tensors = _read_model(folder)
    if kind == "dual_tower":
        return (
            config,
            vocabulary,
            {name.removeprefix("left."): t for name, t in tensors.items() if name.startswith("left.")},
        )
    renamed = {
        re.sub(r"^right\.(?!embed_tokens)", "decoder.", name).removeprefix("right."): t
        for name, t in tensors.items()
    }
    return replace(config, left=config.right), vocabulary, renamed


def load_left_tower(left: Any, vocabulary: Vocabulary, tensors: dict[str, Tensor], where: str) -> list[str]:
    """Fill a `LeftTower` with what `left_tower_of` found; → the names of the tensors that it has no use for."""
    own, table = left.state_dict(), "embed_tokens.weight"
    markers = left.vocabulary.markers
    if vocabulary.markers < markers:
        raise UserError(
            f"{where} has {vocabulary.markers} image markers, this model {markers}: they do not belong together"
        )
    if left.first_id == 0:
        raise UserError(
            f"{where}: a left tower that reads text (left_context = prefix) cannot start from another model's yet; use left_context = image"
        )
    first = len(tensors[table]) - vocabulary.markers
    kept = {name: t for name, t in tensors.items() if name in own} | {
        table: tensors[table][first : first + markers]
    }
    load_tensors(left, kept, where)
    return sorted(tensors.keys() - own.keys())
