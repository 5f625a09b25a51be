"""What both models share as models of the Hugging Face Hub: load, save, push, and the card. Built on huggingface_hub's `PyTorchModelHubMixin`."""

import inspect
from pathlib import Path
from typing import Any, Self

from huggingface_hub import ModelCard, PyTorchModelHubMixin
from torch import nn

from configs.model import ModelConfig
from models.weights.language_models import load_language_weights
from models.weights.model_card import RunFacts, card_of
from models.weights.pretrained import load_model, load_vision_weights, save_model
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
    """`from_pretrained`, `save_pretrained`, `push_to_hub`. A subclass has `model_type`, `config`, `vocabulary` and `parts()`."""

    model_type: str
    config: ModelConfig

    def __init__(self) -> None:
        super().__init__()
        self.beside: dict[
            str, bytes
        ] = {}  # tokenizer and settings of the folder that the model was loaded from: saved with it
        self.code: dict[str, Any] = {}  # how its config.json names the code beside it, for transformers

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the mixin's other options say nothing here, and are refused
        cls,
        source: str | Path,
        *,
        load_backbone: bool = False,
        revision: str | None = None,
        token: str | None = None,
    ) -> Self:
        """A model folder, or a Hub id (`org/name`, `org/name@revision`); an ancestor's too. Missing, foreign or damaged files raise `UserError`.

        With `load_backbone` the vision encoder and the decoders have the pretrained weights that their `weights` settings name, not the
        folder's; what no backbone has, the projector and multi-token heads, is the folder's all the same.
        """
        if revision == "":
            raise UserError("revision is empty: name a branch, tag or commit, or leave it out")
        if revision is not None and ("@" in str(source) or not is_hub_id(str(source))):
            raise UserError(
                f"revision = {revision!r} needs a Hub id that names none itself, and nothing of that name on this disk: {source} is something else"
            )
        token = token.strip() if isinstance(token, str) else token  # as read from a file
        model = load_model(
            {cls.model_type: cls}, f"{source}@{revision}" if revision is not None else source, token
        )
        if load_backbone:
            if all(
                part.weights == "random"
                for part in (
                    model.config.vision,
                    *(getattr(model.config, tower) for tower in model.config.towers),
                )
            ):
                raise UserError(
                    f"load_backbone: the configuration of {source} names no pretrained weights, everything in it began at random"
                )
            load_language_weights(model, Path(CACHE))
            load_vision_weights(model.parts()["vision"])
        return model

    def _save_pretrained(self, save_directory: Path) -> None:
        """`config.json`, the weights, and what stood beside them; each file beside its name and renamed."""
        save_model(self, save_directory)
        for name, data in self.beside.items():
            with replacing(save_directory / name) as path:
                path.write_bytes(data)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, **options: Any
    ) -> str:
        """Make the repository where there is none, and push what `save_pretrained` writes as one commit; → its address.

        `options` are huggingface_hub's: `branch` (made where there is none), `commit_message` … Errors: `UserError`: no token, a wrong one, no right
        to write there, a repository with other than a model of this type, a Hub that stays out of reach.
        """
        known = [
            name for name in inspect.signature(PyTorchModelHubMixin.push_to_hub).parameters if name != "self"
        ]
        for name in options:
            if name not in known:
                raise UsageError(f"push_to_hub has no option {name}{nearest(name, known)}")
        token = token.strip() if isinstance(token, str) else token
        repo = open_repo(repo_id, self.model_type, private, token, options.get("branch"))
        if (
            not {"allow_patterns", "ignore_patterns", "delete_patterns"} & options.keys()
        ):  # else the caller says what goes
            options["delete_patterns"] = [
                *WEIGHTS,
                *(AUXILIARY_FILES if self.beside else []),
            ]  # of an earlier model, where this one does not replace them
        return writing(repo, lambda: str(super(HubModel, self).push_to_hub(repo, token=token, **options)))

    def generate_model_card(self, run: RunFacts | None = None) -> ModelCard:
        """README.md, from the model itself and what is known of its `run`."""
        return card_of(self, run or RunFacts())
