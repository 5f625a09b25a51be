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

COUNTER = "num_batches_tracked"  # of batch normalisation: only some files have it, and nothing reads it


def module_fingerprint(module: nn.Module, salt: str = "") -> str:
    """Hash a module's weights and buffers, including normalisation constants, to 32 hex digits.

    `salt` holds everything else that the module's output depends on.
    """
    digest = hashlib.blake2b(salt.encode(), digest_size=16)
    for name, tensor in sorted(
        [*module.named_parameters(), *module.named_buffers()], key=lambda item: item[0]
    ):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; a damaged one raises `UserError`."""
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from None


def load_tensors(module: nn.Module, tensors: dict[str, Tensor], context: str, assign: bool = False) -> None:
    """Fill `module`. A missing, extra or misshapen tensor raises `UserError` naming it and `context`.

    With `assign` the file's tensors become the parameters, as fp32. Their pages are read on first use and
    copied when they are changed.
    """
    check_tensors(module, tensors, context)
    own = module.state_dict()  # a counter that is missing, extra or misshapen keeps its value
    values = {
        name: tensors[name] if name in tensors and tensors[name].shape == own[name].shape else own[name]
        for name in own
    }
    if assign:
        values = {name: t.float() if t.is_floating_point() else t for name, t in values.items()}
    module.load_state_dict(values, assign=assign)


def check_tensors(module: nn.Module, tensors: dict[str, Tensor], context: str) -> None:
    """Compare `tensors` with the state of `module`: names, shapes, kinds of number, finite values.

    The first difference raises `UserError`. Counters of batch normalisation are left out.
    """
    own = {name: tensor for name, tensor in module.state_dict().items() if not name.endswith(COUNTER)}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(COUNTER)}
    common = sorted(own.keys() & tensors.keys())
    wrong_shapes = [
        f"{name} is {tuple(tensors[name].shape)}, expected {tuple(own[name].shape)}"
        for name in common
        if tensors[name].shape != own[name].shape
    ]
    wrong_dtypes = [
        f"{name} is {tensors[name].dtype}"
        for name in common
        if own[name].is_floating_point() and not tensors[name].is_floating_point()
    ]
    for problem, names in (
        ("lacks", sorted(own.keys() - tensors.keys())),
        ("has unexpected", sorted(tensors.keys() - own.keys())),
        ("has a wrong shape:", wrong_shapes),
        ("has no floating-point weights:", wrong_dtypes),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(
                f"{context} {problem} {', '.join(names[:3])}{more}: these weights belong to another model"
            )
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise UserError(
                f"{context}: {name} holds values that are not finite: the file is damaged, "
                "or its training diverged"
            )


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite. The sum is a fast check that may overflow: then all are looked at."""
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32)) or torch.isfinite(tensor).all())


class _SkipInit(TorchFunctionMode):
    """Skip random and constant initialisation of meta tensors, which takes torch some milliseconds each."""

    SKIPPED = frozenset({"normal_", "uniform_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_"})

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        target = args[0] if args else (kwargs or {}).get("tensor")  # nn.init's functions name it
        if func.__name__ in self.SKIPPED and isinstance(target, Tensor) and target.is_meta:
            return target
        return func(*args, **(kwargs or {}))


@contextmanager
def without_values() -> Iterator[None]:
    """Build modules whose parameters have a shape and no memory: a file will fill them.

    Buffers are built as usual, because not all of them are saved. Other threads are not affected.
    """
    register, own_thread = nn.Module.register_parameter, threading.get_ident()

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and threading.get_ident() == own_thread:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        with _SkipInit():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
