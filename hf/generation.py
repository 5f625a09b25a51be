"""transformers' `generate` on this project's own: arguments and tensors are converted, nothing else."""

from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig as TransformersGenerationConfig
from transformers import GenerationMixin

from configs.model import GenerationConfig
from configs.serialization import from_dict
from hf.configuration import InputError
from models.generation import generate
from models.kv_cache import ImageKV
from utils.errors import nearest

# Arguments of `generate` → this project's settings; transformers lacks the last two.
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
OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
TOKENS = ("eos_token_id", "pad_token_id", "bos_token_id", "suppress_tokens", "stop_strings")
OBJECTS = ("synced_gpus", "logits_processor", "stopping_criteria")
# Values that ask for nothing.
NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "max_length": 20,
    "min_length": 0,
    "typical_p": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "disable_compile": True,  # nothing is compiled here
    "use_cache": True,
}


class TowerGenerationMixin(GenerationMixin):
    """`generate` of a model whose `model` is a `TowerModel`."""

    model: Any

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: TransformersGenerationConfig | None = None,
        streamer: Any = None,
        tokenizer: Any = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Continue the prompts `input_ids`, or `inputs` (B, T) → prompts and answers (B, T + new), int64.

        `attention_mask` and `pixel_values` as in `forward`. An image of several rows is encoded once.
        `streamer` receives one row's tokens as they come; `stop_strings` needs `tokenizer`. Arguments that
        ask for something that is not supported raise `InputError`. Sampling follows torch's random state.
        """
        if (inputs is None) == (input_ids is None):
            raise InputError("generate takes the prompts as input_ids, or as inputs, and not as both")
        ids = inputs if input_ids is None else input_ids
        arguments = _arguments(self.generation_config, generation_config, kwargs)
        settings, ends, padding, suppressed, strings = _settings(arguments)
        if strings and tokenizer is None:
            raise InputError("generate: stop_strings needs the tokenizer too (tokenizer=processor.tokenizer)")
        vlm = self.model.vlm
        if (
            self.config.image_token_id in suppressed
        ):  # and then its markers: TRL asks for no image in an answer
            suppressed = [*suppressed, *range(self.config.image_token_id, self.config.vocab_size)]
        self.check_device_map()
        streams = self.model.streams(ids, attention_mask, pixel_values)
        if not streams.right.gather(1, _last_columns(ids, attention_mask)).all():
            raise InputError("generate: a prompt ends with an image, which only later text can see: add text")
        on_tokens = _TokenCallback(streamer, tokenizer, strings)
        if streamer is not None:
            streamer.put(ids.cpu())
        has_tiles = pixel_values is not None and len(pixel_values) > 0
        with_prompt = (
            has_tiles and vlm.config.left_context == "none"
        )  # vanilla: images among the prompt's tokens
        result = generate(
            vlm,
            ids=streams.batch["right_ids"].to(vlm.device),
            positions=streams.batch["right_positions"].masked_fill(~streams.valid, -1).to(vlm.device),
            images=_encode_images(vlm, streams.batch, pixel_values),
            turn_end=ends,
            settings=settings,
            on_tokens=on_tokens if streamer is not None or strings else None,
            tiles=pixel_values.to(vlm.device) if with_prompt else None,
            suppressed=[token for token in suppressed if token < len(vlm.right.unembedding)],
        )
        if streamer is not None:
            streamer.end()
        answers = [
            torch.tensor(tokens + [end] * (end is not None), dtype=torch.int64)
            for tokens, end in zip(result.tokens, result.ends, strict=True)
        ]
        new = pad_sequence(answers, batch_first=True, padding_value=padding)
        return torch.cat((ids, new.to(ids.device)), 1)


def _last_columns(ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The column of each row's last token, (B, 1)."""
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask.bool().long()
    return (mask * torch.arange(1, ids.shape[1] + 1, device=ids.device)).argmax(1, keepdim=True)


