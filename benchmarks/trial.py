"""The models and data of the training benchmarks: random weights, and one packed row of six documents.

222m       SigLIP-B/16 at 224 pixels, 49 tokens per image, and decoders of SmolLM2-135M's sizes
450m       SigLIP 2 B/16 at 512 pixels, 64 tokens per image, and decoders of SmolLM2-360M's sizes
tiny       for tests and the guard

The text vocabulary of 222m and 450m has 49,152 tokens. A document is an image, a question of 59 tokens and an
answer of 60 supervised tokens; no padding, no markers. The images go to vanilla's decoder, or to the dual
tower's left one. AdamW trains every part, through `training.trainer.Trainer`.
"""

import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from configs.model import (
    DecoderConfig,
    ModelConfig,
    MultiTokenConfig,
    ProjectorConfig,
    VisionConfig,
    Vocabulary,
)
from configs.train import Config, DataConfig, TrainConfig
from models.dual_tower.dual_tower import DualTowerVLM
from models.vision_language_model import VisionLanguageModel
from training.flops import count_flops, trained_shares
from training.memory import RepeatedBatch
from training.trainer import Batch, Trainer, batch_counts
from utils.device import autocast
from utils.errors import UserError

MODELS: dict[str, Any] = {"vanilla": VisionLanguageModel, "dual_tower": DualTowerVLM}
DOCUMENTS, QUESTION, ANSWER = 6, 59, 60  # of the standard row; lengths in tokens
MARKERS = 65  # the global image's and 8 × 8 tiles': rows of the embedding tables, as in a real model


@dataclass(frozen=True)
class Size:
    vision: VisionConfig
    shuffle: int
    decoder: DecoderConfig
    text: int  # tokens of the text vocabulary


SIZES = {
    "tiny": Size(
        VisionConfig(
            "vit_base_patch16_siglip_224",
            "random",
            image_size=32,
            grid=4,
            options='{"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8}',
        ),
        2,
        DecoderConfig(layers=3, hidden_size=48, heads=4, kv_heads=2, head_size=16, mlp_size=96),
        499,
    ),
    "222m": Size(
        VisionConfig("vit_base_patch16_siglip_224", "random", image_size=224, grid=14),
        2,
        DecoderConfig(),
        49152,
    ),
    "450m": Size(
        VisionConfig("vit_base_patch16_siglip_512.v2_webli", "random", image_size=512, grid=32),
        4,
        DecoderConfig(layers=32, hidden_size=960, heads=15, kv_heads=5, head_size=64, mlp_size=2560),
        49152,
    ),
}


