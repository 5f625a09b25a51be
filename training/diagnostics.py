"""Diagnostics besides the loss: update ratios, histograms of weights and gradients, and FLOP/s."""

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.callbacks import Callback
from training.distributed import local_tensor
from training.flops import Flops, count_flops, trained_shares
from training.trackers import Histogram

SAMPLE = 1 << 16  # only the first so many elements of a tensor are inspected
# Part of the device's name → dense bf16 FLOP/s, from the makers' data sheets.
PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "A10G": 70e12,
    "L4": 121e12,
    "V100": 125e12,
}


class Diagnostics(Callback):
    """Every `train.diagnostics_every` steps: update ratios for the log, histograms for the trackers."""

    def begin(self, trainer: Any) -> None:
        self.every = trainer.config.train.diagnostics_every
        self.names = {id(p): name for name, p in trainer.model.named_parameters()}
        self.groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]

    def before_update(self, trainer: Any) -> None:
        """Copy weights and gradients, which the update overwrites."""
        self.before: dict[int, Tensor] = {}
        self.gradients: dict[str, list[Tensor]] = defaultdict(list)
        if not self.every or trainer.step % self.every:
            return
        for p in (p for group in self.groups for p in group["params"] if p.grad is not None):
            self.before[id(p)] = _sample(p).clone()
            self.gradients[self._layer(p)].append(_sample(p.grad).clone())

    def after_step(self, trainer: Any, values: dict[str, Any]) -> None:
        if self.before and values["grad_norm"] is not None:
            values["update_ratios"], histograms = self.report()
            trainer.log.trackers.histograms(trainer.step, histograms)
        self.before, self.gradients = {}, defaultdict(list)  # copies are freed before a validation or a save

    def report(self) -> tuple[dict[str, float], dict[str, Histogram]]:
        """Part → norm of its update ÷ norm of its weights; layer → histograms of weights and gradients.

        Computed from the first `SAMPLE` elements of each tensor's shard on this rank.
        """
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2))
        weights = defaultdict(list)
        for group in self.groups:
            for p in (p for p in group["params"] if id(p) in self.before):
                now, before = _sample(p), self.before[id(p)]
                squares = torch.stack(((now - before).square().sum(), before.square().sum()))
                sums[group["part"]] += squares.cpu()
                weights[self._layer(p)].append(now)
        ratios = {
            part: (update / max(weight, 1e-30)) ** 0.5
            for part, (update, weight) in ((part, s.tolist()) for part, s in sums.items())
        }
        histograms = {
            f"{kind}/{layer}": np.histogram(torch.cat(tensors).cpu().numpy(), bins=64)
            for kind, layers in (("weights", weights), ("gradients", self.gradients))
            for layer, tensors in layers.items()
        }
        return ratios, histograms

    def _layer(self, p: Tensor) -> str:
        """`right.layers.3.mlp.up_proj.weight` → `right.layers.3`; without a number, the first two names."""
        names = self.names[id(p)].split(".")
        last = next((i for i, name in enumerate(names) if name.isdigit()), 1)
        return ".".join(names[: last + 1])


def _sample(x: Tensor) -> Tensor:
    return local_tensor(x).detach().flatten()[:SAMPLE].float()


def sources_of(batch: dict[str, Tensor], samples: list[str], names: list[str]) -> Tensor:
    """Index into `names` of the source of each supervised token, (S,) int64.

    `samples`: source and record number of each group of the batch, row by row.
    """
    groups = batch["right_groups"]  # (B, R); numbered from 0 in each row
    supervised = batch["labels"] != -100  # (B, R)
    counts = groups.amax(1) + 1  # (B,)
    index = {name: i for i, name in enumerate(names)}
    numbers = torch.tensor([index[sample.rpartition(" ")[0]] for sample in samples], dtype=torch.int64)
    return numbers[groups[supervised] + (counts.cumsum(0) - counts).repeat_interleave(supervised.sum(1))]


class FlopsMeter:
    """FLOP/s of training: the matrix products of all tokens, tiles and supervised positions.

    Padding and tiles with cached features do not count. With a cache, the tiles that this rank's encoder
    computed stand for those of every rank.
    """

    def __init__(self, model: Any, device: torch.device, ranks: int) -> None:
        encoder = model.parts()["vision"]
        self.flops: Flops = count_flops(model)
        self.shares = trained_shares(model)
        self.ranks, self.cache, self.computed = ranks, (encoder.cache if encoder.frozen else None), 0
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak = ranks * next((peak for known, peak in PEAKS.items() if known in name), 0.0)

    def of(self, counts: dict[str, int], seconds: float) -> dict[str, float]:
        """TFLOP/s, and `mfu` (arXiv 2204.02311) if the device's peak is known, of `counts` in `seconds`.

        `counts`: those of `trainer.batch_counts`.
        """
        if self.cache is not None:
            computed = self.cache.computed - self.computed
            self.computed = self.cache.computed
            counts = counts | {"tiles": computed * self.ranks}
        total = self.flops.model_flops(counts, self.shares)
        rates = {"tflops_per_s": total / seconds / 1e12}
        return rates | ({"mfu": total / seconds / self.peak} if self.peak else {})
