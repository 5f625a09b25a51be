"""Language models in the Hugging Face format (`config.json`, safetensors) → the decoder's configuration and weights. Strict."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import DecoderConfig, RopeScaling
from models.language_model import LanguageModel
from models.pretrained import check_tensors, read_safetensors

ARCHITECTURES = ("llama", "qwen2", "qwen3", "smollm3")


def decoder_config(folder: Path) -> DecoderConfig:
    """The decoder that a folder's `config.json` describes. What this decoder does not do raises `UserError` and is named."""
    path = folder / "config.json"
    try:
        hf: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} holds no config.json: not a language model's folder") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    kind = hf.get("model_type")
    if kind not in ARCHITECTURES:
        raise UserError(f"{path}: architecture {kind!r} is not supported; supported are {', '.join(ARCHITECTURES)}")
    for key, plain in (("hidden_act", "silu"), ("mlp_bias", False), ("attention_bias", kind == "qwen2"), ("use_sliding_window", False)):
        if hf.get(key, plain) not in (plain, None):
            raise UserError(f"{path}: {key} = {hf[key]!r} is not supported")
    layers, heads = hf["num_hidden_layers"], hf["num_attention_heads"]
    rope = hf.get("rope_parameters") or (hf.get("rope_scaling") or {}) | {"rope_theta": hf.get("rope_theta", 10000.0)}
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
        raise UserError(f"{path}: rotary scaling of type {kind!r} is not supported; supported are default, llama3")
    return RopeScaling(rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"])


def _no_rope_interval(hf: dict[str, Any], layers: int, path: Path) -> int:
    """SmolLM3 lists for every layer whether it has rotary embedding; here it must be every n-th that has none."""
    listed = hf.get("no_rope_layers")
    interval = hf.get("no_rope_layer_interval", 4)
    if listed is None or listed == [int((i + 1) % interval != 0) for i in range(layers)]:
        return int(interval)
    if all(listed):
        return 0
    raise UserError(f"{path}: no_rope_layers = {listed} is not every n-th layer")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, sharded or not, without the prefix `model.`."""
    index = folder / "model.safetensors.index.json"
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    tensors: dict[str, Tensor] = {}
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{folder} holds no {name}: not a complete language model")
        tensors |= read_safetensors(folder / name)
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def load_language_model(model: LanguageModel, tensors: dict[str, Tensor], where: str) -> None:
    """Fill a `LanguageModel`. Tokens that it has beyond the table in the file get the mean of the old embeddings."""
    tensors = dict(tensors)
    if model.config.tied_embeddings:
        tensors.pop("lm_head.weight", None)  # some files repeat the table
    for name in ("embed_tokens.weight", "lm_head.weight"):
        if name in tensors and (new := model.embed_tokens.num_embeddings - len(tensors[name])) > 0:
            tensors[name] = _with_mean_rows(tensors[name], new)
    check_tensors(model, tensors, where)
    model.load_state_dict(tensors)


def _with_mean_rows(table: Tensor, new: int) -> Tensor:
    out = table.new_empty(len(table) + new, table.shape[1])
    out[: len(table)], out[len(table) :] = table, table.float().mean(0).to(table.dtype)
    return out


def load_left_decoder(decoder: nn.Module, tensors: dict[str, Tensor], where: str) -> list[str]:
    """Fill a `KeyValueDecoder` from a language model's tensors; → the names that the left tower has no use for."""
    own = decoder.state_dict()
    check_tensors(decoder, {name: tensor for name, tensor in tensors.items() if name in own}, where)
    decoder.load_state_dict({name: tensors[name] for name in own})
    return sorted(tensors.keys() - own.keys())
