"""Repositories of the Hugging Face Hub → local folders. What goes wrong is one line that says how to do without."""

import logging
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from configs.errors import UserError

T = TypeVar("T")
TRIES = 4  # of what fails, 1, 2, 4 seconds apart
ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def is_hub_id(source: str) -> bool:
    """`org/name` or `org/name@revision`, and nothing on this disk."""
    return not Path(source).exists() and ID.fullmatch(source) is not None and not source.startswith((".", "/"))


def fetch(source: str, patterns: list[str], what: str, kind: str = "model") -> Path:
    """→ the local folder that holds the files of `source` matching `patterns`; `what` they are is for the errors, `kind` "model" or "dataset"."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    name, _, revision = source.partition("@")
    local = "a local folder with the same files works as well: give its path instead of the id"
    _prepare()
    try:
        return trying(name, lambda: Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns, repo_type=kind)), _may_pass)
    except GatedRepoError:
        raise UserError(f"{name} is gated: accept its terms on the Hub and log in ('hf auth login', or HF_TOKEN); {local}") from None
    except RevisionNotFoundError:
        raise UserError(f"{name} has no revision '{revision}' on the Hub") from None
    except RepositoryNotFoundError:
        raise UserError(f"{name} is neither a folder here nor on the Hub, or it is private and needs a token ('hf auth login', or HF_TOKEN); {local}") from None
    except Exception as error:  # every HTTP library has its own
        reason = " ".join(str(error).split()).split(". ")[0][:200]
        raise UserError(f"{name} is no folder here, and {what} could not be fetched from the Hub ({reason}); {local}") from error


def trying(what: str, do: Callable[[], T], may_pass: Callable[[Exception], bool]) -> T:
    """`do()`, again and again where `may_pass` says of its error that another try may succeed. Errors: the last."""
    for attempt in range(TRIES):
        try:
            return do()
        except Exception as error:
            if attempt + 1 == TRIES or not may_pass(error):
                raise
            print(f"warning: {what}: {reason_of(error)}; trying again", file=sys.stderr)
        pause(2**attempt)
    raise AssertionError("TRIES is at least 1")


def reason_of(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).split(" For more information")[0][:200]


def pause(seconds: float) -> None:
    """Wait; in a thread no longer than the program lives."""
    if threading.current_thread() is threading.main_thread():
        time.sleep(seconds)
    else:
        threading.main_thread().join(seconds)


def status_may_pass(error: Exception) -> bool | None:
    """Whether the Hub's answer, if `error` is one, may be another the next time."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return None if status is None else status in (408, 429) or status >= 500


def _may_pass(error: Exception) -> bool:
    """Whether a first request may succeed the next time: after a connection that broke, silence, a server's bad moment; not where nobody can be reached at all."""
    if type(error).__name__ == "LocalEntryNotFoundError" and isinstance(error.__cause__, Exception):  # nothing in the cache either: what counts is why it was asked
        error = error.__cause__
    if (answered := status_may_pass(error)) is not None:
        return answered
    kinds = {kind.__name__ for kind in type(error).__mro__}  # httpx's or httpx2's, as huggingface_hub has it
    return bool(kinds & {"TransportError", "ConnectionResetError", "TimeoutError"}) and not kinds & {"ConnectError", "ProxyError", "UnsupportedProtocol"}


def _prepare() -> None:
    """huggingface_hub lists files with no time limit: a server that accepts and never answers would be waited for for ever. Its own repetitions are not told: ours are."""
    from huggingface_hub import get_session

    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    hooks = get_session().event_hooks["request"]
    if _with_limit not in hooks:
        hooks.append(_with_limit)


def _with_limit(request: Any) -> None:
    from huggingface_hub import constants

    request.extensions["timeout"] = {phase: limit or constants.HF_HUB_DOWNLOAD_TIMEOUT for phase, limit in request.extensions["timeout"].items()}


def dataset_files(source: str, folder: str, endings: tuple[str, ...]) -> tuple[Any, list[str], list[str]]:
    """→ the Hub's file system, the files below `folder` of data set `source` that end so, and the names of the folders at its top."""
    from huggingface_hub import HfFileSystem

    _prepare()
    name, _, revision = source.partition("@")
    root = f"datasets/{name}" + (f"@{quote(revision, safe='')}" if revision else "")  # a revision may hold a /

    def listed() -> tuple[Any, list[str], list[str]]:
        system = HfFileSystem()
        top = [Path(entry["name"]).name for entry in system.ls(root, detail=True) if entry["type"] == "directory"]
        below = system.find(f"{root}/{folder}".rstrip("/")) if not folder or folder.split("/")[0] in top else []
        return system, sorted(file for file in below if file.endswith(endings)), top

    try:
        return trying(source, listed, _may_pass)
    except Exception as error:  # every HTTP library has its own
        raise UserError(
            f"{source} is no folder here, and its files could not be listed on the Hub ({reason_of(error)}); a local folder with the same files works as well"
        ) from error
