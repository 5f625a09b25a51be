"""`--dry_run`: parameters, FLOPs and memory of a configuration, before weights are fetched or trained."""

from collections.abc import Iterable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from configs.model import Vocabulary
from configs.train import Config
from training.flops import count_flops, trained_shares
from training.memory import OVERHEAD, full_batch, step_memory, trial_model
from training.scaling import scaling_table
from training.trainer import batch_counts
from utils.device import pick_device


def dry_run(config: Config, model_class: Any, vocabulary: Vocabulary) -> None:
    """Print parameters by part, FLOPs and memory, and with `gpus` what these need."""
    console = Console(highlight=False, soft_wrap=True)

    def show(columns: Iterable[str], rows: Iterable[tuple[str, ...]], title: str | None = None) -> None:
        table = Table(*columns, title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table)

    with torch.device("meta"):
        model = trial_model(config, model_class, vocabulary)
    rows: list[tuple[str, ...]] = []
    for name, part in (*model.parts().items(), ("all", model)):
        size = sum(p.numel() for p in part.parameters())
        trained = sum(p.numel() for p in part.parameters() if p.requires_grad)
        rows.append((name, f"{size:,}", f"{trained:,}", "float32", f"{size * 4 / 2**20:,.0f}"))
    title = f"{config.config}: {config.model.vision.name} + {config.model.right.weights}"
    show(("part", "parameters", "trained", "dtype", "MiB"), rows, title)
    if config.model.has_shallower_left:
        console.print(f"Left layers that the right layers read: {config.model.left_layer_of}")

    flops, batch = count_flops(model), full_batch(config, vocabulary, config.train.local_batch_size)
    forward, step = flops.forward(batch), flops.training(batch_counts(batch), trained_shares(model))
    (B, L), R = batch["left_ids"].shape, batch["right_ids"].shape[1]
    units = {
        "a tile (encoder, projector)": flops.tile,
        "a left token": flops.left_token,
        "a right token": flops.right_token,
        "a token's logits": flops.supervised_token,
    }
    batches = {
        f"a micro-batch: {B} full rows of {L} + {R} tokens, {len(batch['tiles'])} tiles": forward,
        f"the same, backward included ({step / (B * (L + R)) / 1e9:.3g} GFLOP a token)": step,
    }
    rows = [(name, f"{value / 1e9:.4g}") for name, value in units.items() if value]
    rows += [(name, f"{value / 1e9:,.0f}") for name, value in batches.items()]
    show(("forward FLOPs of", "GFLOP"), rows)

    if config.gpus:
        show(*scaling_table(config, model_class, vocabulary, model, flops))
        return
    # A GPU's need can be estimated without one.
    device = torch.device(name) if (name := config.train.device) != "auto" else pick_device(name)
    parts = step_memory(config, model_class, vocabulary, B, device, save=device.type == "cpu")
    parts["PyTorch itself"] = OVERHEAD
    parts["all"] = sum(parts.values())
    show(("memory of a step", "GiB"), ((name, f"{size / 2**30:.2f}") for name, size in parts.items()))
    console.print(
        "For full rows, half of the text supervised. Samples (0.5 GiB) and features "
        "(--train.feature_cache_gb) are cached beside."
    )
