"""LoRA: nothing at first, trained alone, saved in peft's format, merged without a change."""

from dataclasses import replace

import pytest
import torch

from configs.train import LoraConfig, LoraTower, TrainConfig
from data.collators import collate
from models.masks import cache_mask
from models.weights.lora import add_adapters, check_lora, load_adapter, merge_adapters, save_adapters
from tests.conftest import TINY, TINY_MODEL, TURNS, tiny_model
from tests.test_dual_tower import make_sample
from training.optim import make_optimizers
from utils.errors import UsageError, UserError

LORA = LoraConfig(left=LoraTower(r=4), right=LoraTower(r=8, targets="q_proj,v_proj,down_proj"))


@pytest.fixture
def batch(renderer):
    return collate(
        [[make_sample(renderer, 1, [TURNS[:2]]), make_sample(renderer, 2, [[TURNS[2]]], seed=1)]],
        renderer.tokenizer.global_image,
    )


def hidden(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).hidden


def train(model, batch, **rates: float) -> None:
    optimizers = make_optimizers(
        model, TrainConfig(**({"lr_projector": 1e-2, "lr_left": 1e-2, "lr_right": 1e-2} | rates))
    )
    model.train()
    for _ in range(2):
        model(**batch).loss_sum.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_trained_alone_saved_and_merged(tokenizer, batch, tmp_path):
    model = tiny_model(tokenizer)
    plain = hidden(model, batch)
    add_adapters(model, LORA)
    assert torch.equal(hidden(model, batch), plain)  # nothing at first
    before = {name: p.clone() for name, p in model.named_parameters()}
    train(model, batch)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in changed if "lora_" not in name} == {
        "left.modality_projector.norm.weight",
        "left.modality_projector.norm.bias",
        "left.modality_projector.proj.weight",
        "left.embed_tokens.weight",
    }
    lora = {name for name in before if "lora_" in name}
    assert {name for name in lora if name.startswith("right.")} == {
        f"right.layers.{i}.{m}.lora_{ab}.default.weight"
        for i in range(3)
        for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
        for ab in "AB"
    }
    assert changed >= lora
    trained = hidden(model, batch)
    assert not torch.allclose(trained, plain, atol=1e-3)
    assert [p.name for p in save_adapters(model, tmp_path)] == ["left", "right"]

    again = tiny_model(tokenizer)  # the same base; projector and markers as trained
    again.load_state_dict({n: p for n, p in model.state_dict().items() if n in changed - lora}, strict=False)
    for tower in ("left", "right"):
        load_adapter(again, tower, tmp_path / tower)
    assert torch.equal(hidden(again, batch), trained)
    for merged in (model, again):
        merge_adapters(merged)
        assert sorted(merged.state_dict()) == sorted(tiny_model(tokenizer).state_dict())
        torch.testing.assert_close(hidden(merged, batch), trained, atol=1e-4, rtol=1e-4)


def test_transformers_reads_the_right_towers_adapter(tokenizer, tmp_path):
    """The same language model in transformers with the adapter put on by peft, against ours."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    model = tiny_model(tokenizer)
    add_adapters(model, LORA)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
    save_adapters(model, tmp_path)
    c = TINY
    config = transformers.LlamaConfig(
        vocab_size=model.right.embed_tokens.num_embeddings, hidden_size=c.hidden_size,
        intermediate_size=c.mlp_size, num_hidden_layers=c.layers, num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads, head_dim=c.head_size, rms_norm_eps=c.norm_eps,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    base = {
        f"model.{n.replace('.base_layer', '')}": p
        for n, p in model.right.state_dict().items()
        if "lora_" not in n
    }
    theirs.load_state_dict(base | {"lm_head.weight": base["model.embed_tokens.weight"]})
    ids = torch.randint(0, 200, (1, 12), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(12)[None]
    causal = cache_mask(positions, positions)
    with torch.no_grad():
        ours = model.logits(model.right(model.embed(ids), positions, causal))
        assert not torch.allclose(theirs(ids).logits, ours, atol=1e-2)
        torch.testing.assert_close(
            peft.PeftModel.from_pretrained(theirs, tmp_path / "right")(ids).logits, ours, atol=1e-4, rtol=1e-4
        )


def test_what_does_not_fit_says_so(tokenizer, tmp_path):
    with pytest.raises(UsageError, match="no linear layer called x_proj"):
        check_lora(LoraConfig(right=LoraTower(r=2, targets="q_proj,x_proj")), ("left", "right"))
    with pytest.raises(UsageError, match="without --lora.right.r there are no adapters"):
        check_lora(LoraConfig(right=LoraTower(nf4=True)), ("left", "right"))
    with pytest.raises(UsageError, match="has no left tower"):
        check_lora(LORA, ("right",))
    with pytest.raises(UserError, match="cannot be read as an adapter"):
        load_adapter(tiny_model(tokenizer), "right", tmp_path)
    model = tiny_model(tokenizer)
    add_adapters(model, LORA)
    save_adapters(model, tmp_path)
    small = replace(TINY, hidden_size=64)
    with pytest.raises(UserError, match="does not fit this model's right tower"):
        load_adapter(tiny_model(tokenizer, replace(TINY_MODEL, right=small)), "right", tmp_path / "right")


@pytest.mark.skipif(torch.cuda.is_available(), reason="here QLoRA would run")
def test_qlora_without_cuda_is_an_error():
    with pytest.raises(UsageError, match="QLoRA needs CUDA"):
        check_lora(LoraConfig(right=LoraTower(r=4, nf4=True)), ("left", "right"))
