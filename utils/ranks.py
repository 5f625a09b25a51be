"""The processes of a run under torchrun, and words between them. Alone, all of it does nothing."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class DistributedContext:
    """The ranks of a run; this process is number `rank` of `size`. Every rank makes the same calls, in the same order."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, *values: "Tensor") -> None:
        """Sums over all ranks, in place."""
        import torch.distributed as dist

        for value in values if self.size > 1 else ():
            dist.all_reduce(value)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank."""
        import torch.distributed as dist

        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """The first rank's value."""
        import torch.distributed as dist

        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, 0)
        return values[0]

    def run_on_rank0(self, make: Callable[[], T]) -> T:
        """What `make` gives on the first rank. Its `UserError` ends all ranks; the first one tells it."""
        made: Any = None
        if self.first:
            try:
                made = make()
            except UserError as error:
                self.broadcast(error)
                raise
        made = self.broadcast(made)
        if isinstance(made, UserError):
            raise SystemExit(made.exit_code)
        return made  # type: ignore[no-any-return]

    @contextmanager
    def rank0_first(self) -> Iterator[None]:
        """The block on the first rank, then on all others: what it makes on the disk, they find."""
        if not self.first:
            self.broadcast(None)
        yield
        if self.first:
            self.broadcast(None)


SINGLE_PROCESS = DistributedContext()


def torchrun_context() -> DistributedContext:
    """What torchrun's environment says; nothing is opened."""
    world = DistributedContext(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    if not 0 <= world.rank < world.size:
        raise UserError(
            f"the environment's RANK = {world.rank} and WORLD_SIZE = {world.size} do not fit: torchrun sets both; unset RANK for a single process"
        )
    return world
