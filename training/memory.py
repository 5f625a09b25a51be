"""Memory of a training step: estimated for `--dry_run`, estimated or measured for `--fit-memory`.

Memory is linear in the rows of a micro-batch, and activations are linear in the layers, so small models and
batches are measured and the rest follows. `--fit-memory` chooses the largest local batch size that fits; the
global batch size stays. On a GPU it measures steps with one full row and two; elsewhere it estimates.
"""

import gc
import math
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from configs.model import Vocabulary
from configs.train import Config
from models.language_model import DecoderBlock
from models.losses import CHUNK as LOGITS_CHUNK
from models.weights.lora import add_adapters
from training.checkpoint import FILE_BYTES
from training.optim import freeze
from training.process_memory import GROWTH
from training.trainer import Batch, Trainer
from utils.device import autocast, compute_dtype, pick_device
from utils.errors import UsageError, UserError
from utils.ranks import SINGLE_PROCESS, DistributedContext

aten = torch.ops.aten
SUPERVISED = 0.5  # assumed share of supervised tokens in the right stream's text
OVERHEAD = 700_000_000  # bytes that PyTorch itself takes: its code, or a GPU's context
MARGIN = 1.05  # for fragmentation on a GPU; on a CPU it is at most GROWTH


def full_batch(config: Config, vocabulary: Vocabulary, rows: int) -> Batch:
    """A batch of completely full rows; each image is a group with one document."""
    length = 1 + config.model.tokens_per_tile  # of an image block
    R, vanilla = config.data.right_length, config.model.left_context == "none"
    images = max(1, R // (2 * length) if vanilla else config.data.left_length // length)
    text = R - images * length if vanilla else R  # vanilla: images take half of each row
    block = torch.tensor([vocabulary.first_marker_id] + [vocabulary.image_token_id] * (length - 1))
    image = torch.arange(images).repeat_interleave(length)
    left = {"ids": block.repeat(images), "positions": torch.arange(length).repeat(images), "groups": image}
    per_document = -(-text // images)
    document, offset = torch.arange(text) // per_document, torch.arange(text) % per_document
    right = {"ids": torch.zeros(text, dtype=torch.int64), "positions": offset + length, "groups": document}
    labels = torch.where(offset >= per_document * (1 - SUPERVISED), 1, -100)
    if vanilla:  # the right stream contains the images
        right = {name: torch.cat((left[name], column)) for name, column in right.items()}
        labels = torch.cat((torch.full_like(image, -100), labels))
        left = {name: column[:0] for name, column in left.items()}
    left["images"], right["documents"] = left["groups"], right["groups"]
    streams = {f"left_{name}": column for name, column in left.items()}
    streams |= {f"right_{name}": column for name, column in right.items()} | {"labels": labels}
    side = config.model.vision.image_size
    tiles = torch.zeros(rows * images, 3, side, side, dtype=torch.uint8)
    return {name: column.repeat(rows, 1) for name, column in streams.items()} | {"tiles": tiles}


def trial_model(config: Config, model_class: Any, vocabulary: Vocabulary) -> Any:
    """A model of `config` with adapters and frozen parts; weights are not loaded."""
    model = model_class(config.model, vocabulary)
    add_adapters(model, config.lora)
    freeze(model, config.train)
    return model.train()


def with_random_weights(config: Config, **layers: int) -> Config:
    """`config` without pretrained decoders. `layers`: of `left` and `right`, by default as configured."""
    c = config.model
    towers = {
        name: replace(getattr(c, name), weights="random", layers=layers.get(name, getattr(c, name).layers))
        for name in ("left", "right")
    }
    return replace(config, model=replace(c, **towers, layer_map="" if layers else c.layer_map))


class SkipMatmuls(TorchDispatchMode):
    """Matrix products and convolutions return zeros of the right shape: enough to measure memory."""

    SKIPPED = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution, aten.convolution_backward)

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)  # `super().__init__()` is untyped

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket not in self.SKIPPED or "out" in kwargs:
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs))
        return tree_map_only(Tensor, lambda t: torch.zeros_like(t, device="cpu"), func(*args, **kwargs))


