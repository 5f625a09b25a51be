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
from models.kernels import use_kernels
from models.vision_language_model import VisionLanguageModel
from models.weights.lora import add_adapters
from tests.conftest import TINY, TINY_MODEL, tiny_model
from training.checkpoint import tensors_of
from training.dry_run import dry_run
from training.flops import count_flops, trained_shares
from training.memory import RepeatedBatch, activation_bytes, full_batch, saved_bytes, step_memory
from training.optim import make_optimizers
from training.trainer import Trainer, batch_counts
from utils.device import autocast

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


def make_config(
    context: str,
    lora: LoraConfig = LoraConfig(),  # noqa: B008
    left_layers: int = 10,
    **rates: float,
) -> Config:
    # In a frozen right tower's first layer no gradient goes below attention. This is not modelled.
    tower = replace(TINY, layers=10)
    left = replace(TINY, layers=left_layers)
    model = replace(TINY_MODEL, vision=VIT, left_context=context, left=left, right=tower)
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
def plain():
    """Plain kernels; timm's attention as matrix products, whose backward the counter counts as ours."""
    timm.layers.set_fused_attn(False)
    use_kernels("plain")
    yield
    timm.layers.set_fused_attn(True)
    use_kernels("auto")


def counted(run) -> tuple[float, float]:
    """FLOPs of `run`: all, and those of the decoders' attention."""
    with FlopCounterMode(display=False) as counter:
        run()
    by_operation = counter.get_flop_counts()["Global"]
    attention = sum(n for op, n in by_operation.items() if "scaled_dot_product" in str(op))
    return counter.get_total_flops(), attention


@pytest.mark.parametrize(("context", "left_layers"), [("image", 10), ("image", 4), ("none", 10)])
@pytest.mark.parametrize("frozen", FROZEN)
def test_flops_are_those_of_the_counter(tokenizer, context, left_layers, frozen, plain):
    """FLOPs agree to 2 %: of the forward, and of the whole step but for attention.

    In training, attention counts what is seen, in three products for each of the forward's.
    """
    config = make_config(context, left_layers=left_layers, **FROZEN[frozen])
    model = tiny_model(tokenizer, config.model)
    add_adapters(model, config.lora)
    make_optimizers(model, config.train)  # freezes
    batch = full_batch(config, tokenizer.vocabulary, 3)
    flops, trained = count_flops(model), trained_shares(model)
    with autocast(config.train.dtype, torch.device("cpu")):
        with torch.no_grad():
            forward, dense = counted(lambda: model(**batch))
        both, attention = counted(lambda: model(**batch).loss_sum.backward())
    assert flops.forward(batch) == pytest.approx(forward, rel=0.02) and dense > 0.05 * forward
    without = replace(flops, left_pair=0, right_pair=0)
    assert without.training(batch_counts(batch), trained) == pytest.approx(both - attention, rel=0.02)
    if context == "none":
        documents, positions = batch["right_documents"], batch["right_positions"]
        same = documents[:, :, None] == documents[:, None, :]
        seen = (same & (positions[:, None, :] <= positions[:, :, None])).float().mean().item()
        own = flops.training(batch_counts(batch), trained) - without.training(batch_counts(batch), trained)
        assert own == pytest.approx(3 * dense * seen, rel=1e-6)


def test_flops_are_the_same_on_the_meta_device(tokenizer):
    with torch.device("meta"):
        shapes = DualTowerVLM(TINY_MODEL, tokenizer.vocabulary)
    assert count_flops(shapes) == count_flops(tiny_model(tokenizer))


@pytest.mark.parametrize("model_class", [DualTowerVLM, VisionLanguageModel])
def test_activations_follow_from_one_and_two_layers_and_rows(tokenizer, model_class):
    config = make_config("none" if model_class is VisionLanguageModel else "image")
    measured = saved_bytes(config, model_class, tokenizer.vocabulary, 3, 10, 10)
    estimate = activation_bytes(config, model_class, tokenizer.vocabulary, 3)
    assert estimate == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("layer_map", ["", "0,0,0,0,0,0,0,1,2,3"])
def test_activations_of_a_shallower_left_tower(tokenizer, layer_map):
    config = make_config("image", left_layers=4)
    config = replace(config, model=replace(config.model, layer_map=layer_map))
    measured = saved_bytes(config, DualTowerVLM, tokenizer.vocabulary, 3, 4, 10)
    estimate = activation_bytes(config, DualTowerVLM, tokenizer.vocabulary, 3)
    assert estimate == pytest.approx(measured, rel=0.02)
    assert measured < 0.9 * saved_bytes(config, DualTowerVLM, tokenizer.vocabulary, 3, 10, 10)


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
    trainer = Trainer(config, model, RepeatedBatch(full_batch(config, tokenizer.vocabulary, 3)))
    trainer.train_step()
    written = sum(tensor.nbytes for tensor in tensors_of(model, trainer.optimizers).values())
    without, with_save = (
        step_memory(config, DualTowerVLM, tokenizer.vocabulary, 3, save=save) for save in (False, True)
    )
    assert sum(with_save.values()) - sum(without.values()) == pytest.approx(3 * written, rel=0.01)


@pytest.mark.parametrize(("device", "counted"), [("cpu", True), ("cuda", False)])
def test_a_dry_run_counts_a_save_on_a_cpu_only(tokenizer, capsys, device, counted):
    """A GPU's need can be estimated on a machine without one."""
    config = make_config("image")
    config = replace(config, train=replace(config.train, device=device))
    dry_run(config, DualTowerVLM, tokenizer.vocabulary)
    assert ("a save: copies" in capsys.readouterr().out) == counted
