"""`--dry_run`: parameters, FLOPs and memory of a configuration, before weights are fetched or trained."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from configs.model import DecoderConfig, ModelConfig, Vocabulary
from configs.train import Config
from models.language_model import DecoderBlock
from models.losses import CHUNK as LOGITS_CHUNK
from models.masks import left_mask, right_mask
from models.weights.lora import add_adapters
from training.checkpoint import FILE_BYTES
from training.optim import freeze
from utils.device import autocast, compute_dtype, pick_device

SUPERVISED = 0.5  # assumed share of supervised tokens in the right stream's text
OVERHEAD = 700_000_000  # bytes that PyTorch itself takes: its code, or a GPU's context


def full_batch(config: Config, vocabulary: Vocabulary, rows: int) -> dict[str, Tensor]:
    """A batch of completely full rows; each image is a group with one document."""
    c, P = config.model, config.model.tokens_per_tile
    block = torch.tensor([vocabulary.first_marker_id] + [vocabulary.image_token_id] * P)
    vanilla = c.left_context == "none"
    L, R = (0 if vanilla else config.data.left_length), config.data.right_length
    images = max(1, (R // (2 * len(block))) if vanilla else L // len(block))  # vanilla: half of each row
    text = R - images * len(block) if vanilla else R
    groups = torch.arange(images)
    in_document = -(-text // images)
    left = {
        "ids": block.repeat(images),
        "groups": groups.repeat_interleave(len(block)),
        "positions": torch.arange(len(block)).repeat(images),
    }
    document = torch.arange(in_document * images)[:text] // in_document
    right = {
        "ids": torch.zeros(text, dtype=torch.int64),
        "documents": document,
        "positions": torch.arange(text) % in_document + len(block),
    }
    labels = torch.where(torch.arange(text) % in_document >= in_document * (1 - SUPERVISED), 1, -100)
    if vanilla:  # the right stream contains the images
        right = {
            "ids": torch.cat((left["ids"], right["ids"])),
            "documents": torch.cat((left["groups"], document)),
            "positions": torch.cat((left["positions"], right["positions"])),
        }
        labels = torch.cat((torch.full_like(left["ids"], -100), labels))
        left = {name: column[:0] for name, column in left.items()}
    right["groups"] = right["documents"]
    batch = (
        {f"left_{k}": v for k, v in (left | {"images": left["groups"]}).items()}
        | {f"right_{k}": v for k, v in right.items()}
        | {"labels": labels}
    )
    side = c.vision.image_size
    return {k: v.repeat(rows, 1) for k, v in batch.items()} | {
        "tiles": torch.zeros(rows * images, 3, side, side, dtype=torch.uint8)
    }


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs of the matrix products: two per multiply-add. Nothing else is counted."""

    tile: int  # vision encoder and projector, one tile
    left_token: int  # left decoder, one token; without attention scores
    right_token: int
    supervised_token: int  # its logits
    left_pair: int  # attention, all layers: one query and one key
    right_pair: int

    def forward(self, batch: dict[str, Tensor]) -> float:
        """FLOPs of one batch without gradients; attention runs over whole rows."""
        (B, L), R = batch["left_ids"].shape, batch["right_ids"].shape[1]
        supervised = int((batch["labels"] != -100).sum())
        text = B * (
            L * (self.left_token + L * self.left_pair) + R * (self.right_token + (L + R) * self.right_pair)
        )
        return len(batch["tiles"]) * self.tile + text + supervised * self.supervised_token

    def training(self, batch: dict[str, Tensor], trained: dict[str, float]) -> float:
        """FLOPs of forward and backward; attention over what each query sees.

        `trained`: part → trained share of its matrices. The backward of a trained part costs two forwards,
        that of a frozen part one if gradients flow through it. Logits are computed twice.
        """
        (B, L), R = batch["left_ids"].shape, batch["right_ids"].shape[1]
        supervised = int((batch["labels"] != -100).sum())
        trained = {"left": 0.0} | trained
        before_right = bool(trained["vision"] or trained["projector"] or trained["left"])
        total = float(len(batch["tiles"]) * self.tile * (3 if trained["vision"] else 1))
        own = batch["left_positions"], batch["left_groups"]
        masks = (
            left_mask(*own, batch["left_images"], isolation=True, attention="causal"),
            right_mask(batch["right_positions"], batch["right_documents"], batch["right_groups"], *own),
        )
        pairs = [int(mask.dense().sum()) for mask in masks]
        left_attention, right_attention = pairs[0] * self.left_pair, pairs[1] * self.right_pair
        total += (
            B * L * self.left_token * (1 + before_right + trained["left"]) + 3 * left_attention * before_right
        )
        total += left_attention * (not before_right)
        total += B * R * self.right_token * (1 + 1 + trained["right"]) + 3 * right_attention
        return total + supervised * self.supervised_token * (2 + 1 + (trained["right"] == 1))