def _forward_flops(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def _backward_flops(gradient: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    # The scores once more, then a gradient for each factor.
    return 2 * q[0] * q[1] * q[2] * k[2] * (3 * q[3] + 2 * v[3])


# Counters before torch 2.15 know neither the CPU kernel nor grouped queries.
KERNELS = [
    getattr(torch.ops.aten, f"_scaled_dot_product_{name}")
    for name in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
]
ATTENTION = dict.fromkeys(KERNELS, _forward_flops) | {
    getattr(torch.ops.aten, f"{op.__name__}_backward"): _backward_flops for op in KERNELS
}


def make_config(
    kind: str,
    size: Size,
    dtype: str,
    heads: int = 0,
    rows: int = 1,
    local_rows: int = 1,
    compiled: bool = False,
) -> Config:
    model = ModelConfig(
        vision=size.vision,
        projector=ProjectorConfig(pixel_shuffle=size.shuffle),
        left=size.decoder,
        right=size.decoder,
        left_context="image" if kind == "dual_tower" else "none",
        multi_token=MultiTokenConfig(heads, mlp_size=size.decoder.mlp_size),
    )
    rates = {f"lr_{part}": 1e-5 for part in ("vision", "projector", "left", "right", "heads")}
    return Config(
        model=model,
        data=DataConfig(left_length=1024, right_length=1024),
        train=TrainConfig(
            local_batch_size=local_rows,
            global_batch_size=rows * local_rows,
            dtype=dtype,
            compile=compiled,
            warmup_steps=0,
            **rates,
        ),
    )


def standard_row(model: ModelConfig, vocabulary: Vocabulary) -> Batch:
    """One packed row, the same at every call. A document is an image, then a question, then an answer."""
    length = model.tokens_per_tile + QUESTION + ANSWER
    generator = torch.Generator().manual_seed(0)
    positions, documents = (
        torch.arange(length).repeat(DOCUMENTS),
        torch.arange(DOCUMENTS).repeat_interleave(length),
    )
    image = positions < model.tokens_per_tile
    ids = torch.randint(0, vocabulary.text_size, image.shape, generator=generator).masked_fill(
        image, vocabulary.image_token_id
    )
    labels = ids.roll(-1).masked_fill((positions < length - ANSWER - 1) | (positions == length - 1), -100)
    left = image if model.left_context != "none" else torch.zeros_like(image)
    columns = {"ids": ids, "positions": positions, "groups": documents}
    batch = {f"left_{name}": column[left] for name, column in (columns | {"images": documents}).items()}
    batch |= {
        f"right_{name}": column[~left] for name, column in (columns | {"documents": documents}).items()
    } | {"labels": labels[~left]}
    side = model.vision.image_size
    tiles = torch.randint(0, 256, (DOCUMENTS, 3, side, side), dtype=torch.uint8, generator=generator)
    return {name: column[None] for name, column in batch.items()} | {"tiles": tiles}


class Trial:
    """A model with its optimizers. A step has `rows` micro-batches: `local_rows` times the standard row."""

    def __init__(
        self,
        kind: str,
        size: str,
        dtype: str,
        device: torch.device,
        heads: int = 0,
        rows: int = 1,
        local_rows: int = 1,
        compiled: bool = False,
    ) -> None:
        config = make_config(kind, SIZES[size], dtype, heads, rows, local_rows, compiled)
        self.config = replace(config, train=replace(config.train, device=str(device)))
        self.device = device
        vocabulary = Vocabulary(SIZES[size].text, MARKERS)
        torch.manual_seed(0)
        self.model = MODELS[kind](self.config.model, vocabulary)
        row = standard_row(self.config.model, vocabulary)
        self.row = {
            name: column.repeat(local_rows, *[1] * (column.dim() - 1)) for name, column in row.items()
        }
        self.trainer = Trainer(self.config, self.model, RepeatedBatch(self.row))
        self.tokens = rows * (self.row["left_ids"].numel() + self.row["right_ids"].numel())
        self.marks: dict[str, list[Any]] = {}
        self.model.register_forward_pre_hook(lambda *_: self.mark("called"))
        self.model.register_forward_hook(lambda model, args, output: self._after_forward(output.loss_sum))

    def mark(self, name: str) -> None:
        """Record the time; on CUDA as an event, without synchronization."""
        if self.device.type == "cuda":
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.setdefault(name, []).append(now)

    def between(self, first: str, last: str) -> float:
        """Seconds between two marks, summed over the micro-batches.

        If a step has `last` only once, the interval starts at the last `first`.
        """
        firsts, lasts = self.marks[first], self.marks[last]
        pairs = zip(firsts[-len(lasts) :], lasts, strict=True)
        return sum(a.elapsed_time(b) / 1000 if self.device.type == "cuda" else b - a for a, b in pairs)

    def _after_forward(self, loss: Tensor) -> None:
        self.mark("forward")
        if loss.requires_grad:  # runs at the start of the backward; queues a callback for its end
            loss.register_hook(
                lambda _: torch.autograd.Variable._execution_engine.queue_callback(
                    lambda: self.mark("backward")
                )
            )

    def step(self) -> dict[str, float]:
        """One optimizer step → seconds of the step and of its phases."""
        self.marks.clear()
        self.mark("start")
        values = self.trainer.train_step()
        self.trainer.freed_memory.after_step()  # as `train` does
        self.mark("end")
        synchronize(self.device)
        if "skipped" in values:
            raise UserError(f"the step was skipped and cannot be measured: {values['skipped']}")
        return {
            "step": self.between("start", "end"),
            "forward": self.between("called", "forward"),
            "backward": self.between("forward", "backward"),
            "optimizer": self.between("backward", "end"),
        }

    def forward(self) -> Tensor:
        """The forward of `train_step` → the sum of the losses."""
        with autocast(self.config.train.dtype, self.device):
            output = self.model(**{name: column.to(self.device) for name, column in self.row.items()})
        loss: Tensor = (
            output.loss_sum
            if output.head_loss_sums is None
            else output.loss_sum + output.head_loss_sums.sum()
        )
        return loss

    def flops(self) -> dict[str, float]:
        """FLOPs of a step's forwards and backwards, estimated and counted."""
        times = self.config.train.micro_batches
        estimate = times * count_flops(self.model).training(
            batch_counts(self.row), trained_shares(self.model)
        )
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            self.forward().backward()
        self.model.zero_grad(set_to_none=True)
        return {"estimate": estimate, "counted": times * counter.get_total_flops()}

    def products(self) -> Counter[tuple[int, int, int]]:
        """Shapes (rows, inputs, outputs) of linear layers and logits, with their number per forward."""
        shapes: Counter[tuple[int, int, int]] = Counter()
        linear = [m for m in self.model.modules() if isinstance(m, nn.Linear)]
        hooks = [
            m.register_forward_pre_hook(
                lambda m, x: shapes.update([(x[0].numel() // m.in_features, m.in_features, m.out_features)])
            )
            for m in linear
        ]
        with torch.no_grad():
            self.forward()
        for hook in hooks:
            hook.remove()
        V, D = self.model.right.unembedding.shape
        shapes[int((self.row["labels"] != -100).sum()), D, V] += 1
        return shapes


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
