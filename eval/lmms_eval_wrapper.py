"""The adapter between lmms-eval and this project's models, vanilla and dual tower.

  lmms-eval --model dualtower --model_args pretrained=runs/NAME/model --tasks mmstar

works where the project is installed (`pip install -e '.[eval]'`). `evaluation.py` and validation in training
use the class directly. Prompts go through the one renderer, and an image is encoded once for all its
questions. An error in a request is raised: it is never scored as an empty answer.
"""

import gc
import hashlib
import json
import re
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image, ImageFile

from configs.model import GenerationConfig
from data.conversations import Conversation, Message, ask, split_at_images
from data.images import Tiles
from eval.predictor import Answer, Predictor
from models.kernels import MODES, use_kernels
from utils.errors import ImageError, UsageError, UserError
from utils.files import replacing

MANIFEST = ModelManifest("dualtower", simple_class_path="eval.lmms_eval_wrapper.DualTower")
# Settings of tasks that are read below, or that concern another model's preprocessing.
OTHER_ARGUMENTS = {"image_aspect_ratio", "until", "num_beams", "do_sample"}
EMPTY = Answer("", 0, 0.0, 0.0, "none", 0, 0.0, [], False)
SORT_BATCHES = 4  # batches sorted by length together; their image KVs stay in memory
THUMBNAIL = 256  # pixels
# Column of a row in tasks of ours: the messages up to its question, as JSON.
CONVERSATION = "dualtower_conversation"
Question = tuple[list[Tiles], Conversation]  # it ends with the question
# Where a task's text shows an image, or the n-th one; it takes one newline next to it along.
PLACEHOLDER = re.compile(r"<image(?:[ _](\d+))?>\n|\n?<image(?:[ _](\d+))?>")


