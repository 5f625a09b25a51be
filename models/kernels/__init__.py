"""The seam between the core of `models/` and faster forms of its operations, one in each file of this folder.

The core asks `find_kernel`; None means the plain form, which stands in the core. A kernel says in `applies`
for which tensors it is used. `use_kernels("plain")` turns all of them off.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor

MODES = ("auto", "plain")
_in_use: list[str] = ["auto"]  # or names of kernels


@cache
def all_kernels() -> dict[str, tuple[Any, ...]]:
    """Operation of the core → its kernels in the order of preference."""
    from models.kernels.flex_attention import FlexLayout
    from models.kernels.packed_block import PackedBlock
    from models.kernels.segment_attention import BlockSparseLayout

    return {"attention": (FlexLayout, BlockSparseLayout), "decoding": (PackedBlock,)}


def use_kernels(mode: str | Sequence[str]) -> None:
    """Choose the kernels of this process: "auto" (all), "plain" (none), or the names of some."""
    _in_use[:] = ([] if mode == "plain" else [mode]) if isinstance(mode, str) else mode


def find_kernel(operation: str, x: Tensor) -> Any | None:
    """The kernel of `operation` for tensors like `x`, or None: then the plain form is computed."""
    for kernel in all_kernels()[operation] if _in_use else ():
        if (_in_use == ["auto"] or kernel.__name__ in _in_use) and kernel.applies(x):
            return kernel
    return None
