"""The seam between the core of `models/` and faster forms of its operations, one in each file of this folder.

The core asks `find_kernel`; None means the plain form, which stands in the core. A kernel says in `applies`
for which tensors it is used. `use_kernels("plain")` turns all of them off.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models.kernels.flex_attention import FlexLayout
from models.kernels.rms_norm import TrainedRMSNorm
from models.kernels.segment_attention import BlockSparseLayout
from models.kernels.swiglu import RecomputedSwiGLU

MODES = ("auto", "plain")
# Operation of the core → its kernels in the order of preference. Decoding has `packed_block.py` besides.
KERNELS: dict[str, tuple[Any, ...]] = {
    "attention": (FlexLayout, BlockSparseLayout),
    "rms_norm": (TrainedRMSNorm,),
    "swiglu": (RecomputedSwiGLU,),
}
_chosen: list[Any] = ["auto"]  # or kernels


def use_kernels(mode: str | Sequence[Any]) -> None:
    """Choose the kernels of this process: "auto" (all), "plain" (none), or some of them."""
    _chosen[:] = ([] if mode == "plain" else [mode]) if isinstance(mode, str) else mode


def in_use(kernel: Any, x: Tensor) -> bool:
    """Whether `kernel` was chosen, and applies to tensors like `x`."""
    return (_chosen == ["auto"] or kernel in _chosen) and bool(kernel.applies(x))


def kernels_in_training(device: torch.device) -> list[str]:
    """The names of the kernels that training on `device` uses."""
    with torch.enable_grad():
        kernels = [find_kernel(operation, torch.empty(1, device=device)) for operation in KERNELS]
    return [kernel.__module__.rpartition(".")[2] for kernel in kernels if kernel is not None]


def find_kernel(operation: str, x: Tensor) -> Any | None:
    """The kernel of `operation` for tensors like `x`, or None: then the plain form is computed."""
    for kernel in KERNELS[operation]:
        if in_use(kernel, x):
            return kernel
    return None
