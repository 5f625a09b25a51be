"""What a run needs on given GPUs: `--dry_run --gpus 8xH100`. Estimates; docs/scaling.md explains them.

FLOPs are counted, memory is that of `step_memory`, the loader's speed was measured. MFU is assumed.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

import torch

from configs.model import Vocabulary
from configs.train import Config
from data.images import grid_of, tile_count
from models.language_model import DecoderBlock
from training.diagnostics import PEAKS
from training.distributed import check_world
from training.flops import Flops, trained_shares
from training.memory import OVERHEAD, full_batch, step_memory
from training.trainer import batch_counts
from utils.device import compute_dtype
from utils.errors import UsageError
from utils.ranks import DistributedContext

MFU = 0.40  # assumed: the goal, not a measurement
CUDA = torch.device("cuda")


@dataclass(frozen=True)
class Gpu:
    name: str
    flops: float  # dense bf16 FLOP/s; this and the next two from NVIDIA's data sheets
    memory: float  # bytes
    bandwidth: float  # bytes/s
    price: float  # dollars an hour, on demand
    source: str  # of the price, with its date


SECURE, COMMUNITY = "RunPod Secure Cloud, 2026-11-09", "RunPod Community Cloud, 2026-03-10"
GPUS = {
    "H100": Gpu("H100 SXM", PEAKS["H100"], 80e9, 3.35e12, 3.99, SECURE),
    "A100": Gpu("A100 80GB SXM", PEAKS["A100"], 80e9, 2.04e12, 1.79, SECURE),
    "L4": Gpu("L4", PEAKS["L4"], 24e9, 0.30e12, 0.44, COMMUNITY),
    "RTX4090": Gpu("RTX 4090", PEAKS["RTX 4090"], 24e9, 1.01e12, 0.34, COMMUNITY),
}


@dataclass(frozen=True)
class DataSet:
    """A data set's size, and the means of a sample. docs/scaling.md has the sources."""

    samples: float
    images: float
    text: float  # tokens
    answers: float  # tokens that are supervised


DATA_SETS = {
    "The Cauldron": DataSet(samples=1.88e6, images=1, text=193, answers=97),
    "FineVision": DataSet(samples=24.3e6, images=0.71, text=501, answers=391),
}
IMAGE = (640, 480)  # pixels of a mean image, as in the loader's benchmark
# One loader worker, measured: benchmarks/results/data.json, docs/benchmarks.md ("The data engine").
WORKER_SAMPLES_PER_S = 271  # images of 640 × 480 pixels to one tile of 512
TEXT_MS, IMAGE_MS, TILE_MS = 0.23, 1.61, 1.67  # tokenise + pack, decode, resize + collate


def parse_gpus(gpus: str) -> tuple[Gpu, list[int]]:
    """`1xH100,8xH100` → the GPU and the counts; `H100` is one."""
    parts = [re.fullmatch(r"(?:(\d{1,5})x)?(\w+)", part) for part in gpus.split(",")]
    names = {match[2] for match in parts if match}
    counts = [int(match[1] or 1) for match in parts if match]
    if None in parts or len(names) != 1 or 0 in counts:
        raise UsageError(
            f"gpus = {gpus!r} must be a number and a GPU, such as 8xH100, or several numbers of one GPU: "
            "1xH100,8xH100"
        )
    (name,) = names
    if name not in GPUS:
        raise UsageError(f"gpus = {gpus!r}: {name} is unknown; known are {', '.join(GPUS)}")
    return GPUS[name], counts


def tiles_of(config: Config, data: DataSet) -> float:
    """Mean tiles of a sample: images × tiles of an image of 640 × 480 pixels."""
    return data.images * tile_count(grid_of(*IMAGE, config.model.vision))


def sample_counts(config: Config, data: DataSet) -> dict[str, float]:
    """`batch_counts` of a mean sample: one image block of tiles × (1 + P) tokens, then the text.

    Token i of a sequence sees i keys and itself: n tokens after m others make n × m + n (n + 1) ÷ 2 pairs.
    """

    def pairs(tokens: float, before: float = 0.0) -> float:
        return tokens * before + tokens * (tokens + 1) / 2

    tiles = tiles_of(config, data)
    block = tiles * (1 + config.model.tokens_per_tile)
    vanilla = config.model.left_context == "none"
    return {
        "supervised": data.answers,
        "left": 0.0 if vanilla else block,
        "right": data.text + block * vanilla,
        "tiles": tiles,
        "left_pairs": 0.0 if vanilla else pairs(block),
        "right_pairs": pairs(data.text + block) if vanilla else pairs(data.text, block),
    }


def seconds(flops: float, gpu: Gpu, count: int) -> float:
    """FLOPs ÷ (GPUs × MFU × peak)."""
    return flops / (count * MFU * gpu.flops)


def loader_cores(samples_per_s: float, images: float, tiles: float) -> float:
    """Samples/s ÷ 271, × ms of a sample ÷ ms of the benchmark's sample of one image and one tile."""
    sample = TEXT_MS + images * IMAGE_MS + tiles * TILE_MS
    return samples_per_s / WORKER_SAMPLES_PER_S * sample / (TEXT_MS + IMAGE_MS + TILE_MS)


def ddp_bytes(trained: int, count: int) -> float:
    """Bytes that a GPU sends in a step: a ring's all-reduce, 2 (N − 1) ÷ N × fp32 gradients."""
    return 2 * (count - 1) / count * 4 * trained


