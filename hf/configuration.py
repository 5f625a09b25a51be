"""The `config.json` of an exported folder for `transformers.AutoConfig`, with its own keys."""

from typing import Any

from transformers import PretrainedConfig

from utils.errors import UsageError

# transformers' names of the right tower's sizes → ours.
SIZES = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_size",
    "intermediate_size": "mlp_size",
    "max_position_embeddings": "max_positions",
}


class InputError(UsageError, ValueError):
    """Wrong arguments, for callers that expect `ValueError` as from transformers."""


class TowerConfig(PretrainedConfig):
    """`model` and `vocabulary` are `ModelConfig` and `Vocabulary` of configs/model.py, as dictionaries.

    `image_token_id`, `vocab_size` and transformers' names of the right tower's sizes (`hidden_size` …) are
    read from them.
    """

    def __init__(
        self, model: dict[str, Any] | None = None, vocabulary: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        self.model, self.vocabulary = model, vocabulary
        super().__init__(**{"tie_word_embeddings": False} | kwargs)  # the model itself ties them

    def __getattr__(self, name: str) -> Any:
        # Reached only for what no attribute holds; a configuration without a model has no sizes.
        if name in SIZES and self.__dict__.get("model"):
            return self.model["right"][SIZES[name]]
        raise AttributeError(f"{type(self).__name__} has no attribute {name}")

    @property
    def image_token_id(self) -> int:
        """The placeholder of an image token. Text tokens have smaller ids, markers larger ones."""
        return self.vocabulary["text_size"]

    @property
    def vocab_size(self) -> int:
        return self.vocabulary["text_size"] + 1 + self.vocabulary["markers"]


class DualTowerConfig(TowerConfig):
    model_type = "dual_tower"


class VanillaConfig(TowerConfig):
    model_type = "vanilla"
