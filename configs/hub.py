"""Repositories of the Hugging Face Hub → local folders. What goes wrong is one line that says how to do without."""

import re
from pathlib import Path

from configs.errors import UserError

ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def is_hub_id(source: str) -> bool:
    """`org/name` or `org/name@revision`, and nothing on this disk."""
    return not Path(source).exists() and ID.fullmatch(source) is not None and not source.startswith((".", "/"))


def fetch(source: str, patterns: list[str], what: str) -> Path:
    """→ the local folder that holds the files of `source` matching `patterns`; `what` they are is for the errors."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    name, _, revision = source.partition("@")
    local = "a local folder with the same files works as well: give its path instead of the id"
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except GatedRepoError:
        raise UserError(f"{name} is gated: accept its terms on the Hub and log in ('hf auth login', or HF_TOKEN); {local}") from None
    except RevisionNotFoundError:
        raise UserError(f"{name} has no revision '{revision}' on the Hub") from None
    except RepositoryNotFoundError:
        raise UserError(f"{name} is neither a folder here nor on the Hub, or it is private and needs a token ('hf auth login', or HF_TOKEN); {local}") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split()).split(". ")[0][:200]
        raise UserError(f"{name} is no folder here, and {what} could not be fetched from the Hub ({reason}); {local}") from None
