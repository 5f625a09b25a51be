"""Tensors of a file → a module. Strict: every tensor is accounted for."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from models.weights.folder import damaged, weight_files
from utils.errors import UserError
from utils.files import refuse_pointer

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
        refuse_pointer(path)
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from None


def load_tensors(module: nn.Module, tensors: dict[str, Tensor], context: str) -> None:
    """Make `tensors` the parameters and buffers of `module`, as fp32. It may be on the meta device.

    A missing, extra or misshapen tensor raises `UserError` naming it and `context`. Pages of a file are read
    on first use and copied when they are changed.
    """
    check_tensors(module, tensors, context)
    values = {}
    for name, own in module.state_dict().items():
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != own.shape:  # a counter keeps its value, or starts at zero
            tensor = torch.zeros_like(own, device="cpu") if own.is_meta else own
        values[name] = tensor.float() if tensor.is_floating_point() else tensor
    module.load_state_dict(values, assign=True)
    _compute_buffers(module, context)


def _compute_buffers(module: nn.Module, context: str) -> None:
    """Compute the buffers that no file holds, where they are on the meta device.

    Their modules do it in `init_non_persistent_buffers`, as timm calls it. `UserError` if a tensor remains on
    the meta device.
    """
    for part in module.modules():
        on_meta = [(name, buffer) for name, buffer in part.named_buffers(recurse=False) if buffer.is_meta]
        compute: Callable[[], None] | None = getattr(part, "init_non_persistent_buffers", None)
        if on_meta and compute is not None:
            for name, buffer in on_meta:
                setattr(part, name, torch.empty_like(buffer, device="cpu"))
            compute()
    named = [*module.named_parameters(), *module.named_buffers()]
    if remaining := [name for name, tensor in named if tensor.is_meta]:
        raise UserError(
            f"{context} has no values for {', '.join(remaining[:3])}: "
            "their module must compute them in init_non_persistent_buffers()"
        )


def allocate(module: nn.Module) -> None:
    """Give tensors on the meta device memory, which a checkpoint will fill: values are arbitrary."""
    on_meta = {name: tensor for name, tensor in module.state_dict().items() if tensor.is_meta}
    empty = {name: torch.empty_like(tensor, device="cpu") for name, tensor in on_meta.items()}
    module.load_state_dict(empty, assign=True, strict=False)


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
    check_finite(tensors, context)


def check_finite(tensors: Mapping[str, Tensor], context: str) -> None:
    """Raise `UserError` where a tensor holds a value that is not finite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise UserError(
                f"{context}: {name} holds values that are not finite: the file is damaged, "
                "or its training diverged"
            )


def check_weights(folder: Path) -> None:
    """Raise `UserError` where the weights of a model folder cannot be read, or are not finite."""
    for path in weight_files(folder):
        check_finite(read_safetensors(path), str(path))


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite. The sum is a fast check that may overflow: then all are looked at."""
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32)) or torch.isfinite(tensor).all())
