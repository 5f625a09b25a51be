"""The `config.json` of an exported folder for `transformers.AutoConfig`, with its own keys."""

from typing import Any

from transformers import PretrainedConfig


class TowerConfig(PretrainedConfig):
    """`model` and `vocabulary` are `ModelConfig` and `Vocabulary` of configs/model.py, as dictionaries."""

    def __init__(
        self, model: dict[str, Any] | None = None, vocabulary: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        self.model, self.vocabulary = model, vocabulary
        super().__init__(**kwargs)


class DualTowerConfig(TowerConfig):
    model_type = "dual_tower"


class VanillaConfig(TowerConfig):
    model_type = "vanilla"
