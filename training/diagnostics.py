"""What is looked at now and then beside the loss: how far an update moves the weights, how weights and gradients are spread, and what the machine achieves."""

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from training.estimate import Flops, count_flops, trained_shares
from training.trackers import Histogram

SHARE = 1 << 16  # numbers of a tensor that are looked at: its first
# Dense bf16 FLOP/s of makers' data sheets, by what the device's name holds.
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


class Diagnostics:
    """`look` before an update, `found` after it."""

    def __init__(self, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self.before: dict[int, Tensor] = {}
        self.gradients: dict[str, list[Tensor]] = {}

    def look(self) -> None:
        """Keep what the update will overwrite; gradients by layer."""
        self.before, gradients = {}, defaultdict(list)
        for p in (p for group in self.groups for p in group["params"] if p.grad is not None):
            self.before[id(p)] = _share(p).clone()
            gradients[self._layer(p)].append(_share(p.grad).clone())
        self.gradients = dict(gradients)

    def found(self) -> tuple[dict[str, float], dict[str, Histogram]]:
        """→ norm of the update ÷ norm of the weights, by part; histograms of weights and gradients, by layer. Of the first `SHARE` numbers of every tensor, and of this rank's share."""
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2))
        weights = defaultdict(list)
        for group in self.groups:
            for p in (p for p in group["params"] if id(p) in self.before):
                now, before = _share(p), self.before[id(p)]
                sums[group["part"]] += torch.stack(
                    ((now - before).square().sum(), before.square().sum())
                ).cpu()
                weights[self._layer(p)].append(now)
        ratios = {
            part: (moved / max(was, 1e-30)) ** 0.5
            for part, (moved, was) in ((part, s.tolist()) for part, s in sums.items())
        }
        spread = {
            f"{kind}/{layer}": _histogram(tensors)
            for kind, layers in (("weights", weights), ("gradients", self.gradients))
            for layer, tensors in layers.items()
        }
        self.before, self.gradients = {}, {}
        return ratios, spread

    def _layer(self, p: Tensor) -> str:
        """`right.layers.3` of `right.layers.3.mlp.up_proj.weight`; what stands outside numbered layers by its first two names."""
        names = self.names[id(p)].split(".")
        last = next((i for i, name in enumerate(names) if name.isdigit()), 1)
        return ".".join(names[: last + 1])


def _share(x: Tensor) -> Tensor:
    x = x.to_local() if isinstance(x, DTensor) else x
    return x.detach().flatten()[:SHARE].float()


def _histogram(tensors: list[Tensor]) -> Histogram:
    return np.histogram(torch.cat(tensors).cpu().numpy(), bins=64)


def sources_of(batch: dict[str, Tensor], samples: list[str], names: list[str]) -> Tensor:
    """Which of `names` each supervised token of a batch comes from, (S,); `samples`: source and record number of each of its groups, row by row."""
    groups, supervised = (
        batch["right_groups"],
        batch["labels"] != -100,
    )  # (B, R), groups in each row from 0 on
    counts = groups.amax(1) + 1
    number = {name: i for i, name in enumerate(names)}
    numbers = torch.tensor([number[sample.rpartition(" ")[0]] for sample in samples], dtype=torch.int64)
    return numbers[groups[supervised] + (counts.cumsum(0) - counts).repeat_interleave(supervised.sum(1))]


class FlopsMeter:
    """FLOP/s of training: the products of every token, tile and supervised position, padding left out. Tiles whose features are cached count nothing."""

    def __init__(self, model: Any, device: torch.device, ranks: int) -> None:
        encoder = model.parts()["vision"]
        self.flops: Flops = count_flops(model)
        self.shares = {"left": 0.0} | trained_shares(model)
        self.tile = 0 if encoder.frozen and encoder.cache is not None else self.flops.tile
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak = ranks * next((peak for known, peak in PEAKS.items() if known in name), 0.0)

    def of(self, counts: dict[str, int], seconds: float) -> dict[str, float]:
        """`counts`: tiles, left and right tokens, left and right pairs of a query and a key, supervised tokens. `mfu` (arXiv 2204.02311) where the device's peak is known."""
        f, trained = self.flops, self.shares
        before_right = bool(trained["vision"] or trained["projector"] or trained["left"])
        total = counts["tiles"] * self.tile * (3 if trained["vision"] else 1)
        total += counts["left"] * f.left_token * (1 + before_right + trained["left"]) + counts[
            "left_pairs"
        ] * f.left_pair * (3 if before_right else 1)
        total += (
            counts["right"] * f.right_token * (2 + trained["right"])
            + counts["right_pairs"] * f.right_pair * 3
        )
        total += counts["supervised"] * f.supervised_token * (2 + (trained["right"] == 1))
        found = {"tflops_per_s": total / seconds / 1e12}
        return found | ({"mfu": total / seconds / self.peak} if self.peak else {})
