"""The stored references: rendered records, packed rows, batches, data state, answers of tiny models."""

import hashlib
import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zlib import crc32

import numpy as np
import torch

from configs.cli import resolve
from configs.model import (
    DecoderConfig,
    GenerationConfig,
    ModelConfig,
    MultiTokenConfig,
    ProjectorConfig,
    VisionConfig,
)
from data.collators import collate_prompts
from data.images import Tiles
from data.packing import Budget, Window
from data.render import Document, Renderer
from data.tokenizer import Tokenizer
from eval.predictor import Predictor
from models.dual_tower.dual_tower import DualTowerVLM
from models.generation import generate
from models.vision_language_model import VisionLanguageModel
from tests.conftest import chat
from training.setup import build_data

FILE = Path(__file__).parent / "references.json"
TURNS = [
    {"user": "what color is the shape?", "assistant": "blue"},
    {"user": "<|im_start|>is there\n<|image|> a red  circle?", "assistant": "no<|im_end|>"},
    {"user": "naïve façade 你好 🙂\u200d", "assistant": "ünïcode"},
    {"user": "is it large or is it small?", "assistant": " it is small \n"},
]
GRIDS = {"text": [], "one image": [(1, 1)], "two images": [(1, 1), (1, 1)], "tiles": [(2, 3), (1, 1)]}
CONTEXTS = ("image", "prefix", "none")
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
MODEL = ModelConfig(
    VisionConfig("tf_efficientnet_lite0", "random", level=3, image_size=64, grid=4),
    ProjectorConfig(pixel_shuffle=2, norm=True),
    TINY,
    TINY,
)  # 4 image tokens a tile
MODELS = {
    "dual tower": MODEL,
    "bidirectional": replace(MODEL, left_attention="bidirectional"),
    "images see one another": replace(MODEL, image_isolation=False),
    "prefix": replace(MODEL, left_context="prefix", image_isolation=False),
    "vanilla": replace(MODEL, left_context="none"),
    "heads": replace(MODEL, multi_token=MultiTokenConfig(3, 32)),
}
SETTINGS = {
    "greedy": GenerationConfig(max_new_tokens=12),
    "greedy, penalty": GenerationConfig(max_new_tokens=12, repetition_penalty=1.5),
    "sampled": GenerationConfig(
        max_new_tokens=12, sampling=True, seed=3, temperature=1.3, top_k=40, top_p=0.95
    ),
    "drafts": GenerationConfig(max_new_tokens=12, speculative="on"),
    "sampled drafts": GenerationConfig(
        max_new_tokens=12, sampling=True, seed=5, speculative="on", draft_tokens=2
    ),
}
RUNS = {
    "default": [],
    "vanilla": ["--config", "vanilla_easyvqa"],
    "chain": ["--data.turns", "chain", "--data.right_length", "256"],
    "mixture": ["--data.sources", "easy_vqa*0.5,openmoji:60", "--data.temperature", "2"],
    "tiles": [
        "--model.vision.image_size",
        "64",
        "--model.vision.max_side",
        "128",
        "--model.vision.enlarge",
        "true",
        "--data.left_length",
        "64",
        "--data.max_tiles",
        "8",
    ],
}
SMALL = ["--data.limit", "120", "--data.validation_images", "20", "--data.window", "24"]


def tiny_tokenizer() -> Tokenizer:
    text = [t for turn in TURNS for t in ("user\n", turn["user"], "assistant\n", turn["assistant"])]
    return Tokenizer.train(text * 3, 320)


def digest(*values: Any) -> str:
    """Of tensors (their type, shape and bytes) and of plain JSON."""
    out = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            out.update(f"{value.dtype}{tuple(value.shape)}".encode() + value.contiguous().numpy().tobytes())
        else:
            out.update(json.dumps(value, sort_keys=True).encode())
    return out.hexdigest()[:16]


def columns(document: Document) -> dict[str, list[int]]:
    return {
        name: getattr(document, name)
        for name in ("left_ids", "left_positions", "left_images", "right_ids", "right_positions", "labels")
    }


def rendered() -> dict[str, Any]:
    """Ids, positions and labels of conversations and prompts, by routing and images."""
    tokenizer, out = tiny_tokenizer(), {}
    for context in CONTEXTS:
        renderer = Renderer(tokenizer, 4, context)
        for name, grids in GRIDS.items():
            out[f"{context}, {name}"] = columns(renderer.conversation(chat(TURNS, len(grids)), grids))
            out[f"{context}, {name}, prompt"] = columns(
                renderer.prompt(chat([*TURNS[:2], {"user": "and now?"}], len(grids)), grids)
            )
    return out


def runs() -> dict[str, Any]:
    """References of several configurations.

    The tokenizer, an epoch's rows, the data state, and the batches before and after a resume.
    """
    return {
        f"{name}, streams {streams}": run([*flags, *SMALL, "--data.streams", str(streams)])
        for name, flags in RUNS.items()
        for streams in ((1, 2) if name == "mixture" else (1,))
    }


