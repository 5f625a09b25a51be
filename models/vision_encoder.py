"""The vision encoder: a timm backbone, from 8-bit tiles to a feature map."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import timm
import torch
from torch import Tensor, nn

from configs.model import VisionConfig
from utils.errors import UsageError


def create_backbone(config: VisionConfig, pretrained: bool = False) -> nn.Module:
    """timm's model, with random weights or the Hub's.

    Transformers with a fixed input size are built for `config.image_size`. `UsageError` for settings that
    timm refuses.
    """
    try:
        options: dict[str, Any] = json.loads(config.options or "{}")
        if config.image_size and _takes_one_size(config.name):
            options["img_size"] = config.image_size
        return timm.create_model(config.name, pretrained=pretrained, **options)
    except (
        TypeError,
        ValueError,
        AssertionError,
        LookupError,
        ArithmeticError,
        RuntimeError,
        OSError,
    ) as error:
        if pretrained:
            raise  # an error of the Hub
        raise UsageError(
            f"model.vision: timm cannot make {config.name} of {config.image_size} pixels "
            f"with options {config.options or '{}'}: {type(error).__name__}: {error}"
        ) from None


def check_name(name: str) -> None:
    """Raise `UsageError` unless timm has a model of this name."""
    if timm.is_model(name):
        return
    if known := timm_name(name):
        raise UsageError(f"model.vision.name: timm's name of {name} is {known}: give that one")
    near = timm.list_models(f"*{name.split('_')[0]}*")[:5]
    raise UsageError(
        f"model.vision.name: timm has no model '{name}'"
        + (f" (some it has: {', '.join(near)})" if near else "")
    )


def timm_name(name: str) -> str:
    """timm's name of `hf-hub:timm/NAME` or of one of Google's SigLIPs on the Hub; "" if unknown."""
    own = name.removeprefix("hf-hub:").removeprefix("timm/")
    if siglip := re.fullmatch(r"google/siglip(2?)-([a-z0-9-]+)-patch(\d+)(?:-(\d+))?", name):
        version, size, patch, side = siglip.groups()
        size = {"giant-opt": "giantopt"}.get(size, size)
        own = f"vit_{size}_patch{patch}_siglip_{side or 224}.{'v2_' if version else ''}webli"
    return own if own != name and timm.is_model(own) and own in timm.list_pretrained() else ""


def _takes_one_size(name: str) -> bool:
    settings = timm.get_pretrained_cfg(name)
    if settings is not None:
        return bool(settings.fixed_input_size)
    with torch.device("meta"):  # a user's own model, without settings in timm's registry
        return bool(getattr(timm.create_model(name), "default_cfg", {}).get("fixed_input_size"))


def resolve_vision(config: VisionConfig) -> VisionConfig:
    """Fill in `image_size` and `grid` from the encoder, without computing anything.

    `UsageError` where the encoder cannot take the image size.
    """
    check_name(config.name)
    config = replace(config, grid=0)
    with torch.device("meta"):
        probe = VisionEncoder(config)
        side = config.image_size or probe.own_size
        try:
            shape = probe.encode(torch.empty(1, 3, side, side, dtype=torch.uint8)).shape
        except (AssertionError, RuntimeError, ValueError) as error:
            message = " ".join(str(error).split())
            raise UsageError(
                f"model.vision.image_size = {side} does not suit {config.name}: {message}"
            ) from None
    if shape[2:] != (side // probe.stride, side // probe.stride) or side % probe.stride:
        raise UsageError(
            f"model.vision.image_size = {side} must be a multiple of {probe.stride}, "
            f"the pixels that a feature of {config.name} stands for"
        )
    return replace(config, image_size=side, grid=shape[2])


class VisionEncoder(nn.Module):
    """Tiles (N, 3, h, w) uint8 → features (N, C, grid, grid) of one of timm's feature levels.

    Batch norms stay in evaluation mode even when the encoder trains: with batch statistics, one packed
    document would change another's features. So does all of a frozen encoder.
    """

    backbone: Any  # timm's module, with attributes of its own
    mean: Tensor
    std: Tensor

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = create_backbone(config)
        if not hasattr(self.backbone, "forward_intermediates"):
            raise UsageError(f"model.vision.name: timm's {config.name} does not give its feature maps")
        levels: list[dict[str, Any]] = list(self.backbone.feature_info)
        if not -len(levels) <= config.level < len(levels):
            raise UsageError(
                f"model.vision.level = {config.level}: {config.name} has {len(levels)} feature levels, "
                f"0 to {len(levels) - 1}"
            )
        self.level = config.level % len(levels)
        self.last = self.level == len(levels) - 1
        self.features: int = levels[self.level]["num_chs"]
        self.stride: int = levels[self.level]["reduction"]  # pixels per feature, along each side
        if config.grid and config.image_size != config.grid * self.stride:
            raise UsageError(
                f"model.vision.grid = {config.grid} does not follow from image_size = {config.image_size} "
                f"and {self.stride} pixels a feature"
            )
        settings = self.backbone.default_cfg
        self.own_size: int = settings["input_size"][-1]
        # Drop the layers whose output is not read.
        self.backbone.prune_intermediate_layers([self.level], prune_norm=not self.last, prune_head=True)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.empty(1, 3, 1, 1, dtype=torch.float32), persistent=False)
        self.init_non_persistent_buffers()
        self.eval()
        # training/feature_cache.py: stores a frozen encoder's features.
        self.cache: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor] | None = None

    def init_non_persistent_buffers(self) -> None:
        """Fill in mean and standard deviation of 8-bit pixels. Under this name timm's modules do the same."""
        mean, std = (0.0,) * 3, (1.0,) * 3
        if self.config.normalize == "timm":
            mean, std = self.backbone.default_cfg["mean"], self.backbone.default_cfg["std"]
        for buffer, values in ((self.mean, mean), (self.std, std)):
            buffer.copy_(torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1) * 255)

    def train(self, mode: bool = True) -> "VisionEncoder":
        """Training mode turns on dropout and drop-path of `vision.options`, where the encoder is trained."""
        super().train(mode and not self.frozen)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "VisionEncoder":
        """Convert the weights, as `.to` does, but keep `mean` and `std` in fp32: bf16 loses 8-bit pixels."""
        mean, std = self.mean, self.std
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        self.mean, self.std = mean.to(self.mean.device), std.to(self.std.device)
        return self

    @property
    def dtype(self) -> torch.dtype:
        return next(self.backbone.parameters()).dtype

    @property
    def frozen(self) -> bool:
        return not any(p.requires_grad for p in self.parameters())

    def forward(self, tiles: Tensor) -> Tensor:
        if self.cache is not None and self.frozen:
            return self.cache(tiles, self.encode)
        return self.encode(tiles)

    def encode(self, tiles: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            pixels = ((tiles.float() - self.mean) / self.std).to(self.dtype)
            pixels = pixels.contiguous(memory_format=torch.channels_last)
            return self.backbone.forward_intermediates(
                pixels, indices=[self.level], norm=self.last, stop_early=True, intermediates_only=True
            )[0]
