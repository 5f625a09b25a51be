"""Questions about images → answers: what generate.py, evaluation.py and the validation in training have in common."""

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.errors import UsageError, UserError
from configs.schema import GenerationConfig
from data.collators import collate_prompts
from data.images import open_image, to_tiles
from data.render import Renderer
from data.tokens import Tokenizer
from models.dual_tower.dual_tower import DualTowerVLM
from models.generation import generate
from models.kv_cache import ImageKV


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: int
    ttft_ms: float  # from the question, its image read but not encoded, to the first token of its batch
    tokens_per_s: float  # of this row, over the whole call
    image_kv: str  # "computed" or "reused"; "none" without an image


class Answerer:
    """A model with its renderer. Image KVs are kept by image content: the last `keep` images are never encoded twice."""

    def __init__(self, model: Any, renderer: Renderer, keep: int = 256) -> None:
        if renderer.tokenizer.vocabulary != model.vocabulary:
            raise UserError(f"the tokenizer has {renderer.tokenizer.vocabulary}, the model {model.vocabulary}: they do not belong together")
        self.model, self.renderer, self.keep = model, renderer, keep
        self.image_kvs: OrderedDict[str, ImageKV] = OrderedDict()

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Answerer":
        """Model and tokenizer of one model folder; the errors of both."""
        model = DualTowerVLM.from_pretrained(folder)
        return cls(model, Renderer(Tokenizer.load(Path(folder)), model.config.tokens_per_tile))

    def tiles(self, image: Any) -> Tensor:
        """Path, bytes or Pillow image → tiles (1, 3, h, w) uint8. Errors: `ImageError`."""
        return to_tiles(open_image(image), self.model.config.vision.image_size)

    def encode(self, images: list[Tensor]) -> tuple[list[ImageKV], list[bool]]:
        """Tiles of several images → their image KVs, and which of them had to be computed."""
        keys = [hashlib.blake2b(tiles.numpy().tobytes(), digest_size=16).hexdigest() for tiles in images]
        new = {key: tiles for key, tiles in zip(keys, images, strict=True) if key not in self.image_kvs}
        if new:
            block = torch.tensor(self.renderer.image_block())
            kvs = self.model.encode_images(torch.cat(list(new.values())), [block] * len(new))
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
        questions: list[tuple[list[Tensor], str]],
        settings: GenerationConfig,
        on_text: Callable[[str], None] | None = None,
    ) -> list[Answer]:
        """Answer a batch of (tiles of each image, question). `on_text` sees a single question's answer as it grows."""
        for _, question in questions:
            if not question.strip():
                raise UsageError("the prompt is empty: give a question")
        prompts = [self.renderer.prompt(len(images), [{"user": question}]) for images, question in questions]
        started = time.perf_counter()
        kvs, computed = self.encode([tiles for images, _ in questions for tiles in images])
        rows, at = [], 0
        for prompt in prompts:
            n = len(prompt.block_positions)
            rows.append(list(zip(kvs[at : at + n], prompt.block_positions, strict=True)))
            at += n
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        encode_s = time.perf_counter() - started
        batch = {k: v.to(self.model.device) for k, v in collate_prompts(prompts).items()}
        stream = self._stream(on_text) if on_text is not None else None
        made = generate(self.model, images=rows, stop=self.renderer.tokenizer.turn_end, settings=settings, on_tokens=stream, **batch)
        answers, at = [], 0
        for (images, _), tokens in zip(questions, made.tokens, strict=True):
            fresh = computed[at : at + len(images)]
            at += len(images)
            kv = "none" if not images else "computed" if any(fresh) else "reused"
            text = self.renderer.tokenizer.decode(tokens)
            answers.append(Answer(text, len(tokens), 1e3 * (encode_s + made.first_token_s), len(tokens) / (encode_s + made.seconds), kv))
        return answers

    def _stream(self, on_text: Callable[[str], None]) -> Callable[[list[int]], None]:
        so_far: list[int] = []

        def on_tokens(tokens: list[int]) -> None:
            if tokens[0] != self.renderer.tokenizer.turn_end:
                so_far.append(tokens[0])
                on_text(self.renderer.tokenizer.decode(so_far))

        return on_tokens
