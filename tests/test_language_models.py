"""The decoder against transformers: Llama, Qwen2, Qwen3 and SmolLM3 of random tiny shapes, fp32."""

import json
import random

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from models.language_model import KeyValueDecoder, LanguageModel
from models.masks import cache_mask, right_mask
from models.weights.language_models import (
    decoder_config,
    load_language_model,
    load_left_decoder,
    read_tensors,
)
from utils.errors import UserError

KINDS = ["Llama", "Qwen2", "Qwen3", "SmolLM3"]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 500.0,
}


def reference(kind: str, seed: int, folder, **changes):
    """A random small model of transformers, saved."""
    rng = random.Random(f"{kind}{seed}")
    groups = rng.choice([1, 2])
    heads = groups * rng.choice([1, 2, 3])
    options = {
        "vocab_size": 90, "hidden_size": rng.choice([32, 40]), "intermediate_size": rng.choice([48, 72]),
        "num_hidden_layers": rng.choice([2, 5]),
        "num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": rng.choice([8, 16]),
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": rng.choice([True, False]),
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": rng.choice([1e3, 1e5])},
    }  # fmt: skip
    if kind == "Qwen2":
        options["hidden_size"] = options.pop("head_dim") * heads
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**options | changes)
    ).eval()
    with torch.no_grad():
        for p in (
            model.parameters()
        ):  # norms and biases that differ from what they start as; logits that tell tokens apart
            p.add_(torch.randn_like(p) * (0.3 if p.dim() < 2 else 0.1))
    model.save_pretrained(folder)
    return model


def ours(folder, extra_tokens: int = 0) -> LanguageModel:
    tensors = read_tensors(folder)
    model = LanguageModel(decoder_config(folder), len(tensors["embed_tokens.weight"]) + extra_tokens).eval()
    load_language_model(model, tensors, str(folder))
    return model


def logits(
    model: LanguageModel, ids: torch.Tensor, positions: torch.Tensor, documents: torch.Tensor
) -> torch.Tensor:
    nothing = torch.empty(len(ids), 0, dtype=torch.int64)
    with torch.no_grad():
        return model.logits(
            model(
                model.embed_tokens(ids),
                positions,
                right_mask(positions, documents, documents, nothing, nothing),
            )
        )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers(kind, seed, tmp_path):
    """Alone, left-padded, and packed with another text."""
    changes = {"rope_parameters": LLAMA3} if kind == "Llama" and seed % 2 else {}
    theirs, model = reference(kind, seed, tmp_path, **changes), ours(tmp_path)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters())
    a, b = torch.randint(0, 90, (1, 60)), torch.randint(0, 90, (1, 17))
    with torch.no_grad():
        expected_a, expected_b = theirs(a).logits[0], theirs(b).logits[0]
    count, zeros = torch.arange(60)[None], torch.zeros(1, 60, dtype=torch.int64)
    torch.testing.assert_close(logits(model, a, count, zeros)[0], expected_a, atol=1e-4, rtol=0)
    packed = logits(
        model,
        torch.cat((a, b), 1),
        torch.cat((count, count[:, :17]), 1),
        torch.cat((zeros, zeros[:, :17] + 1), 1),
    )[0]
    torch.testing.assert_close(packed, torch.cat((expected_a, expected_b)), atol=1e-4, rtol=0)
    padded = logits(
        model,
        torch.cat((zeros[:, :9], b), 1),
        torch.cat((zeros[:, :9], count[:, :17]), 1),
        torch.cat((zeros[:, :9] - 1, zeros[:, :17]), 1),
    )[0, 9:]
    torch.testing.assert_close(padded, expected_b, atol=1e-4, rtol=0)


def test_scaling_and_missing_rope_matter(tmp_path):
    """What the comparison above rests on is not the same with the feature left out."""
    plain, scaled = (
        reference("Llama", 1, tmp_path / "a"),
        reference("Llama", 1, tmp_path / "b", rope_parameters=LLAMA3 | {"rope_theta": 1e3}),
    )
    ids = torch.randint(0, 90, (1, 60))
    with torch.no_grad():
        assert (plain(ids).logits - scaled(ids).logits).abs().max() > 1e-2
    reference("SmolLM3", 3, tmp_path / "c", num_hidden_layers=5)
    assert decoder_config(tmp_path / "c").no_rope_interval == 4


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_start_as_the_mean_and_leave_the_old_alone(tied, tmp_path):
    reference("Llama", 0, tmp_path, tie_word_embeddings=tied)
    old, new = ours(tmp_path), ours(tmp_path, extra_tokens=3)
    ids, count = torch.randint(0, 90, (1, 40)), torch.arange(40)[None]
    a, b = (logits(m, ids, count, torch.zeros_like(ids)) for m in (old, new))
    assert torch.equal(a, b[..., :90])
    for table in {new.embed_tokens.weight, new.unembedding}:
        torch.testing.assert_close(table[90:], table[:90].mean(0).expand(3, -1))


def test_the_left_decoder_takes_a_language_models_keys_and_values(tmp_path):
    theirs = reference("Qwen3", 0, tmp_path)
    config = decoder_config(tmp_path)
    left = KeyValueDecoder(config)
    unused = load_left_decoder(left, list(range(config.layers)), read_tensors(tmp_path), str(tmp_path))
    last = f"layers.{config.layers - 1}."
    assert {
        "norm.weight",
        "embed_tokens.weight",
        f"{last}self_attn.q_proj.weight",
        f"{last}mlp.up_proj.weight",
    } <= set(unused)
    ids, positions = torch.randint(0, 90, (1, 20)), torch.arange(20)[None]
    with torch.no_grad():
        layers = left(theirs.get_input_embeddings()(ids), positions, cache_mask(positions, positions))
        cache = theirs(ids, use_cache=True).past_key_values
    for layer, (_, values) in enumerate(layers):
        torch.testing.assert_close(values, cache.layers[layer].values, atol=1e-4, rtol=0)


def test_sharded_folders(tmp_path):
    model = reference("Llama", 2, tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    one, many = read_tensors(tmp_path / "one"), read_tensors(tmp_path / "many")
    assert one.keys() == many.keys() and all(torch.equal(one[n], many[n]) for n in one)
    next((tmp_path / "many").glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match="not a complete language model"):
        read_tensors(tmp_path / "many")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "'mamba' is not supported; supported are llama, qwen2, qwen3, smollm3"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "type 'yarn' is not supported"),
    ],
)
def test_what_the_decoder_does_not_do_is_named(change, message, tmp_path):
    reference("Llama", 0, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(UserError, match=message):
        decoder_config(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "lacks norm.weight"),
        (lambda t: t.update({"model.norm.bias": torch.zeros(3)}), "unexpected norm.bias"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), "norm.weight is"),
    ],
)
def test_tensors_are_accounted_for(damage, message, tmp_path):
    reference("Llama", 0, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        ours(tmp_path)
