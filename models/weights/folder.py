"""A model folder or Hub repository, checked without reading its weights; imports no PyTorch."""

from pathlib import Path
from typing import Any, NamedTuple

from utils.errors import UsageError, UserError
from utils.files import in_cache, read_json
from utils.hub import AUXILIARY_FILES, NANOVLM, WEIGHTS, fetch, is_hub_id, kind_of

FORMAT, OLDEST = 4, 3  # of a model folder: the format that is written, and the oldest that is read
INDEX = "model.safetensors.index.json"  # of weights in several files
MODEL_TYPES = ("dual_tower", "vanilla")


def is_nanovlm(config: Any) -> bool:
    """Whether this is the content of a nanoVLM checkpoint's `config.json`."""
    return kind_of(config) == NANOVLM


class ModelFiles(NamedTuple):
    """Where the files of a model are."""

    config: Path  # config.json
    weights: list[Path]
    folder: Path  # of the tokenizer and settings


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
        if (folder / "adapter_config.json").is_file():
            hint = "; it holds an adapter: save the merged model (merge_and_unload, docs/transformers.md)"
        raise UserError(f"{context or folder} holds no {name}: not a complete model folder{hint}")


def read_model_config(folder: Path) -> dict[str, Any]:
    """Read the `config.json` of a complete model folder, of this project or of nanoVLM."""
    if not folder.is_dir():
        raise UserError(f"no model folder at {folder}")
    _check_file(folder, "config.json")
    config = checked_config(folder / "config.json", str(folder))
    weight_files(folder)
    return config


def checked_config(path: Path, source: str = "") -> dict[str, Any]:
    """Read a `config.json`. An unknown model type or format raises `UserError`.

    `source`: the model folder or Hub id, for the error.
    """
    context = source or str(path)
    config = read_json(path)
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
        name = f"{source}/config.json" if source else path
        types = ", ".join(MODEL_TYPES)
        raise UserError(f"{name} describes a model of type {kind!r}, not one of {types}")
    if type(version) is not int or not OLDEST <= version <= FORMAT:
        raise UserError(f"{context} has model format {version!r}; this version reads {OLDEST} to {FORMAT}")
    return dict(config)


def find_model(source: str | Path, **download: Any) -> Path:
    """Return a local model folder; a Hub id is fetched, with options of `fetch`.

    Its `config.json` is fetched first; the rest only if that describes a known type and format.
    """
    if not is_hub_id(str(source)):
        return Path(source)
    folder = fetch(str(source), ["config.json"], "config.json", **download)
    _check_file(folder, "config.json", str(source))
    checked_config(folder / "config.json", str(source))
    return fetch(str(source), ["config.json", *WEIGHTS, *AUXILIARY_FILES], "the model", **download)


def find_files(source: str | Path, config: Path | None = None, **download: Any) -> ModelFiles:
    """Find the files of a model folder, a Hub id, or a weights file (`model.safetensors`) and its `config`.

    `config` defaults to the `config.json` in the weights file's folder; folders and Hub ids take none.
    `download`: options of `fetch`.
    """
    if (weights := Path(source)).is_file():
        config = config if config is not None else weights.parent / "config.json"
        if not config.is_file():
            problem = "is a folder" if config.is_dir() else "does not exist"
            raise UsageError(f"{weights} needs its config.json: {config} {problem}; name it with --config")
        has_tokenizer = (config.parent / "tokenizer.json").is_file()
        return ModelFiles(config, [weights], config.parent if has_tokenizer else weights.parent)
    if config is not None:
        problem = "has a config.json of its own" if weights.is_dir() else "is no file"
        raise UsageError(f"--config is for a weights file, and {source} {problem}")
    folder = find_model(source, **download)
    read_model_config(folder)
    return ModelFiles(folder / "config.json", weight_files(folder), folder)


def damaged(path: Path, error: Exception) -> UserError:
    """The error of a weight file that cannot be read."""
    return UserError(f"{path} cannot be read as safetensors: {error}{in_cache(path)}")
