"""Faster start and exit of scripts that import large libraries."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


@contextmanager
def faster_imports() -> Iterator[None]:
    """Imports inside the block take 6 instead of 8 seconds.

    Garbage collection is off, and timm does not import W&B, which it does where that is installed.
    """
    hide_wandb, collecting = "wandb" not in sys.modules, gc.isenabled()
    gc.disable()
    if hide_wandb:
        sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if collecting:
            gc.enable()
        if hide_wandb:
            del sys.modules["wandb"]


def exit_at_once() -> NoReturn:
    """End the process without the interpreter's clean-up, which takes 1.5 s for some thousand modules.

    For scripts that have written all output: the streams are flushed, `atexit` functions do not run.
    """
    print(end="", flush=True)
    print(end="", file=sys.stderr, flush=True)
    os._exit(0)
