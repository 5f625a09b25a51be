"""The device that computes, and what it computes fast."""

import os
from contextlib import AbstractContextManager

import torch

from utils.errors import UsageError, UserError


def computes_bf16(device: torch.device) -> bool:
    """Whether the device computes bf16 products natively."""
    if device.type == "cuda":  # an estimate may be made without a GPU: then a recent one is assumed
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    return (
        device.type == "cpu"
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    )


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype `name`: bf16, fp16, fp32, or "auto", bf16 where the device computes in it, else fp32."""
    if name == "auto":
        return torch.bfloat16 if computes_bf16(device) else torch.float32
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def describe_device(device: torch.device) -> str:
    """The device for people: `cpu (AVX512, 2 threads)`, `cuda:0 (NVIDIA L4, 22 GiB)`."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{device} ({properties.name}, {properties.total_memory / 2**30:.0f} GiB)"
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"cpu ({torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' * (threads > 1)})"
    return str(device)


def autocast(name: str, device: torch.device) -> AbstractContextManager[None]:
    """torch's autocast to the dtype called `name`; off for fp32."""
    dtype = compute_dtype(name, device)
    enabled = dtype != torch.float32
    return torch.autocast(device.type, dtype if enabled else torch.bfloat16, enabled=enabled)


def pick_device(name: str, flag: str = "train.device") -> torch.device:
    """The device called `name`; "auto" is cuda, mps or cpu, under torchrun this rank's own cuda device.

    `flag`: what error messages call it.
    """
    device = name
    if name == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if device.split(":")[0] not in ("cpu", "cuda", "mps"):
        raise UsageError(f"{flag} = {name!r} is none of auto, cpu, cuda, mps")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"{flag} = {device!r} cannot be used: {str(error).splitlines()[0]}") from None
