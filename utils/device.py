"""The device that computes, and what it computes fast."""

import os

import torch

from utils.errors import UsageError, UserError


def computes_bf16(device: torch.device) -> bool:
    """Whether the device computes bf16 products natively."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return (
        device.type == "cpu"
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    )


def pick_device(name: str, flag: str = "train.device") -> torch.device:
    """The device called `name`; "auto" is cuda if available, under torchrun this rank's own.

    `flag`: what error messages call it.
    """
    device = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if device.split(":")[0] not in ("cpu", "cuda", "mps"):
        raise UsageError(f"{flag} = {name!r} is none of auto, cpu, cuda, mps")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"{flag} = {device!r} cannot be used: {str(error).splitlines()[0]}") from None
