"""Downloads from and uploads to the Hugging Face Hub. Errors are one line, and name a remedy."""

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
TRIES = 4  # of a failed request, after waits of 1, 2 and 4 seconds
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
# As hf/export.py names them; remote_*.py is of older folders.
CODE = ["configs_*.py", "data_*.py", "hf_*.py", "models_*.py", "utils_*.py", "remote_*.py"]
AUXILIARY_FILES = [*SETTINGS, *TOKENIZER, *CODE]  # of a model folder, besides its config and weights
CARD = ["README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "training.png"]  # of a model folder, too
NANOVLM = "nanovlm"  # kind of a nanoVLM checkpoint
# Files that a repository may hold before its first model.
ABOUT = (".md", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg")
REFUSALS = {
    401: "the Hub does not know this token: log in again ('hf auth login'), or mend HF_TOKEN",
    402: "more storage has to be paid for",
    403: "this token may not write there: choose a name of your own, or a token with that right",
    404: "there is no such repository, or this token may not see it",
    413: "a file is too large for this account",
    429: "too many requests: try again later",
}  # by HTTP status; the server's message is appended


class HubUnavailable(UserError):
    """A temporary failure: the network or the Hub is unavailable, and a later try may succeed."""


def is_hub_id(source: str) -> bool:
    """Whether `source` is `org/name` or `org/name@revision` and no local path."""
    return (
        not Path(source).exists() and ID.fullmatch(source) is not None and not source.startswith((".", "/"))
    )


def kind_of(config: Any) -> str | None:
    """The `model_type` of a parsed `config.json`; `NANOVLM` for nanoVLM's configs, which have none."""
    if not isinstance(config, dict):
        return None
    return NANOVLM if "vit_hidden_dim" in config and "lm_hidden_dim" in config else config.get("model_type")


def fetch(source: str, patterns: list[str], what: str, kind: str = "model", **download: Any) -> Path:
    """Download the files of `source` that match `patterns`; return their local folder.

    what: a noun phrase for the files, for errors.
    kind: "model" or "dataset".
    download: `token`, `cache_dir` and `force_download` of huggingface_hub.
    """
    from huggingface_hub import snapshot_download

    name, _, revision = source.partition("@")
    return _reading(
        source,
        what,
        lambda: Path(
            snapshot_download(
                name, revision=revision or None, allow_patterns=patterns, repo_type=kind, **download
            )
        ),
    )


def repo_info(source: str) -> tuple[str, list[tuple[str, int]]]:
    """A model repository's visibility and commit as text, and its files: (name, bytes). Downloads nothing."""
    from huggingface_hub import HfApi

    name, _, revision = source.partition("@")
    info = _reading(
        source,
        "its list of files",
        lambda: HfApi().model_info(name, revision=revision or None, files_metadata=True),
    )
    return f"{'private' if info.private else 'public'}, commit {info.sha}", [
        (file.rfilename, file.size or 0) for file in info.siblings or []
    ]


def _reading(source: str, what: str, do: Callable[[], T]) -> T:
    """Call `do`, which reads `what` from `source`; retry temporary failures. Errors: `UserError`."""
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
            f"{name} is neither a local folder nor on the Hub, or it is private and needs a token "
            f"('hf auth login', or HF_TOKEN); {local}"
        ) from None
    except Exception as error:  # every HTTP library has its own
        if getattr(getattr(error, "response", None), "status_code", None) == 401:
            raise UserError(f"{name} could not be fetched: {REFUSALS[401]}; {local}") from None
        reason = without_tokens(" ".join(str(error).split()).split(". ")[0])[:200]
        raise UserError(
            f"{name} is no local folder, and {what} could not be fetched from the Hub ({reason}); {local}"
        ) from error


def trying(what: str, do: Callable[[], T], may_pass: Callable[[Exception], bool]) -> T:
    """Call `do` up to `TRIES` times, while `may_pass(error)` is true. Raises the last error."""
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
    """Replace access tokens: some libraries print request headers in their errors."""
    return re.sub(r"(?<=Bearer )\S+|hf_[A-Za-z0-9]{6,}", "…", text)


def pause(seconds: float) -> None:
    """Sleep. In other threads than the main one: until the main thread ends, at most."""
    if threading.current_thread() is threading.main_thread():
        time.sleep(seconds)
    else:
        threading.main_thread().join(seconds)


def status_may_pass(error: BaseException) -> bool | None:
    """Whether an HTTP error may pass with another try; None for other errors."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return None if status is None else status in (408, 429) or status >= 500


def _may_pass(error: Exception) -> bool:
    """Whether another try of a read may succeed: after a broken connection, a timeout or a server error.

    False if no connection could be made, or if the request itself is wrong.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import httpx

    # Not in the cache either: the cause is the request's own error.
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if (by_status := status_may_pass(error)) is not None:
        return by_status
    temporary = (httpx.TransportError, ConnectionResetError, TimeoutError)
    permanent = (httpx.ConnectError, httpx.ProxyError, httpx.UnsupportedProtocol, httpx.LocalProtocolError)
    return isinstance(error, temporary) and not isinstance(error, permanent)


def _prepare() -> None:
    """Give huggingface_hub's requests a timeout, and silence its own messages about retries.

    It lists files without a timeout: a server that accepts and never answers would block for ever.
    """
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


def dataset_files(source: str, folder: str) -> tuple[Any, list[str], list[str]]:
    """List the files below `folder` of data set `source`.

    → the Hub's file system, the files, and the names of the data set's top-level folders.
    """
    from huggingface_hub import HfFileSystem

    _prepare()
    name, _, revision = source.partition("@")
    root = f"datasets/{name}"
    if revision:
        root += f"@{quote(revision, safe='')}"  # a revision may contain a slash

    def listed() -> tuple[Any, list[str], list[str]]:
        system = HfFileSystem()
        top = [
            Path(entry["name"]).name for entry in system.ls(root, detail=True) if entry["type"] == "directory"
        ]
        exists = not folder or folder.split("/")[0] in top
        below = system.find(f"{root}/{folder}".rstrip("/")) if exists else []
        return system, sorted(below), top

    try:
        return trying(source, listed, _may_pass)
    except Exception as error:  # every HTTP library has its own
        raise UserError(
            f"{source} is no local folder, and its files could not be listed on the Hub "
            f"({reason_of(error)}); a local folder with the same files works as well"
        ) from error


def open_repo(
    name: str,
    model_type: str,
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
) -> str:
    """Open a model repository for a model of this type → OWNER/NAME. Without an OWNER it is the user's own.

    The repository is created if it is missing, and so is `branch`, from main. Errors: `UserError` if it
    cannot be created, holds a model of another type or other files, or is public although `private` is true.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RevisionNotFoundError

    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError(
            f"{name!r} is no name for a repository: NAME or OWNER/NAME, of letters, digits, '-', '_' and '.'"
        )
    if branch is not None and (not re.fullmatch(r"[\w.+/-]+", branch) or branch.startswith("refs/")):
        raise UserError(f"{branch!r} is no name for a branch: letters, digits, '-', '_', '.', '+' and '/'")
    if not (token or get_token()):
        raise UserError(
            f"{name} cannot be pushed to without a token that may write: "
            "log in ('hf auth login'), or set HF_TOKEN"
        )

    def process_group() -> str:
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
        _check_contents(repo, info, model_type, token)
        if new is not None:
            api.create_branch(repo, branch=new, exist_ok=True)
        return repo

    return writing(name, process_group)


def _check_contents(repo: str, info: Any, model_type: str, token: str | None) -> None:
    """Raise `UserError` if a repository holds a model of another type, or files but no model."""
    from huggingface_hub import hf_hub_download

    names = {file.rfilename for file in info.siblings or []}
    if "config.json" in names:
        file = hf_hub_download(repo, "config.json", revision=info.sha, token=token)
        existing_type = kind_of(read_json(Path(file)))
        if existing_type != model_type:
            raise UserError(
                f"{repo} holds a model of type {existing_type!r}, this one is {model_type!r}: "
                "choose another name"
            )
        return
    known = (".gitattributes", "LICENSE", "LICENSE.txt")
    others = sorted(name for name in names if not name.endswith(ABOUT) and name not in known)
    if others:
        raise UserError(
            f"{repo} holds {', '.join(others[:3])}{' …' * (len(others) > 3)} and no config.json, "
            "so no model of this project: choose another name"
        )


def files_of_model(folder: Path) -> list[str]:
    """The names of a folder's files that belong to its model; other code and stale weights do not."""
    names = {"config.json", *SETTINGS, *TOKENIZER, *CARD}
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        names.add("model.safetensors")
    else:
        names |= {index.name, *read_json(index)["weight_map"].values()}
    for path in (path for pattern in CODE for path in folder.glob(pattern)):
        if " of DualTowerVLM" in path.read_text(encoding="utf-8", errors="replace")[:200]:
            names.add(path.name)
    return sorted(name for name in names if (folder / name).is_file())


def push(folder: Path, repo: str, message: str, branch: str | None = None) -> str:
    """Upload a folder's files to `repo` as one commit → the commit's URL. Errors: `UserError`.

    Files that do not belong to a model are left out. Weights, settings and code of an earlier model are
    deleted unless this one replaces them.
    """
    from huggingface_hub import HfApi

    def pushed() -> str:
        options: dict[str, Any] = {
            "commit_message": message,
            "revision": branch,
            "allow_patterns": files_of_model(folder),
            "delete_patterns": [*WEIGHTS, *AUXILIARY_FILES],
        }
        return str(HfApi().upload_folder(repo_id=repo, folder_path=folder, **options).commit_url)

    return writing(repo, pushed)


def writing(repo: str, do: Callable[[], T]) -> T:
    """Call `do`, which writes to `repo`; retry temporary failures.

    Errors: `HubUnavailable` if the last try failed for a temporary reason too, else `UserError`.
    """
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
    """An error and its chain of causes, outermost first."""
    while error is not None:
        yield error
        error = error.__cause__


def _writing_may_pass(error: Exception) -> bool:
    """Whether another try of an upload may succeed; unlike a read, also if no connection could be made."""
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils import httpx

    for cause in _causes(error):
        if (by_status := status_may_pass(cause)) is not None:
            return by_status
    temporary = (httpx.TransportError, ConnectionError, TimeoutError, RuntimeError)  # the last: from hf_xet
    permanent = (OfflineModeIsEnabled, httpx.UnsupportedProtocol, httpx.LocalProtocolError)
    causes = list(_causes(error))
    return any(isinstance(cause, temporary) for cause in causes) and not any(
        isinstance(cause, permanent) for cause in causes
    )


def _refusal(error: Exception) -> str:
    for cause in _causes(error):
        if (response := getattr(cause, "response", None)) is not None:
            message = without_tokens(getattr(cause, "server_message", None) or reason_of(cause))
            status = response.status_code
            return " ".join(f"{REFUSALS.get(status, '')} ({status}: {message})".split())[:400]
    return reason_of(list(_causes(error))[-1])
