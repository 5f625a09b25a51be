"""The figures of --dry_run against measurements.

They are compared with PyTorch's FLOP counter, saved tensors, and a model's own parameters.
"""

from dataclasses import replace

import pytest
import timm.layers
import torch
from torch.utils.flop_counter import FlopCounterMode

from configs.model import VisionConfig
from configs.train import Config, DataConfig, LoraConfig, LoraTower, TrainConfig
from models.dual_tower.dual_tower import DualTowerVLM
from models.vision_language_model import VisionLanguageModel
from models.weights.lora import add_adapters
from tests.conftest import TINY, TINY_MODEL, tiny_model
from training.checkpoint import tensors_of
from training.estimate import (
    count_flops,
    estimate_activations,
    full_batch,
    saved_bytes,
    step_memory,
    trained_shares,
)
from training.fit_memory import RepeatedBatch
from training.optim import make_optimizers
from training.precision import autocast
from training.step import train_step

FROZEN = {
    "none": {},
    "vision": {"lr_vision": 0.0},
    "right": {"lr_right": 0.0},
    "left": {"lr_left": 0.0, "lr_vision": 0.0},
    "adapters on the right": {"lora": LoraConfig(right=LoraTower(r=2))},
    "all but the right tower": {"lr_left": 0.0, "lr_vision": 0.0, "lr_projector": 0.0},
}


# A small ViT: torch counts the backward of EfficientNet's depthwise convolutions as if they were dense.
VIT = VisionConfig(
    "vit_base_patch16_siglip_224",
    "random",
    image_size=32,
    grid=4,
    normalize="unit",
    options='{"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8}',
)


def make_config(context: str, lora: LoraConfig = LoraConfig(), **rates: float) -> Config:  # noqa: B008
    # In a frozen right tower's first layer no gradient goes below attention. This is not modelled.
    tower = replace(TINY, layers=10)
    model = replace(TINY_MODEL, vision=VIT, left_context=context, left=tower, right=tower)
    data = DataConfig(left_length=30, right_length=96)
    return Config(
        model=model,
        data=data,
        lora=lora,
        train=TrainConfig(
            local_batch_size=3, global_batch_size=3, dtype="bf16", **({"lr_vision": 1e-3} | rates)
        ),
    )


@pytest.fixture
def plain_attention():
    """timm's attention as matrix products: torch's counter does not know the fused kernel of a CPU."""
    timm.layers.set_fused_attn(False)
    yield
    timm.layers.set_fused_attn(True)


@pytest.mark.parametrize("context", ["image", "none"])
@pytest.mark.parametrize("frozen", FROZEN)
def test_flops_are_those_of_the_counter(tokenizer, context, frozen, plain_attention):
    """FLOPs agree to 2 %, for the forward alone and with the backward.

    In bf16, where attention is plain matrix products that the counter recognizes.
    """
    config = make_config(context, **FROZEN[frozen])
    model = tiny_model(tokenizer, config.model)
    add_adapters(model, config.lora)
    make_optimizers(model, config.train)  # freezes
    batch = full_batch(config, tokenizer.vocabulary, 3)
    flops = count_flops(model)
    with (
        FlopCounterMode(display=False) as forward,
        torch.no_grad(),
        autocast(config.train, torch.device("cpu")),
    ):
        model(**batch)
    assert flops.forward(batch) == pytest.approx(forward.get_total_flops(), rel=0.02)
    with FlopCounterMode(display=False) as both, autocast(config.train, torch.device("cpu")):
        model(**batch).loss_sum.backward()
    trained = trained_shares(model)
    assert flops.training(batch, trained) == pytest.approx(both.get_total_flops(), rel=0.02)


def test_flops_are_the_same_on_the_meta_device(tokenizer):
    with torch.device("meta"):
        shapes = DualTowerVLM(TINY_MODEL, tokenizer.vocabulary)
    assert count_flops(shapes) == count_flops(tiny_model(tokenizer))


@pytest.mark.parametrize("model_class", [DualTowerVLM, VisionLanguageModel])
def test_activations_follow_from_one_and_two_layers_and_rows(tokenizer, model_class):
    config = make_config("none" if model_class is VisionLanguageModel else "image")

    def measure(rows: int, layers: int) -> int:
        return saved_bytes(config, model_class, tokenizer.vocabulary, rows, layers)

    assert estimate_activations(
        config.train.local_batch_size, config.model.right.layers, measure
    ) == pytest.approx(measure(config.train.local_batch_size, config.model.right.layers), rel=0.02)


def test_a_full_batch_is_full(tokenizer):
    config = make_config("image")
    batch = full_batch(config, tokenizer.vocabulary, 3)
    assert (
        batch["left_ids"].shape == (3, 30)
        and batch["right_ids"].shape == (3, 96)
        and len(batch["tiles"]) == 3 * 6
    )
    assert (batch["left_groups"].amax(1) == 5).all() and (batch["right_groups"].amax(1) == 5).all()
    vanilla = full_batch(make_config("none"), tokenizer.vocabulary, 1)
    assert (
        vanilla["right_ids"].shape == (1, 96)
        and int((vanilla["right_ids"] == tokenizer.image).sum()) == len(vanilla["tiles"]) * 4
    )


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_save_takes_a_copy_of_what_it_writes_and_its_file_twice(tokenizer, optimizer):
    """The tensors of a real checkpoint; a small one is a single file, assembled twice."""
    config = make_config("image")
    config = replace(config, train=replace(config.train, optimizer=optimizer, ema=0.9))
    model = tiny_model(tokenizer, config.model)
    optimizers = make_optimizers(model, config.train)
    batches = RepeatedBatch(full_batch(config, tokenizer.vocabulary, 3))
    train_step(config, model, optimizers, batches, 1, torch.device("cpu"))
    written = sum(tensor.nbytes for tensor in tensors_of(model, optimizers).values())
    without, with_save = (
        step_memory(config, DualTowerVLM, tokenizer.vocabulary, save=save)(3) for save in (False, True)
    )
    assert sum(with_save.values()) - sum(without.values()) == pytest.approx(3 * written, rel=0.01)
