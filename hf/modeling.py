"""Both models as `transformers.AutoModelForImageTextToText` loads them: their weights by the names of the file, and this project's own `generate`."""

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
from models.image_blocks import encode_rows, image_blocks_of
from models.image_store import ImageStore
from models.language_model import Output
from models.vision_encoder import VisionEncoder
from models.vision_language_model import VisionLanguageModel
from utils.errors import UsageError, nearest

# Arguments of generate → this project's settings; the last three are its own.
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
        "draft_width",
    )
}
FIXED = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "use_cache": True,
    "return_dict_in_generate": False,
}  # arguments that have one value here
OTHERS = ("eos_token_id", "pad_token_id", "stop_strings")
# What some versions of transformers write into every generation_config: it asks for nothing.
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
    """The model's parts stand here under their own names, so that tensors have the names of the file; `vlm` is the model itself, of the same parts."""

    model_class: type[nn.Module]
    main_input_name = "input_ids"
    _no_split_modules = ("Block", "KeyValueLayer", "VisionEncoder")  # what device_map keeps on one device

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
        """transformers builds models on no device and fills in what the file holds; buffers that follow from the settings are left to this."""
        if isinstance(module, VisionEncoder):
            whole = VisionEncoder(module.config)
            for name, part in whole.named_modules():
                for leaf in part._non_persistent_buffers_set:
                    module.get_submodule(name).get_buffer(leaf).copy_(part.get_buffer(leaf))

    def get_input_embeddings(self) -> nn.Module:
        return self.vlm.right.embed_tokens

    def forward(self, **batch: Tensor) -> Output:
        """The batch of data/collators.py (docs/architecture.md), as the project trains it → losses and hidden states. What a processor makes is for `generate`."""
        if "input_ids" in batch:
            raise UsageError(
                "forward takes a training batch (docs/architecture.md), not a processor's output: that is for generate"
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
        """Prompts `input_ids` (B, T), padded on either side where `attention_mask` (B, T) is 0 → prompts and answers (B, T + new), int64.

        `pixel_values` (N, 3, h, w) uint8: the tiles of all images, in the order of their blocks in `input_ids`. An image that stands in several
        rows is encoded once. `streamer` takes one row's tokens as they come; `tokenizer` is what `stop_strings` needs.
        Arguments: `SETTINGS`, `OTHERS`; all else raises `UsageError`. Sampling follows torch's random state.
        """
        if not isinstance(generation_config, TransformersGenerationConfig | None):
            raise UsageError(
                f"generate: generation_config is a {type(generation_config).__name__}, expected transformers' GenerationConfig"
            )
        given = (
            _said(self.generation_config)
            | (_said(generation_config) if generation_config is not None else {})
            | kwargs
        )
        settings, stop, padding, strings = _settings(given)
        if (
            not isinstance(input_ids, Tensor)
            or input_ids.is_floating_point()
            or not isinstance(attention_mask, Tensor | None)
        ):
            raise UsageError(
                "generate: input_ids and attention_mask must be tensors of integers, as the processor makes them with return_tensors='pt'"
            )
        if strings and tokenizer is None:
            raise UsageError("generate: stop_strings needs the tokenizer too (tokenizer=processor.tokenizer)")
        mask = (
            attention_mask.bool()
            if attention_mask is not None
            else torch.ones_like(input_ids, dtype=torch.bool)
        )
        if (
            input_ids.ndim != 2
            or mask.shape != input_ids.shape
            or not input_ids.numel()
            or not mask.any(1).all()
        ):
            raise UsageError(
                f"generate: input_ids {tuple(input_ids.shape)} and attention_mask {tuple(mask.shape)} must be (B, T), with at least one token a row"
            )
        prompts = [row[kept].tolist() for row, kept in zip(input_ids, mask, strict=True)]
        rows = self.vlm.vocabulary.size
        if wrong := [token for ids in prompts for token in ids if not 0 <= token < rows]:
            raise UsageError(
                f"generate: input_ids hold {wrong[0]}, this model's vocabulary has {rows:,} tokens: they come from another tokenizer"
            )
        documents = [
            route(ids, [IGNORE] * len(ids), segments_of(ids, self.vlm.vocabulary), self.vlm.config.left_context)
            for ids in prompts
        ]
        tiles = self._tiles(prompts, pixel_values)
        stopped = set()

        def on_tokens(row: int, tokens: list[int]) -> bool:
            if streamer is not None:
                streamer.put(torch.tensor(tokens[-1:]))
            if any(string in tokenizer.decode(tokens) for string in strings):
                stopped.add(row)
            return row in stopped

        if streamer is not None:
            streamer.put(input_ids.cpu())
        made = generate(
            self.vlm,
            ids=pad_sequence([torch.tensor(d.right_ids) for d in documents], batch_first=True).to(
                self.device
            ),
            positions=pad_sequence(
                [torch.tensor(d.right_positions) for d in documents], batch_first=True, padding_value=-1
            ).to(self.device),
            images=encode_rows(self.vlm, self._blocks(documents, tiles), ImageStore())[0],
            stop=stop,
            settings=settings,
            on_tokens=on_tokens if streamer is not None or strings else None,
            tiles=pixel_values.to(self.device)
            if self.vlm.config.left_context == "none" and pixel_values is not None and len(pixel_values)
            else None,
        )
        if streamer is not None:
            streamer.end()
        answers = [
            tokens + [stop] * (len(tokens) < settings.max_new_tokens and row not in stopped)
            for row, tokens in enumerate(made.tokens)
        ]
        new = pad_sequence(
            [torch.tensor(tokens, dtype=torch.int64) for tokens in answers],
            batch_first=True,
            padding_value=padding,
        )
        return torch.cat((input_ids, new.to(input_ids.device)), 1)

    def _tiles(self, prompts: list[list[int]], pixel_values: Tensor | None) -> list[list[Tensor]]:
        """The tiles of each prompt's images, one entry an image: as many as its block has markers."""
        vocabulary = self.vlm.vocabulary
        counts = [
            [
                sum(token > vocabulary.image_token_id for token in ids[a:b])
                for a, b, image in segments_of(ids, vocabulary)
                if image >= 0
            ]
            for ids in prompts
        ]
        squares = self.vlm.config.tokens_per_tile
        for ids, row in zip(prompts, counts, strict=True):
            if (found := ids.count(vocabulary.image_token_id)) != squares * sum(row):
                raise UsageError(
                    f"generate: a row of input_ids has {found} image tokens for {sum(row)} image tiles of {squares}: an image's block is cut, or its mask has holes"
                )
        needed, given = sum(map(sum, counts)), 0 if pixel_values is None else len(pixel_values)
        if needed != given:
            raise UsageError(
                f"generate: input_ids have room for {needed} image tiles, pixel_values holds {given}: give both as one call of the processor makes them"
            )
        side = self.vlm.config.vision.image_size
        if pixel_values is not None and (
            pixel_values.dtype != torch.uint8 or pixel_values.shape[1:] != (3, side, side)
        ):
            raise UsageError(
                f"generate: pixel_values are {pixel_values.dtype} {tuple(pixel_values.shape)}, expected torch.uint8 (N, 3, {side}, {side}), as the processor makes them"
            )
        tiles = iter(pixel_values.cpu().split([n for row in counts for n in row])) if needed else iter(())
        return [[next(tiles) for _ in row] for row in counts]

    def _blocks(self, documents: list[Document], tiles: list[list[Tensor]]) -> list[list[Any]]:
        isolated = self.vlm.config.image_isolation
        return [
            image_blocks_of(d.left_ids, d.left_positions, d.left_images, d.blocks(isolated), shown)
            for d, shown in zip(documents, tiles, strict=True)
        ]


def _said(config: TransformersGenerationConfig) -> dict[str, Any]:
    return {
        name: value
        for name, value in config.to_diff_dict().items()
        if name not in DEFAULTS or value != DEFAULTS[name]
    }


def _settings(given: dict[str, Any]) -> tuple[GenerationConfig, int, int, list[str]]:
    """Arguments of transformers → this project's settings, the token that ends an answer, the one behind it, and the strings that end one."""
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
    settings = from_dict(
        GenerationConfig,
        {SETTINGS[name]: value for name, value in given.items() if name in SETTINGS},
        "generate",
    )
    if settings.sampling:
        settings = from_dict(
            GenerationConfig, vars(settings) | {"seed": int(torch.randint(2**62, ()))}, "generate"
        )
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
