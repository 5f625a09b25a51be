"""What a user did wrong or what the machine refused, told in one line, with the right exit code."""

import io
import os
import select
import sys
from collections.abc import Callable
from difflib import get_close_matches


class UserError(Exception):
    """A mistake that its reader can mend: the message says what, where and what to do. Exit code 1."""

    exit_code = 1


class UsageError(UserError):
    """A wrong command line or configuration. Exit code 2."""

    exit_code = 2


class ImageError(UserError):
    """An image that cannot be used; `reason` is a short word for counting."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def nearest(name: str, known: list[str], count: int = 1) -> str:
    """A hint naming the known words nearest to `name`, at most `count`: `" (did you mean 'lr_right'?)"`, or all of a short list."""
    *others, last = [f"'{word}'" for word in get_close_matches(name, known, n=count)] or [""]
    if last:
        return f" (did you mean {', '.join(others)}{' or ' * bool(others)}{last}?)"
    return f" (known: {', '.join(sorted(known))})" if len(known) <= 12 else ""


def run_script(main: Callable[[list[str]], None]) -> None:
    """Run a script's `main(argv)`; a user's mistake becomes one line on stderr. `--debug` shows the traceback."""
    argv = sys.argv[1:]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that has no arrow loses no answer
    debug = "--debug" in argv
    try:
        main([a for a in argv if a != "--debug"])
        print(end="", flush=True)  # nothing where there is no standard output at all
    except (UserError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            sys.exit(141)  # as a shell's tools do under `| head`
        if debug:
            raise
        message, rank = " ".join(str(error).split()), os.environ.get("RANK", "0")
        if rank == "0":
            print(f"error: {message}", file=sys.stderr)
        elif not isinstance(error, UsageError):  # which all ranks find, and the first one tells
            print(f"error: rank {rank}: {message}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _nobody_reads() -> bool:
    """Is the standard output a pipe whose reader has gone? From then on it goes nowhere."""
    output = sys.stdout.fileno()
    poll = select.poll()
    poll.register(output, 0)
    gone = any(events & select.POLLERR for _, events in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return gone
