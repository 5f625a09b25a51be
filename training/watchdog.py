"""Where the threads are when training stalls."""

import faulthandler
import sys
import threading
import time
import traceback


class Watchdog:
    """Each silence of so many minutes (0: none) has the stacks of all threads printed to stderr.

    A thread of Python's does it, which disturbs no other. Where it cannot run, for one holds the interpreter's lock and hangs, `faulthandler`
    does, after twice the time: beside threads at work that may end the process.
    """

    def __init__(self, minutes: float) -> None:
        self.seconds, self.last, self.over = minutes * 60, time.monotonic(), threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self.seconds and sys.__stderr__ is not None:
            self.thread.start()
        return self

    def progress(self) -> None:
        """Training goes on: a new silence begins."""
        self.last = time.monotonic()

    def __exit__(self, *error: object) -> None:
        self.over.set()
        if self.thread.is_alive():
            self.thread.join()

    def _watch(self) -> None:
        rest = self.seconds
        while True:
            faulthandler.dump_traceback_later(2 * self.seconds + 1, file=sys.__stderr__)  # begins anew
            if self.over.wait(max(0.1, rest)):
                break
            rest = self.last + self.seconds - time.monotonic()
            if rest <= 0:
                print(_stacks(self.seconds / 60), end="", file=sys.__stderr__, flush=True)
                rest, self.last = self.seconds, time.monotonic()
        faulthandler.cancel_dump_traceback_later()


def _stacks(minutes: float) -> str:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = {
        ident: frame for ident, frame in sys._current_frames().items() if ident != threading.get_ident()
    }
    told = [
        f"thread {names.get(ident, ident)}, most recent call last:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in frames.items()
    ]
    return f"no step for {minutes:.3g} minutes; training goes on waiting. Where its threads are:\n{''.join(told)}"
