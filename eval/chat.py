"""Conversations about images, and answers on a terminal."""

import io
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from configs.model import GenerationConfig
from data.collators import collate_prompts
from data.conversations import Conversation, ask, images_of, text_of
from data.images import Tiles
from data.render import Document
from eval.predictor import Answer, Predictor
from models.generation import Generation, check_heads, generate, new_cache
from models.kv_cache import ImageKV
from utils.errors import UsageError, UserError


class Chat:
    """One conversation.

    Earlier turns stay in the right tower's cache: a turn costs its own tokens only, and an image is encoded
    once.
    """

    def __init__(
        self,
        predictor: Predictor,
        settings: GenerationConfig,
        stops: Sequence[str] = (),
        system: str = "",
    ) -> None:
        if predictor.model.config.left_context == "prefix":
            raise UsageError(
                "this model reads the text before an image in its left tower (left_context = prefix): "
                "it cannot go on with a conversation; ask single questions"
            )
        if system and not predictor.renderer.tokenizer.template.has_system:
            raise UsageError("--system: this model's chat template has no system role: leave it out")
        model = predictor.model
        check_heads(model, settings)
        self.predictor, self.settings = predictor, settings
        self.stops = [stop for stop in stops if stop]
        self.cache = new_cache(model, 1, 0)
        self.position = 0  # of the next token that is not in the cache
        self.last: list[int] = []  # tokens of the last answer that are not in the cache
        self.seen: set[int] = set()  # tokens of all turns
        self.messages: Conversation = [{"role": "system", "content": system}] if system else []

    def ask(
        self, text: str, images: list[Tiles], on_text: Callable[[str, str], None] | None = None
    ) -> Answer:
        """Answer the next turn, about `images` and all earlier turns and images."""
        if not text.strip():
            raise UsageError("the prompt is empty: give a question")
        predictor, started = self.predictor, time.perf_counter()
        self._check_images(images)
        messages = [*self.messages, *ask(text, len(images))]
        prompt = self._prompt(messages, images)
        image_kvs, computed = predictor.images_of([prompt], [images])
        encode_s = time.perf_counter() - started
        generation = self._generate(prompt, images, image_kvs, on_text)
        answer = predictor.make_answer(
            generation, 0, computed[0], encode_s, self.stops, self.settings.max_new_tokens
        )
        self._commit(prompt, generation.tokens[0], answer)
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        return answer

    def _check_images(self, images: list[Tiles]) -> None:
        config = self.predictor.model.config
        read_together = not config.image_isolation and config.left_context == "image"
        if images and images_of(self.messages) and read_together:
            raise UsageError(
                "this model reads the images of a conversation together (image_isolation = false): "
                "begin a new one for another image"
            )

    def _prompt(self, messages: Conversation, images: list[Tiles]) -> Document:
        renderer, grids = self.predictor.renderer, [image.grid for image in images]
        if self.position:
            return renderer.follow_up(messages, grids, self.last, self.position)
        return renderer.prompt(messages, grids)

    def _generate(
        self,
        prompt: Document,
        images: list[Tiles],
        image_kvs: list[list[tuple[ImageKV, int]]],
        on_text: Callable[[str, str], None] | None,
    ) -> Generation:
        """Generate with the cache; an exception leaves the cache as it was."""
        predictor = self.predictor
        batch = {k: v.to(predictor.model.device) for k, v in collate_prompts([prompt]).items()}
        stream = predictor.stream(on_text, self.stops, 1) if on_text is not None or self.stops else None
        before = self.cache.lengths
        try:
            return generate(
                predictor.model,
                images=image_kvs,
                turn_end=predictor.renderer.tokenizer.turn_end,
                settings=self.settings,
                on_tokens=stream,
                tiles=predictor.tiles_of([images]),
                cache=self.cache,
                seen=sorted(self.seen),
                **batch,
            )
        except BaseException:  # Ctrl-C, for one
            self.cache.truncate(before)
            raise

    def _commit(self, prompt: Document, generated: list[int], answer: Answer) -> None:
        """Add a turn to the conversation. Tokens behind a stop string are removed from the cache."""
        tokens = generated[: self.predictor.tokens_within(generated, answer.text)]
        dropped = max(0, len(generated) - 1) - max(0, len(tokens) - 1)
        self.cache.truncate([length - dropped for length in self.cache.lengths])
        self.position = prompt.right_positions[-1] + 1 + max(0, len(tokens) - 1)
        # An image token that a vanilla model says cannot be read again: it stands for an image's features.
        image_token = self.predictor.model.vocabulary.image_token_id
        self.last = [token for token in tokens[-1:] if token != image_token]
        self.seen.update(prompt.right_ids, tokens)


