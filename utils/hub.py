"""Repositories of the Hugging Face Hub → local folders, and back. What goes wrong is one line that says how to do without, or what to do."""

import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from utils.errors import UserError
from utils.files import read_json

T = TypeVar("T")
TRIES = 4  # of what fails, 1, 2, 4 seconds apart
ID = re.compile(r"[\w.-]+/[\w.-]+(@\S+)?")
NAME = re.compile(r"([\w.-]+/)?[\w.-]+")
WEIGHTS = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
SETTINGS = ["generation_config.json", "processor_config.json", "preprocessor_config.json"]
TOKENIZER = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
]
CODE = [
    "configs_*.py",
    "data_*.py",
    "hf_*.py",
    "models_*.py",
    "utils_*.py",
    "remote_*.py",
]  # as hf/export.py names it; the last: older folders
BESIDE = [*SETTINGS, *TOKENIZER, *CODE]  # what may stand beside the weights
NANOVLM = "an ancestor's"
ABOUT = (
    ".md",
    ".png",
    ".jpg",
    ".jpeg",
    ".gif",
    ".webp",
    ".svg",
)  # what a repository may hold before there is a model
NEVER = {"UnsupportedProtocol", "LocalProtocolError"}  # errors of transport that are the request's own
REFUSALS = {
    401: "the Hub does not know this token: log in again ('hf auth login'), or mend HF_TOKEN",
    402: "more storage has to be paid for",
    403: "this token may not write there: choose a name of your own, or a token with that right",
    404: "there is no such repository, or this token may not see it",
    413: "a file is too large for this account",
    429: "too many requests: try again later",
}  # by status; the server's own words follow


class HubUnavailable(UserError):
    """The Hub is out of reach, or has a bad moment: later it may work."""


def is_hub_id(source: str) -> bool:
    """`org/name` or `org/name@revision`, and nothing on this disk."""
    return (
        not Path(source).exists() and ID.fullmatch(source) is not None and not source.startswith((".", "/"))
    )


def kind_of(config: Any) -> str | None:
    """What type of model a `config.json` describes: its `model_type`, or `ANCESTOR`'s, which have none."""
    if not isinstance(config, dict):
        return None
    return NANOVLM if "vit_hidden_dim" in config and "lm_hidden_dim" in config else config.get("model_type")


def fetch(source: str, patterns: list[str], what: str, kind: str = "model", token: str | None = None) -> Path:
    """→ the local folder that holds the files of `source` matching `patterns`; `what` they are is for the errors, `kind` "model" or "dataset"."""
    from huggingface_hub import snapshot_download

    name, _, revision = source.partition("@")
    return _reading(
        source,
        what,
        lambda: Path(
            snapshot_download(
                name, revision=revision or None, allow_patterns=patterns, repo_type=kind, token=token
            )
        ),
    )


def repo_info(source: str) -> tuple[str, list[tuple[str, int]]]:
    """Of a model repository, without its files: "private" or "public" and the commit; each file's name and bytes."""
    from huggingface_hub import HfApi

    name, _, revision = source.partition("@")
    info = _reading(
        source,
        "what it holds",
        lambda: HfApi().model_info(name, revision=revision or None, files_metadata=True),
    )
    return f"{'private' if info.private else 'public'}, commit {info.sha}", [
        (file.rfilename, file.size or 0) for file in info.siblings or []
    ]


