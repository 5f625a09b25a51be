"""The processor for `transformers.AutoProcessor`: text or conversations with images → the model's inputs."""

import re
from itertools import groupby
from typing import Any

from tokenizers import Tokenizer as HFTokenizer
from transformers import BatchFeature, ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from data.conversations import Conversation, Message, checked, image_of, images_of, kind_of, text_part
from data.images import Tiles
from data.tokenizer import IMAGE, TextEncoder
from hf.configuration import InputError
from utils.errors import nearest

# Arguments of `__call__` besides text and images, and what those with few values may be.
VALUES = {
    "padding": (True, False, "longest", "max_length"),
    "padding_side": ("left", "right"),
    "truncation": (True, False),
    "add_special_tokens": (False,),
}
OPTIONS = (*VALUES, "pad_to_multiple_of", "max_length", "return_tensors")


class DualTowerProcessor(ProcessorMixin):
    """The processor of both models. `tokens_per_tile` as in the model's configuration."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        tokens_per_tile: int = 0,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)
        self.tokens_per_tile = tokens_per_tile
        self._encoders: dict[tuple[str, int], TextEncoder] = {}

    def __call__(
        self, images: Any = None, text: str | list[str] | None = None, videos: Any = None, **options: Any
    ) -> BatchFeature:
        """Text with its images → `input_ids`, `attention_mask` (B, T) and `pixel_values` (N, 3, h, w) uint8.

        `text` is what a chat template wrote, with `<|image|>` for each image. Special tokens in it are
        special, so it must be trusted, and none is added. `images` (paths, URLs, bytes, Pillow images): one
        list for all texts, in the order of the placeholders, or a list for each text.

        Options as in transformers' tokenizers: `OPTIONS`. Tensors are padded by default.
        Errors: `InputError`, `ImageError`.
        """
        if videos is not None:
            raise InputError("processor: videos are not supported")
        _check_options(options)
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, list | tuple) or not texts or not all(isinstance(t, str) for t in texts):
            raise InputError(f"the processor needs text, or a list of texts, found {kind_of(text)}")
        encoder = self._encoder(self.chat_template)
        ids = [encoder.encode_rendered(text) for text in texts]
        tiles = [
            self.image_processor.tiles(image) for image in _in_order(images, [t.count(IMAGE) for t in texts])
        ]
        return self._batch(encoder, ids, tiles, options)

    def apply_chat_template(
        self,
        conversation: list[Any],
        chat_template: str | None = None,
        tools: Any = None,
        documents: Any = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = None,
        return_dict: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        sanitize_control_tokens: bool = True,
        **kwargs: Any,
    ) -> Any:
        """One conversation, or a list of them → text.

        With `tokenize` → `input_ids`; with `return_dict` too → all inputs of the model, with
        `return_assistant_tokens_mask` also `assistant_masks`, 1 at what the assistant says. Messages are
        those of `data/conversations.py`. With `tokenize`, special tokens in their contents are text, always,
        and each image part carries its image: `{"type": "image", "image" or "url" or "path" or "base64": …}`.
        Further arguments are options of `__call__`, or variables of the template. Errors: `InputError`,
        `ConversationError`.
        """
        if tools or documents:
            raise InputError("processor: tools and documents are not supported")
        if not isinstance(conversation, list | tuple) or not conversation:
            raise InputError(f"a conversation is a list of messages, found {kind_of(conversation)}")
        is_batch = isinstance(conversation[0], list | tuple)
        chats = [checked(messages) for messages in (conversation if is_batch else [conversation])]
        if continue_final_message and (
            add_generation_prompt or any(chat[-1]["role"] != "assistant" for chat in chats)
        ):
            raise InputError(
                "continue_final_message needs a last message of the assistant, and no add_generation_prompt"
            )
        if continue_final_message and return_assistant_tokens_mask:
            raise InputError("continue_final_message and return_assistant_tokens_mask exclude one another")
        template = chat_template or self.chat_template
        options = {"return_tensors": return_tensors} | (processor_kwargs or {})
        variables = {
            name: value
            for name, value in kwargs.items()
            if name not in OPTIONS and re.search(rf"\b{name}\b", template)
        }
        options |= {name: value for name, value in kwargs.items() if name not in variables}
        _check_options(options)
        encoder = self._encoder(template)
        texts, turns = render_jinja_template(
            [_as_text(chat, encoder) for chat in chats] if tokenize else chats,
            chat_template=template,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
            continue_final_message=continue_final_message,
            add_generation_prompt=add_generation_prompt,
            **{**self.tokenizer.special_tokens_map, **variables},
        )
        if not tokenize:
            return texts if is_batch else texts[0]
        ids = [encoder.encode_rendered(text) for text in texts]
        masks = None
        if return_assistant_tokens_mask:
            masks = [
                _mask(len(row), encoder.turn_tokens(text, row, [start for start, _ in own]))
                for text, row, own in zip(texts, ids, turns, strict=True)
            ]
        tiles = [self._tiles_of(part) for chat in chats for part in images_of(chat)]
        batch = self._batch(encoder, ids, tiles, options, masks)
        return batch if return_dict else batch["input_ids"]

    def _encoder(self, template: str) -> TextEncoder:
        key = template, len(self.tokenizer)
        if key not in self._encoders:
            backend = HFTokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
            backend.no_truncation()
            backend.no_padding()
            self._encoders[key] = TextEncoder(backend, template)
        return self._encoders[key]

    def _tiles_of(self, part: dict[str, Any]) -> Tiles:
        if (image := image_of(part)) is None:
            raise InputError("an image of the chat has no source: give it image, url, path or base64")
        return self.image_processor.tiles(image)

    def _batch(
        self,
        encoder: TextEncoder,
        rows: list[list[int]],
        tiles: list[Tiles],
        options: dict[str, Any],
        masks: list[list[int]] | None = None,
    ) -> BatchFeature:
        """Put image blocks at the placeholders, truncate, pad. `options` have been checked."""
        tensors, padding = options.get("return_tensors"), options.get("padding")
        padding = tensors is not None if padding is None else padding
        limit = options.get("max_length") if options.get("truncation") else None
        if (placeholders := sum(row.count(encoder.image) for row in rows)) != len(tiles):
            raise InputError(f"the chat template writes {placeholders} placeholders for {len(tiles)} images")
        images = iter(tiles)
        columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": []}
        if masks is not None:
            columns["assistant_masks"] = []
        for number, row in enumerate(rows):
            blocks = [
                encoder.image_block(next(images).grid, self.tokens_per_tile)
                if token == encoder.image
                else [token]
                for token in row
            ]
            ids = [token for block in blocks for token in block]
            if limit is not None and any(token >= encoder.image for token in ids[limit:]):
                raise InputError(
                    f"Image features and image tokens do not match: max_length = {limit} truncates an image "
                    f"of a text of {len(ids)} tokens: raise it, or set it to None"
                )
            columns["input_ids"].append(ids[:limit])
            columns["attention_mask"].append([1] * len(ids[:limit]))
            if masks is not None:
                mask = [m for m, block in zip(masks[number], blocks, strict=True) for _ in block]
                columns["assistant_masks"].append(mask[:limit])
        longest = max(map(len, columns["input_ids"])) if padding else 0
        longest = max(longest, options["max_length"]) if padding == "max_length" else longest
        multiple = options.get("pad_to_multiple_of") or 1
        longest = -(-longest // multiple) * multiple
        left = (options.get("padding_side") or self.tokenizer.padding_side) == "left"
        for name, column in columns.items():
            filler = self.tokenizer.pad_token_id if name == "input_ids" else 0
            for row in column:
                empty = [filler] * max(0, longest - len(row))
                row[:] = empty + row if left else row + empty
        data: dict[str, Any] = dict(columns)
        if tiles or tensors is not None:  # rows of a batch have equal keys; TRL has lists, of texts alone too
            data["pixel_values"] = self.image_processor.stack(tiles)
        return BatchFeature(data, tensor_type=tensors)


def _check_options(options: dict[str, Any]) -> None:
    """Raise `InputError` for options or values that `__call__` does not support."""
    for name, value in options.items():
        if name not in OPTIONS and value is not None:
            raise InputError(
                f"processor: the argument {name} is not supported{nearest(name, list(OPTIONS))}; those of "
                "generate go into a pipeline as generate_kwargs={…}"
            )
    for name, allowed in VALUES.items():
        if options.get(name) not in (None, *allowed):
            raise InputError(f"processor: {name} = {options[name]!r} is not supported, only {allowed}")
    for name in ("max_length", "pad_to_multiple_of"):
        if options.get(name) is not None and (type(options[name]) is not int or options[name] < 1):
            raise InputError(f"processor: {name} = {options[name]!r} is not a number of tokens")
    needs_limit = options.get("truncation") or options.get("padding") == "max_length"
    if needs_limit and options.get("max_length") is None:
        raise InputError("processor: truncation and padding='max_length' need max_length")


def _as_text(chat: Conversation, encoder: TextEncoder) -> Conversation:
    """Mark the names of special tokens in contents as text. A name may span parts."""

    def marked(message: Message) -> Message:
        if isinstance(message["content"], str):
            return {**message, "content": encoder.as_text(message["content"])}
        parts = []
        for is_image, run in groupby(message["content"], lambda part: part["type"] == "image"):
            run = list(run)
            parts += run if is_image else [text_part(encoder.as_text("".join(p["text"] for p in run)))]
        return {**message, "content": parts}

    return [marked(message) for message in chat]


def _mask(length: int, turns: list[tuple[int, int]]) -> list[int]:
    """(length,), 1 within `turns`."""
    mask = [0] * length
    for start, end in turns:
        mask[start:end] = [1] * (end - start)
    return mask


def _in_order(images: Any, counts: list[int]) -> list[Any]:
    """`images` of `__call__` as one list. `counts`: the placeholders of each text."""
    images = [] if images is None else list(images) if isinstance(images, list | tuple) else [images]
    nested = bool(images) and all(isinstance(own, list | tuple | None) for own in images)
    given = [len(own or ()) for own in images] if nested else [len(images)]
    expected = counts if nested else [sum(counts)]
    if given != expected:
        raise InputError(
            f"the texts have {', '.join(map(str, expected))} image placeholders ({IMAGE}), and "
            f"{', '.join(map(str, given))} images are given; apply_chat_template writes placeholders"
        )
    return [image for own in images for image in own or ()] if nested else images
