"""Rank and world size under torchrun, and collectives. With one process the collectives do nothing."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

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
        """Call `function` on rank 0 and broadcast its result. Its exception ends all ranks."""
        result = None
        with self._rank0_block():
            if self.is_rank0:
                result = function()
        return cast("T", self.broadcast(result))

    @contextmanager
    def rank0_first(self) -> Iterator[None]:
        """Run the block on rank 0, then on the others, which can read the files that rank 0 wrote.

        An exception of rank 0 ends all ranks.
        """
        if self.is_rank0:
            with self._rank0_block():
                yield
        else:
            with self._rank0_block():
                pass
            yield

    @contextmanager
    def _rank0_block(self) -> Iterator[None]:
        """The others wait here for rank 0's block, and exit with its status if it raises."""
        failed_with = 0
        try:
            yield
        except BaseException as error:
            failed_with = error.exit_code if isinstance(error, UserError) else 1
            raise
        finally:
            failed_with = self.broadcast(failed_with)
        if failed_with:
            raise SystemExit(failed_with)


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