def _reading(source: str, what: str, do: Callable[[], T]) -> T:
    """`do()`, which reads `what` of `source`: tried again where that may help. Errors: `UserError`."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    name, _, revision = source.partition("@")
    local = "a local folder with the same files works as well: give its path instead of the id"
    _prepare()
    try:
        return trying(name, do, _may_pass)
    except GatedRepoError:
        raise UserError(
            f"{name} is gated: accept its terms on the Hub and log in ('hf auth login', or HF_TOKEN); {local}"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{name} has no revision '{revision}' on the Hub") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{name} is neither a folder here nor on the Hub, or it is private and needs a token ('hf auth login', or HF_TOKEN); {local}"
        ) from None
    except Exception as error:  # every HTTP library has its own
        if getattr(getattr(error, "response", None), "status_code", None) == 401:
            raise UserError(f"{name} could not be fetched: {REFUSALS[401]}; {local}") from None
        reason = without_tokens(" ".join(str(error).split()).split(". ")[0])[:200]
        raise UserError(
            f"{name} is no folder here, and {what} could not be fetched from the Hub ({reason}); {local}"
        ) from error


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


def reason_of(error: BaseException) -> str:
    return without_tokens(
        " ".join(f"{type(error).__name__}: {error}".split()).split(" For more information")[0]
    )[:200]


def without_tokens(text: str) -> str:
    """Some libraries' errors show the request's headers."""
    return re.sub(r"(?<=Bearer )\S+|hf_[A-Za-z0-9]{6,}", "…", text)


def pause(seconds: float) -> None:
    """Wait; in a thread no longer than the program lives."""
    if threading.current_thread() is threading.main_thread():
        time.sleep(seconds)
    else:
        threading.main_thread().join(seconds)


def status_may_pass(error: BaseException) -> bool | None:
    """Whether the Hub's answer, if `error` is one, may be another the next time."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return None if status is None else status in (408, 429) or status >= 500


def _may_pass(error: Exception) -> bool:
    """Whether a first request may succeed the next time: after a connection that broke, silence, a server's bad moment; not where nobody can be reached at all."""
    if type(error).__name__ == "LocalEntryNotFoundError" and isinstance(
        error.__cause__, Exception
    ):  # nothing in the cache either: what counts is why it was asked
        error = error.__cause__
    if (answered := status_may_pass(error)) is not None:
        return answered
    kinds = {kind.__name__ for kind in type(error).__mro__}  # httpx's or httpx2's, as huggingface_hub has it
    return bool(kinds & {"TransportError", "ConnectionResetError", "TimeoutError"}) and not kinds & {
        "ConnectError",
        "ProxyError",
        *NEVER,
    }


def _prepare() -> None:
    """huggingface_hub lists files with no time limit: a server that accepts and never answers would be waited for for ever. Its own repetitions are not told: ours are."""
    from huggingface_hub import get_session

    for quiet in ("utils._http", "_snapshot_download"):
        logging.getLogger(f"huggingface_hub.{quiet}").setLevel(logging.ERROR)
    hooks = get_session().event_hooks["request"]
    if _with_limit not in hooks:
        hooks.append(_with_limit)


def _with_limit(request: Any) -> None:
    from huggingface_hub import constants

    request.extensions["timeout"] = {
        phase: limit or constants.HF_HUB_DOWNLOAD_TIMEOUT
        for phase, limit in request.extensions["timeout"].items()
    }


def dataset_files(source: str, folder: str, endings: tuple[str, ...]) -> tuple[Any, list[str], list[str]]:
    """→ the Hub's file system, the files below `folder` of data set `source` that end so, and the names of the folders at its top."""
    from huggingface_hub import HfFileSystem

    _prepare()
    name, _, revision = source.partition("@")
    root = f"datasets/{name}" + (
        f"@{quote(revision, safe='')}" if revision else ""
    )  # a revision may hold a /

    def listed() -> tuple[Any, list[str], list[str]]:
        system = HfFileSystem()
        top = [
            Path(entry["name"]).name for entry in system.ls(root, detail=True) if entry["type"] == "directory"
        ]
        below = (
            system.find(f"{root}/{folder}".rstrip("/")) if not folder or folder.split("/")[0] in top else []
        )
        return system, sorted(file for file in below if file.endswith(endings)), top

    try:
        return trying(source, listed, _may_pass)
    except Exception as error:  # every HTTP library has its own
        raise UserError(
            f"{source} is no folder here, and its files could not be listed on the Hub ({reason_of(error)}); a local folder with the same files works as well"
        ) from error


