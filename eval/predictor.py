"""Answers to questions about images, for generate.py, evaluation.py and validation in training."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from configs.model import GenerationConfig
from data.collators import collate_prompts
from data.conversations import Conversation, ask, text_of
from data.images import Tiles, open_pixels, to_tiles
from data.render import IGNORE, Document, Renderer
from data.tokenizer import Tokenizer
from models.dual_tower.dual_tower import DualTowerVLM
from models.generation import Generation, generate, prefill
from models.image_store import (
    ImageBlock,
    ImageStore,
    encode_blocks,
    encode_rows,
    image_blocks_of,
    image_kv_fingerprint,
)
from models.kernels.packed_block import pack_blocks
from models.kv_cache import ImageKV
from models.vision_language_model import VisionLanguageModel
from models.weights.folder import ModelFiles, find_files
from models.weights.language_models import find_language_model
from models.weights.model_folder import load_model, nanovlm_tokenizer
from utils.device import computes_bf16, pick_device
from utils.errors import UsageError, UserError
from utils.files import CACHE
from utils.hub import is_hub_id


class Answer(NamedTuple):
    """An answer and its figures."""

    text: str
    tokens: int
    ttft_ms: float  # from the decoded image, not yet encoded, to the first token of the batch
    tokens_per_s: float  # of this row, over the whole call
    image_kv: str  # "computed" or "reused"; "none" without an image, or without a left tower
    decode_steps: int  # of the right tower, prefill included
    # Tokens per decode step after the prefill and its token; the token that ends an answer counts.
    # 0 without such steps.
    tokens_per_step: float
    # Text and log-probability of each token; empty unless settings ask for them.
    token_logprobs: list[tuple[str, float]]
    truncated: bool  # by `max_new_tokens`


class Predictor:
    """A model with its renderer and a store of image KVs.

    The store is keyed by content and is in memory by default. An image block in it is not encoded again.
    """

    def __init__(
        self, model: DualTowerVLM | VisionLanguageModel, renderer: Renderer, store: ImageStore | None = None
    ) -> None:
        if renderer.tokenizer.vocabulary != model.vocabulary:
            raise UserError(
                f"the tokenizer has {renderer.tokenizer.vocabulary}, the model {model.vocabulary}: "
                "they do not belong together"
            )
        self.model, self.renderer = model, renderer
        self.store = store if store is not None else ImageStore()  # an empty store is false

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        dtype: str = "auto",
        device: str = "auto",
        store: Path | None = None,
        config: Path | None = None,
        compiled: bool = False,
    ) -> "Predictor":
        """Load model and tokenizer; raises the errors of both.

        `checkpoint`: a model folder, a Hub id, or a weights file with its `config` (by default the
        `config.json` in its folder). `dtype`: "fp32" or "bf16", also by torch's names, or "auto", bf16 where
        the device computes in it. `store`: folder of image KVs. `compiled`: torch.compile the decode step.
        """
        dtype = {"float32": "fp32", "bfloat16": "bf16"}.get(dtype, dtype)
        if dtype not in ("auto", "fp32", "bf16"):
            raise UsageError(f"dtype = {dtype!r} is none of auto, fp32, bf16")
        torch_device = pick_device(device, "--device")
        files = find_files(checkpoint, config)
        model = load_model({c.model_type: c for c in (VisionLanguageModel, DualTowerVLM)}, files)
        model.to(torch_device)
        tokenizer = _tokenizer(files)
        if dtype == "bf16" or (dtype == "auto" and computes_bf16(model.device)):
            model.to(torch.bfloat16)
        if compiled:
            from models.kernels.compiled_decode import compile_decoding

            compile_decoding(model)
        else:
            pack_blocks(model.right)
        image_store = None
        if store is not None and isinstance(model, DualTowerVLM):
            fingerprint = image_kv_fingerprint(model)
            image_store = ImageStore(folder=store, fingerprint=fingerprint)
            image_store.serve(model, fingerprint)
        renderer = Renderer(tokenizer, model.config.tokens_per_tile, model.config.left_context)
        return cls(model, renderer, image_store)

    def tiles(self, image: Any) -> Tiles:
        """Cut an image into tiles (N, 3, h, w) uint8 with their grid. Errors: `ImageError`.

        `image`: a path, bytes or a Pillow image.
        """
        return to_tiles(open_pixels(image), self.model.config.vision)

    def encode(self, blocks: list[ImageBlock]) -> tuple[list[ImageKV], list[bool]]:
        """Return the image KVs of left-stream blocks, and for each whether it was computed."""
        return encode_blocks(self.model, blocks, self.store)

    def answer(
        self,
        questions: Sequence[tuple[list[Tiles], str | Conversation]],
        settings: GenerationConfig,
        on_text: Callable[[str, str], None] | None = None,
        stops: Sequence[str] = (),
    ) -> list[Answer]:
        """Answer a batch of (tiles of each image, question or conversation that ends with one).

        `on_text` receives the text so far of a single question's answer, and the pending text after it, with
        which a stop string may begin. Each of `stops` ends an answer before itself.
        """
        if not questions:
            return []
        prompts = [self.prompt(images, question) for images, question in questions]
        started = time.perf_counter()
        images = [images for images, _ in questions]
        image_kvs, computed = self.images_of(prompts, images)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        encode_s = time.perf_counter() - started
        batch = {k: v.to(self.model.device) for k, v in collate_prompts(prompts).items()}
        stops = [stop for stop in stops if stop]
        stream = None if on_text is None and not stops else self.stream(on_text, stops, len(questions))
        generation = generate(
            self.model,
            images=image_kvs,
            turn_end=self.renderer.tokenizer.turn_end,
            settings=settings,
            on_tokens=stream,
            tiles=self.tiles_of(images),
            **batch,
        )
        return [
            self.make_answer(generation, row, computed[row], encode_s, stops, settings.max_new_tokens)
            for row in range(len(questions))
        ]

    def prompt(self, images: list[Tiles], question: str | Conversation) -> Document:
        """Render a question, or a conversation that ends with one, about `images`."""
        messages = ask(question, len(images)) if isinstance(question, str) else question
        if not text_of(messages[-1]).strip():
            raise UsageError("the prompt is empty: give a question")
        return self.renderer.prompt(messages, [image.grid for image in images])

    @torch.inference_mode()
    def loglikelihoods(
        self, questions: Sequence[tuple[list[Tiles], str | Conversation, str]]
    ) -> list[tuple[float, bool]]:
        """Score a batch of (tiles of each image, question or conversation that ends with one, answer).

        Returns log P(answer | question) without the end of turn, and whether greedy decoding starts with the
        answer.
        """
        model, images = self.model, [images for images, _, _ in questions]
        if any(not answer for _, _, answer in questions):
            raise UserError("an empty answer has no likelihood")
        documents = [
            self.renderer.conversation(
                [
                    *(ask(question, len(tiles)) if isinstance(question, str) else question),
                    {"role": "assistant", "content": answer},
                ],
                [image.grid for image in tiles],
            )
            for tiles, question, answer in questions
        ]
        longest, limit = max(document.length for document in documents), model.right.config.max_positions
        if longest > limit:
            raise UsageError(
                f"a question with its answer has {longest} tokens (image included), "
                f"which exceeds this model's {limit} positions"
            )
        image_kvs, _ = self.images_of(documents, images)
        batch = {k: v.to(model.device) for k, v in collate_prompts(documents).items()}
        _, hidden = prefill(model, batch["ids"], batch["positions"], image_kvs, 0, self.tiles_of(images))
        scores = []
        for b, document in enumerate(documents):
            labels = torch.tensor(document.labels, device=model.device)
            supervised = (labels != IGNORE).nonzero()[:, 0]
            # The answer alone, without the end of turn: earlier turns are supervised too.
            gaps = (supervised.diff() > 1).nonzero()
            indices = supervised[int(gaps[-1]) + 1 if len(gaps) else 0 : -1]
            logprobs = model.right.logits(hidden[b, indices]).float().log_softmax(-1)  # (T, V)
            targets = labels[indices]
            greedy = bool((logprobs.max(-1).indices == targets).all())
            scores.append((logprobs.gather(1, targets[:, None]).sum().item(), greedy))
        return scores

    def make_answer(
        self,
        generation: Generation,
        row: int,
        computed: list[bool],
        encode_s: float,
        stops: Sequence[str],
        max_new_tokens: int,
    ) -> Answer:
        """Turn one row of a generation into an answer.

        `computed`: whether each of its image KVs was computed. `encode_s`: seconds spent on them.
        """
        tokens = generation.tokens[row]
        whole = self.renderer.tokenizer.decode(tokens)
        text = _until(stops, whole)
        truncated = len(tokens) == max_new_tokens and text == whole
        later_steps = generation.decode_steps[row] - 1
        later_tokens = len(tokens) - 1 + (text == whole and not truncated)  # with the end of turn
        return Answer(
            text=text,
            tokens=len(tokens),
            ttft_ms=1e3 * (encode_s + generation.first_token_s),
            tokens_per_s=len(tokens) / (encode_s + generation.seconds),
            image_kv="none" if not computed else "computed" if any(computed) else "reused",
            decode_steps=generation.decode_steps[row],
            tokens_per_step=later_tokens / later_steps if later_steps else 0.0,
            token_logprobs=self.token_logprobs(
                tokens, generation.logprobs[row], len(text) if text != whole else None
            ),
            truncated=truncated,
        )

    def tokens_within(self, tokens: list[int], text: str) -> int:
        """Count the tokens of an answer that lie within `text`, a prefix of the decoded answer."""
        return next(
            n
            for n in range(len(tokens), -1, -1)
            if len(self.renderer.tokenizer.decode(tokens[:n])) <= len(text)
        )

    def token_logprobs(
        self, tokens: list[int], logprobs: list[float], characters: int | None = None
    ) -> list[tuple[str, float]]:
        """Return the text that each token adds, with its log-probability.

        `characters`: length of a truncated text; tokens after its end are left out.
        """
        pairs, end = [], 0
        for number, logprob in enumerate(logprobs, 1):
            if characters is not None and end >= characters:
                break
            text = self.renderer.tokenizer.decode(tokens[:number])[:characters]
            if number < len(logprobs):
                text = text.rstrip("\ufffd")  # characters whose bytes are incomplete
            pairs.append((text[end:], logprob))
            end = max(end, len(text))
        return pairs

    def images_of(
        self, prompts: list[Document], images: list[list[Tiles]]
    ) -> tuple[list[list[tuple[ImageKV, int]]], list[list[bool]]]:
        """Return each prompt's image KVs with their first positions, and whether each was computed."""
        isolated, blocks = self.model.config.image_isolation, []
        for prompt, prompt_images in zip(prompts, images, strict=True):
            blocks.append(
                image_blocks_of(
                    prompt.left_ids,
                    prompt.left_positions,
                    prompt.left_images,
                    prompt.blocks(isolated),
                    [image.pixels for image in prompt_images],
                )
            )
        return encode_rows(self.model, blocks, self.store)

    def tiles_of(self, images: list[list[Tiles]]) -> Tensor | None:
        """Concatenate tiles for a vanilla model, (N, 3, h, w); None for a dual tower, and without images."""
        tiles = [image.pixels for row in images for image in row]
        if not tiles or not isinstance(self.model, VisionLanguageModel):
            return None
        return torch.cat(tiles).to(self.model.device)

    def stream(
        self, on_text: Callable[[str, str], None] | None, stops: Sequence[str], rows: int
    ) -> Callable[[int, list[int]], bool]:
        """Make the callback that `generate` calls with a row's tokens so far; it returns whether to stop.

        Characters with incomplete bytes are held back, and so is the beginning of a stop string.
        """

        def on_tokens(row: int, tokens: list[int]) -> bool:
            whole = self.renderer.tokenizer.decode(tokens).rstrip("\ufffd")
            text = _until(stops, whole)
            if on_text is not None and rows == 1:
                pending = max((overlap(stop, text) for stop in stops), default=0) if text == whole else 0
                split = len(text) - pending
                on_text(text[:split], text[split:])
            return text != whole

        return on_tokens


def _until(stops: Sequence[str], text: str) -> str:
    """Return `text` up to the first of `stops` in it."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def overlap(stop: str, text: str) -> int:
    """Count the characters at the end of `text` with which `stop` may begin."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)


def _tokenizer(files: ModelFiles) -> Tokenizer:
    """Load a model's tokenizer; a nanoVLM checkpoint only names that of a language model."""
    folder = files.folder
    reference = None if (folder / "tokenizer.json").is_file() else nanovlm_tokenizer(files.config)
    if reference is None:
        return Tokenizer.load(folder)
    source, rows = reference
    if not is_hub_id(source) and not Path(source).exists():
        raise UserError(
            f"{folder} holds no tokenizer.json, and the language model that it names, '{source}', "
            f"is missing: copy its tokenizer.json to {folder}"
        )
    language_model = find_language_model(source, Path(CACHE), weights=False)
    return Tokenizer.of_language_model(language_model, rows, template="chatml")
