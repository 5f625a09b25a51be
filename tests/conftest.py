"""Shared by the tests: tiny models, a tokenizer, and samples made by hand."""

from pathlib import Path

import pytest
import torch

from configs.schema import DecoderConfig, ModelConfig, ProjectorConfig, VisionConfig
from data.render import Renderer
from data.tokens import Tokenizer
from models.dual_tower.dual_tower import DualTowerVLM

torch.set_num_threads(1)  # tiny tensors: threads only get in one another's way

TINY = DecoderConfig(layers=3, hidden_size=48, heads=4, kv_heads=2, head_size=16, mlp_size=96, max_positions=256)
TINY_MODEL = ModelConfig(vision=VisionConfig(weights="random", image_size=64, stride=16), projector=ProjectorConfig(2), left=TINY, right=TINY)  # 4 image tokens a tile

TURNS = [
    {"user": "what color is the shape?", "assistant": "blue"},
    {"user": "is there a red circle in the image?", "assistant": "no"},
    {"user": "what is it?", "assistant": "a rectangle"},
    {"user": "is it large or is it small?", "assistant": "it is small"},
]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    text = [t for turn in TURNS for t in ("user\n", turn["user"], "assistant\n", turn["assistant"])]
    return Tokenizer.train(text * 3, 300)


@pytest.fixture(scope="session")
def renderer(tokenizer: Tokenizer) -> Renderer:
    return Renderer(tokenizer, TINY_MODEL.tokens_per_tile)


def tiny_model(tokenizer: Tokenizer, config: ModelConfig = TINY_MODEL, seed: int = 0) -> DualTowerVLM:
    """A dual tower with random weights, large enough for logits to tell inputs apart."""
    torch.manual_seed(seed)
    model = DualTowerVLM(config, tokenizer.vocabulary)
    with torch.no_grad():
        for p in [*model.right.parameters(), *model.left.decoder.parameters(), *model.left.embed_markers.parameters()]:
            if p.dim() >= 2:
                p.mul_(5)
    return model.eval()


@pytest.fixture
def model(tokenizer: Tokenizer) -> DualTowerVLM:
    return tiny_model(tokenizer)


def random_tiles(images: int, seed: int = 0, side: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def image_file(tmp_path: Path) -> Path:
    from PIL import Image

    path = tmp_path / "image.png"
    Image.fromarray(random_tiles(1)[0].permute(1, 2, 0).numpy()).save(path)
    return path
