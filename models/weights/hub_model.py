"""Loading, saving and pushing of both models, and their card, on huggingface_hub's `PyTorchModelHubMixin`."""

import inspect
from pathlib import Path
from typing import Any, Self

from huggingface_hub import ModelCard, PyTorchModelHubMixin
from torch import nn

from configs.model import ModelConfig
from models.weights.folder import find_files
from models.weights.language_models import load_language_weights
from models.weights.model_card import RunFacts, card_of
from models.weights.model_folder import load_model, save_model
from models.weights.tensors import check_finite
from models.weights.vision import load_vision_weights
from utils.errors import UsageError, UserError, nearest
from utils.files import CACHE, replacing
from utils.hub import AUXILIARY_FILES, WEIGHTS, is_hub_id, open_repo, writing


class HubModel(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="dualtowervlm",
    pipeline_tag="image-text-to-text",
    tags=["vision-language-model"],
):
    """`from_pretrained`, `save_pretrained`, `push_to_hub`.

    A subclass has `model_type`, `config`, `vocabulary` and `parts()`.
    """

    model_type: str
    config: ModelConfig

    def __init__(self) -> None:
        super().__init__()
        # Tokenizer and settings of the folder that the model was loaded from: saved with it.
        self.extra_files: dict[str, bytes] = {}
        # Keys of config.json by which transformers finds the code among those files.
        self.code: dict[str, Any] = {}

    @classmethod
    def from_pretrained(  # type: ignore[override]  # without the mixin's other options
        cls,
        source: str | Path,
        *,
        load_backbone: bool = False,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
    ) -> Self:
        """Load a model folder or a Hub id (`org/name`, `org/name@revision`), of this project or of nanoVLM.

        `cache_dir`: of downloads, huggingface_hub's own by default; `force_download`: also of what is there.
        Missing, foreign or damaged files raise `UserError`. With `load_backbone` the vision encoder and the
        decoders get the pretrained weights that their `weights` settings name. Projector and multi-token
        heads, which no backbone has, are the folder's in any case.
        """
        if revision == "":
            raise UserError("revision is empty: name a branch, tag or commit, or leave it out")
        if revision is not None and ("@" in str(source) or not is_hub_id(str(source))):
            raise UserError(
                f"revision = {revision!r} needs a Hub id that names none itself, and nothing of that name on "
                f"this disk: {source} is something else"
            )
        token = token.strip() if isinstance(token, str) else token  # as read from a file
        named = f"{source}@{revision}" if revision is not None else source
        files = find_files(named, token=token, cache_dir=cache_dir, force_download=force_download)
        model = load_model({cls.model_type: cls}, files)
        if load_backbone:
            towers = [getattr(model.config, tower) for tower in model.config.towers]
            if all(part.weights == "random" for part in (model.config.vision, *towers)):
                raise UserError(
                    f"load_backbone: the configuration of {source} names no pretrained weights, "
                    "everything in it began at random"
                )
            load_language_weights(model, Path(CACHE))
            load_vision_weights(model.parts()["vision"])
        return model

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write `config.json`, the weights and `extra_files`; each file under a temporary name first."""
        save_model(self, save_directory)
        for name, data in self.extra_files.items():
            with replacing(save_directory / name) as path:
                path.write_bytes(data)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, **options: Any
    ) -> str:
        """Push the files of `save_pretrained` as one commit; → its address.

        A missing repository is created. `options` are huggingface_hub's: `branch` (created if missing),
        `commit_message` … Weights that are not finite, a missing or wrong token, no right to write, a
        repository with another type of model, and a Hub out of reach raise `UserError`.
        """
        known = [
            name for name in inspect.signature(PyTorchModelHubMixin.push_to_hub).parameters if name != "self"
        ]
        for name in options:
            if name not in known:
                raise UsageError(f"push_to_hub has no option {name}{nearest(name, known)}")
        token = token.strip() if isinstance(token, str) else token
        check_finite(self.state_dict(), "the model")
        repo = open_repo(repo_id, self.model_type, private, token, options.get("branch"))
        # Delete an earlier model's files that this one does not replace, unless the caller selects the files.
        if not {"allow_patterns", "ignore_patterns", "delete_patterns"} & options.keys():
            options["delete_patterns"] = [*WEIGHTS, *(AUXILIARY_FILES if self.extra_files else [])]
        return writing(repo, lambda: str(super(HubModel, self).push_to_hub(repo, token=token, **options)))

    def generate_model_card(self, run: RunFacts | None = None) -> ModelCard:
        """Write README.md from the model itself and the known facts of its `run`."""
        return card_of(self, run or RunFacts())
