"""A moving average of the trained weights (`train.ema`). It stands in the optimizer's state beside the moments: checkpoints hold it, and any number of ranks can read it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor

KEY = "average"  # in a parameter's state


def update_ema(optimizers: list[torch.optim.Optimizer], step: int, decay: float) -> None:
    """After the optimizers' 1-based `step`. Early on the decay is (1 + step) ÷ (10 + step) at most, else the start would weigh for long."""
    known: list[tuple[Tensor, Tensor]] = []
    for parameter, state in ((p, state) for optimizer in optimizers for p, state in optimizer.state.items()):
        if KEY in state:
            known.append((_local(state[KEY]), _local(parameter.detach())))
        else:  # its first update; the optimizer made its own state before
            state[KEY] = parameter.detach().clone()
    if known:
        averages, weights = zip(*known, strict=True)
        torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + step) / (10 + step)))


@torch.no_grad()
def swap_ema(optimizers: list[torch.optim.Optimizer]) -> None:
    """The averages, where there are any, become the model's weights, and the reverse."""
    for parameter, state in ((p, state) for optimizer in optimizers for p, state in optimizer.state.items()):
        if KEY in state:
            weights, average = _local(parameter.detach()), _local(state[KEY])
            kept = weights.clone()
            weights.copy_(average)
            average.copy_(kept)


@contextmanager
def ema_weights(optimizers: list[torch.optim.Optimizer]) -> Iterator[None]:
    """Inside the block the model has the averages, where there are any. No checkpoint may be copying its weights."""
    swap_ema(optimizers)
    try:
        yield
    finally:
        swap_ema(optimizers)


def load_ema(checkpoint: Path, model: Any) -> None:
    """Into a model that this rank has for itself, over its weights; what has no average yet stays."""
    reader = HuggingFaceStorageReader(str(checkpoint))
    found = reader.read_metadata().state_dict_metadata
    wanted = {f"optimizer.{name}.{KEY}": parameter.detach() for name, parameter in model.named_parameters()}
    dcp.load(
        {name: tensor for name, tensor in wanted.items() if name in found},
        storage_reader=reader,
        no_dist=True,
    )


def _local(tensor: Tensor) -> Tensor:
    """This rank's share."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
