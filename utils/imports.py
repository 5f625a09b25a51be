"""Large libraries: imported late, and left at once."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


@contextmanager
def faster_imports() -> Iterator[None]:
    """Imports without what takes 2 of their 8 seconds: a search for garbage among modules, and W&B, which timm imports where it is installed."""
    absent, collected = "wandb" not in sys.modules, gc.isenabled()
    gc.disable()
    if absent:
        sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if collected:
            gc.enable()
        if absent:
            del sys.modules["wandb"]


def exit_at_once() -> NoReturn:
    """End the process here: taking some thousand modules apart takes a second and a half, and frees what the system frees anyway. For scripts that have written all they will."""
    print(end="", flush=True)
    print(end="", file=sys.stderr, flush=True)
    os._exit(0)