class DualTower(lmms):
    """A model for lmms-eval: `pretrained`, a model folder or Hub id, or a `predictor` in memory.

    `batch_size` "auto" is 32; any is halved when memory runs out. `max_new_tokens` overrides the tasks'
    values (0: theirs, or 64). `thumbnails`: folder for thumbnails of the images, or None. `progress` is
    called with the number of answers done and of all.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "",
        batch_size: int | str = 32,
        device: str = "auto",
        dtype: str = "auto",
        max_new_tokens: int | str = 0,
        speculative: str = "auto",
        kernels: str = "",
        predictor: Predictor | None = None,
        thumbnails: Path | None = None,
        progress: Callable[[int, int], None] | None = None,
        say: Callable[[str], None] = print,
        max_batch_size: Any = None,  # lmms-eval passes it to every model
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise UsageError(
                f"--model_args: unknown {', '.join(unknown)} "
                "(known: pretrained, dtype, max_new_tokens, speculative, kernels)"
            )
        if predictor is None and not pretrained:
            raise UsageError("--model_args: pretrained=DIR is needed, a model folder or Hub id")
        if kernels and kernels not in MODES:
            raise UsageError(f"--model_args: kernels={kernels} must be one of {', '.join(MODES)}")
        if kernels:  # else as the process has it
            use_kernels(kernels)
        self.predictor = (
            predictor if predictor is not None else Predictor.from_pretrained(pretrained, dtype, device)
        )
        self.device = self.predictor.model.device
        self.batch_size = 32 if batch_size == "auto" else whole("batch_size", batch_size, 1)
        self.max_new_tokens = whole("max_new_tokens", max_new_tokens, 0)
        if speculative not in ("auto", "on", "off"):
            raise UsageError(f"--model_args: speculative={speculative} must be one of auto, on, off")
        self.base = GenerationConfig(max_new_tokens=64, speculative=speculative)  # type: ignore[arg-type]
        self.thumbnails, self.progress, self.say = thumbnails, progress, say
        # by task: number and prompt of the first document
        self.first_prompts: dict[str, tuple[int, str]] = {}
        # by task and document: file names of the thumbnails
        self.images: dict[tuple[str, int], list[str]] = {}
        # by task and document: checksum of the images of the first request
        self.seen: dict[tuple[str, int], str] = {}
        self.truncated: dict[str, int] = defaultdict(int)  # by task: answers that reached max_new_tokens
        self.shortened: set[str] = set()  # tasks with answers for which the model has too few positions
        self.drawn: dict[tuple[str, int], int] = defaultdict(int)  # by task and document: sampled answers
        self.tokens, self.seconds = 0, 0.0  # of all answers
        self.halved = False  # whether the batch size was halved for want of memory

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers in the order of `requests`."""
        real = [r for r in requests if not padding(r)]
        answers = iter(
            self.answers(
                [(r.args[4], r.args[3]) for r in real],
                [r.args[1] for r in real],
                [r.args[0] for r in real],
                [partial(self.question, r) for r in real],
            )
        )
        in_order = [EMPTY if padding(r) else next(answers) for r in requests]
        return [GenerationResult(a.text, TokenCounts(output_tokens=a.tokens)) for a in in_order]

    def answers(
        self,
        keys: list[tuple[str, int]],
        arguments: list[dict[str, Any]],
        texts: list[str],
        asked: list[Callable[[], Question]],
    ) -> list[Answer]:
        """Answer `texts`, each of a task and document (`keys`), in batches of equal settings.

        `asked` returns a text with its images when its batch begins. Of neighbouring texts, which share
        images, the longest are answered first.
        """
        answers: dict[int, Answer] = {}
        groups: dict[tuple[GenerationConfig, tuple[str, ...]], list[int]] = defaultdict(list)
        for number, given in enumerate(arguments):
            groups[self.settings(given)].append(number)
        for (settings, ends), numbers in groups.items():
            queue = self._sorted_by_length(numbers, texts)
            while queue:
                part, queue = queue[: self.batch_size], queue[self.batch_size :]  # it may be halved meanwhile
                questions = {n: asked[n]() for n in part}
                capped = {n: self.capped(settings, questions[n], keys[n]) for n in part}
                together = [n for n in part if capped[n] == settings and not settings.sampling]
                answered = zip(
                    together, self.answer([questions[n] for n in together], settings, ends), strict=True
                )
                answers |= dict(answered)
                for n in part:
                    own = capped[n]
                    if n not in answers and own is None:
                        answers[n] = EMPTY._replace(truncated=True)
                    elif n not in answers:
                        own = replace(own, seed=self.seed(own.seed, keys[n])) if own.sampling else own
                        answers[n] = self.answer([questions[n]], own, ends)[0]
                    self.truncated[keys[n][0]] += answers[n].truncated
                if self.progress is not None:
                    self.progress(len(answers), len(texts))
        return [answers[n] for n in range(len(texts))]

    def capped(
        self, settings: GenerationConfig, question: Question, key: tuple[str, int]
    ) -> GenerationConfig | None:
        """Settings whose answer fits the model's positions behind `question`; None where none fits.

        What does not fit counts as truncated, and its row is named.
        """
        prompt = self.predictor.prompt(*question)
        limit = self.predictor.model.right.config.max_positions
        free, tokens = limit - prompt.length, settings.max_new_tokens
        if free >= tokens:
            return settings
        row = f"task {key[0]}: row {key[1]}: the question has {prompt.length} tokens (images included)"
        if free < 1:
            self.say(
                f"warning: {row}, and the model {limit} positions: its answer is empty, and counts as cut"
            )
            return None
        if key[0] not in self.shortened:
            self.shortened.add(key[0])
            self.say(f"{row}: answers there and in like rows have {free} tokens at most, not {tokens}")
        return replace(settings, max_new_tokens=free)

    def _sorted_by_length(self, numbers: list[int], texts: list[str]) -> list[int]:
        """Sort every `SORT_BATCHES` batches of texts by their tokens, the longest first."""
        lengths = {n: len(self.predictor.renderer.tokenizer.encode(texts[n])) for n in numbers}
        near = SORT_BATCHES * self.batch_size
        return [
            n
            for start in range(0, len(numbers), near)
            for n in sorted(numbers[start : start + near], key=lengths.__getitem__, reverse=True)
        ]

    def seed(self, seed: int, key: tuple[str, int]) -> int:
        """Derive the seed of a sampled answer from its document and repetition, not its batch or rank."""
        self.drawn[key] += 1
        text = repr((seed, key, self.drawn[key]))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest())

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Answer requests of several rounds; one round of all requests at a time.

        The task gives the next question, and says when a request is done.
        """
        answers: list[list[str]] = [[] for _ in requests]
        texts = [r.args[0] for r in requests]
        visuals: list[Any] = [None] * len(requests)
        infos: list[Any] = [None] * len(requests)
        tiles_so_far: list[list[Tiles]] = [[] for _ in requests]  # images so far
        messages: list[Conversation] = [[] for _ in requests]  # messages so far

        def question(n: int) -> Question:
            _, _, visuals_of, _, doc_id, task, split = requests[n].args
            if answers[n]:
                tiles = self.tiles(visuals[n], task, doc_id)
            else:
                tiles = self.images_of(visuals_of, doc_id, task, split)
            tiles, message = user_message(texts[n], tiles)
            tiles_so_far[n] += tiles
            messages[n].append(message)
            self.note((tiles_so_far[n], messages[n]), doc_id, task)
            return tiles_so_far[n], list(messages[n])

        pending = [n for n, r in enumerate(requests) if not padding(r)]
        while pending:
            this_round, pending = pending, []
            batch = self.answers(
                [(requests[n].args[5], requests[n].args[4]) for n in this_round],
                [requests[n].args[1] for n in this_round],
                [texts[n] for n in this_round],
                [partial(question, n) for n in this_round],
            )
            for n, answer in zip(this_round, batch, strict=True):
                _, _, _, next_round, doc_id, task, split = requests[n].args
                answers[n].append(answer.text)
                messages[n].append({"role": "assistant", "content": answer.text})
                visuals[n], texts[n], done, final, infos[n] = next_round(
                    self.task_dict[task][split][doc_id],
                    previous_output=list(answers[n]),
                    round_idx=len(answers[n]),
                    previous_round_info=infos[n],
                )
                if done:
                    answers[n] = list(final or answers[n])
                else:
                    pending.append(n)
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Return −log P of each continuation, in nats, and whether the greedy answer starts with it.

        The end of turn is left out. lmms-eval picks the choice with the smallest value ("the actual loss"),
        and passes on unchanged only a `GenerationResult`.
        """
        scores: list[tuple[float, bool]] = []
        for start in range(0, len(requests), self.batch_size):
            part = requests[start : start + self.batch_size]
            questions = [self.question(request) for request in part]
            # lmms-eval puts a space between prompt and choice; an answer's turn begins without one.
            continuations = [self._continuation(request).strip() for request in part]
            scores += self.in_memory(
                [(*question, text) for question, text in zip(questions, continuations, strict=True)],
                self.predictor.loglikelihoods,
            )
            if self.progress is not None:
                self.progress(len(scores), len(requests))
        return [GenerationResult((-logprob, greedy)) for logprob, greedy in scores]

    def _continuation(self, request: Instance) -> str:
        """Return the text of a request's continuation, which may be a function of the document."""
        _, continuation, _, doc_id, task, split = request.args
        if isinstance(continuation, str):
            return continuation
        return str(continuation(self.task_dict[task][split][doc_id]))

    def question(self, request: Instance) -> Question:
        """Return a request's images and text.

        Its arguments: text, settings or continuation, function to a document's images, document, task, split.
        """
        text, _, visuals_of, doc_id, task, split = request.args
        tiles = self.images_of(visuals_of, doc_id, task, split)
        if (conversation := self.task_dict[task][split][doc_id].get(CONVERSATION)) is not None:
            messages = json.loads(conversation)  # a task of ours
        else:
            tiles, message = user_message(text, tiles)
            messages = [message]
        self.note((tiles, messages), doc_id, task)
        return tiles, messages

    def images_of(
        self, visuals_of: Callable[[Any], Any] | None, doc_id: int, task: str, split: str
    ) -> list[Tiles]:
        """Return the images that a task reads from a document."""
        ImageFile.LOAD_TRUNCATED_IMAGES = False  # lmms-eval sets it; a truncated image is an error
        try:
            document = self.task_dict[task][split][doc_id]
            images = visuals_of(document) if visuals_of is not None else []
        except (AttributeError, KeyError, TypeError, OSError, UserError) as error:
            # Tasks' functions raise any of these where a row lacks its image.
            raise UserError(
                f"task {task}: row {doc_id} has no image that can be used ({type(error).__name__}: {error})"
            ) from error
        return self.tiles(images, task, doc_id)

    def note(self, question: Question, doc_id: int, task: str) -> None:
        """Keep a task's first prompt: the first one about the first document."""
        if doc_id < self.first_prompts.get(task, (doc_id + 1, ""))[0]:
            self.first_prompts[task] = (
                doc_id,
                self.predictor.renderer.preview(self.predictor.prompt(*question)),
            )

    def tiles(self, images: Sequence[Any] | None, task: str, doc_id: int) -> list[Tiles]:
        """Cut a document's images into tiles; note their checksum, and write thumbnails."""
        tiles = []
        for image in images or ():
            if not isinstance(image, Image.Image | bytes | Path):
                problem = (
                    "has no image"
                    if image is None
                    else f"has a {type(image).__name__} for an image: this model reads images alone"
                )
                raise UserError(f"task {task}: row {doc_id} {problem}")
            try:
                tiles.append(self.predictor.tiles(image))
            except ImageError as error:
                raise UserError(f"task {task}: row {doc_id}: {error}") from error
        if (task, doc_id) not in self.seen:
            digest = hashlib.blake2b(digest_size=8)
            for image_tiles in tiles:
                digest.update(image_tiles.pixels.contiguous().numpy())
            self.seen[task, doc_id] = digest.hexdigest()
        if self.thumbnails is not None:
            names = self.images.setdefault((task, doc_id), [])
            new_names = [thumbnail(image_tiles, self.thumbnails) for image_tiles in tiles]
            names += [name for name in new_names if name not in names]
        return tiles

    def answer(
        self, questions: list[Question], settings: GenerationConfig, ends: tuple[str, ...]
    ) -> list[Answer]:
        """Answer a batch."""
        started = time.perf_counter()
        answers = self.in_memory(questions, lambda part: self.predictor.answer(part, settings, stops=ends))
        self.seconds += time.perf_counter() - started
        self.tokens += sum(answer.tokens for answer in answers)
        return answers

    def in_memory(self, questions: list[Any], work: Callable[[list[Any]], list[Any]]) -> list[Any]:
        """Run `work` on a batch. When memory runs out, the batch size is halved, once, with a message."""
        try:
            return work(questions)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            if len(questions) == 1:
                raise UserError(
                    "out of memory for a single question: take a larger machine, or --dtype bf16"
                ) from error
            if self.halved:
                raise UserError(
                    f"out of memory at batch size {self.batch_size} too: give a smaller --batch_size"
                ) from error
            half, self.halved = self.batch_size // 2, True
            prefix = f"rank {self.rank}: " if self.world_size > 1 else ""  # each rank has its own memory
            self.say(f"{prefix}out of memory at batch size {self.batch_size}: going on with {half}")
            self.batch_size = half
            error.__traceback__ = None  # it holds the batch's tensors
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            return [one for i in range(0, len(questions), half) for one in work(questions[i : i + half])]
        except (torch.OutOfMemoryError, RuntimeError) as again:
            if not out_of_memory(again):
                raise
            raise UserError(f"out of memory at batch size {half} too: give a smaller --batch_size") from again

    def settings(self, arguments: dict[str, Any]) -> tuple[GenerationConfig, tuple[str, ...]]:
        """Turn a task's generation arguments into ours, and the strings that end an answer.

        An argument that is not supported raises `UsageError`.
        """
        given = {
            "until" if key == "stop_sequences" else key: value
            for key, value in arguments.items()
            if value is not None
        }
        if self.max_new_tokens:
            given["max_new_tokens"] = self.max_new_tokens
        known = {"max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed"}
        if unknown := sorted(set(given) - known - OTHER_ARGUMENTS):
            raise UsageError(
                f"generation arguments that are not supported: {', '.join(unknown)} "
                f"(known: {', '.join(sorted(known | OTHER_ARGUMENTS))})"
            )
        if given.get("num_beams", 1) != 1:
            raise UsageError(
                f"generation arguments: num_beams = {given['num_beams']} is not supported; "
                "answers are greedy or sampled, one beam"
            )
        ends = given.get("until", ())
        ends = (ends,) if isinstance(ends, str) else tuple(ends)
        do_sample = bool(given.get("do_sample", given.get("temperature", 0) > 0))
        sampling = do_sample and given.get("temperature", 1) > 0
        used = known if sampling else {"max_new_tokens", "repetition_penalty"}
        values = {key: given[key] for key in used & set(given)}
        base = {
            "max_new_tokens": self.base.max_new_tokens,
            "speculative": self.base.speculative,
            "sampling": sampling,
        }
        return GenerationConfig(**(base | values)), ends

    def clean(self) -> None:
        """Keep the model, which lmms-eval would delete: training goes on with it."""


