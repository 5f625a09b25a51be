"""Errors that a user can mend: one line on stderr, and an exit code."""

import io
import os
import select
import sys
from collections.abc import Callable
from difflib import get_close_matches


class UserError(Exception):
    """An error that the user can mend: the message says what is wrong, where, and what to do. Exit code 1."""

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
    """A hint for an error: `" (did you mean 'lr_right'?)"`, with the `count` known words nearest to `name`.

    Without a near word: all known words if there are at most 12, else an empty string.
    """
    words = get_close_matches(name, known, n=count)
    *others, last = [f"'{word}'" for word in words] or [""]
    if last:
        return f" (did you mean {', '.join(others)}{' or ' * bool(others)}{last}?)"
    return f" (known: {', '.join(sorted(known))})" if len(known) <= 12 else ""


def run_script(main: Callable[[list[str]], None]) -> None:
    """Run `main(argv)`. `UserError`, `OSError`: one line on stderr; with `--debug`, the traceback."""
    argv = sys.argv[1:]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # characters that the terminal lacks are escaped
    debug = "--debug" in argv
    try:
        main([a for a in argv if a != "--debug"])
        print(end="", flush=True)  # flushes; writes nothing if stdout is closed
    except (UserError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _reader_closed():
            sys.exit(141)  # as shell tools do under `| head`
        if debug:
            raise
        message, rank = " ".join(str(error).split()), os.environ.get("RANK", "0")
        if rank == "0":
            print(f"error: {message}", file=sys.stderr)
        elif not isinstance(error, UsageError):  # all ranks raise the same one; rank 0 prints it
            print(f"error: rank {rank}: {message}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _reader_closed() -> bool:
    """Whether stdout is a pipe without a reader. If so, stdout is redirected to the null device."""
    output = sys.stdout.fileno()
    poll = select.poll()
    poll.register(output, 0)
    closed = any(events & select.POLLERR for _, events in poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return closed