def open_repo(
    name: str,
    model_type: str,
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
) -> str:
    """Make a model repository, unless there is one of that name for a model of this type; and `branch`, from main, where there is none. → OWNER/NAME; without an OWNER it is yours.

    Errors: `UserError` where it cannot be had, holds a model of another type or files that are none, or is public and was to be private.
    """
    from huggingface_hub import HfApi, get_token, hf_hub_download
    from huggingface_hub.errors import RevisionNotFoundError

    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError(
            f"{name!r} is no name for a repository: NAME or OWNER/NAME, of letters, digits, '-', '_' and '.'"
        )
    if branch is not None and (not re.fullmatch(r"[\w.+/-]+", branch) or branch.startswith("refs/")):
        raise UserError(f"{branch!r} is no name for a branch: letters, digits, '-', '_', '.', '+' and '/'")
    if not (token or get_token()):
        raise UserError(
            f"{name} cannot be pushed to without a token that may write: log in ('hf auth login'), or set HF_TOKEN"
        )

    def opened() -> str:
        api = HfApi(token=token)
        repo = api.create_repo(name, private=private, exist_ok=True).repo_id
        try:
            info, new = api.model_info(repo, revision=branch), None
        except RevisionNotFoundError:
            info, new = api.model_info(repo), branch
        if private and not info.private:
            raise UserError(
                f"{repo} is there already, and public: choose another name, or make it private on the Hub"
            )
        names = {file.rfilename for file in info.siblings or []}
        if "config.json" in names:
            found = kind_of(
                read_json(Path(hf_hub_download(repo, "config.json", revision=info.sha, token=token)))
            )
            if found != model_type:
                raise UserError(
                    f"{repo} holds a model of type {found!r}, this one is {model_type!r}: choose another name"
                )
        elif others := sorted(
            name
            for name in names
            if not name.endswith(ABOUT) and name not in (".gitattributes", "LICENSE", "LICENSE.txt")
        ):
            raise UserError(
                f"{repo} holds {', '.join(others[:3])}{' …' * (len(others) > 3)} and no config.json, so no model of this project: choose another name"
            )
        if new is not None:
            api.create_branch(repo, branch=new, exist_ok=True)
        return repo

    return writing(name, opened)


def push(folder: Path, repo: str, message: str, branch: str | None = None) -> str:
    """A folder's files, but none whose name begins with a dot and no folders in it → repository `repo`, as one commit; → its address. Weights, settings and code of an earlier model that it does not replace go. Errors: `UserError`."""
    from huggingface_hub import HfApi

    def pushed() -> str:
        options: dict[str, Any] = {
            "commit_message": message,
            "revision": branch,
            "ignore_patterns": [".*", "*/*"],
            "delete_patterns": [*WEIGHTS, *BESIDE],
        }
        return str(HfApi().upload_folder(repo_id=repo, folder_path=folder, **options).commit_url)

    return writing(repo, pushed)


def writing(repo: str, do: Callable[[], T]) -> T:
    """`do()`, which writes to `repo`: tried again where the network or the Hub may have had a bad moment. Errors: `UserError`, `HubUnavailable` where it stays so."""
    _prepare()
    try:
        return trying(repo, do, _writing_may_pass)
    except UserError:
        raise
    except Exception as error:  # every HTTP library has its own
        raise (HubUnavailable if _writing_may_pass(error) else UserError)(
            f"{repo} could not be pushed to: {_refusal(error)}"
        ) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from, outermost first."""
    while error is not None:
        yield error
        error = error.__cause__


def _writing_may_pass(error: Exception) -> bool:
    """Unlike a first request, a long upload is worth waiting for a network that is away."""
    for cause in _causes(error):
        if (answered := status_may_pass(cause)) is not None:
            return answered
    kinds = {kind.__name__ for cause in _causes(error) for kind in type(cause).__mro__}
    return bool(
        kinds & {"TransportError", "ConnectionError", "TimeoutError", "RuntimeError"}
    ) and not kinds & {
        "OfflineModeIsEnabled",
        *NEVER,
    }  # RuntimeError: hf_xet's for a network that fails


def _refusal(error: Exception) -> str:
    for cause in _causes(error):
        if (response := getattr(cause, "response", None)) is not None:
            said = without_tokens(getattr(cause, "server_message", None) or reason_of(cause))
            return " ".join(
                f"{REFUSALS.get(response.status_code, '')} ({response.status_code}: {said})".split()
            )[:400]
    return reason_of(list(_causes(error))[-1])
