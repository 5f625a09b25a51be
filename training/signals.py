"""Signals before, during and after training."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stopped(Exception):
    """A signal ended training early; the message names the checkpoint."""


class StopSignals:
    """SIGINT, SIGTERM and SIGUSR1 become a `name` that the loop reads after each step. SIGINT `patience` times more than once interrupts at once."""

    def __init__(self, patience: int = 1) -> None:
        self.name, self.patience, self.interrupts = "", patience, 0

    def __enter__(self) -> "StopSignals":
        main = threading.current_thread() is threading.main_thread()  # Python takes signals nowhere else
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
        for (
            number,
            handler,
        ) in self.before.items():  # one who was told to stop is about to: a second word changes nothing
            signal.signal(number, signal.SIG_IGN if self.name and number != signal.SIGINT else handler)


@contextmanager
def ending_in_order() -> Iterator[None]:
    """What ends the process at once, before training takes signals and after it, ends the block first: what is half made is taken away."""

    def end(number: int, frame: Any) -> None:
        print(
            f"{signal.Signals(number).name} before or after training: start again with --resume auto",
            file=sys.stderr,
        )  # which begins where there is nothing yet
        raise SystemExit(128 + number)

    main = threading.current_thread() is threading.main_thread()  # Python takes signals nowhere else
    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGUSR1) if main}
    try:
        yield
    finally:
        for number, handler in before.items():
            if (
                signal.getsignal(number) is end
            ):  # else training was told to stop, and this process is about to
                signal.signal(number, handler)