def _encode_images(
    vlm: Any, batch: dict[str, Tensor], pixel_values: Tensor | None
) -> list[list[tuple[ImageKV, int]]]:
    """Each row's image KVs with their start positions; what several rows show is encoded once."""
    columns = [batch[name].tolist() for name in ("left_ids", "left_positions", "left_images", "left_groups")]
    rows, unique, at = [], {}, 0
    for row in zip(*columns, strict=True):
        tokens = [token for token in zip(*row, strict=True) if token[3] >= 0]
        blocks = [
            list(run) for _, run in groupby(tokens, lambda t: t[2] if vlm.config.image_isolation else 0)
        ]
        rows.append([])
        for block in blocks:
            ids, positions, images, _ = map(list, zip(*block, strict=True))
            first = min((image for image in images if image >= 0), default=0)
            numbers = [max(image - first, -1) for image in images]
            count = sum(token > vlm.vocabulary.image_token_id for token in ids)
            tiles = None if pixel_values is None else pixel_values[at : at + count]
            at += count
            key = (*ids, *numbers, b"" if tiles is None else tiles.cpu().numpy().tobytes())
            unique.setdefault(key, (ids, numbers, tiles))
            rows[-1].append((key, positions[0]))
    if not unique:
        return [[] for _ in rows]
    all_ids, all_numbers, all_tiles = zip(*unique.values(), strict=True)
    kvs = vlm.encode_images(
        torch.cat([tiles for tiles in all_tiles if tiles is not None]),
        [torch.tensor(ids) for ids in all_ids],
        [torch.tensor(numbers) for numbers in all_numbers],
    )
    by_key = dict(zip(unique, kvs, strict=True))
    return [[(by_key[key], start) for key, start in row] for row in rows]


class _TokenCallback:
    """Passes new tokens to a streamer, and ends a row at a stop string."""

    def __init__(self, streamer: Any, tokenizer: Any, strings: list[str]) -> None:
        self.streamer, self.tokenizer, self.strings = streamer, tokenizer, strings

    def __call__(self, row: int, tokens: list[int]) -> bool:
        if self.streamer is not None:
            self.streamer.put(torch.tensor(tokens[-1:]))
        return any(string in self.tokenizer.decode(tokens) for string in self.strings)


def _arguments(
    own: TransformersGenerationConfig, other: TransformersGenerationConfig | None, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Merge the folder's settings, those of `generation_config` and `kwargs`; a later one wins.

    What asks for nothing is left out.
    """
    if not isinstance(other, TransformersGenerationConfig | None):
        raise InputError(
            f"generate: generation_config is a {type(other).__name__}, "
            "expected transformers' GenerationConfig"
        )
    if kwargs.get("max_length") is not None:
        raise InputError("generate: max_length is not supported: use max_new_tokens")
    # Arguments of transformers: False and an empty list ask for nothing.
    theirs = {*OBJECTS, *TransformersGenerationConfig().to_dict()}
    configs = [config.to_diff_dict() for config in (own, other) if config is not None]
    merged = {name: value for values in (*configs, kwargs) for name, value in values.items()}
    return {
        name: value
        for name, value in merged.items()
        if value is not None
        and not (name in theirs and (value is False or value == []) and name != "do_sample")
        and (name not in NEUTRAL or value != NEUTRAL[name])
        and not name.startswith("_")
        and name != "transformers_version"
    }


def _settings(given: dict[str, Any]) -> tuple[GenerationConfig, list[int], int, list[int], list[str]]:
    """Convert transformers' arguments → settings, end tokens, padding, suppressed tokens, stop strings."""
    for name, value in given.items():
        if name in NEUTRAL:
            raise InputError(f"generate: {name} = {value!r} is not supported, only {NEUTRAL[name]!r}")
        if name not in {*SETTINGS, *TOKENS}:
            raise InputError(
                f"generate: the argument {name} is not supported{nearest(name, [*SETTINGS, *TOKENS])}"
            )
    unused = () if given.get("do_sample") else OF_SAMPLING
    values = {SETTINGS[n]: value for n, value in given.items() if n in SETTINGS and n not in unused}
    settings = from_dict(GenerationConfig, values, "generate")
    if settings.sampling:
        values = vars(settings) | {"seed": int(torch.randint(2**62, ()))}
        settings = from_dict(GenerationConfig, values, "generate")
    ends = _token_list("eos_token_id", given)
    if not ends:
        raise InputError("generate: eos_token_id is missing: the token that ends an answer")
    padding, strings = given.get("pad_token_id", ends[0]), given.get("stop_strings", [])
    strings = [strings] if isinstance(strings, str) else strings
    if not isinstance(padding, int):
        raise InputError(f"generate: pad_token_id = {padding!r} is not a token")
    if not isinstance(strings, list | tuple) or not all(
        isinstance(string, str) and string for string in strings
    ):
        raise InputError(f"generate: stop_strings = {strings!r} are not strings with something in them")
    return settings, ends, padding, _token_list("suppress_tokens", given), list(strings)


def _token_list(name: str, given: dict[str, Any]) -> list[int]:
    value = given.get(name, [])
    value = value.tolist() if isinstance(value, Tensor) else value
    tokens = [value] if type(value) is int else value
    if not isinstance(tokens, list | tuple) or not all(type(token) is int and token >= 0 for token in tokens):
        raise InputError(f"generate: {name} = {value!r} is not a token, or a list of tokens")
    return list(tokens)
