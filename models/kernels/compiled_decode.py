"""The decode step by torch.compile. On CUDA it runs as a CUDA graph: the host starts all its kernels at once.

Its shapes are fixed: rows stay until all are done, and the cache has a multiple of 256 slots, all of which
attention reads. Another number of rows, drafts or slots is compiled once more, and then for any number.
"""

import shutil
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from models.generation import VLM, forward_cached
from models.kv_cache import DecodingCache
from models.language_model import LanguageModel
from utils.errors import UsageError


class CompiledStep:
    """`forward_cached` by torch.compile, for a cache of fixed shapes."""

    def __init__(self) -> None:
        self.step: Any = torch.compile(forward_cached, mode="reduce-overhead", fullgraph=True)

    def __call__(self, right: LanguageModel, x: Tensor, positions: Tensor, cache: DecodingCache) -> Tensor:
        for tensor in (*cache.keys, *cache.values):  # a CUDA graph may write into what has a fixed address
            torch._dynamo.mark_static_address(tensor, guard=False)
        torch.compiler.cudagraph_mark_step_begin()
        states: Tensor = self.step(right, x, positions, cache)
        return states


def compile_decoding(model: VLM) -> None:
    """Let `generate` compile the decode step of `model`, and its greedy drafts, at their first use.

    `UsageError` where torch has no compiler: Triton on CUDA, a C++ compiler elsewhere.
    """
    cuda = model.device.type == "cuda"
    if (find_spec("triton") if cuda else shutil.which("g++")) is None:
        raise UsageError(
            f"--compile needs {'Triton' if cuda else 'the C++ compiler g++'}: install it, or leave it out"
        )
    model.right.compiled_step = CompiledStep()
    if model.heads is not None:
        draft: Any = torch.compile(model.heads.draft, mode="reduce-overhead", fullgraph=True)
        model.heads.compiled_draft = draft