def saved_tensor_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that `forward` saves for the backward of its result, without the model's weights and buffers."""
    owned = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
    sizes: dict[int, tuple[StorageWeakRef, int]] = {}  # storage → its reference, bytes

    def record(tensor: Tensor) -> Any:
        """Count a storage once and let it go: a forward that keeps nothing fits where a step would not."""
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:  # a weak reference keeps the number from being used again
            sizes[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    with torch.autograd.graph.saved_tensors_hooks(record, lambda none: none):  # no backward
        forward()
    return sum(size for _, size in sizes.values())


@cache
def saved_bytes(
    config: Config, model_class: Any, vocabulary: Vocabulary, rows: int, left_layers: int, right_layers: int
) -> int:
    """Bytes that a forward with so many layers saves for its backward, without weights; measured."""
    with torch.random.fork_rng(devices=[]):
        shallow = with_random_weights(config, left=left_layers, right=right_layers)
        model = trial_model(shallow, model_class, vocabulary)
        for block in (m for m in model.modules() if isinstance(m, DecoderBlock)):
            block.recompute = config.train.recompute
        batch = full_batch(config, vocabulary, rows)
        with autocast(config.train.dtype, torch.device("cpu")), SkipMatmuls():
            return saved_tensor_bytes(model, lambda: model(**batch).loss_sum)


def extrapolate(rows: int, of: Callable[[int], float]) -> float:
    """The value `of(rows)` of what is linear in rows, from `of(1)` and `of(2)`."""
    return of(1) if rows == 1 else of(1) + (rows - 1) * (of(2) - of(1))


def activation_bytes(config: Config, model_class: Any, vocabulary: Vocabulary, rows: int) -> int:
    """Bytes that a micro-batch saves for its backward, from models of one and two layers."""
    right = config.model.right.layers
    left = config.model.left.layers if "left" in config.model.towers else right
    saved = partial(saved_bytes, config, model_class, vocabulary)

    def of(rows: int) -> int:
        one, two = saved(rows, 1, 1), saved(rows, 2, 2)
        unpaired = (right - left) * (saved(rows, 1, 2) - one) if left < right else 0
        return one + (left - 1) * (two - one) + unpaired

    return int(extrapolate(rows, of))


def step_memory(
    config: Config,
    model_class: Any,
    vocabulary: Vocabulary,
    rows: int,
    device: torch.device = torch.device("cpu"),  # noqa: B008 (immutable)
    ranks: int = 1,
    save: bool = False,
) -> dict[str, int]:
    """Bytes of a step with micro-batches of `rows` rows on `device`, which need not be there, by purpose.

    Weights, gradients and optimizer state are sharded over `ranks`. With `save`, a checkpoint is written
    meanwhile; on a GPU this takes none of its memory.
    """
    with torch.device("meta"):
        model = trial_model(config, model_class, vocabulary)
    train = config.train
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad]
    optimizer = 8 * trained - (4 * sum(w.numel() for w in linear) if train.optimizer == "muon" else 0)
    average = 4 * trained if train.ema else 0
    supervised = int((full_batch(config, vocabulary, 1)["labels"] != -100).sum())
    dtype = compute_dtype(train.dtype, device)
    if train.dtype == "auto":  # that of `device`, though the CPU measures
        train = replace(train, dtype="bf16" if dtype == torch.bfloat16 else "fp32")
    # Without what saved bytes do not depend on, so that --fit-memory and --dry_run share their measurements.
    train = replace(train, local_batch_size=1, global_batch_size=1)
    measured = replace(config, train=train, fit_memory="")
    parts = {
        "weights": 4 * total // ranks,
        "gradients": 4 * trained // ranks,
        f"optimizer ({train.optimizer})": optimizer // ranks,
        **({"averaged weights (ema)": average // ranks} if average else {}),
        f"activations, weights in {str(dtype).removeprefix('torch.')}": activation_bytes(
            measured, model_class, vocabulary, rows
        ),
        "logits of a chunk": 4 * 4 * min(LOGITS_CHUNK, rows * supervised * vocabulary.size),
    }
    if train.recompute:
        whole = replace(measured, train=replace(train, recompute=False))
        saved = partial(saved_bytes, whole, model_class, vocabulary)
        block = extrapolate(rows, lambda rows: saved(rows, 2, 2) - saved(rows, 1, 1))
        parts["a block of each tower, computed again"] = int(block)
    if save:
        copied = (4 * total + optimizer + average) // ranks
        parts["a save: copies, and a file in the making"] = copied + 2 * min(FILE_BYTES, copied)
    return parts


@dataclass
class RepeatedBatch:
    """Batches for `Trainer.train_step`: the same one, again and again."""

    batch: Batch

    def __next__(self) -> Batch:
        return self.batch

    def sources(self) -> list[str]:
        return []

    def samples(self) -> list[str]:
        return []


Measure = Callable[[Callable[[], None], torch.device], float]


def cuda_peak(steps: Callable[[], None], device: torch.device) -> float:
    """Peak bytes in use on `device` during `steps`, by CUDA's counter."""
    torch.cuda.reset_peak_memory_stats(device)
    steps()
    return float(torch.cuda.max_memory_allocated(device))


def peak(
    config: Config,
    model_class: Any,
    vocabulary: Vocabulary,
    rows: int,
    device: torch.device,
    measure: Measure = cuda_peak,
) -> float:
    """Peak bytes in use during two steps of two micro-batches of `rows` full rows; infinite if memory ends.

    `measure(steps, device)` calls `steps` and returns its peak.
    """
    train = replace(config.train, local_batch_size=rows, global_batch_size=2 * rows, compile=False)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return _trial_peak(replace(config, train=train), model_class, vocabulary, device, measure)
    except torch.OutOfMemoryError:
        return math.inf
    finally:  # the trial's model is freed by now
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _trial_peak(
    config: Config, model_class: Any, vocabulary: Vocabulary, device: torch.device, measure: Measure
) -> float:
    model = trial_model(with_random_weights(config), model_class, vocabulary)
    batches = RepeatedBatch(full_batch(config, vocabulary, config.train.local_batch_size))
    trainer = Trainer(config, model, batches)
    # A scale of 1, so that nothing overflows.
    trainer.scaler = torch.amp.GradScaler(device.type, init_scale=1.0, enabled=config.train.dtype == "fp16")

    def steps() -> None:
        for _ in range(2):
            values = trainer.train_step()
            assert values["grad_norm"] is not None, values  # else the optimizer's state would be missing

    return measure(steps, device)


def fit_batch_size(
    config: Config, model_class: Any, vocabulary: Vocabulary, world: DistributedContext = SINGLE_PROCESS
) -> tuple[Config, str]:
    """→ `config` with the local batch size that fits, and a line that says why. If nothing fits: `UserError`.

    The device of rank 0 represents those of all ranks. The random state is left as it is.
    """
    device = pick_device(config.train.device)
    on_cpu = device.type == "cpu"
    if config.fit_memory == "auto":
        limit, limit_label = free_memory(device), f"that are free on {device.type}"
        if limit is None:
            raise UsageError(
                f"--fit-memory: the free memory of {device.type} is unknown: say how many GB, --fit-memory 12"
            )
        limit /= int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if on_cpu else 1
    else:
        limit, limit_label = float(config.fit_memory) * 1e9, "that it was given"
    ranks = world.size if config.parallel == "fsdp" else 1
    is_measured = device.type == "cuda" and config.parallel == "ddp"

    @cache
    def step_bytes(rows: int) -> float:
        if is_measured:
            return peak(config, model_class, vocabulary, rows, device)
        return sum(step_memory(config, model_class, vocabulary, rows, device, ranks, save=on_cpu).values())

    def needed(rows: int) -> float:
        return OVERHEAD + (GROWTH if on_cpu else MARGIN) * extrapolate(rows, step_bytes)

    method = "measured with one row and two" if is_measured else "estimated, as by --dry_run"
    return choose(config, needed, limit, limit_label, method, world)


def choose(
    config: Config,
    needed: Callable[[int], float],
    limit: float,
    limit_label: str,
    method: str,
    world: DistributedContext = SINGLE_PROCESS,
) -> tuple[Config, str]:
    """Choose the most rows that take at most `limit` bytes and divide the global batch.

    Ranks and streams must be able to share it. `needed`: rows → bytes; `limit_label`, `method`: for messages.
    """
    batch, shared = config.train.global_batch_size, math.lcm(world.size, config.data.streams or world.size)
    choices = [rows for rows in range(1, batch + 1) if batch % rows == 0 and batch // rows % shared == 0]
    if not choices:
        raise UserError(
            f"--fit-memory: train.global_batch_size = {batch} rows cannot be shared by {shared} ranks or "
            "streams"
        )
    fit = [rows for rows in choices if needed(rows) <= limit]
    if not fit:
        advice = (
            "shorten data.left_length and data.right_length, or train fewer parts"
            if config.train.recompute
            else "turn on --train.recompute"
        )
        takes = f"{needed(1) / 1e9:.1f} GB ({method}), more" if math.isfinite(needed(1)) else "more"
        raise UserError(
            f"--fit-memory: a micro-batch of one row takes {takes} than the {limit / 1e9:.1f} GB "
            f"{limit_label}: {advice}"
        )
    rows = max(fit)
    line = (
        f"--fit-memory: train.local_batch_size {rows} of train.global_batch_size {batch}, "
        f"{needed(rows) / 1e9:.1f} GB ({method}) of the {limit / 1e9:.1f} GB {limit_label}"
    )
    more = next((r for r in choices if r > rows), None)
    if more and math.isfinite(needed(more)):
        line += f"; {more} rows would take {needed(more) / 1e9:.1f}"
    return replace(config, train=replace(config.train, local_batch_size=rows)), line


def free_memory(device: torch.device) -> float | None:
    """Free memory of `device` in bytes; None if the system does not report it."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    with suppress(OSError):
        match = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
        return int(match[1]) * 1024.0 if match and device.type == "cpu" else None
    return None
