"""Work around the steps: the base of all callbacks, and the watchdog."""

import faulthandler
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any


class Callback:
    """Work around the steps. A `Trainer` calls the methods of its callbacks, in their order."""

    def begin(self, trainer: Any) -> None:
        """Training goes on after `trainer.step`; nothing in the run folder is of a later step any more."""

    def before_update(self, trainer: Any) -> None:
        """The gradients are complete, and the weights about to change."""

    def after_step(self, trainer: Any, values: dict[str, Any]) -> None:
        """A step is done; `values` are those for the log, and may be added to."""

    def evaluate(self, trainer: Any) -> dict[str, Any]:
        """Return metrics of the model, which is in evaluation mode and holds the average of `train.ema`."""
        return {}

    def before_checkpoint(self) -> None:
        """A checkpoint is about to be written. Called in the saver's thread."""

    def saved(self, checkpoint: Path) -> None:
        """A checkpoint is complete. Called on rank 0, in the saver's thread."""

    def in_use(self) -> list[Path]:
        """Return the checkpoints that are being read, and must not be deleted. Called on rank 0."""
        return []

    def end(self, succeeded: bool) -> None:
        """Training ended or was stopped (`succeeded`), or failed."""


class Watchdog(Callback):
    """Prints the stacks of all threads to stderr whenever `minutes` pass without a step (0: never).

    A Python thread prints them, which does not disturb the others. It cannot run while a hanging thread holds
    the interpreter's lock. `faulthandler` prints then, after twice the time: while other threads run it may
    crash the process.
    """

    def __init__(self, minutes: float) -> None:
        self.seconds, self.last, self.over = minutes * 60, time.monotonic(), threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def begin(self, trainer: Any = None) -> None:
        self.last = time.monotonic()
        if self.seconds and sys.__stderr__ is not None:
            self.thread.start()

    def after_step(self, trainer: Any, values: dict[str, Any]) -> None:
        self.last = time.monotonic()

    def end(self, succeeded: bool) -> None:
        self.over.set()
        if self.thread.is_alive():
            self.thread.join()

    def _watch(self) -> None:
        stderr = sys.__stderr__
        assert stderr is not None  # else the thread is not started
        remaining = self.seconds
        while True:
            faulthandler.dump_traceback_later(2 * self.seconds + 1, file=stderr)  # restarts its countdown
            if self.over.wait(max(0.1, remaining)):
                break
            remaining = self.last + self.seconds - time.monotonic()
            if remaining <= 0:
                print(_stacks(self.seconds / 60), end="", file=stderr, flush=True)
                remaining, self.last = self.seconds, time.monotonic()
        faulthandler.cancel_dump_traceback_later()


def _stacks(minutes: float) -> str:
    """The message: the stack of every thread but this one."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = {
        ident: frame for ident, frame in sys._current_frames().items() if ident != threading.get_ident()
    }
    stacks = [
        f"thread {names.get(ident, ident)}, most recent call last:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in frames.items()
    ]
    return (
        f"no step for {minutes:.3g} minutes; training goes on waiting. Where its threads are:\n"
        f"{''.join(stacks)}"
    )