def trained_shares(model: Any) -> dict[str, float]:
    """Part → trained share of its matrices: 0 if it is frozen, small if it has adapters."""
    shares = {}
    for name, part in model.parts().items():
        matrices = [m.weight for m in part.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        shares[name] = sum(w.numel() for w in matrices if w.requires_grad) / sum(w.numel() for w in matrices)
    return shares


def count_flops(model: Any) -> Flops:
    """Count FLOPs from shapes alone, so the model may be on the meta device.

    Torch's counter counts vision encoder and projector.
    """
    c: ModelConfig = model.config
    encoder, projector = model.parts()["vision"], model.parts()["projector"]
    device = next(encoder.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        projector(
            encoder.encode(
                torch.zeros(1, 3, c.vision.image_size, c.vision.image_size, dtype=torch.uint8, device=device)
            )
        )
    right = sum(m.weight.numel() for m in model.right.layers.modules() if isinstance(m, nn.Linear))
    left = (
        sum(m.weight.numel() for m in model.left.decoder.modules() if isinstance(m, nn.Linear))
        if "left" in c.towers
        else 0
    )
    unembedding = model.right.unembedding.numel()

    def pair(config: DecoderConfig, layers: int) -> int:
        return 4 * config.heads * config.head_size * layers

    return Flops(
        counter.get_total_flops(),
        2 * left,
        2 * right,
        2 * unembedding,
        pair(c.left, c.left.layers - 1) if left else 0,
        pair(c.right, c.right.layers),
    )


class SkipMatmuls(TorchDispatchMode):
    """Matrix products and convolutions return zeros of the right shape: enough to measure memory."""

    SKIPPED = (
        torch.ops.aten.mm,
        torch.ops.aten.addmm,
        torch.ops.aten.bmm,
        torch.ops.aten.baddbmm,
        torch.ops.aten.convolution,
        torch.ops.aten.convolution_backward,
    )

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)  # `super().__init__()` is untyped

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket not in self.SKIPPED or "out" in kwargs:
            return func(*args, **kwargs)
        shapes = func(
            *tree_map_only(Tensor, lambda t: t.to("meta"), args),
            **tree_map_only(Tensor, lambda t: t.to("meta"), kwargs),
        )
        return tree_map_only(
            Tensor,
            lambda t: torch.zeros(t.untyped_storage().nbytes() // t.element_size(), dtype=t.dtype).as_strided(
                t.shape, t.stride()
            ),
            shapes,
        )


def trial_model(
    config: Config, model_class: Any, vocabulary: Vocabulary, layers: int = 0, left_layers: int = 0
) -> Any:
    """A model of `config` with random weights, adapters and frozen parts; does not change the random state.

    `layers`: of each decoder (0: as configured). `left_layers`: of the left one, where it has fewer.
    """
    left, right = (
        replace(getattr(config.model, tower), weights="random", **({"layers": layers} if layers else {}))
        for tower in ("left", "right")
    )
    left = replace(left, layers=left_layers) if left_layers else left
    layer_map = "" if layers else config.model.layer_map
    with torch.random.fork_rng(devices=[]):
        model = model_class(replace(config.model, left=left, right=right, layer_map=layer_map), vocabulary)
        add_adapters(model, config.lora)
    freeze(model, config.train)
    return model.train()


@cache
def saved_bytes(
    config: Config, model_class: Any, vocabulary: Vocabulary, rows: int, layers: int, left_layers: int = 0
) -> int:
    """Bytes that a forward with `layers` layers saves for its backward, without weights; measured."""
    model = trial_model(config, model_class, vocabulary, layers, left_layers)
    for block in model.modules():
        if isinstance(block, DecoderBlock):
            block.recompute = config.train.recompute
    batch = full_batch(config, vocabulary, rows)
    with autocast(config.train.dtype, torch.device("cpu")), SkipMatmuls():
        return saved_tensor_bytes(model, lambda: model(**batch).loss_sum)


def saved_tensor_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that `forward` saves for the backward of its result, without the model's weights and buffers."""
    owned = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    sizes: dict[int, int] = {}  # address → bytes

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda t: t):
        loss = forward()
    del loss  # until now its graph kept all saved tensors alive, so no address was reused
    return sum(sizes.values())


