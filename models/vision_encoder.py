"""A timm backbone behind one small class: 8-bit tiles in, a feature map out; features of a frozen encoder are kept."""

from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

from configs.errors import UsageError
from configs.schema import VisionConfig


class VisionEncoder(nn.Module):
    """Tiles (N, 3, h, w) uint8 → features (N, C, h / stride, w / stride).

    Normalisation layers stay in evaluation mode even when the encoder trains: batch statistics would let one packed
    document change another, and make features depend on what they were batched with.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        if not timm.is_model(config.name):
            near = timm.list_models(f"*{config.name.split('_')[0]}*")[:5]
            raise UsageError(f"model.vision.name: timm has no model '{config.name}'" + (f" (some it has: {', '.join(near)})" if near else ""))
        self.backbone = timm.create_model(config.name)
        levels = [level["reduction"] for level in self.backbone.feature_info]
        if config.stride not in levels:
            raise UsageError(f"model.vision.stride = {config.stride}: {config.name} has feature levels at strides {levels}")
        self.level = levels.index(config.stride)
        self.features: int = self.backbone.feature_info[self.level]["num_chs"]
        settings = self.backbone.default_cfg
        self.backbone.prune_intermediate_layers([self.level], prune_norm=True, prune_head=True)  # layers that nothing would read
        self.register_buffer("mean", torch.tensor(settings["mean"]).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(settings["std"]).view(1, 3, 1, 1) * 255, persistent=False)
        self.eval()
        self.cache: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor] | None = None  # training/feature_cache.py

    def train(self, mode: bool = True) -> "VisionEncoder":
        return super().train(False)

    @property
    def frozen(self) -> bool:
        return not any(p.requires_grad for p in self.parameters())

    def forward(self, tiles: Tensor) -> Tensor:
        if self.cache is not None and self.frozen:
            return self.cache(tiles, self.encode)
        return self.encode(tiles)

    def encode(self, tiles: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            pixels = ((tiles.float() - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
            return self.backbone.forward_intermediates(pixels, indices=[self.level], stop_early=True, intermediates_only=True)[0]
