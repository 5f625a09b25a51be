"""The processor for `transformers.AutoProcessor`: chats with images → inputs of `generate`."""

import base64
import http.client
import re
import urllib.request
from functools import cached_property
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer as HFTokenizer
from transformers import BatchFeature, ProcessorMixin

from configs.model import VisionConfig
from configs.serialization import from_dict
from data.images import Tiles, open_pixels, to_tiles
from data.render import Renderer
from data.tokenizer import IMAGE, TURN_END, TURN_START, Tokenizer
from utils.errors import ImageError, UsageError

MESSAGE = re.compile(rf"{re.escape(TURN_START)}(\w+)\n(.*?)(?:({re.escape(TURN_END)})\n?|\Z)", re.DOTALL)
SOURCES = ("image", "url", "path", "base64")
TIMEOUT_S = 30


class Message(NamedTuple):
    role: str
    text: str
    images: list[Any]  # they go before the text, wherever they were


Chat = tuple[list[Message], bool]  # messages, and whether the last one, the assistant's, is to be continued


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
        """The renderer, with all tokens in one sequence: the model routes them.

        Its tokenizer is a copy, because it encodes the names of special tokens in a text as plain text.
        """
        return Renderer(
            Tokenizer(HFTokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())),
            self.tokens_per_tile,
            "none",
        )

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

        `text` is the result of `apply_chat_template(tokenize=False)`, with a placeholder per image; or a
        question about its images. `images` (paths, URLs, Pillow images, bytes): those of a single text, one
        for each text, or a list for each. Counts that differ raise `UsageError`.
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
            raise UsageError(f"the processor needs text, or a list of texts, found {_kinds(texts)}")
        chats = [_parsed(text, own) for text, own in zip(texts, _by_text(images, len(texts)), strict=True)]
        return self._batch(chats, padding, padding_side, return_tensors)

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

        With `tokenize` → `input_ids`; with `return_dict` too → all inputs of `generate`. Messages have a
        role, "user" and "assistant" alternating, and content: a string, or parts
        `{"type": "text", "text": …}` and `{"type": "image", "image" or "url" or "path" or "base64": …}`.
        Images go before their message's text. Any other form raises `UsageError`.
        """
        if not isinstance(conversation, list | tuple) or not conversation:
            raise UsageError(f"a conversation is a list of messages, found {_kinds(conversation)}")
        conversations = conversation if isinstance(conversation[0], list | tuple) else [conversation]
        chats = [
            _chat(messages, add_generation_prompt, continue_final_message, tokenize)
            for messages in conversations
        ]
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
            return self.tokenizer.apply_chat_template(
                conversation,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
        batch = self._batch(chats, **options)
        return batch if return_dict else batch["input_ids"]

    def _batch(
        self, chats: list[Chat], padding: bool | str, padding_side: str | None, return_tensors: str | None
    ) -> BatchFeature:
        if padding not in (True, False, "longest"):
            raise UsageError(
                f"processor: padding = {padding!r} is not supported, only True ('longest') and False"
            )
        side = self.vision["image_size"]
        rows, tiles = [], [torch.empty(0, 3, side, side, dtype=torch.uint8)]
        for chat in chats:
            ids, images = self._rendered(*chat)
            rows.append(ids)
            tiles += [image.pixels for image in images]
        longest = max(map(len, rows)) if padding else 0
        left = (padding_side or self.tokenizer.padding_side) == "left"
        batch: dict[str, Any] = {"input_ids": [], "attention_mask": []}
        for ids in rows:
            empty = max(0, longest - len(ids))
            for name, own, filler in (
                ("input_ids", ids, self.tokenizer.pad_token_id),
                ("attention_mask", [1] * len(ids), 0),
            ):
                batch[name].append([filler] * empty + own if left else own + [filler] * empty)
        return BatchFeature(batch | {"pixel_values": torch.cat(tiles)}, tensor_type=return_tensors)

    def _rendered(self, messages: list[Message], open_end: bool) -> tuple[list[int], list[Tiles]]:
        """Render a chat → its token ids, image blocks included, and its images."""
        tokenizer = self.renderer.tokenizer
        config = from_dict(VisionConfig, self.vision, "processor_config.json: vision")
        ids: list[int] = []
        images: list[Tiles] = []
        last: list[int] = []  # tokens of the previous answer
        for message in messages:
            if message.role == "assistant":
                last = tokenizer.encode(message.text)
                continue
            tiles = [to_tiles(open_pixels(_source(image)), config) for image in message.images]
            grids = [image.grid for image in tiles]
            document = (
                self.renderer.follow_up(grids, message.text, last, len(ids))
                if ids
                else self.renderer.prompt(grids, [{"user": message.text}])
            )
            ids += document.right_ids
            images += tiles
        if messages[-1].role == "user":  # no answer is requested
            return ids[: -len(self.renderer.assistant)], images
        return ids + last + ([] if open_end else [tokenizer.turn_end, *self.renderer.newline]), images


def _refuse(unknown: dict[str, Any]) -> None:
    if unknown:
        raise UsageError(
            f"processor: the argument {next(iter(unknown))} is not supported; those of generate go into a "
            "pipeline as generate_kwargs={…}"
        )


def _kinds(value: Any) -> str:
    """Name the type of a value, and those of a list's entries; the content may be long."""
    if not isinstance(value, list | tuple):
        return type(value).__name__
    parts = sorted({type(part).__name__ for part in value})
    return f"{type(value).__name__} of {', '.join(parts) or 'nothing'}"