def run(flags: list[str]) -> dict[str, Any]:
    config, _ = resolve(flags, "")
    vision = replace(
        config.model.vision, grid=config.model.vision.grid or config.model.vision.image_size // 16
    )
    config = replace(config, model=replace(config.model, vision=vision))
    with TemporaryDirectory() as folder:
        data = build_data(config, Path(folder))
        rows = [[list(sample.key) for sample in row] for row in islice(iter(data.batches.rows), 60)]
        data = build_data(config, Path(folder))
        before = [batch_digest(next(data.batches)) for _ in range(4)]
        state = json.loads(json.dumps(list(data.batches.state().values())))
        after = [batch_digest(next(data.batches)) for _ in range(4)]
        resumed = build_data(config, Path(folder))
        resumed.batches.load_state(state)
        again = [batch_digest(next(resumed.batches)) for _ in range(4)]
    assert after == again, "a resumed run has other batches"
    return {
        "tokenizer": hashlib.blake2b(data.tokenizer.backend.to_str().encode(), digest_size=16).hexdigest(),
        "first rows": rows[:3],
        "rows": digest(rows),
        "state": digest(state),
        "first stream's position": {name: state[0][name] for name in ("epoch", "cursor", "part", "number")},
        "batches": before,
        "batches after a resume": again,
    }


def batch_digest(batch: dict[str, torch.Tensor]) -> str:
    """Without pixels, which CPUs resize with other last bits."""
    return digest(list(batch["tiles"].shape), *(batch[name] for name in sorted(batch) if name != "tiles"))


def packed() -> dict[str, Any]:
    """Rows of lengths like The Cauldron's: the numbers of their samples."""
    rng, window = np.random.default_rng(0), Window(Budget(2600, 1496, 65, 40))
    rows: list[list[int]] = []
    for number in range(1500):
        tiles = int(rng.integers(0, 9))
        window.add(
            FakeSample(  # type: ignore[arg-type]
                number, 65 * tiles, int(min(1496, 20 + rng.exponential(173))), tiles
            )
        )
        if len(window) == 300:
            rows.append([sample.key for sample in window.take_row()])  # type: ignore[misc]
    return {"rows": digest(rows), "first": rows[0]}


class FakeSample:
    """Lengths alone: all that packing looks at."""

    def __init__(self, key: int, left_length: int, right_length: int, tile_total: int) -> None:
        self.key, self.left_length, self.right_length, self.tile_total = (
            key,
            left_length,
            right_length,
            tile_total,
        )


def fill(model: torch.nn.Module) -> None:
    """Fill weights from NumPy's generator: the same on every machine.

    The weights are large, so that logits differ clearly.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            seed = crc32(
                ("right." * name.startswith("heads.") + name).encode()
            )  # the name that it had when the references were stored
            values = np.random.default_rng(seed).standard_normal(tuple(parameter.shape))
            scale = 1.0 if parameter.dim() < 2 else 3.0 * parameter[0].numel() ** -0.5
            own = torch.from_numpy(values).float() * scale
            parameter.copy_(
                own.abs() * 0.5 + 0.5
                if parameter.dim() < 2 and name.endswith("weight")
                else own * 0.1
                if parameter.dim() < 2
                else own
            )


def answers() -> dict[str, Any]:
    """Tokens that tiny models give to a ragged batch of three prompts with one, two and no images."""
    tokenizer, out = tiny_tokenizer(), {}
    for name, config in MODELS.items():
        model = (VisionLanguageModel if config.left_context == "none" else DualTowerVLM)(
            config, tokenizer.vocabulary
        ).eval()
        fill(model)
        predictor = Predictor(model, Renderer(tokenizer, config.tokens_per_tile, config.left_context))
        pixels = torch.from_numpy(
            np.random.default_rng(7).integers(0, 256, (3, 1, 3, 64, 64), dtype=np.uint8)
        )
        images = [[Tiles((1, 1), pixels[0])], [Tiles((1, 1), pixels[1]), Tiles((1, 1), pixels[2])], []]
        prompts = [predictor.prompt(row, turn["user"]) for row, turn in zip(images, TURNS, strict=False)]
        for what, settings in SETTINGS.items():
            if "drafts" in what and name != "heads":
                continue
            placed = predictor.images_of(prompts, images)[0]
            generated = generate(
                model,
                images=placed,
                turn_end=tokenizer.turn_end,
                settings=settings,
                tiles=predictor.tiles_of(images),
                **collate_prompts(prompts),
            )
            out[f"{name}, {what}"] = generated.tokens
    return out


def references() -> dict[str, Any]:
    return {"rendered": rendered(), "runs": runs(), "packed": packed(), "answers": answers()}


def write() -> None:
    parts = [
        f'"{part}": {{\n'
        + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in values.items())
        + "\n}"
        for part, values in references().items()
    ]
    FILE.write_text("{\n" + ",\n".join(parts) + "\n}\n")
