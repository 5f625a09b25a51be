"""A model folder or Hub repository, checked without reading its weights; imports no PyTorch."""

from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import in_cache, read_json
from utils.hub import AUXILIARY_FILES, NANOVLM, WEIGHTS, fetch, is_hub_id, kind_of

FORMAT, OLDEST = 4, 3  # of a model folder: the format that is written, and the oldest that is read
INDEX = "model.safetensors.index.json"  # of weights in several files
MODEL_TYPES = ("dual_tower", "vanilla")


def is_nanovlm(config: Any) -> bool:
    """Whether this is the content of a nanoVLM checkpoint's `config.json`."""
    return kind_of(config) == NANOVLM


def weight_files(folder: Path) -> list[Path]:
    """List the weight files of a model folder. A missing one and a damaged index raise `UserError`."""
    if (folder / "model.safetensors").is_file() or not (folder / INDEX).is_file():
        files = [folder / "model.safetensors"]
    else:
        index = read_json(folder / INDEX)
        try:
            files = [folder / name for name in sorted(set(index["weight_map"].values()))]
        except (LookupError, AttributeError, TypeError) as error:
            raise UserError(f"{folder / INDEX} is damaged: {error!r}") from None
    for path in files:
        _check_file(folder, path.name)
    return files


def _check_file(folder: Path, name: str, context: str = "") -> None:
    if not (folder / name).is_file():
        inner = folder / "model"
        hint = f"; did you mean {inner}?" if (inner / "config.json").is_file() else ""
        raise UserError(f"{context or folder} holds no {name}: not a complete model folder{hint}")


def read_model_config(folder: Path) -> dict[str, Any]:
    """Read the `config.json` of a complete model folder, of this project or of nanoVLM."""
    if not folder.is_dir():
        raise UserError(f"no model folder at {folder}")
    config = _checked_config(folder, str(folder))
    weight_files(folder)
    return config


def _checked_config(folder: Path, context: str) -> dict[str, Any]:
    _check_file(folder, "config.json", context)
    config = read_json(folder / "config.json")
    version = config.get("format") if isinstance(config, dict) else None
    if type(version) is int and version > FORMAT:
        raise UserError(
            f"{context} has model format {version} and was written by a newer version, which this one, "
            f"of format {FORMAT}, cannot read: update this program"
        )
    if is_nanovlm(config):
        return dict(config)
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in MODEL_TYPES:
        raise UserError(
            f"{context}/config.json describes a model of type {kind!r}, not one of {', '.join(MODEL_TYPES)}"
        )
    if type(version) is not int or not OLDEST <= version <= FORMAT:
        raise UserError(f"{context} has model format {version!r}; this version reads {OLDEST} to {FORMAT}")
    return dict(config)


def find_model(source: str | Path, token: str | None = None) -> Path:
    """Return a local model folder; a Hub id is fetched.

    Its `config.json` is fetched first; the rest only if that describes a known type and format.
    """
    if not is_hub_id(str(source)):
        return Path(source)
    _checked_config(fetch(str(source), ["config.json"], "config.json", token=token), str(source))
    return fetch(str(source), ["config.json", *WEIGHTS, *AUXILIARY_FILES], "the model", token=token)


def damaged(path: Path, error: Exception) -> UserError:
    """The error of a weight file that cannot be read."""
    return UserError(f"{path} cannot be read as safetensors: {error}{in_cache(path)}")
