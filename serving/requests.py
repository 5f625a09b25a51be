"""What goes into the engine and comes out: requests, events, and an answer's text."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor

from configs.model import GenerationConfig
from data.images import Grid, Tiles
from data.render import Document
from eval.predictor import Predictor, overlap
from models.image_store import ImageBlock, image_blocks_of
from models.kv_cache import ImageKV
from serving.batch import Step


class Refused(Exception):
    """A request that is not answered; `status` and `code` as in HTTP and in OpenAI's errors."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Delta:
    """New text of an answer, and its decode step, up to the answer's end."""

    text: str
    step: Step


@dataclass(frozen=True)
class Done:
    """The end of an answer, or of an encoding."""

    reason: str  # "stop", "length", or "encoded"
    tokens: int  # of the answer
    cached_tokens: int  # image tokens of the prompt whose KV was in the store
    image_kv: str  # "computed", "reused", or "none"
    decode_steps: int
    kvs: Sequence[tuple[ImageKV, int]] = ()  # of an encoding: image KVs with their first positions


Event = Delta | Done | Refused


@dataclass(frozen=True)
class StoredImage:
    """An image that a client names by its handle: its KV must be in the store."""

    key: str
    grid: Grid


@dataclass(eq=False)
class Request:
    """A prompt and how to answer it; `on_event` is called in the engine's thread."""

    prompt: Document
    # The blocks of the left stream, each an image with isolation. Empty for a vanilla model.
    blocks: Sequence[ImageBlock | StoredImage]
    settings: GenerationConfig
    on_event: Callable[[Event], None]
    tiles: Tensor | None = None  # of a vanilla model
    stops: Sequence[str] = ()
    top_logprobs: int | None = None
    constraint: Callable[[list[int], Tensor], None] | None = None
    encode_only: bool = False  # collect the image KVs, and answer nothing
    cancelled: bool = False
    over: bool = False
    submitted: float = field(default_factory=time.perf_counter)

    def emit(self, event: Event) -> None:
        """Pass an event on, unless the client has gone or has its last one."""
        if not self.over and not self.cancelled:
            self.over = not isinstance(event, Delta)
            self.on_event(event)


def left_blocks(
    predictor: Predictor, prompt: Document, images: Sequence[Tiles | StoredImage]
) -> list[ImageBlock | StoredImage]:
    """The blocks of a prompt's left stream. `Refused` for a stored image that is not encoded on its own."""
    stored = any(isinstance(image, StoredImage) for image in images)
    if stored and not has_handles(predictor):
        raise Refused(
            400, "no_handles", "this model does not encode an image on its own: send it with each request"
        )
    if not prompt.left_ids:
        return []
    parts = prompt.blocks(predictor.model.config.image_isolation)
    pixels = [image.pixels if isinstance(image, Tiles) else torch.empty(0) for image in images]
    blocks = image_blocks_of(prompt.left_ids, prompt.left_positions, prompt.left_images, parts, pixels)
    if not stored:
        return list(blocks)
    return [i if isinstance(i, StoredImage) else b for i, b in zip(images, blocks, strict=True)]


def has_handles(predictor: Predictor) -> bool:
    """Whether the model encodes each image on its own, so that a stored image KV serves any prompt."""
    c = predictor.model.config
    return c.left_context == "image" and c.image_isolation


class Text:
    """An answer's text as its tokens come. What may be the start of a stop string is held back."""

    def __init__(self, predictor: Predictor, stops: Sequence[str]) -> None:
        self.tokenizer = predictor.renderer.tokenizer
        self.stops = [stop for stop in stops if stop]
        self.stream = DecodeStream(skip_special_tokens=True)
        self.tokens: list[int] = []
        self.text, self.sent, self.stopped = "", 0, False

    def add(self, token: int) -> None:
        self.tokens.append(token)
        try:
            piece = self.stream.step(self.tokenizer.backend, token) or ""
        except Exception:  # bytes that are no text, of a tokenizer with byte fallback
            self.stream, piece = DecodeStream(skip_special_tokens=True), "\ufffd"
            piece += self.stream.step(self.tokenizer.backend, token) or ""
        start = max(0, len(self.text) - max(map(len, self.stops), default=0))
        self.text += piece
        self._stop(start)

    def _stop(self, start: int) -> None:
        ends = [at for stop in self.stops if (at := self.text.find(stop, start)) >= 0]
        if ends:
            self.text, self.stopped = self.text[: min(ends)], True

    def new(self, over: bool) -> str:
        """The text since the last call; all of it if the answer is `over`."""
        if over and not self.stopped:  # characters whose bytes are incomplete
            self.text = self.text + self.tokenizer.decode(self.tokens)[len(self.text) :]
            self._stop(self.sent)
        held = 0 if over else max((overlap(stop, self.text) for stop in self.stops), default=0)
        end = max(self.sent, len(self.text) - held)
        new, self.sent = self.text[self.sent : end], end
        return new
