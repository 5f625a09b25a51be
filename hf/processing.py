"""The processor for `transformers.AutoProcessor`: conversations with images → inputs of `generate`."""

import http.client
import re
import urllib.request
from functools import cached_property
from typing import Any

import torch
from tokenizers import Tokenizer as HFTokenizer
from transformers import BatchFeature, ProcessorMixin

from configs.model import VisionConfig
from configs.serialization import from_dict
from data.conversations import (
    Conversation,
    ask,
    checked,
    image_of,
    images_of,
    kind_of,
    split_at_images,
)
from data.images import Tiles, open_pixels, to_tiles
from data.render import Document, Renderer
from data.tokenizer import IMAGE, Tokenizer
from utils.errors import ImageError, UsageError

TIMEOUT_S = 30
Row = tuple[Document, list[Tiles]]


class DualTowerProcessor(ProcessorMixin):
    """The processor of both models.

    `vision` is a `VisionConfig` as a dictionary; `tokens_per_tile` as in the model's configuration.
    """

    def __init__(
        self, tokenizer: Any, vision: dict[str, Any], tokens_per_tile: int, chat_template: str | None = None
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template or tokenizer.chat_template)
        self.vision, self.tokens_per_tile = vision, tokens_per_tile
        from_dict(VisionConfig, vision, "processor_config.json: vision")  # raises UsageError for a wrong one

    @cached_property
    def renderer(self) -> Renderer:
        """The renderer, with all tokens in one sequence: the model routes them."""
        backend = HFTokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        return Renderer(Tokenizer(backend, self.chat_template), self.tokens_per_tile, "none")

    @property
    def image_processor(self) -> "DualTowerProcessor":
        """The processor itself: pipelines need the attribute to put images into a batch."""
        return self

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        padding: bool | str = True,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        **unknown: Any,
    ) -> BatchFeature:
        """Text with its images → `input_ids`, `attention_mask` (B, T) and `pixel_values` (N, 3, h, w) uint8.

        `text` is what `apply_chat_template(tokenize=False)` wrote, with a placeholder per image; special
        tokens in it are special, so it must be trusted. Or it is a question, without special tokens. `images`
        (paths, URLs, Pillow images, bytes): those of a single text, one for each text, or a list for each.
        Counts that differ raise `UsageError`.
        """
        _refuse(unknown)
        if text is None:
            raise UsageError(
                "the processor needs text: a question, or a chat that apply_chat_template has written"
            )
        texts = [text] if isinstance(text, str) else text
        if (
            not isinstance(texts, list | tuple)
            or not texts
            or not all(isinstance(text, str) for text in texts)
        ):
            raise UsageError(f"the processor needs text, or a list of texts, found {kind_of(texts)}")
        rows = [self._row_of_text(t, own) for t, own in zip(texts, _by_text(images, len(texts)), strict=True)]
        return self._batch(rows, padding, padding_side, return_tensors)

    def apply_chat_template(
        self,
        conversation: list[Any],
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """One conversation, or a list of them → text.

        With `tokenize` → `input_ids`; with `return_dict` too → all inputs of `generate`. Messages are those
        of `data/conversations.py`; special tokens in their contents are text. With `tokenize` each image part
        carries its image: `{"type": "image", "image" or "url" or "path" or "base64": …}`. Any other form
        raises `UsageError`.
        """
        if not isinstance(conversation, list | tuple) or not conversation:
            raise UsageError(f"a conversation is a list of messages, found {kind_of(conversation)}")
        conversations = conversation if isinstance(conversation[0], list | tuple) else [conversation]
        chats = [checked(messages) for messages in conversations]
        if continue_final_message and (
            add_generation_prompt or any(c[-1]["role"] != "assistant" for c in chats)
        ):
            raise UsageError(
                "continue_final_message needs a last message of the assistant, and no add_generation_prompt"
            )
        options = (
            {"padding": True, "padding_side": None, "return_tensors": return_tensors}
            | (processor_kwargs or {})
            | kwargs
        )
        _refuse(
            {
                name: value
                for name, value in options.items()
                if name not in ("padding", "padding_side", "return_tensors")
            }
        )
        if not tokenize:
            if continue_final_message:
                return self.tokenizer.apply_chat_template(
                    conversation, tokenize=False, continue_final_message=True
                )
            texts = [self.renderer.text(messages, add_generation_prompt) for messages in chats]
            return texts if isinstance(conversation[0], list | tuple) else texts[0]
        go_on = add_generation_prompt or continue_final_message
        batch = self._batch([self._row_of_chat(messages, go_on) for messages in chats], **options)
        return batch if return_dict else batch["input_ids"]

    def _row_of_chat(self, messages: Conversation, add_generation_prompt: bool) -> Row:
        tiles = []
        for part in images_of(messages):
            if (image := image_of(part)) is None:
                raise UsageError("an image of the chat has no source: give it image, url, path or base64")
            tiles.append(self._tiles(image))
        grids = [image.grid for image in tiles]
        return self.renderer.prompt(messages, grids, add_generation_prompt), tiles

    def _row_of_text(self, text: str, images: list[Any]) -> Row:
        count = text.count(IMAGE)
        tokenizer = self.renderer.tokenizer
        is_question = not any(token != IMAGE and token in text for token in tokenizer.special)
        if count != len(images) and (count or not is_question):
            raise UsageError(
                f"the text has {count} image placeholders ({IMAGE}), but {len(images)} images are given"
            )
        tiles = [self._tiles(image) for image in images]
        grids = [image.grid for image in tiles]
        if not is_question:
            return self.renderer.trusted(text, grids), tiles
        messages = ask(text, len(images))
        if count:
            messages = [{"role": "user", "content": split_at_images(text, re.compile(re.escape(IMAGE)))}]
        return self.renderer.prompt(messages, grids), tiles

    def _tiles(self, image: Any) -> Tiles:
        config = from_dict(VisionConfig, self.vision, "processor_config.json: vision")
        return to_tiles(open_pixels(_source(image)), config)

    def _batch(
        self, rows: list[Row], padding: bool | str, padding_side: str | None, return_tensors: str | None
    ) -> BatchFeature:
        if padding not in (True, False, "longest"):
            raise UsageError(
                f"processor: padding = {padding!r} is not supported, only True ('longest') and False"
            )
        side = self.vision["image_size"]
        tiles = [torch.empty(0, 3, side, side, dtype=torch.uint8)]
        tiles += [image.pixels for _, images in rows for image in images]
        longest = max(len(document.right_ids) for document, _ in rows) if padding else 0
        left = (padding_side or self.tokenizer.padding_side) == "left"
        batch: dict[str, Any] = {"input_ids": [], "attention_mask": []}
        for document, _ in rows:
            ids = document.right_ids
            empty = max(0, longest - len(ids))
            for name, own, filler in (
                ("input_ids", ids, self.tokenizer.pad_token_id),
                ("attention_mask", [1] * len(ids), 0),
            ):
                batch[name].append([filler] * empty + own if left else own + [filler] * empty)
        return BatchFeature(batch | {"pixel_values": torch.cat(tiles)}, tensor_type=return_tensors)


def _refuse(unknown: dict[str, Any]) -> None:
    if unknown:
        raise UsageError(
            f"processor: the argument {next(iter(unknown))} is not supported; those of generate go into a "
            "pipeline as generate_kwargs={…}"
        )


def _by_text(images: Any, texts: int) -> list[list[Any]]:
    """Convert `images` of `__call__` → a list for each text."""
    if images is None:
        return [[] for _ in range(texts)]
    images = images if isinstance(images, list | tuple) else [images]
    if images and all(isinstance(part, list | tuple) for part in images):
        nested = [list(part) for part in images]
    else:
        nested = [list(images)] if texts == 1 else [[image] for image in images]
    if len(nested) != texts:
        raise UsageError(
            f"{len(nested)} images or lists of images for {texts} texts: give a list of images for each text"
        )
    return nested


def _source(image: Any) -> Any:
    """Convert an image for `open_pixels`: fetch a URL, keep anything else."""
    if not isinstance(image, str) or not image.startswith(("http://", "https://")):
        return image
    try:
        with urllib.request.urlopen(image, timeout=TIMEOUT_S) as answer:
            return answer.read()
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ImageError("missing", f"{image} cannot be fetched: {error}") from None