def user_message(text: str, images: list[Tiles]) -> tuple[list[Tiles], Message]:
    """A task's text with its images where it puts them: at `<image>`, or `<image 2>`; else before the text.

    Returns the images in the order of their places. Text that does not name each image once is text.
    """
    matches = PLACEHOLDER.finditer(text)
    order = [int(match[1] or match[2] or n) - 1 for n, match in enumerate(matches, 1)]
    if not images or sorted(order) != list(range(len(images))):
        return images, ask(text, len(images))[0]
    return [images[n] for n in order], {"role": "user", "content": split_at_images(text, PLACEHOLDER)}


def whole(name: str, value: int | str, minimum: int) -> int:
    """A whole number of --model_args."""
    if not re.fullmatch(r"-?\d+", str(value)) or int(value) < minimum:
        raise UsageError(f"--model_args: {name}={value} must be a whole number from {minimum}")
    return int(value)


def padding(request: Instance) -> bool:
    """Whether lmms-eval added a request only to give all ranks the same number; its answer is not read."""
    return bool((request.metadata or {}).get("__padding_only__"))


def out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def thumbnail(tiles: Tiles, folder: Path) -> str:
    """Write the view of the whole image as the model sees it; return the file's name, a hash of the view."""
    view = tiles.pixels[0]
    name = hashlib.blake2b(view.numpy(), digest_size=8).hexdigest() + ".jpg"
    if not (folder / name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(view.permute(1, 2, 0).numpy())
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        with replacing(folder / name) as temp_path:
            image.save(temp_path, format="jpeg", quality=85)
    return name
