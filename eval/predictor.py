"""Questions about images → answers: what generate.py, evaluation.py and the validation in training have in common."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from configs.model import GenerationConfig
from data.collators import collate_prompts
from data.images import Tiles, open_pixels, to_tiles
from data.render import IGNORE, Document, Renderer
from data.tokenizer import Tokenizer
from models.dual_tower.dual_tower import DualTowerVLM
from models.generation import Generation, generate, prefill
from models.image_blocks import ImageBlock, encode_blocks, encode_rows, image_blocks_of
from models.image_store import ImageStore
from models.kernels.packed_linear import Packed, pack_for_decoding
from models.kv_cache import ImageKV
from models.layers import computes_bf16, pick_device
from models.vision_language_model import VisionLanguageModel
from models.weights.folder import find_model
from models.weights.language_models import find_language_model
from models.weights.model_folder import load_model, nanovlm_tokenizer
from utils.errors import UsageError, UserError
from utils.files import CACHE
from utils.hub import is_hub_id


class Answer(NamedTuple):
    text: str
    tokens: int
    ttft_ms: float  # from the question, its image read but not encoded, to the first token of its batch
    tokens_per_s: float  # of this row, over the whole call
    image_kv: str  # "computed" or "reused"; "none" without an image, or without a left tower
    decode_steps: int  # of the right tower, prompt included
    tokens_per_step: float  # behind the first pass and its token; the one that ends an answer is one of them. 0 where there was no other pass
    token_logprobs: list[
        tuple[str, float]
    ]  # its tokens' texts and log-probabilities, where settings ask for them
    truncated: bool  # by `max_new_tokens`


class Predictor:
    """A model with its renderer. Image KVs are kept by content in `store`, by default in memory: a block that it holds is not encoded again."""

    def __init__(
        self, model: DualTowerVLM | VisionLanguageModel, renderer: Renderer, store: ImageStore | None = None
    ) -> None:
        if renderer.tokenizer.vocabulary != model.vocabulary:
            raise UserError(
                f"the tokenizer has {renderer.tokenizer.vocabulary}, the model {model.vocabulary}: they do not belong together"
            )
        self.model, self.renderer = model, renderer
        self.store = store if store is not None else ImageStore()  # an empty one is false

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: str = "fp32", device: str = "cpu", store: Path | None = None
    ) -> "Predictor":
        """Model and tokenizer of one model folder or Hub id; the errors of both.

        `dtype`: "fp32", "bf16", or "auto", bf16 where the machine multiplies in it. `store`: folder where image KVs are kept.
        """
        place = pick_device(device, "--device")
        found = find_model(folder)
        model = load_model({c.model_type: c for c in (VisionLanguageModel, DualTowerVLM)}, found).to(place)
        tokenizer = _tokenizer(found)
        if dtype == "bf16" or (dtype == "auto" and computes_bf16(model.device)):
            model.to(torch.bfloat16)
        if Packed.available(model.right.unembedding):
            pack_for_decoding(model)
        kept = None
        if store is not None and isinstance(model, DualTowerVLM):
            kept = ImageStore(folder=store, fingerprint=(fingerprint := model.fingerprint()))
            kept.serve(model, fingerprint)
        return cls(model, Renderer(tokenizer, model.config.tokens_per_tile, model.config.left_context), kept)

    def tiles(self, image: Any) -> Tiles:
        """Path, bytes or Pillow image → its tiles (n, 3, h, w) uint8 and their grid. Errors: `ImageError`."""
        return to_tiles(open_pixels(image), self.model.config.vision)

    def encode(self, blocks: list[ImageBlock]) -> tuple[list[ImageKV], list[bool]]:
        """Blocks of the left stream → their image KVs, and which of them had to be computed."""
        return encode_blocks(self.model, blocks, self.store)

    def answer(
        self,
        questions: list[tuple[list[Tiles], str]],
        settings: GenerationConfig,
        on_text: Callable[[str, str], None] | None = None,
        stops: Sequence[str] = (),
    ) -> list[Answer]:
        """Answer a batch of (tiles of each image, question). `on_text` sees a single question's answer as it grows, and what waits behind it, for a stop string may begin there. Each of `stops` ends an answer before it."""
        if not questions:
            return []
        for _, question in questions:
            if not question.strip():
                raise UsageError("the prompt is empty: give a question")
        prompts = [
            self.renderer.prompt([image.grid for image in images], [{"user": question}])
            for images, question in questions
        ]
        started = time.perf_counter()
        images = [images for images, _ in questions]
        rows, fresh = self.images_of(prompts, images)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        encode_s = time.perf_counter() - started
        batch = {k: v.to(self.model.device) for k, v in collate_prompts(prompts).items()}
        stops = [stop for stop in stops if stop]
        stream = None if on_text is None and not stops else self.stream(on_text, stops, len(questions))
        made = generate(
            self.model,
            images=rows,
            stop=self.renderer.tokenizer.turn_end,
            settings=settings,
            on_tokens=stream,
            tiles=self.tiles_of(images),
            **batch,
        )
        return [
            self.told(made, row, fresh[row], encode_s, stops, settings.max_new_tokens)
            for row in range(len(questions))
        ]

    @torch.inference_mode()
    def loglikelihoods(self, questions: list[tuple[list[Tiles], str, str]]) -> list[tuple[float, bool]]:
        """Of a batch of (tiles of each image, question, answer): log P(answer | question), its end of turn left out, and whether greedy decoding begins so."""
        model, images = self.model, [images for images, _, _ in questions]
        if any(not answer for _, _, answer in questions):
            raise UserError("an empty answer has no likelihood")
        told = [
            self.renderer.conversation([i.grid for i in shown], [{"user": question, "assistant": answer}])
            for shown, question, answer in questions
        ]
        longest, limit = max(document.length for document in told), model.right.config.max_positions
        if longest > limit:
            raise UsageError(
                f"a question with its answer has {longest} tokens (image included), which exceeds this model's {limit} positions"
            )
        rows, _ = self.images_of(told, images)
        batch = {k: v.to(model.device) for k, v in collate_prompts(told).items()}
        _, hidden = prefill(model, batch["ids"], batch["positions"], rows, 0, self.tiles_of(images))
        found = []
        for b, document in enumerate(told):
            labels = torch.tensor(document.labels, device=model.device)
            places = (labels != IGNORE).nonzero()[:-1, 0]  # the last is the end of turn
            logprobs = model.right.logits(hidden[b, places]).float().log_softmax(-1)  # (T, V)
            wanted = labels[places]
            found.append(
                (
                    logprobs.gather(1, wanted[:, None]).sum().item(),
                    bool((logprobs.max(-1).indices == wanted).all()),
                )
            )
        return found

    def told(
        self,
        made: Generation,
        row: int,
        computed: list[bool],
        encode_s: float,
        stops: Sequence[str],
        longest: int,
    ) -> Answer:
        """A row of what `generate` made. `computed`: which of its image KVs had to be; `encode_s`: what that took; `longest`: tokens that were allowed."""
        tokens = made.tokens[row]
        whole = self.renderer.tokenizer.decode(tokens)
        text = _until(stops, whole)
        kv = "none" if not computed else "computed" if any(computed) else "reused"
        speed = len(tokens) / (encode_s + made.seconds)
        truncated, behind = len(tokens) == longest and text == whole, made.decode_steps[row] - 1
        per_pass = (len(tokens) - 1 + (text == whole and not truncated)) / behind if behind else 0.0
        token_logprobs = self.token_logprobs(tokens, made.logprobs[row], len(text) if text != whole else None)
        return Answer(
            text,
            len(tokens),
            1e3 * (encode_s + made.first_token_s),
            speed,
            kv,
            made.decode_steps[row],
            per_pass,
            token_logprobs,
            truncated,
        )

    def tokens_within(self, tokens: list[int], text: str) -> int:
        """How many of an answer's tokens stand before the end of `text`, with which they begin."""
        return next(
            n
            for n in range(len(tokens), -1, -1)
            if len(self.renderer.tokenizer.decode(tokens[:n])) <= len(text)
        )

    def token_logprobs(
        self, tokens: list[int], logprobs: list[float], characters: int | None = None
    ) -> list[tuple[str, float]]:
        """What each token added to the text, with its log-probability; of a text that was cut to so many characters none behind its end."""
        out, at = [], 0
        for number, logprob in enumerate(logprobs, 1):
            if characters is not None and at >= characters:
                break
            text = self.renderer.tokenizer.decode(tokens[:number])[:characters]
            whole = (
                text.rstrip("\ufffd") if number < len(logprobs) else text
            )  # characters whose bytes have not all come
            out.append((whole[at:], logprob))
            at = max(at, len(whole))
        return out

    def images_of(
        self, prompts: list[Document], images: list[list[Tiles]]
    ) -> tuple[list[list[tuple[ImageKV, int]]], list[list[bool]]]:
        """Each prompt's image KVs with the positions where they start, and which of them had to be computed."""
        isolated, blocks = self.model.config.image_isolation, []
        for prompt, shown in zip(prompts, images, strict=True):
            blocks.append(
                image_blocks_of(
                    prompt.left_ids,
                    prompt.left_positions,
                    prompt.left_images,
                    prompt.blocks(isolated),
                    [image.pixels for image in shown],
                )
            )
        return encode_rows(self.model, blocks, self.store)

    def tiles_of(self, images: list[list[Tiles]]) -> Tensor | None:
        """The tiles that a vanilla model reads beside its prompts; None for a dual tower, and without images."""
        tiles = [image.pixels for row in images for image in row]
        return (
            torch.cat(tiles).to(self.model.device)
            if tiles and isinstance(self.model, VisionLanguageModel)
            else None
        )

    def stream(
        self, on_text: Callable[[str, str], None] | None, stops: Sequence[str], rows: int
    ) -> Callable[[int, list[int]], bool]:
        """What `generate` calls with a row's tokens so far. Characters whose bytes, and beginnings of `stops` whose ends, have not come wait."""

        def on_tokens(row: int, tokens: list[int]) -> bool:
            whole = self.renderer.tokenizer.decode(tokens).rstrip("\ufffd")
            text = _until(stops, whole)
            if on_text is not None and rows == 1:
                waits = max((_beginning(stop, text) for stop in stops), default=0) if text == whole else 0
                on_text(text[: len(text) - waits], text[len(text) - waits :])
            return text != whole

        return on_tokens


def _until(stops: Sequence[str], text: str) -> str:
    """`text` before the first of `stops` in it."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def _beginning(stop: str, text: str) -> int:
    """Characters at the end of `text` with which `stop` may begin."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)


def _tokenizer(folder: Path) -> Tokenizer:
    """A model folder's own; an ancestor's folder only names a language model's."""
    named = None if (folder / "tokenizer.json").is_file() else nanovlm_tokenizer(folder)
    if named is None:
        return Tokenizer.load(folder)
    source, rows = named
    if not is_hub_id(source) and not Path(source).exists():
        raise UserError(
            f"{folder} holds no tokenizer.json, and the language model that it names for one, '{source}', cannot be had: put its tokenizer.json there"
        )
    return Tokenizer.of_language_model(
        find_language_model(source, Path(CACHE), weights=False), rows, impose_chatml=True
    )