def estimate_activations(rows: int, layers: int, measure: Callable[[int, int], int]) -> int:
    """Bytes that a micro-batch saves for its backward, extrapolated from `measure(rows, layers)`.

    They are linear in rows and in layers, so one and two of each are measured.
    """
    a, b, c, d = measure(1, 1), measure(2, 1), measure(1, 2), measure(2, 2)
    rows, layers = rows - 1, layers - 1
    return a + rows * (b - a) + layers * (c - a) + rows * layers * (d - c - b + a)


def all_activations(config: Config, rows: int, measure: Callable[..., int]) -> int:
    """`estimate_activations` of all layers, where the left tower may have fewer than the right one.

    `measure(rows, layers, left_layers)` as in `saved_bytes`. Right layers without a left one of their own are
    measured over a single left layer.
    """
    right = config.model.right.layers
    left = config.model.left.layers if "left" in config.model.towers else right
    total = estimate_activations(rows, left, measure)
    if left < right:
        more, less = (estimate_activations(rows, n, lambda r, n: measure(r, n, 1)) for n in (right, left))
        total += more - less
    return total


def step_memory(
    config: Config,
    model_class: Any,
    vocabulary: Vocabulary,
    ranks: int = 1,
    save: bool = False,
    device: torch.device | None = None,
) -> Callable[[int], dict[str, int]]:
    """Return a function from the rows of a micro-batch to the bytes of a step, by purpose.

    Weights, gradients and optimizer state are sharded over `ranks`. With `save`, a checkpoint is written
    meanwhile; on a GPU this takes none of its memory. `device`: the one to train on, by default the CPU; it
    need not be there.
    """
    dtype = compute_dtype(config.train.dtype, device or torch.device("cpu"))
    if config.train.dtype == "auto":  # of `device`, though the CPU measures
        train = replace(config.train, dtype="bf16" if dtype == torch.bfloat16 else "fp32")
        config = replace(config, train=train)
    with torch.device("meta"):
        model = model_class(config.model, vocabulary)
        add_adapters(model, config.lora)
    freeze(model, config.train)
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    matrices = sum(
        m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad
    )
    optimizer = 8 * trained - (4 * matrices if config.train.optimizer == "muon" else 0)
    average = 4 * trained if config.train.ema else 0
    copied = (4 * total + optimizer + average) // ranks
    # Activations do not depend on these fields: --fit-memory and --dry_run share one cached measurement.
    one = replace(config, train=replace(config.train, local_batch_size=1, global_batch_size=1), fit_memory="")
    whole = replace(one, train=replace(one.train, recompute=False))
    supervised = int((full_batch(config, vocabulary, 1)["labels"] != -100).sum())

    def measure(
        rows: int, layers: int, left_layers: int = 0, recompute: bool = config.train.recompute
    ) -> int:
        return saved_bytes(one if recompute else whole, model_class, vocabulary, rows, layers, left_layers)

    def bytes_of_step(rows: int) -> dict[str, int]:
        activations = all_activations(config, rows, measure)
        parts = {
            "weights": 4 * total // ranks,
            "gradients": 4 * trained // ranks,
            f"optimizer ({config.train.optimizer})": optimizer // ranks,
            **({"averaged weights (ema)": average // ranks} if average else {}),
            f"activations, weights in {str(dtype).removeprefix('torch.')}": activations,
            "logits of a chunk": 4 * 4 * min(LOGITS_CHUNK, rows * supervised * vocabulary.size),
        }
        if config.train.recompute:
            two, one = (
                estimate_activations(rows, layers, lambda r, n: measure(r, n, recompute=False))
                for layers in (2, 1)
            )
            parts["a block of each tower, computed again"] = two - one
        if save:
            parts["a save: copies, and a file in the making"] = copied + 2 * min(FILE_BYTES, copied)
        return parts

    return bytes_of_step


def dry_run(config: Config, model_class: Any, vocabulary: Vocabulary) -> None:
    """Print parameters by part, FLOPs and memory."""
    console = Console(highlight=False, soft_wrap=True)
    with torch.device("meta"):
        model = model_class(config.model, vocabulary)
        add_adapters(model, config.lora)
    freeze(model, config.train)
    table = Table(
        "part",
        "parameters",
        "trained",
        "dtype",
        "MiB",
        title=f"{config.config}: {config.model.vision.name} + {config.model.right.weights}",
    )
    total = trained = 0
    for name, part in model.parts().items():
        size = sum(p.numel() for p in part.parameters())
        trained_size = sum(p.numel() for p in part.parameters() if p.requires_grad)
        total, trained = total + size, trained + trained_size
        table.add_row(name, f"{size:,}", f"{trained_size:,}", "float32", f"{size * 4 / 2**20:,.0f}")
    table.add_row("all", f"{total:,}", f"{trained:,}", "float32", f"{total * 4 / 2**20:,.0f}")
    console.print(table)
    if config.model.has_shallower_left:
        console.print(f"Left layers that the right layers read: {config.model.left_layer_of}")

    flops, batch = count_flops(model), full_batch(config, vocabulary, config.train.local_batch_size)
    step = flops.training(batch, trained_shares(model))
    tokens = batch["left_ids"].numel() + batch["right_ids"].numel()
    table = Table("forward FLOPs of", "GFLOP")
    for name, value in (
        ("a tile (encoder, projector)", flops.tile),
        ("a left token", flops.left_token),
        ("a right token", flops.right_token),
        ("a token's logits", flops.supervised_token),
    ):
        if value:
            table.add_row(name, f"{value / 1e9:.4g}")
    lengths = f"{batch['left_ids'].shape[1]} + {batch['right_ids'].shape[1]}"
    table.add_row(
        f"a micro-batch: {config.train.local_batch_size} full rows of {lengths} tokens, "
        f"{len(batch['tiles'])} tiles",
        f"{flops.forward(batch) / 1e9:,.0f}",
    )
    table.add_row(
        f"the same, backward included ({step / tokens / 1e9:.3g} GFLOP a token)", f"{step / 1e9:,.0f}"
    )
    console.print(table)
    table = Table("memory of a step", "GiB")
    # A GPU's need can be estimated without one.
    device = torch.device(name) if (name := config.train.device) != "auto" else pick_device(name)
    estimate = step_memory(config, model_class, vocabulary, save=device.type == "cpu", device=device)
    parts = estimate(config.train.local_batch_size)
    parts["PyTorch itself"] = OVERHEAD
    for name, size in (*parts.items(), ("all", sum(parts.values()))):
        table.add_row(name, f"{size / 2**30:.2f}")
    console.print(table)
    console.print(
        "For full rows, half of the text supervised. Samples (0.5 GiB) and features "
        "(--train.feature_cache_gb) are cached beside."
    )
