"""The bridge: identity at the start, learned, and the same in training, in decoding and in exported code."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForImageTextToText

from configs.model import GenerationConfig, ModelConfig
from configs.train import Config, TrainConfig
from data.collators import collate, collate_prompts
from data.images import Tiles
from eval.predictor import Predictor
from models.dual_tower.dual_tower import DualTowerVLM
from models.generation import prefill
from models.image_store import image_kv_fingerprint
from models.weights.model_folder import left_tower_of, load_left_tower
from tests.conftest import TINY, TINY_MODEL, TURNS, lively_model, random_tiles, tiny_model
from tests.naive_dual_tower import Naive
from tests.test_dual_tower import block_starts, document_logits, full_ids, make_sample
from training.export import export
from training.optim import make_optimizers
from utils.errors import UsageError

GATE = replace(TINY_MODEL, bridge="gate")
SHALLOW = replace(GATE, left=replace(TINY, layers=2), layer_map="0,1,1")
GATES = "left.bridge.gates"


def bridged(tokenizer, config: ModelConfig = GATE) -> DualTowerVLM:
    """A model whose bridge is not the identity."""
    model = lively_model(tokenizer, config)
    torch.nn.init.normal_(model.left.bridge.gates, std=0.5)
    return model


def batch_of(renderer, tokenizer) -> dict[str, torch.Tensor]:
    samples = [make_sample(renderer, 2, [TURNS[:2], TURNS[2:]], seed=1), make_sample(renderer, 1, [TURNS])]
    return collate([samples], tokenizer.global_image)


def answers(predictor: Predictor) -> list[str]:
    asked = [([Tiles((1, 1), random_tiles(1, seed))], "what color is the shape?") for seed in range(3)]
    return [answer.text for answer in predictor.answer(asked, GenerationConfig(max_new_tokens=12))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [GATE, SHALLOW])
def test_step_0_is_that_of_a_model_without_one(tokenizer, renderer, config, dtype):
    """Loss, gradients and answers, to the bit."""
    models = [lively_model(tokenizer, replace(config, bridge=bridge)) for bridge in ("none", "gate")]
    losses = []
    for model in models:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            losses.append(model(**batch_of(renderer, tokenizer)).loss_sum)
        losses[-1].backward()
    assert torch.equal(*losses)
    without, own = (dict(model.named_parameters()) for model in models)
    assert own.keys() - without.keys() == {GATES} and own[GATES].grad.any()
    assert all(torch.equal(p.grad, own[name].grad) for name, p in without.items() if p.grad is not None)
    texts = [answers(Predictor(model, renderer)) for model in models]
    assert texts[0] == texts[1] and any(texts[0])


@pytest.mark.parametrize("config", [GATE, SHALLOW])
def test_equals_the_naive_dual_tower(tokenizer, renderer, config):
    """Packed, and by image KV and prompt."""
    model, sample = tiny_model(tokenizer, config), make_sample(renderer, 1, [[TURNS[0]], [TURNS[1]]])
    torch.nn.init.normal_(model.left.bridge.gates, std=0.5)
    expected = Naive(model).logits(full_ids(renderer, sample, 0), sample.tiles)
    packed = collate([[sample]], tokenizer.global_image)
    torch.testing.assert_close(document_logits(model, packed, 0, 0), expected, atol=1e-5, rtol=0)
    document = sample.documents[0]
    kv = model.encode_image(sample.tiles, torch.tensor(document.left_ids))
    prompts = collate_prompts([document])
    with torch.no_grad():
        images = [[(kv, block_starts(document)[0])]]
        _, states = prefill(model, prompts["ids"], prompts["positions"], images, 4)
    torch.testing.assert_close(model.logits(states)[0], expected, atol=1e-5, rtol=0)


def test_training_moves_it_with_the_left_decoder(tokenizer, renderer):
    model = tiny_model(tokenizer, GATE)
    optimizers = make_optimizers(model, TrainConfig(lr_left=1e-2, optimizer="muon"))  # each parameter once
    before = model(**batch_of(renderer, tokenizer)).loss_sum
    before.backward()
    for optimizer in optimizers:
        optimizer.step()
    assert model.left.bridge.gates.detach().abs().amax((1, 2, 3, 4)).gt(1e-3).all()  # of every layer
    assert model(**batch_of(renderer, tokenizer)).loss_sum < before


def test_folders_and_stores(tokenizer, renderer, tmp_path):
    """A folder keeps the bridge. Stored image KVs have it, and are not those of another bridge."""
    model = bridged(tokenizer)
    export(model, tmp_path / "model", tokenizer, Config(model=model.config), tmp_path)
    expected = answers(Predictor(model, renderer))
    for image_kv in ("computed", "reused"):
        again = Predictor.from_pretrained(tmp_path / "model", dtype="fp32", store=tmp_path / "store")
        asked = [([Tiles((1, 1), random_tiles(1))], "what color is the shape?")]
        assert again.answer(asked, GenerationConfig(max_new_tokens=12))[0].image_kv == image_kv
        assert answers(again) == expected and image_kv_fingerprint(again.model) == image_kv_fingerprint(model)
    with torch.no_grad():
        model.left.bridge.gates.zero_()
    assert answers(Predictor(model, renderer)) != expected
    assert image_kv_fingerprint(model) != image_kv_fingerprint(again.model)


def test_in_transformers(tokenizer, tmp_path, modules_cache):
    model = bridged(tokenizer, SHALLOW)
    export(model, tmp_path / "model", tokenizer, Config(model=model.config), tmp_path)
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", trust_remote_code=True).model
    block, tiles = torch.tensor([tokenizer.global_image] + [tokenizer.image] * 4), random_tiles(1)
    expected = model.encode_image(tiles, block).data
    assert torch.equal(theirs.vlm.encode_image(tiles, block).data, expected)


def test_an_older_folder_has_none(tokenizer, tmp_path):
    tiny_model(tokenizer).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["model"]["bridge"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert DualTowerVLM.from_pretrained(tmp_path).left.bridge is None


def test_a_left_tower_of_another_model(tokenizer, tmp_path):
    """The bridge of the layers that are taken; the identity, where the source has none."""
    source = bridged(tokenizer)
    source.save_pretrained(tmp_path / "gate")
    tiny_model(tokenizer).save_pretrained(tmp_path / "none")
    for name, expected in (("gate", source.left.bridge.gates[:2]), ("none", torch.zeros(2, 2, 2, 1, 16))):
        model = DualTowerVLM(SHALLOW, source.vocabulary)
        load_left_tower(model.left, *left_tower_of(str(tmp_path / name)), context=name)
        assert torch.equal(model.left.bridge.gates, expected)


def test_a_vanilla_model_has_none():
    with pytest.raises(UsageError, match="model.bridge has no effect, for a vanilla model has no left tower"):
        Config(model=replace(GATE, left_context="none"))
