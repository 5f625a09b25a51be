"""Signals that stop a run: before, during and after training."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stopped(Exception):
    """A signal ended training early; the message names the checkpoint."""


class StopSignals:
    """Records SIGINT, SIGTERM or SIGUSR1 as `name`, which the loop reads after each step.

    The SIGINT that follows `patience` others raises `KeyboardInterrupt` at once.
    """

    def __init__(self, patience: int = 1) -> None:
        self.name, self.patience, self.interrupts = "", patience, 0

    def __enter__(self) -> "StopSignals":
        main = threading.current_thread() is threading.main_thread()  # Python handles signals only there
        self.before = {
            number: signal.signal(number, self._note)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
            if main
        }
        return self

    def _note(self, number: int, frame: Any) -> None:
        self.interrupts += number == signal.SIGINT
        if self.interrupts > self.patience and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    def __exit__(self, *error: object) -> None:
        # After a stop signal the process is about to end: further ones are ignored, except SIGINT.
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_IGN if self.name and number != signal.SIGINT else handler)


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGUSR1 into `SystemExit`, so that half-made files are removed.

    For the time before and after training; `StopSignals` takes over in between.
    """

    def end(number: int, frame: Any) -> None:
        # With --resume auto, for it starts a new run where there is none yet.
        print(
            f"{signal.Signals(number).name} before or after training: start again with --resume auto",
            file=sys.stderr,
        )
        raise SystemExit(128 + number)

    main = threading.current_thread() is threading.main_thread()  # Python handles signals only there
    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGUSR1) if main}
    try:
        yield
    finally:
        for number, handler in before.items():
            # Another handler means that a signal stopped training, and the process is about to end.
            if signal.getsignal(number) is end:
                signal.signal(number, handler)
