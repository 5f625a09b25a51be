"""Tensors of a file → a module. Strict: every tensor is accounted for."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from models.weights.folder import damaged
from utils.errors import UserError

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


def read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from None


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
