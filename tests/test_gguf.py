"""GGUF files of tiny models: read back, or refused with a reason.

They are written by the package gguf in the same way as llama.cpp's converter.
"""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from models.weights.gguf import convert_gguf
from models.weights.language_models import find_language_model
from tests.test_language_models import logits, ours, reference
from utils.errors import UserError

NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def in_gguf(name: str) -> str:
    if not name.startswith("model.layers."):
        return {
            "model.embed_tokens.weight": "token_embd.weight",
            "model.norm.weight": "output_norm.weight",
            "lm_head.weight": "output.weight",
        }[name]
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    stem, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{NAMES[stem]}.{kind}"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of a head's rows: component i and i + E/2 side by side."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(weight.shape)


def write(path, model, kind: str, change=None, **settings) -> None:
    c = model.config
    writer = gguf.GGUFWriter(path, kind)
    fields = {
        "block_count": c.num_hidden_layers, "context_length": 128,
        "embedding_length": c.hidden_size, "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads, "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": c.head_dim if kind != "qwen2" else c.hidden_size // c.num_attention_heads,
    }  # fmt: skip
    for name, value in fields.items():
        writer.add_uint32(f"{kind}.{name}", value)
    writer.add_float32(f"{kind}.attention.layer_norm_rms_epsilon", c.rms_norm_eps)
    writer.add_float32(f"{kind}.rope.freq_base", c.rope_parameters["rope_theta"])
    writer.add_string("tokenizer.ggml.model", settings.get("tokenizer", "gpt2"))
    writer.add_string("tokenizer.ggml.pre", settings.get("pre", "qwen2"))
    tokens = [chr(0x100 + i) for i in range(c.vocab_size)]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges([" ".join(tokens[:2])])
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        values = tensor.numpy()
        if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            values = interleaved(values, c.num_attention_heads if "q_proj" in name else c.num_key_value_heads)
        if change is not None and (raw := change(name, values)) is not None:
            writer.add_tensor(in_gguf(name), raw[0], raw_shape=raw[1], raw_dtype=raw[2])
        else:
            writer.add_tensor(in_gguf(name), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3"])
def test_logits_equal_those_of_the_model_written(kind, tmp_path):
    for seed in range(2):
        model = reference(kind, seed, tmp_path / "hf")
        write(tmp_path / f"{seed}.gguf", model, kind.lower())
        folder = find_language_model(str(tmp_path / f"{seed}.gguf"), tmp_path)
        ids = torch.randint(0, 90, (2, 20), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            expected = model(ids).logits
        positions = torch.arange(20).expand_as(ids)
        torch.testing.assert_close(
            logits(ours(folder), ids, positions, torch.zeros_like(ids)), expected, atol=1e-4, rtol=1e-4
        )
        written = (folder / "model.safetensors").stat().st_mtime_ns
        assert (
            find_language_model(str(tmp_path / f"{seed}.gguf"), tmp_path) == folder
            and (folder / "model.safetensors").stat().st_mtime_ns == written
        )


def test_a_quantised_tensor_is_undone(tmp_path):
    model = reference("Llama", 0, tmp_path / "hf", hidden_size=64, intermediate_size=64)

    def quantise(name, values):
        if not name.endswith("up_proj.weight"):
            return None
        packed = gguf.quantize(values, Kind.Q8_0)
        return packed, packed.shape, Kind.Q8_0

    write(tmp_path / "q.gguf", model, "llama", quantise)
    mine = ours(convert_gguf(tmp_path / "q.gguf", tmp_path))
    weight, true = mine.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight
    assert 0 < (weight - true).abs().max() < true.abs().max() / 100
    assert torch.equal(mine.layers[0].mlp.gate_proj.weight, model.model.layers[0].mlp.gate_proj.weight)


def test_what_cannot_be_read_says_why(tmp_path):
    model = reference("Llama", 0, tmp_path / "hf", hidden_size=256)

    def strange(name, values):
        return (
            (np.zeros((values.shape[0], 292), np.uint8), (values.shape[0], 292), Kind.Q8_K)
            if name.endswith("0.mlp.up_proj.weight")
            else None
        )

    for name, kind, change, settings, message in (
        (
            "a",
            "gemma",
            None,
            {},
            "architecture 'gemma' is not supported; supported in GGUF files are llama, qwen2, qwen3",
        ),
        ("b", "llama", strange, {}, "blk.0.ffn_up.weight is quantised as Q8_K"),
        ("c", "llama", None, {"tokenizer": "llama"}, "a tokenizer of kind 'llama'"),
        ("d", "llama", None, {"pre": "falcon"}, "splits text like 'falcon'"),
    ):
        write(tmp_path / f"{name}.gguf", model, kind, change, **settings)
        with pytest.raises(UserError, match=message):
            convert_gguf(tmp_path / f"{name}.gguf", tmp_path / "cache")
    whole = (tmp_path / "b.gguf").read_bytes()
    for share in (0.0, 0.01, 0.5, 0.99):
        (tmp_path / "cut.gguf").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(UserError, match="cut.gguf"):
            convert_gguf(tmp_path / "cut.gguf", tmp_path / "cache")
    assert not (tmp_path / "cache").exists() or list((tmp_path / "cache").iterdir()) == []