def _chat(
    messages: list[Any], add_generation_prompt: bool, continue_final_message: bool, sources: bool
) -> Chat:
    """Check and convert messages in transformers' format. With `sources` an image must have one."""
    if not isinstance(messages, list | tuple) or not messages:
        raise UsageError(f"a conversation is a list of messages, found {_kinds(messages)}")
    chat = [_message(message, sources) for message in messages]
    if continue_final_message and (add_generation_prompt or chat[-1].role != "assistant"):
        raise UsageError(
            "continue_final_message needs a last message of the assistant, and no add_generation_prompt"
        )
    if add_generation_prompt:
        chat.append(Message("assistant", "", []))
    return _alternating(chat), add_generation_prompt or continue_final_message


def _alternating(chat: list[Message]) -> list[Message]:
    """Return `chat` if user and assistant alternate in it, and only the user shows images."""
    for number, message in enumerate(chat):
        expected = ("user", "assistant")[number % 2]
        if message.role != expected:
            raise UsageError(
                f"message {number + 1} of the chat is of role '{message.role}', expected '{expected}': "
                "user and assistant speak in turn, and the user begins"
            )
        if message.images and expected == "assistant":
            raise UsageError(
                f"message {number + 1} of the chat is the assistant's and holds an image: "
                "only the user shows images"
            )
    return chat


def _message(message: Any, sources: bool) -> Message:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        form = list(message) if isinstance(message, dict) else type(message).__name__
        raise UsageError(f"a chat message must be a dictionary with role and content, found {form}")
    content = message["content"]
    if isinstance(content, str):
        return Message(message["role"], content, [])
    if not isinstance(content, list | tuple) or not all(isinstance(part, dict) for part in content):
        raise UsageError(
            "the content of a chat message is a string, or a list of parts {'type': 'text', 'text': …} "
            f"and {{'type': 'image', …}}, found {_kinds(content)}"
        )
    texts, images = [], []
    for part in content:
        kind = part.get("type")
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise UsageError(
                    f"a part of a chat message is of type 'text', and its text is {_kinds(part.get('text'))}"
                )
            texts.append(part["text"])
        elif kind == "image_url":  # OpenAI's form, and a common mistake for it
            url = part.get("image_url")
            images.append(url.get("url") if isinstance(url, dict) else url)
        elif kind == "image":
            key = next((key for key in SOURCES if part.get(key) is not None), None)
            if key is None and sources:
                raise UsageError(f"an image of the chat has no source: give it one of {', '.join(SOURCES)}")
            images.append(_decoded(part[key]) if key == "base64" else part.get(key or ""))
        else:
            raise UsageError(f"a part of a chat message is of type {kind!r}; supported are text and image")
    return Message(message["role"], "".join(texts), images)


def _parsed(text: str, images: list[Any]) -> Chat:
    """Parse the chat template's text, or a question, and assign its images."""
    if TURN_START not in text:
        question = re.sub(rf"^(?:{re.escape(IMAGE)}\s*)+", "", text)
        if IMAGE in question or text.count(IMAGE) not in (0, len(images)):
            raise UsageError(
                f"the question has {text.count(IMAGE)} image placeholders ({IMAGE}) for {len(images)} "
                "images: leave them out, or put all of them in front"
            )
        return [Message("user", question, images), Message("assistant", "", [])], True
    count = text.count(IMAGE)
    if count != len(images):
        raise UsageError(
            f"the text has {count} image placeholders ({IMAGE}), but {len(images)} images are given"
        )
    rest, messages, at, ended = iter(images), [], 0, True
    while at < len(text):
        match = MESSAGE.match(text, at)
        if match is None:
            raise UsageError(
                f"the text is not a chat as apply_chat_template writes it, from {text[at : at + 40]!r} on"
            )
        role, content, end = match.groups()
        own = [next(rest) for _ in range(content.count(IMAGE))]
        messages.append(Message(role, content.replace(IMAGE, ""), own))
        at, ended = match.end(), end is not None
    if not ended and messages[-1].role != "assistant":
        raise UsageError(f"the text's last message, the user's, does not end with {TURN_END}")
    return _alternating(messages), not ended


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
    """Convert an image for `open_pixels`: fetch a URL, decode a data URL, keep anything else."""
    if isinstance(image, str) and image.startswith("data:"):
        return _decoded(image.partition(",")[2])
    if not isinstance(image, str) or not image.startswith(("http://", "https://")):
        return image
    try:
        with urllib.request.urlopen(image, timeout=TIMEOUT_S) as answer:
            return answer.read()
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ImageError("missing", f"{image} cannot be fetched: {error}") from None


def _decoded(text: Any) -> bytes:
    try:
        return base64.b64decode("".join(text.split()) if isinstance(text, str) else text, validate=True)
    except (TypeError, ValueError) as error:
        raise ImageError("damaged", f"an image is not base64: {error}") from None
