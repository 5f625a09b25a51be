"""An exponential moving average (EMA) of the trained weights: `train.ema`.

It is part of the optimizer's state, so checkpoints contain it and any number of ranks can read it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.checkpoint import load_tensors, saved_shapes
from training.distributed import local_tensor

KEY = "average"  # in a parameter's state


def update_ema(optimizers: list[torch.optim.Optimizer], step: int, decay: float) -> None:
    """Update the averaged after the optimizers' 1-based `step`.

    The decay is at most (1 + step) ÷ (10 + step), so that the initial weights are soon forgotten.
    """
    pairs: list[tuple[Tensor, Tensor]] = []
    for parameter, state in ((p, state) for optimizer in optimizers for p, state in optimizer.state.items()):
        if KEY in state:
            pairs.append((local_tensor(state[KEY]), local_tensor(parameter.detach())))
        else:  # its first update, after the optimizer has created its own state
            state[KEY] = parameter.detach().clone()
    if pairs:
        ema, weights = zip(*pairs, strict=True)
        torch._foreach_lerp_(ema, weights, 1 - min(decay, (1 + step) / (10 + step)))


@torch.no_grad()
def swap_ema(optimizers: list[torch.optim.Optimizer]) -> None:
    """Exchange the model's weights and their averaged, where there are any."""
    for parameter, state in ((p, state) for optimizer in optimizers for p, state in optimizer.state.items()):
        if KEY in state:
            weights, average = local_tensor(parameter.detach()), local_tensor(state[KEY])
            copy = weights.clone()
            weights.copy_(average)
            average.copy_(copy)


@contextmanager
def ema_weights(optimizers: list[torch.optim.Optimizer]) -> Iterator[None]:
    """Give the model its averaged inside the block. No checkpoint may be copying its weights meanwhile."""
    swap_ema(optimizers)
    try:
        yield
    finally:
        swap_ema(optimizers)


def load_ema(checkpoint: Path, model: Any) -> None:
    """Load the averages of a checkpoint into a model that is not shared among ranks.

    Weights without an average stay as they are.
    """
    saved = saved_shapes(checkpoint)
    targets = {f"optimizer.{name}.{KEY}": parameter.detach() for name, parameter in model.named_parameters()}
    averaged = {name: tensor for name, tensor in targets.items() if name in saved}
    load_tensors(checkpoint, averaged, no_dist=True)
