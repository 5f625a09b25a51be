"""Both models for `transformers.AutoModelForImageTextToText`, with this project's own `generate`.

Their tensors have the names of `model.safetensors`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig as TransformersGenerationConfig
from transformers import GenerationMixin, PreTrainedModel

from configs.model import GenerationConfig, ModelConfig, Vocabulary
from configs.serialization import from_dict
from data.render import IGNORE, Document, route, segments_of
from hf.configuration import DualTowerConfig, VanillaConfig
from models.dual_tower.dual_tower import DualTowerVLM
from models.generation import generate
from models.image_store import ImageStore, encode_rows, image_blocks_of
from models.language_model import Output
from models.vision_language_model import VisionLanguageModel
from utils.errors import UsageError, nearest

# Arguments of `generate` → this project's settings; transformers lacks the last three.
SETTINGS = {"do_sample": "sampling"} | {
    name: name
    for name in (
        "max_new_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "speculative",
        "draft_tokens",
    )
}
# Arguments with only one supported value.
FIXED = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "use_cache": True,
    "return_dict_in_generate": False,
}
OTHERS = ("eos_token_id", "pad_token_id", "stop_strings")
# Defaults that some versions of transformers write into every generation_config: they are ignored.
DEFAULTS = {
    "max_length": 20,
    "min_length": 0,
    "early_stopping": False,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "remove_invalid_values": False,
    "output_scores": False,
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4,
    "assistant_lookbehind": 10,
    "target_lookbehind": 10,
    "diversity_penalty": 0.0,
    "num_beam_groups": 1,
}


class TowerForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A model of this project, `vlm`, as a model of transformers.

    The parts of `vlm` are registered directly, so that tensors have the names of the file.
    """

    model_class: type[nn.Module]
    main_input_name = "input_ids"
    _no_split_modules = ("Block", "KeyValueLayer", "VisionEncoder")  # device_map keeps each on one device

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        vlm = self.model_class(
            from_dict(ModelConfig, config.model, "config.json: model"),
            from_dict(Vocabulary, config.vocabulary, "config.json: vocabulary"),
        )
        for name, part in vlm.named_children():
            self.add_module(name, part)
        self.__dict__["vlm"] = vlm  # not a child: its parts are
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Compute the buffers that no file holds: transformers fills in only the tensors of the file."""
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()

    def get_input_embeddings(self) -> nn.Module:
        return self.vlm.right.embed_tokens

    def forward(self, **batch: Tensor) -> Output:
        """Train on a batch of data/collators.py (docs/architecture.md) → losses and hidden states.

        A processor's output is for `generate` and raises `UsageError`.
        """
        if "input_ids" in batch:
            raise UsageError(
                "forward takes a training batch (docs/architecture.md), not a processor's output: "
                "that is for generate"
            )
        return self.vlm(**batch)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        generation_config: TransformersGenerationConfig | None = None,
        streamer: Any = None,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Continue the prompts `input_ids` (B, T) → prompts and answers (B, T + new), int64.

        Prompts are padded on either side, where `attention_mask` (B, T) is 0. `pixel_values` (N, 3, h, w)
        uint8 holds the tiles of all images, in the order of their blocks in `input_ids`. An image of several
        rows is encoded once. `streamer` receives one row's tokens as they come; `stop_strings` needs
        `tokenizer`. Arguments other than `SETTINGS`, `FIXED` and `OTHERS` raise `UsageError`. Sampling
        follows torch's random state.
        """
        settings, stop, padding, strings = _settings(self._arguments(generation_config, kwargs))
        mask = _prompt_mask(input_ids, attention_mask)
        if strings and tokenizer is None:
            raise UsageError("generate: stop_strings needs the tokenizer too (tokenizer=processor.tokenizer)")
        prompts = [row[valid].tolist() for row, valid in zip(input_ids, mask, strict=True)]
        self._check_vocabulary(prompts)
        vocabulary, left_context = self.vlm.vocabulary, self.vlm.config.left_context
        documents = [
            route(ids, [IGNORE] * len(ids), segments_of(ids, vocabulary), left_context) for ids in prompts
        ]
        images = self._tiles(prompts, pixel_values)
        ids = pad_sequence([torch.tensor(d.right_ids) for d in documents], batch_first=True)
        positions = pad_sequence(
            [torch.tensor(d.right_positions) for d in documents], batch_first=True, padding_value=-1
        )
        tiles = None  # of a vanilla model, which reads them together with the prompts
        if left_context == "none" and pixel_values is not None and len(pixel_values):
            tiles = pixel_values.to(self.device)
        on_tokens = _TokenCallback(streamer, tokenizer, strings)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        result = generate(
            self.vlm,
            ids=ids.to(self.device),
            positions=positions.to(self.device),
            images=encode_rows(self.vlm, self._blocks(documents, images), ImageStore())[0],
            turn_end=stop,
            settings=settings,
            on_tokens=on_tokens if streamer is not None or strings else None,
            tiles=tiles,
        )
        if streamer is not None:
            streamer.end()
        answers = []
        for row, tokens in enumerate(result.tokens):
            ended = len(tokens) < settings.max_new_tokens and row not in on_tokens.stopped
            answers.append(torch.tensor(tokens + [stop] * ended, dtype=torch.int64))
        new = pad_sequence(answers, batch_first=True, padding_value=padding)
        return torch.cat((input_ids, new.to(input_ids.device)), 1)

    def _arguments(
        self, generation_config: TransformersGenerationConfig | None, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Merge arguments: those of the folder, of `generation_config`, `kwargs`; a later one wins."""
        if not isinstance(generation_config, TransformersGenerationConfig | None):
            raise UsageError(
                f"generate: generation_config is a {type(generation_config).__name__}, "
                "expected transformers' GenerationConfig"
            )
        own = _changed_values(self.generation_config)
        other = _changed_values(generation_config) if generation_config is not None else {}
        return own | other | kwargs

    def _check_vocabulary(self, prompts: list[list[int]]) -> None:
        size = self.vlm.vocabulary.size
        if wrong := [token for ids in prompts for token in ids if not 0 <= token < size]:
            raise UsageError(
                f"generate: input_ids hold {wrong[0]}, this model's vocabulary has {size:,} tokens: "
                "they come from another tokenizer"
            )

    def _tiles(self, prompts: list[list[int]], pixel_values: Tensor | None) -> list[list[Tensor]]:
        """Split `pixel_values` by prompt and image. An image has as many tiles as its block has markers."""
        vocabulary = self.vlm.vocabulary
        counts = [
            [
                sum(token > vocabulary.image_token_id for token in ids[a:b])
                for a, b, image in segments_of(ids, vocabulary)
                if image >= 0
            ]
            for ids in prompts
        ]
        per_tile = self.vlm.config.tokens_per_tile
        for ids, row in zip(prompts, counts, strict=True):
            if (image_tokens := ids.count(vocabulary.image_token_id)) != per_tile * sum(row):
                raise UsageError(
                    f"generate: a row of input_ids has {image_tokens} image tokens for {sum(row)} image "
                    f"tiles of {per_tile}: an image's block is truncated, or its mask has holes"
                )
        needed, given = sum(map(sum, counts)), 0 if pixel_values is None else len(pixel_values)
        if needed != given:
            raise UsageError(
                f"generate: input_ids have room for {needed} image tiles, pixel_values holds {given}: "
                "give both as one call of the processor makes them"
            )
        side = self.vlm.config.vision.image_size
        if pixel_values is not None and (
            pixel_values.dtype != torch.uint8 or pixel_values.shape[1:] != (3, side, side)
        ):
            raise UsageError(
                f"generate: pixel_values are {pixel_values.dtype} {tuple(pixel_values.shape)}, "
                f"expected torch.uint8 (N, 3, {side}, {side}), as the processor makes them"
            )
        tiles = iter(pixel_values.cpu().split([n for row in counts for n in row])) if needed else iter(())
        return [[next(tiles) for _ in row] for row in counts]

    def _blocks(self, documents: list[Document], images: list[list[Tensor]]) -> list[list[Any]]:
        isolated = self.vlm.config.image_isolation
        return [
            image_blocks_of(d.left_ids, d.left_positions, d.left_images, d.blocks(isolated), tiles)
            for d, tiles in zip(documents, images, strict=True)
        ]


class _TokenCallback:
    """Passes new tokens to a streamer, and stops a row at a stop string; `stopped` holds these rows."""

    def __init__(self, streamer: Any, tokenizer: Any, strings: list[str]) -> None:
        self.streamer, self.tokenizer, self.strings = streamer, tokenizer, strings
        self.stopped: set[int] = set()

    def __call__(self, row: int, tokens: list[int]) -> bool:
        if self.streamer is not None:
            self.streamer.put(torch.tensor(tokens[-1:]))
        if any(string in self.tokenizer.decode(tokens) for string in self.strings):
            self.stopped.add(row)
        return row in self.stopped


def _changed_values(config: TransformersGenerationConfig) -> dict[str, Any]:
    """Return the values of a generation_config that differ from transformers' defaults and `DEFAULTS`."""
    return {
        name: value
        for name, value in config.to_diff_dict().items()
        if name not in DEFAULTS or value != DEFAULTS[name]
    }


def _prompt_mask(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Check prompts and their mask → the mask (B, T), bool."""
    if (
        not isinstance(input_ids, Tensor)
        or input_ids.is_floating_point()
        or not isinstance(attention_mask, Tensor | None)
    ):
        raise UsageError(
            "generate: input_ids and attention_mask must be tensors of integers, as the processor makes them "
            "with return_tensors='pt'"
        )
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    mask = mask.bool()
    if input_ids.ndim != 2 or mask.shape != input_ids.shape or not input_ids.numel() or not mask.any(1).all():
        raise UsageError(
            f"generate: input_ids {tuple(input_ids.shape)} and attention_mask {tuple(mask.shape)} "
            "must be (B, T), with at least one token a row"
        )
    return mask


def _settings(given: dict[str, Any]) -> tuple[GenerationConfig, int, int, list[str]]:
    """Convert transformers' arguments → settings, end token, padding token, stop strings."""
    given = {
        name: value
        for name, value in given.items()
        if value is not None and not name.startswith("_") and name != "transformers_version"
    }
    for name, value in given.items():
        if name in FIXED and value != FIXED[name]:
            raise UsageError(f"generate: {name} = {value!r} is not supported, only {FIXED[name]!r}")
        if name not in {*SETTINGS, *FIXED, *OTHERS}:
            raise UsageError(
                f"generate: the argument {name} is not supported{nearest(name, [*SETTINGS, *OTHERS])}"
            )
    values = {SETTINGS[name]: value for name, value in given.items() if name in SETTINGS}
    settings = from_dict(GenerationConfig, values, "generate")
    if settings.sampling:
        values = vars(settings) | {"seed": int(torch.randint(2**62, ()))}
        settings = from_dict(GenerationConfig, values, "generate")
    stop = given.get("eos_token_id")
    if isinstance(stop, list | tuple) and len(stop) == 1:
        stop = stop[0]
    if type(stop) is not int:
        raise UsageError(f"generate: eos_token_id = {stop!r} is not supported, only one token")
    padding, strings = given.get("pad_token_id", stop), given.get("stop_strings", [])
    strings = [strings] if isinstance(strings, str) else strings
    if not isinstance(padding, int):
        raise UsageError(f"generate: pad_token_id = {padding!r} is not a token")
    if not isinstance(strings, list | tuple) or not all(
        isinstance(string, str) and string for string in strings
    ):
        raise UsageError(f"generate: stop_strings = {strings!r} are not strings with something in them")
    return settings, stop, padding, list(strings)


class DualTowerForConditionalGeneration(TowerForConditionalGeneration):
    config_class = DualTowerConfig
    model_class = DualTowerVLM


class VanillaForConditionalGeneration(TowerForConditionalGeneration):
    config_class = VanillaConfig
    model_class = VisionLanguageModel