class StreamedText:
    """Prints an answer as it grows, where `live`. `pending` is text that a stop string may yet remove."""

    def __init__(self, live: bool = True) -> None:
        self.text, self.pending, self.live = "", "", live

    def __call__(self, text: str, pending: str) -> None:
        if self.live:
            print(text[len(self.text) :], end="", flush=True)
        self.text, self.pending = text, pending

    def end(self, text: str) -> None:
        print(text[len(self.text) :], flush=True)


def format_stats(answer: Answer) -> str:
    """Format an answer's figures as a line."""
    per_step = (
        f"{answer.tokens_per_step:.2f} tokens per decode step after it"
        if answer.decode_steps > 1
        else "one decode step"
    )
    return (
        f"[first token {answer.ttft_ms:.0f} ms, {answer.tokens_per_s:.1f} tokens/s, {per_step}, "
        f"image KV {answer.image_kv}]"
    )


def answer_all(
    predictor: Predictor,
    questions: Sequence[str | Conversation],
    images: list[Tiles],
    settings: GenerationConfig,
    stops: Sequence[str],
    as_json: bool,
    stats: bool,
) -> None:
    """Print an answer to each question, or conversation that ends with one, all about the same images.

    On a terminal it is printed as it grows; with `as_json` as one object per line.
    """
    live = sys.stdout is not None and sys.stdout.isatty() and not as_json
    for question in questions:
        prompt = question if isinstance(question, str) else text_of(question[-1])
        prefix = f"{prompt}  →  "
        if live:
            print(prefix, end="", flush=True)
        if len(questions) == 1:
            prefix = ""
        streamed = StreamedText(live)
        try:
            answer = predictor.answer([(images, question)], settings, streamed, stops)[0]
        except KeyboardInterrupt:  # print the text so far
            text = streamed.text + streamed.pending
            if as_json:
                print(json.dumps(_interrupted_fields(prompt, text, settings)), flush=True)
            else:
                print(streamed.pending if live else prefix + text, flush=True)
            raise
        if as_json:
            print(json.dumps(_fields(prompt, answer, settings)), flush=True)
        elif live:
            streamed.end(answer.text)
        else:
            print(prefix + answer.text, flush=True)
        if stats:
            print(format_stats(answer), file=sys.stderr)


def _fields(prompt: str, answer: Answer, settings: GenerationConfig) -> dict[str, Any]:
    """Return the JSON fields of an answer."""
    fields = {
        "prompt": prompt,
        "answer": answer.text,
        "interrupted": False,
        "ttft_ms": round(answer.ttft_ms, 2),
        "tokens_per_s": round(answer.tokens_per_s, 1),
        "image_kv": answer.image_kv,
        "decode_steps": answer.decode_steps,
    }
    if settings.logprobs:
        fields["tokens"] = [text for text, _ in answer.token_logprobs]
        fields["logprobs"] = [logprob for _, logprob in answer.token_logprobs]
    return fields


def _interrupted_fields(prompt: str, text: str, settings: GenerationConfig) -> dict[str, Any]:
    """Return the JSON fields of an answer that was interrupted after `text`."""
    fields = {
        "prompt": prompt,
        "answer": text,
        "interrupted": True,
        "ttft_ms": None,
        "tokens_per_s": None,
        "image_kv": None,
        "decode_steps": None,
    }
    return fields | ({"tokens": None, "logprobs": None} if settings.logprobs else {})


def talk(predictor: Predictor, chat: Chat, images: list[Tiles], stats: bool) -> int:
    """Read turns from standard input until an empty line or its end; return how many lines failed.

    The images of a turn that fails are dropped.
    """
    if sys.stdin is None:
        raise UsageError("--chat: there is no standard input to read turns from")
    failed = 0
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # an invalid byte fails only its own turn
    while line := _read_line():
        if line == "/image" or line.startswith("/image "):
            try:
                if line == "/image":
                    raise UsageError("give a file behind /image")
                images.append(predictor.tiles(line.removeprefix("/image").strip()))
            except UserError as error:
                failed += 1
                print(f"error: {error}", file=sys.stderr)
            continue
        streamed = StreamedText()
        try:
            answer = chat.ask(line, images, streamed)
        except KeyboardInterrupt:  # the conversation goes on from before this turn
            print(streamed.pending, flush=True)
            print("[stopped: this turn is forgotten]", file=sys.stderr)
            continue
        except UserError as error:
            failed += 1
            dropped = f"{len(images)} image{'s' * (len(images) > 1)} dropped: give them again with /image"
            print(f"error: {error}" + (f" ({dropped})" if images else ""), file=sys.stderr)
            images = []
            continue
        streamed.end(answer.text)
        images = []
        if stats:
            print(format_stats(answer), file=sys.stderr)
    return failed


def _read_line() -> str:
    """Read a line without outer spaces, with a prompt on a terminal; "" at the end of input."""
    try:
        if sys.stdin.isatty() and sys.stdout is not None:
            return input("> ").strip()
        return sys.stdin.readline().strip()
    except EOFError:
        return ""
