"""Repositories of the Hugging Face Hub → local folders. What goes wrong is one line that says how to do without."""

import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from configs.errors import UserError

ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def is_hub_id(source: str) -> bool:
    """`org/name` or `org/name@revision`, and nothing on this disk."""
    return not Path(source).exists() and ID.fullmatch(source) is not None and not source.startswith((".", "/"))


def fetch(source: str, patterns: list[str], what: str, kind: str = "model") -> Path:
    """→ the local folder that holds the files of `source` matching `patterns`; `what` they are is for the errors, `kind` "model" or "dataset"."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    _limit_waiting()
    name, _, revision = source.partition("@")
    local = "a local folder with the same files works as well: give its path instead of the id"
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns, repo_type=kind))
    except GatedRepoError:
        raise UserError(f"{name} is gated: accept its terms on the Hub and log in ('hf auth login', or HF_TOKEN); {local}") from None
    except RevisionNotFoundError:
        raise UserError(f"{name} has no revision '{revision}' on the Hub") from None
    except RepositoryNotFoundError:
        raise UserError(f"{name} is neither a folder here nor on the Hub, or it is private and needs a token ('hf auth login', or HF_TOKEN); {local}") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split()).split(". ")[0][:200]
        raise UserError(f"{name} is no folder here, and {what} could not be fetched from the Hub ({reason}); {local}") from None


def _limit_waiting() -> None:
    """huggingface_hub lists files with no time limit: a server that accepts and never answers would be waited for for ever."""
    from huggingface_hub import get_session

    hooks = get_session().event_hooks["request"]
    if _with_limit not in hooks:
        hooks.append(_with_limit)


def _with_limit(request: Any) -> None:
    from huggingface_hub import constants

    request.extensions["timeout"] = {phase: limit or constants.HF_HUB_DOWNLOAD_TIMEOUT for phase, limit in request.extensions["timeout"].items()}


def dataset_files(source: str, folder: str, endings: tuple[str, ...]) -> tuple[Any, list[str], list[str]]:
    """→ the Hub's file system, the files below `folder` of data set `source` that end so, and the names of the folders at its top."""
    from huggingface_hub import HfFileSystem

    _limit_waiting()
    name, _, revision = source.partition("@")
    root = f"datasets/{name}" + (f"@{quote(revision, safe='')}" if revision else "")  # a revision may hold a /
    try:
        system = HfFileSystem()
        top = [Path(entry["name"]).name for entry in system.ls(root, detail=True) if entry["type"] == "directory"]
        files = sorted(file for file in system.find(f"{root}/{folder}".rstrip("/")) if file.endswith(endings)) if not folder or folder.split("/")[0] in top else []
    except Exception as error:  # every HTTP library has its own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{source} is no folder here, and its files could not be listed on the Hub ({reason}); a local folder with the same files works as well") from error
    return system, files, top
