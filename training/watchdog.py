"""Prints the stacks of all threads when training stalls."""

import faulthandler
import sys
import threading
import time
import traceback


class Watchdog:
    """Prints the stacks of all threads to stderr whenever `minutes` pass without progress (0: never).

    A Python thread prints them, which does not disturb the others. It cannot run while a hanging thread holds
    the interpreter's lock. `faulthandler` prints then, after twice the time: while other threads run it may
    crash the process.
    """

    def __init__(self, minutes: float) -> None:
        self.seconds, self.last, self.over = minutes * 60, time.monotonic(), threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self.seconds and sys.__stderr__ is not None:
            self.thread.start()
        return self

    def progress(self) -> None:
        """Restart the countdown."""
        self.last = time.monotonic()

    def __exit__(self, *error: object) -> None:
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
