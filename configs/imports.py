"""Large libraries, imported late."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def sooner() -> Iterator[None]:
    """Imports without what takes 2 of their 8 seconds: a search for garbage among modules, and W&B, which timm imports where it is installed."""
    absent = "wandb" not in sys.modules
    gc.disable()
    if absent:
        sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        gc.enable()
        if absent:
            del sys.modules["wandb"]
