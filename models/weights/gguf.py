"""GGUF files (llama.cpp's format) → cached folders in the Hugging Face format.

Such a folder holds `config.json`, `model.safetensors` in fp32, and `tokenizer.json`.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from utils.errors import UserError
from utils.files import replacing, replacing_folder

# GGUF's general.architecture → model_type
ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
VERSION = 1  # of this conversion: cached folders of another one are not used
RENAMED = (
    (r"^token_embd\.", "model.embed_tokens."),
    (r"^output_norm\.", "model.norm."),
    (r"^output\.", "lm_head."),
    (r"^blk\.(\d+)\.attn_norm\.", r"model.layers.\1.input_layernorm."),
    (r"^blk\.(\d+)\.ffn_norm\.", r"model.layers.\1.post_attention_layernorm."),
    (r"^blk\.(\d+)\.attn_output\.", r"model.layers.\1.self_attn.o_proj."),
    (r"^blk\.(\d+)\.attn_([qkv])\.", r"model.layers.\1.self_attn.\2_proj."),
    (r"^blk\.(\d+)\.attn_([qk])_norm\.", r"model.layers.\1.self_attn.\2_norm."),
    (r"^blk\.(\d+)\.ffn_(gate|up|down)\.", r"model.layers.\1.mlp.\2_proj."),
)
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def _split(pattern: str) -> list[dict[str, Any]]:
    return [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        BYTE_LEVEL | {"use_regex": False},
    ]


# tokenizer.ggml.pre → the splits of text before byte-level BPE, as `tokenizers` writes them
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [BYTE_LEVEL],
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL],
    "llama-bpe": _split(WORDS % "{1,3}"),
    "qwen2": _split(WORDS % ""),
}


def convert_gguf(path: Path, cache: Path) -> Path:
    """Convert a GGUF file, unless it is cached → the folder under `cache` in the Hugging Face format.

    An architecture, quantisation or tokenizer that cannot be converted raises `UserError` naming it.
    """
    try:
        with open(path, "rb") as file:
            folder = cache / f"{path.stem}-v{VERSION}-{hashlib.file_digest(file, 'blake2b').hexdigest()[:16]}"
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if (folder / "config.json").is_file():
        return folder
    config, tensors, tokenizer, template = _read_gguf(path)
    with replacing_folder(folder) as temp_path:
        with replacing(temp_path / "model.safetensors") as file:
            save_file(tensors, file)
        for name, content in (
            ("tokenizer.json", tokenizer),
            ("tokenizer_config.json", {"chat_template": template}),
            ("config.json", config),
        ):
            (temp_path / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return folder


def _read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any], str | None]:
    """Read a GGUF file → the content of `config.json`, tensors, that of `tokenizer.json`, chat template."""
    try:
        import gguf
    except ModuleNotFoundError:
        raise UserError(f"{path}: reading GGUF files needs the package gguf (pip install gguf)") from None
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the reader raises many kinds for a truncated or foreign file
        raise UserError(
            f"{path} cannot be read as GGUF: {' '.join(str(error).split()) or type(error).__name__}"
        ) from None
    try:
        config = _config(fields, {t.name for t in reader.tensors}, path)
        tokenizer = _tokenizer(fields, path)
    except KeyError as error:
        raise UserError(f"{path}: the GGUF key {error} is missing") from None
    tensors: dict[str, Tensor] = {}
    for entry in reader.tensors:
        try:
            values = gguf.dequantize(entry.data, entry.tensor_type).astype(np.float32)
        except NotImplementedError:
            raise UserError(
                f"{path}: {entry.name} is quantised as {entry.tensor_type.name}, which the package gguf "
                "cannot undo; take another file of this model"
            ) from None
        name = entry.name
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        if config["model_type"] == "llama" and (match := re.search(r"self_attn\.([qk])_proj", name)):
            heads = config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"]
            values = _as_halves(values, heads)
        tensors[name] = torch.from_numpy(np.ascontiguousarray(values))
    return config, tensors, tokenizer, fields.get("tokenizer.chat_template")


def _as_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder each head's rows of a query or key projection.

    GGUF's llama pairs neighbouring rotary components; Hugging Face's pairs component i with i + E/2.
    """
    rows = weight.shape[0] // heads
    return weight.reshape(heads, rows // 2, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _config(fields: dict[str, Any], names: set[str], path: Path) -> dict[str, Any]:
    """Build the `config.json` of the Hugging Face format."""
    kind = fields["general.architecture"]
    if kind not in ARCHITECTURES:
        raise UserError(
            f"{path}: architecture {kind!r} is not supported; supported in GGUF files are "
            f"{', '.join(ARCHITECTURES)}"
        )
    if "rope_freqs.weight" in names or f"{kind}.rope.scaling.type" in fields:
        raise UserError(
            f"{path}: rotary scaling in a GGUF file is not supported; take the model's safetensors"
        )
    c = {
        name.removeprefix(f"{kind}."): value for name, value in fields.items() if name.startswith(f"{kind}.")
    }
    head_size = c.get("attention.key_length", c["embedding_length"] // c["attention.head_count"])
    if c.get("rope.dimension_count", head_size) != head_size:
        raise UserError(
            f"{path}: rotary embedding on {c['rope.dimension_count']} of {head_size} components is not "
            "supported"
        )
    return {
        "model_type": ARCHITECTURES[kind],
        "num_hidden_layers": c["block_count"],
        "hidden_size": c["embedding_length"],
        "num_attention_heads": c["attention.head_count"],
        "num_key_value_heads": c.get("attention.head_count_kv", c["attention.head_count"]),
        "head_dim": head_size,
        "intermediate_size": c["feed_forward_length"],
        "max_position_embeddings": c["context_length"],
        "rms_norm_eps": c["attention.layer_norm_rms_epsilon"],
        "rope_theta": c.get("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in names,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
    }


def _tokenizer(fields: dict[str, Any], path: Path) -> dict[str, Any]:
    """Build the `tokenizer.json` of a byte-level BPE.

    Token types: 1 is ordinary, 3 and 4 are special ("control", "user-defined").
    """
    kind, pre = fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise UserError(
            f"{path}: a tokenizer of kind {kind!r} that splits text like {pre!r} is not supported "
            f"(byte-level BPE like {known} is); take the model's safetensors"
        )
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": token, "special": types[i] == 3} | plain
            for i, token in enumerate(tokens)
            if types[i] in (3, 4)
        ],
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]],
        },
    }