def fsdp_bytes(gathered: int, itemsize: int, trained: int, micro_batches: int, count: int) -> float:
    """Bytes that a GPU sends in a step: all-gathers of each micro-batch, one reduce-scatter in fp32.

    (N − 1) ÷ N × (micro-batches × gathered elements × their size + 4 × trained elements)
    """
    return (count - 1) / count * (micro_batches * gathered * itemsize + 4 * trained)


def gathered_elements(model: Any) -> int:
    """Elements that FSDP2 gathers for a micro-batch: of blocks and encoder twice, of the rest once.

    Blocks are freed after their forward, so the backward gathers them again (`distributed.wrap_model`).
    """

    def size(*modules: Any) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    encoder = model.parts()["vision"]
    twice = size(*(m for m in model.modules() if isinstance(m, DecoderBlock)))
    twice += 0 if encoder.frozen else size(encoder)
    return size(model) - (size(encoder) if encoder.frozen else 0) + twice


Estimate = dict[str, float]  # what → value, for one number of GPUs


def estimate_time(
    config: Config, vocabulary: Vocabulary, model: Any, flops: Flops, gpu: Gpu, count: int
) -> Estimate:
    """Hours, dollars, samples/s and loader cores of the configured run and of each data set, read once."""
    shares, train = trained_shares(model), config.train
    batch = full_batch(config, vocabulary, train.local_batch_size)
    step = flops.model_flops(batch_counts(batch), shares) * train.micro_batches
    hours = config.max_steps * seconds(step, gpu, count) / 3600
    values = {
        "a step of full rows, TFLOP": step / 1e12,
        "a step of full rows, s": seconds(step, gpu, count),
        f"{config.max_steps:,} such steps, hours": hours,
        f"{config.max_steps:,} such steps, $": hours * count * gpu.price,
    }
    for name, data in DATA_SETS.items():
        sample = flops.model_flops(sample_counts(config, data), shares)
        hours = seconds(data.samples * sample, gpu, count) / 3600
        rate = data.samples / (3600 * hours)
        values |= {
            f"{name}, TFLOP a sample": sample / 1e12,
            f"{name}, hours": hours,
            f"{name}, $": hours * count * gpu.price,
            f"{name}, samples/s": rate,
            f"{name}, loader cores": loader_cores(rate, data.images, tiles_of(config, data)),
        }
    return values


def estimate_network(config: Config, model: Any, step_seconds: float, count: int) -> Estimate:
    """GB that each GPU sends in a step, and GB/s while steps take `step_seconds`."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    itemsize = compute_dtype(config.train.dtype, CUDA).itemsize
    forwards = config.train.micro_batches // count
    ddp = ddp_bytes(trained, count) / 1e9
    fsdp = fsdp_bytes(gathered_elements(model), itemsize, trained, forwards, count) / 1e9
    return {
        "network, DDP, GB a step": ddp,
        "network, DDP, GB/s": ddp / step_seconds,
        "network, FSDP2, GB a step": fsdp,
        "network, FSDP2, GB/s": fsdp / step_seconds,
    }


def estimate_memory(
    config: Config, model_class: Any, vocabulary: Vocabulary, model: Any, gpu: Gpu, count: int
) -> Estimate:
    """GB on each GPU, and the milliseconds that its memory takes to move what the optimizer touches."""
    train = config.train
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    ddp, fsdp = (
        step_memory(config, model_class, vocabulary, train.local_batch_size, CUDA, ranks)
        for ranks in (1, count)
    )
    if train.micro_batches > count:  # gradients are exchanged after a step's last forward: until then whole
        fsdp["gradients"] = ddp["gradients"]
    moved = 12 * trained + 2 * ddp[f"optimizer ({train.optimizer})"]  # gradients are read only
    return {
        "memory, DDP, GB": (sum(ddp.values()) + OVERHEAD) / 1e9,
        "memory, FSDP2, GB": (sum(fsdp.values()) + OVERHEAD) / 1e9,
        "optimizer, DDP, ms": moved / gpu.bandwidth * 1e3,
    }


def figure(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def scaling_table(
    config: Config, model_class: Any, vocabulary: Vocabulary, model: Any, flops: Flops
) -> tuple[list[str], list[tuple[str, ...]], str]:
    """Columns, rows and title of the table of `--gpus`. `model`: with its frozen parts, on any device."""
    gpu, counts = parse_gpus(config.gpus)
    estimates = []
    for count in counts:
        check_world(replace(config, parallel="ddp"), DistributedContext(size=count))
        values = estimate_time(config, vocabulary, model, flops, gpu, count)
        values |= estimate_network(config, model, values["a step of full rows, s"], count)
        values |= estimate_memory(config, model_class, vocabulary, model, gpu, count)
        estimates.append(values)
    rows = [(name, *(figure(values[name]) for values in estimates)) for name in estimates[0]]
    title = (
        f"{gpu.name}: peak {gpu.flops / 1e12:.0f} TFLOP/s, {gpu.memory / 1e9:.0f} GB, "
        f"{gpu.bandwidth / 1e12:.3g} TB/s,\n${gpu.price} an hour ({gpu.source}); assumed MFU: {MFU:.0%}"
    )
    return ["estimated", *(f"{count} GPU{'s' * (count > 1)}" for count in counts)], rows, title
