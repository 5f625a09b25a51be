"""The adapter between lmms-eval and this project's models, vanilla and dual tower alike.

  lmms-eval --model dualtower --model_args pretrained=runs/NAME/model --tasks mmstar

works where the project is installed (`pip install -e '.[eval]'`); `evaluation.py` and the validation in training use the class
directly. Prompts go through the one renderer, images are encoded once however many questions are asked about them, and what
goes wrong in a request is raised: nothing is scored as an empty answer.
"""

import gc
import hashlib
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
from data.images import Tiles
from eval.predictor import Answer, Predictor
from utils.errors import ImageError, UsageError, UserError
from utils.files import replacing

MANIFEST = ModelManifest("dualtower", simple_class_path="eval.lmms_eval_wrapper.DualTower")
OF_OTHERS = {
    "image_aspect_ratio",
    "until",
    "num_beams",
    "do_sample",
}  # settings of tasks that are read here, or speak of another model's preprocessing
NEAR = 4  # batches that are sorted by length together: the image KVs of so many stay in memory
THUMBNAIL = 256
Question = tuple[list[Tiles], str]


class DualTower(lmms):
    """A model for lmms-eval: `pretrained`, a model folder or Hub id, or an `predictor` that is in memory already.

    `max_new_tokens` goes before what tasks say (0: theirs, or 64). With `keep`, a folder, thumbnails of the images are written there.
    `progress` is called with answers done and to do.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "",
        batch_size: int | str = 32,
        device: str = "auto",
        dtype: str = "fp32",
        max_new_tokens: int | str = 0,
        speculative: str = "auto",
        predictor: Predictor | None = None,
        keep: Path | None = None,
        progress: Callable[[int, int], None] | None = None,
        say: Callable[[str], None] = print,
        max_batch_size: Any = None,  # lmms-eval gives it to every model
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise UsageError(
                f"--model_args: unknown {', '.join(unknown)} (known: pretrained, dtype, max_new_tokens, speculative)"
            )
        if predictor is None and not pretrained:
            raise UsageError("--model_args: pretrained=DIR is needed, a model folder or Hub id")
        self.predictor = (
            predictor if predictor is not None else Predictor.from_pretrained(pretrained, dtype, device)
        )
        self.device = self.predictor.model.device
        self.batch_size = int(batch_size)
        self.longest = int(max_new_tokens)
        self.base = GenerationConfig(max_new_tokens=64, speculative=speculative)  # type: ignore[arg-type]
        self.keep, self.progress, self.say = keep, progress, say
        self.first_prompts: dict[
            str, tuple[int, str]
        ] = {}  # by task: of the first document that was asked about
        self.images: dict[
            tuple[str, int], list[str]
        ] = {}  # file names of the thumbnails, by task and document
        self.seen: dict[
            tuple[str, int], str
        ] = {}  # a checksum of the images that were shown first, by task and document
        self.truncated: dict[str, int] = defaultdict(int)  # answers that reached max_new_tokens, by task
        self.drawn: dict[tuple[str, int], int] = defaultdict(int)  # sampled answers, by task and document
        self.tokens, self.seconds = 0, 0.0  # of all answers
        self.halved = False  # the batch size, for want of memory

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers in the order of `requests`."""
        real = [r for r in requests if not padding(r)]  # there is nothing to even out here
        answers = iter(
            self.answers(
                [(r.args[4], r.args[3]) for r in real],
                [r.args[1] for r in real],
                [r.args[0] for r in real],
                [partial(self.question, r) for r in real],
            )
        )
        made = [
            next(answers) if not padding(r) else Answer("", 0, 0.0, 0.0, "none", 0, 0.0, [], False)
            for r in requests
        ]
        return [GenerationResult(a.text, TokenCounts(output_tokens=a.tokens)) for a in made]

    def answers(
        self,
        keys: list[tuple[str, int]],
        arguments: list[dict[str, Any]],
        texts: list[str],
        asked: list[Callable[[], Question]],
    ) -> list[Answer]:
        """Answers to `texts`, each of a task and document; `asked` give them with their images, when their turn comes. Like settings together, and of so many that stand near one another, an image's among them, the longest first."""
        answers: dict[int, Answer] = {}
        alike: dict[tuple[GenerationConfig, tuple[str, ...]], list[int]] = defaultdict(list)
        for number, given in enumerate(arguments):
            alike[self.settings(given)].append(number)
        for (settings, ends), numbers in alike.items():
            lengths, near = (
                {n: len(self.predictor.renderer.tokenizer.encode(texts[n])) for n in numbers},
                NEAR * self.batch_size,
            )
            numbers = [
                n
                for at in range(0, len(numbers), near)
                for n in sorted(numbers[at : at + near], key=lengths.__getitem__, reverse=True)
            ]
            while numbers:
                part, numbers = numbers[: self.batch_size], numbers[self.batch_size :]
                questions = [asked[n]() for n in part]
                if settings.sampling:
                    made = [
                        self.answer([q], replace(settings, seed=self.seed(settings.seed, keys[n])), ends)[0]
                        for n, q in zip(part, questions, strict=True)
                    ]
                else:
                    made = self.answer(questions, settings, ends)
                for n, answer in zip(part, made, strict=True):
                    answers[n] = answer
                    self.truncated[keys[n][0]] += answer.truncated
                if self.progress is not None:
                    self.progress(len(answers), len(texts))
        return [answers[n] for n in range(len(texts))]

    def seed(self, seed: int, key: tuple[str, int]) -> int:
        """Of a drawn answer: one of its own for each document and repetition, so that no batch or rank changes it."""
        self.drawn[key] += 1
        return int.from_bytes(
            hashlib.blake2b(repr((seed, key, self.drawn[key])).encode(), digest_size=4).digest()
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Each request's answers, round after round, all requests' rounds together; the task says what is asked next, and when it is enough."""
        told: list[list[str]] = [[] for _ in requests]
        texts = [r.args[0] for r in requests]
        shown: list[Any] = [None] * len(requests)
        infos: list[Any] = [None] * len(requests)

        def see(n: int) -> Question:
            _, _, visuals_of, _, doc_id, task, split = requests[n].args
            tiles = (
                self.tiles(shown[n], task, doc_id) if told[n] else self.look(visuals_of, doc_id, task, split)
            )
            self.note(tiles, texts[n], doc_id, task)
            return tiles, texts[n]

        asked = [n for n, r in enumerate(requests) if not padding(r)]
        while asked:
            now = asked
            keys = [(requests[n].args[5], requests[n].args[4]) for n in now]
            made = self.answers(
                keys,
                [requests[n].args[1] for n in now],
                [texts[n] for n in now],
                [partial(see, n) for n in now],
            )
            asked = []
            for n, answer in zip(now, made, strict=True):
                _, _, _, next_round, doc_id, task, split = requests[n].args
                document = self.task_dict[task][split][doc_id]
                told[n].append(answer.text)
                shown[n], texts[n], done, said, infos[n] = next_round(
                    document,
                    previous_output=list(told[n]),
                    round_idx=len(told[n]),
                    previous_round_info=infos[n],
                )
                if done:
                    told[n] = list(said or told[n])
                else:
                    asked.append(n)
        return told

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Of each continuation, in nats: −log P behind the prompt, end of turn left out, and whether it is the greedy answer's beginning.

        lmms-eval takes the choice whose value is least ("the actual loss"), and passes on unchanged only what a `GenerationResult` holds.
        """
        found: list[tuple[float, bool]] = []
        for start in range(0, len(requests), self.batch_size):
            part = requests[start : start + self.batch_size]
            questions = [self.question(request) for request in part]
            continuations = [
                r.args[1]
                if isinstance(r.args[1], str)
                else str(r.args[1](self.task_dict[r.args[4]][r.args[5]][r.args[3]]))
                for r in part
            ]
            # The answer's turn begins without a space: the one that lmms-eval puts between prompt and choice has no place there.
            found += self.in_memory(
                [(*q, c.strip()) for q, c in zip(questions, continuations, strict=True)],
                self.predictor.loglikelihoods,
            )
            if self.progress is not None:
                self.progress(len(found), len(requests))
        return [GenerationResult((-logprob, greedy)) for logprob, greedy in found]  # type: ignore[arg-type]

    def question(self, request: Instance) -> Question:
        """A request's images and text, from (text, settings or continuation, images of a document, document, task, split)."""
        text, _, visuals_of, doc_id, task, split = request.args
        tiles = self.look(visuals_of, doc_id, task, split)
        self.note(tiles, text, doc_id, task)
        return tiles, text

    def look(
        self, visuals_of: Callable[[Any], Any] | None, doc_id: int, task: str, split: str
    ) -> list[Tiles]:
        """The images that a task finds in a document."""
        ImageFile.LOAD_TRUNCATED_IMAGES = False  # lmms-eval sets it: half an image would be asked about
        try:
            document = self.task_dict[task][split][doc_id]
            images = visuals_of(document) if visuals_of is not None else []
        except (
            AttributeError,
            KeyError,
            TypeError,
            OSError,
            UserError,
        ) as error:  # what functions of tasks do where a row lacks its image
            raise UserError(
                f"task {task}: row {doc_id} has no image that can be used ({type(error).__name__}: {error})"
            ) from error
        return self.tiles(images, task, doc_id)

    def note(self, tiles: list[Tiles], text: str, doc_id: int, task: str) -> None:
        """Keep a task's first prompt: the first that is asked about the first document."""
        if doc_id < self.first_prompts.get(task, (doc_id + 1, ""))[0]:
            prompt = self.predictor.renderer.prompt([t.grid for t in tiles], [{"user": text}])
            self.first_prompts[task] = doc_id, self.predictor.renderer.preview(prompt)

    def tiles(self, images: Sequence[Any] | None, task: str, doc_id: int) -> list[Tiles]:
        out = []
        for image in images or ():
            if not isinstance(image, Image.Image | bytes | Path):
                what = (
                    "has no image"
                    if image is None
                    else f"has a {type(image).__name__} for an image: this model reads images alone"
                )
                raise UserError(f"task {task}: row {doc_id} {what}")
            try:
                out.append(self.predictor.tiles(image))
            except ImageError as error:
                raise UserError(f"task {task}: row {doc_id}: {error}") from error
        if (task, doc_id) not in self.seen:
            digest = hashlib.blake2b(digest_size=8)
            for shown in out:
                digest.update(shown.pixels.contiguous().numpy())
            self.seen[task, doc_id] = digest.hexdigest()
        if self.keep is not None:
            kept = self.images.setdefault((task, doc_id), [])
            kept += [name for name in (thumbnail(image, self.keep) for image in out) if name not in kept]
        return out

    def answer(
        self, questions: list[Question], settings: GenerationConfig, ends: tuple[str, ...]
    ) -> list[Answer]:
        """A batch of answers."""
        started = time.perf_counter()
        answers = self.in_memory(questions, lambda part: self.predictor.answer(part, settings, stops=ends))
        self.seconds += time.perf_counter() - started
        self.tokens += sum(answer.tokens for answer in answers)
        return answers

    def in_memory(self, questions: list[Any], work: Callable[[list[Any]], list[Any]]) -> list[Any]:
        """`work` on a batch. Where memory runs out the batch size is halved, once, and that is told."""
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
            who = f"rank {self.rank}: " if self.world_size > 1 else ""  # each has memory of its own
            self.say(f"{who}out of memory at batch size {self.batch_size}: going on with {half}")
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
        """A task's generation arguments → ours, and the strings that end an answer. One that is not supported raises `UsageError`."""
        given = {
            "until" if key == "stop_sequences" else key: value
            for key, value in arguments.items()
            if value is not None
        }
        if self.longest:
            given["max_new_tokens"] = self.longest
        known = {"max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed"}
        if unknown := sorted(set(given) - known - OF_OTHERS):
            raise UsageError(
                f"generation arguments that are not supported: {', '.join(unknown)} (known: {', '.join(sorted(known | OF_OTHERS))})"
            )
        if given.get("num_beams", 1) != 1:
            raise UsageError(
                f"generation arguments: num_beams = {given['num_beams']} is not supported; answers are greedy or sampled, one beam"
            )
        ends = given.get("until", ())
        ends = (ends,) if isinstance(ends, str) else tuple(ends)
        sampling = (
            bool(given.get("do_sample", given.get("temperature", 0) > 0)) and given.get("temperature", 1) > 0
        )
        values = (
            {key: given[key] for key in known & set(given)}
            if sampling
            else {key: given[key] for key in known & {"max_new_tokens", "repetition_penalty"} & set(given)}
        )
        base = {
            "max_new_tokens": self.base.max_new_tokens,
            "speculative": self.base.speculative,
            "sampling": sampling,
        }
        return GenerationConfig(**(base | values)), ends

    def clean(self) -> None:
        """lmms-eval's would delete the model, which training goes on with."""


def padding(request: Instance) -> bool:
    """Whether lmms-eval put it there to even ranks out; nobody reads its answer."""
    return bool((request.metadata or {}).get("__padding_only__"))


def out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def thumbnail(tiles: Tiles, folder: Path) -> str:
    """Write the view of the whole image, as the model sees it; → the file's name, the same for the same view."""
    view = tiles.pixels[0]
    name = hashlib.blake2b(view.numpy(), digest_size=8).hexdigest() + ".jpg"
    if not (folder / name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(view.permute(1, 2, 0).numpy())
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        with replacing(folder / name) as beside:
            image.save(beside, format="jpeg", quality=85)
    return name
