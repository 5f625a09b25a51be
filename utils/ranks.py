"""Rank and world size under torchrun, and collectives. With one process the collectives do nothing."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

from utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class DistributedContext:
    """This process's `rank` and the world `size`. All ranks call the collectives, in the same order."""

    rank: int = 0
    size: int = 1

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0

    def sum(self, *values: "Tensor") -> None:
        """All-reduce each tensor to its sum over all ranks, in place."""
        import torch.distributed as dist

        for value in values if self.size > 1 else ():
            dist.all_reduce(value)

    def gather(self, value: T) -> list[T]:
        """All-gather: the value of every rank, in the order of ranks."""
        import torch.distributed as dist

        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """The value of rank 0, on all ranks."""
        import torch.distributed as dist

        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, 0)
        return values[0]

    def run_on_rank0(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0 and broadcast its result. Its `UserError` ends all ranks."""
        result: Any = None
        if self.is_rank0:
            try:
                result = function()
            except UserError as error:
                self.broadcast(error)
                raise
        result = self.broadcast(result)
        if isinstance(result, UserError):
            raise SystemExit(result.exit_code)
        return cast("T", result)

    @contextmanager
    def rank0_first(self) -> Iterator[None]:
        """Run the block on rank 0, then on the others, which can read the files that rank 0 wrote."""
        if not self.is_rank0:
            self.broadcast(None)
        yield
        if self.is_rank0:
            self.broadcast(None)


SINGLE_PROCESS = DistributedContext()


def torchrun_context() -> DistributedContext:
    """Read RANK and WORLD_SIZE from the environment; no process group is opened."""
    world = DistributedContext(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    if not 0 <= world.rank < world.size:
        raise UserError(
            f"the environment's RANK = {world.rank} and WORLD_SIZE = {world.size} do not fit: "
            "torchrun sets both; unset RANK for a single process"
        )
    return world
