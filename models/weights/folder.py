"""A model folder or Hub repository, looked at without reading its weights; imports no PyTorch."""

from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import in_cache, read_json
from utils.hub import AUXILIARY_FILES, NANOVLM, WEIGHTS, fetch, is_hub_id, kind_of

FORMAT, OLDEST = 4, 3  # of a model folder: written, and still read
INDEX = "model.safetensors.index.json"  # of weights in several files
MODEL_TYPES = ("dual_tower", "vanilla")


def is_nanovlm(config: Any) -> bool:
    """Is this the content of an ancestor's `config.json`?"""
    return kind_of(config) == NANOVLM


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model folder's weights. A missing or damaged one of the list raises `UserError`."""
    if (folder / "model.safetensors").is_file() or not (folder / INDEX).is_file():
        files = [folder / "model.safetensors"]
    else:
        index = read_json(folder / INDEX)
        try:
            files = [folder / name for name in sorted(set(index["weight_map"].values()))]
        except (LookupError, AttributeError, TypeError) as error:
            raise UserError(f"{folder / INDEX} is damaged: {error!r}") from None
    for path in files:
        _check_there(folder, path.name)
    return files


def _check_there(folder: Path, name: str, where: str = "") -> None:
    if not (folder / name).is_file():
        inner = folder / "model"
        hint = f"; did you mean {inner}?" if (inner / "config.json").is_file() else ""
        raise UserError(f"{where or folder} holds no {name}: not a complete model folder{hint}")


def read_model_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a complete model folder, of this version or of an ancestor."""
    if not folder.is_dir():
        raise UserError(f"no model folder at {folder}")
    head = _checked_config(folder, str(folder))
    weight_files(folder)
    return head


def _checked_config(folder: Path, where: str) -> dict[str, Any]:
    _check_there(folder, "config.json", where)
    head = read_json(folder / "config.json")
    found = head.get("format") if isinstance(head, dict) else None
    if type(found) is int and found > FORMAT:
        raise UserError(
            f"{where} has model format {found} and was written by a newer version, which this one, of format {FORMAT}, cannot read: update this program"
        )
    if is_nanovlm(head):
        return dict(head)
    kind = head.get("model_type") if isinstance(head, dict) else None
    if kind not in MODEL_TYPES:
        raise UserError(
            f"{where}/config.json describes a model of type {kind!r}, not one of {', '.join(MODEL_TYPES)}"
        )
    if type(found) is not int or not OLDEST <= found <= FORMAT:
        raise UserError(f"{where} has model format {found!r}; this version reads {OLDEST} to {FORMAT}")
    return dict(head)


def find_model(source: str | Path, token: str | None = None) -> Path:
    """A local model folder, or a Hub id, which is fetched: its `config.json` first, and no more where that is not of a model that can be read."""
    if not is_hub_id(str(source)):
        return Path(source)
    _checked_config(fetch(str(source), ["config.json"], "config.json", token=token), str(source))
    return fetch(str(source), ["config.json", *WEIGHTS, *AUXILIARY_FILES], "the model", token=token)


def damaged(path: Path, error: Exception) -> UserError:
    """Of a weight file that cannot be read."""
    return UserError(f"{path} cannot be read as safetensors: {error}{in_cache(path)}")
