"""Questions about images → answers: what generate.py, evaluation.py and the validation in training have in common."""

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from configs.errors import UsageError, UserError
from configs.hub import is_hub_id
from configs.schema import GenerationConfig
from data.collators import collate_prompts
from data.images import Tiles, open_pixels, to_tiles
from data.render import Document, Renderer
from data.tokens import Tokenizer
from models.dual_tower.dual_tower import DualTowerVLM
from models.generation import generate
from models.kv_cache import ImageKV
from models.language_weights import find_language_model
from models.pretrained import ancestor_tokenizer, find_model, load_model
from models.vision_language_model import VisionLanguageModel


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: int
    ttft_ms: float  # from the question, its image read but not encoded, to the first token of its batch
    tokens_per_s: float  # of this row, over the whole call
    image_kv: str  # "computed" or "reused"; "none" without an image, or without a left tower


class Block(NamedTuple):
    """A part of the left stream that is encoded by itself."""

    tiles: Tensor  # (n, 3, h, w) uint8
    ids: list[int]
    images: list[int]
    start: int  # position of its first token


class Answerer:
    """A model with its renderer. Image KVs are kept by content: the last `keep` blocks are never encoded twice."""

    def __init__(self, model: DualTowerVLM | VisionLanguageModel, renderer: Renderer, keep: int = 256) -> None:
        if renderer.tokenizer.vocabulary != model.vocabulary:
            raise UserError(f"the tokenizer has {renderer.tokenizer.vocabulary}, the model {model.vocabulary}: they do not belong together")
        self.model, self.renderer, self.keep = model, renderer, keep
        self.image_kvs: OrderedDict[str, ImageKV] = OrderedDict()

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Answerer":
        """Model and tokenizer of one model folder or Hub id; the errors of both."""
        model = load_model({c.model_type: c for c in (VisionLanguageModel, DualTowerVLM)}, folder)
        return cls(model, Renderer(_tokenizer(find_model(folder)), model.config.tokens_per_tile, model.config.left_context))

    def tiles(self, image: Any) -> Tiles:
        """Path, bytes or Pillow image → its tiles (n, 3, h, w) uint8 and their grid. Errors: `ImageError`."""
        return to_tiles(open_pixels(image), self.model.config.vision)

    def encode(self, blocks: list[Block]) -> tuple[list[ImageKV], list[bool]]:
        """Blocks of the left stream → their image KVs, and which of them had to be computed."""
        keys = [hashlib.blake2b(block.tiles.numpy().tobytes() + repr((block.ids, block.images)).encode(), digest_size=16).hexdigest() for block in blocks]
        new = {key: block for key, block in zip(keys, blocks, strict=True) if key not in self.image_kvs}
        if new:
            assert isinstance(self.model, DualTowerVLM)
            tiles = torch.cat([block.tiles for block in new.values()])
            kvs = self.model.encode_images(tiles, [torch.tensor(b.ids) for b in new.values()], [torch.tensor(b.images) for b in new.values()])
            self.image_kvs.update(zip(new, kvs, strict=True))
        found = []
        for key in keys:
            self.image_kvs.move_to_end(key)
            found.append(self.image_kvs[key])
        while len(self.image_kvs) > self.keep:
            self.image_kvs.popitem(last=False)
        seen: set[str] = set()
        computed = [key in new and not (key in seen or seen.add(key)) for key in keys]  # type: ignore[func-returns-value]
        return found, computed

    def answer(
        self,
        questions: list[tuple[list[Tiles], str]],
        settings: GenerationConfig,
        on_text: Callable[[str], None] | None = None,
    ) -> list[Answer]:
        """Answer a batch of (tiles of each image, question). `on_text` sees a single question's answer as it grows."""
        for _, question in questions:
            if not question.strip():
                raise UsageError("the prompt is empty: give a question")
        prompts = [self.renderer.prompt([image.grid for image in images], [{"user": question}]) for images, question in questions]
        started = time.perf_counter()
        blocks = [self._blocks(prompt, images) for prompt, (images, _) in zip(prompts, questions, strict=True)]
        kvs, computed = self.encode([block for row in blocks for block in row])
        rows, fresh, at = [], [], 0
        for row in blocks:
            part = slice(at, at := at + len(row))
            rows.append([(kv, block.start) for kv, block in zip(kvs[part], row, strict=True)])
            fresh.append(computed[part])
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        encode_s = time.perf_counter() - started
        batch = {k: v.to(self.model.device) for k, v in collate_prompts(prompts).items()}
        if isinstance(self.model, VisionLanguageModel):  # its images stand in the prompts
            images = [image.pixels for images, _ in questions for image in images]
            batch["tiles"] = torch.cat(images).to(self.model.device) if images else None
        stream = self._stream(on_text) if on_text is not None else None
        made = generate(self.model, images=rows, stop=self.renderer.tokenizer.turn_end, settings=settings, on_tokens=stream, **batch)
        answers = []
        for computed_here, tokens in zip(fresh, made.tokens, strict=True):
            kv = "none" if not computed_here else "computed" if any(computed_here) else "reused"
            text = self.renderer.tokenizer.decode(tokens)
            answers.append(Answer(text, len(tokens), 1e3 * (encode_s + made.first_token_s), len(tokens) / (encode_s + made.seconds), kv))
        return answers

    def _blocks(self, prompt: Document, images: list[Tiles]) -> list[Block]:
        out, at = [], 0
        for part in prompt.blocks(self.model.config.image_isolation):
            numbers = prompt.left_images[part]
            count = len(set(numbers) - {-1})
            out.append(Block(torch.cat([image.pixels for image in images[at : at + count]]), prompt.left_ids[part], numbers, prompt.left_positions[part.start]))
            at += count
        return out

    def _stream(self, on_text: Callable[[str], None]) -> Callable[[list[int]], None]:
        so_far: list[int] = []

        def on_tokens(tokens: list[int]) -> None:
            if tokens[0] != self.renderer.tokenizer.turn_end:
                so_far.append(tokens[0])
                on_text(self.renderer.tokenizer.decode(so_far))

        return on_tokens


def _tokenizer(folder: Path) -> Tokenizer:
    """A model folder's own; an ancestor's folder only names a language model's."""
    named = None if (folder / "tokenizer.json").is_file() else ancestor_tokenizer(folder)
    if named is None:
        return Tokenizer.load(folder)
    source, rows = named
    if not is_hub_id(source) and not Path(source).exists():
        raise UserError(f"{folder} holds no tokenizer.json, and the language model that it names for one, '{source}', cannot be had: put its tokenizer.json there")
    return Tokenizer.of_language_model(find_language_model(source, Path("cache"), weights=False), rows, impose_chatml=True)
