"""Questions and conversations on one or more images, and their place on a terminal."""

import io
import json
import sys
import time
from collections.abc import Callable, Sequence

from configs.model import GenerationConfig
from data.collators import collate_prompts
from data.images import Tiles
from eval.predictor import Answer, Predictor
from models.generation import check_heads, generate
from models.kv_cache import DecodingCache
from utils.errors import UsageError, UserError


class Chat:
    """One conversation. What was said stays in the right tower's cache: a turn costs its own tokens only, an image is encoded once."""

    def __init__(self, predictor: Predictor, settings: GenerationConfig, stops: Sequence[str] = ()) -> None:
        if predictor.model.config.left_context == "prefix":
            raise UsageError(
                "this model reads the text before an image in its left tower (left_context = prefix): it cannot go on with a conversation; ask single questions"
            )
        config, model = predictor.model.right.config, predictor.model
        check_heads(model, settings)
        self.predictor, self.settings, self.stops = predictor, settings, [stop for stop in stops if stop]
        self.cache = DecodingCache(
            config.layers,
            1,
            config.kv_heads,
            0,
            config.head_size,
            model.right.embed_tokens.weight.dtype,
            model.device,
        )
        self.position = 0  # of the next token that is not in the cache
        self.last: list[int] = []  # of the last answer, and not in the cache
        self.seen: set[int] = set()  # tokens of all turns
        self.shown = 0  # images

    def ask(
        self, text: str, images: list[Tiles], on_text: Callable[[str, str], None] | None = None
    ) -> Answer:
        """The answer to the next turn, about `images` and all that was said and shown before."""
        if not text.strip():
            raise UsageError("the prompt is empty: give a question")
        predictor, started = self.predictor, time.perf_counter()
        if (
            images
            and self.shown
            and not predictor.model.config.image_isolation
            and predictor.model.config.left_context == "image"
        ):
            raise UsageError(
                "this model reads the images of a conversation together (image_isolation = false): begin a new one for another image"
            )
        renderer, grids = predictor.renderer, [image.grid for image in images]
        prompt = (
            renderer.follow_up(grids, text, self.last, self.position)
            if self.position
            else renderer.prompt(grids, [{"user": text}])
        )
        rows, fresh = predictor.images_of([prompt], [images])
        encode_s = time.perf_counter() - started
        batch = {k: v.to(predictor.model.device) for k, v in collate_prompts([prompt]).items()}
        stream = predictor.stream(on_text, self.stops, 1) if on_text is not None or self.stops else None
        before = self.cache.lengths
        try:
            made = generate(
                predictor.model,
                images=rows,
                stop=renderer.tokenizer.turn_end,
                settings=self.settings,
                on_tokens=stream,
                tiles=predictor.tiles_of([images]),
                cache=self.cache,
                seen=sorted(self.seen),
                **batch,
            )
        except BaseException:  # Ctrl-C, for one: the conversation is where it was before this turn
            self.cache.lengths = before
            raise
        answer = predictor.told(made, 0, fresh[0], encode_s, self.stops, self.settings.max_new_tokens)
        whole = made.tokens[0]
        tokens = whole[
            : predictor.tokens_within(whole, answer.text)
        ]  # what a stop string cut off was not said
        self.cache.lengths = [
            length - max(0, len(whole) - 1) + max(0, len(tokens) - 1) for length in self.cache.lengths
        ]
        self.position = prompt.right_positions[-1] + 1 + max(0, len(tokens) - 1)
        self.last = [
            token for token in tokens[-1:] if token < predictor.model.vocabulary.text_size
        ]  # an image token that was said cannot be read
        self.shown += len(images)
        self.seen.update(prompt.right_ids, tokens)
        return answer


class StreamedText:
    """An answer as it grows: its text so far, which is printed where it is `live`, and what waits behind it."""

    def __init__(self, live: bool = True) -> None:
        self.text, self.waits, self.live = "", "", live

    def __call__(self, text: str, waits: str) -> None:
        if self.live:
            print(text[len(self.text) :], end="", flush=True)
        self.text, self.waits = text, waits

    def end(self, text: str) -> None:
        print(text[len(self.text) :], flush=True)


def told(answer: Answer) -> str:
    per_pass = (
        f"{answer.tokens_per_step:.2f} tokens a pass behind it" if answer.decode_steps > 1 else "one pass"
    )
    return f"[first token {answer.ttft_ms:.0f} ms, {answer.tokens_per_s:.1f} tokens/s, {per_pass}, image KV {answer.image_kv}]"


def answer_all(
    predictor: Predictor,
    prompts: Sequence[str],
    images: list[Tiles],
    settings: GenerationConfig,
    stops: Sequence[str],
    as_json: bool,
    stats: bool,
) -> None:
    """Print an answer to each prompt, all about the same images: as it grows, where the output is a terminal; with `as_json` as one object a line."""
    live = sys.stdout is not None and sys.stdout.isatty() and not as_json
    for prompt in prompts:
        if live:
            print(f"{prompt}  →  ", end="", flush=True)
        show, alone = StreamedText(live), len(prompts) == 1
        try:
            answer = predictor.answer([(images, prompt)], settings, show, stops)[0]
        except KeyboardInterrupt:  # what came is not lost
            text = show.text + show.waits
            if as_json:
                fields = {
                    "prompt": prompt,
                    "answer": text,
                    "interrupted": True,
                    "ttft_ms": None,
                    "tokens_per_s": None,
                    "image_kv": None,
                    "decode_steps": None,
                }
                print(
                    json.dumps(fields | ({"tokens": None, "logprobs": None} if settings.logprobs else {})),
                    flush=True,
                )
            else:
                print(show.waits if live else text if alone else f"{prompt}  →  {text}", flush=True)
            raise
        if as_json:
            fields = {
                "prompt": prompt,
                "answer": answer.text,
                "interrupted": False,
                "ttft_ms": round(answer.ttft_ms, 2),
                "tokens_per_s": round(answer.tokens_per_s, 1),
            }
            token_logprobs = (
                {
                    "tokens": [text for text, _ in answer.token_logprobs],
                    "logprobs": [logprob for _, logprob in answer.token_logprobs],
                }
                if settings.logprobs
                else {}
            )
            print(
                json.dumps(
                    fields
                    | {"image_kv": answer.image_kv, "decode_steps": answer.decode_steps}
                    | token_logprobs
                ),
                flush=True,
            )
        elif live:
            show.end(answer.text)
        else:
            print(answer.text if alone else f"{prompt}  →  {answer.text}", flush=True)
        if stats:
            print(told(answer), file=sys.stderr)


def talk(predictor: Predictor, chat: Chat, images: list[Tiles], stats: bool) -> int:
    """Turns from standard input until an empty line or its end; → how many lines failed. Images of a turn that fails are put away."""
    if sys.stdin is None:
        raise UsageError("--chat: there is no standard input to read turns from")
    failed = 0
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a wrong byte spoils its own turn alone
    while True:
        try:
            line = (
                input("> ") if sys.stdin.isatty() and sys.stdout is not None else sys.stdin.readline()
            ).strip()
        except EOFError:
            return failed
        if not line:
            return failed
        if line == "/image" or line.startswith("/image "):
            try:
                if line == "/image":
                    raise UsageError("give a file behind /image")
                images.append(predictor.tiles(line.removeprefix("/image").strip()))
            except UserError as error:
                failed += 1
                print(f"error: {error}", file=sys.stderr)
            continue
        show = StreamedText()
        try:
            answer = chat.ask(line, images, show)
        except (
            KeyboardInterrupt
        ):  # the answer so far stays on the screen; the conversation goes on from before it
            print(show.waits, flush=True)
            print("[stopped: this turn is forgotten]", file=sys.stderr)
            continue
        except UserError as error:
            failed += 1
            print(
                f"error: {error}"
                + (
                    f" ({len(images)} image{'s' * (len(images) > 1)} put away: show them again with /image)"
                    if images
                    else ""
                ),
                file=sys.stderr,
            )
            images = []
            continue
        show.end(answer.text)
        images = []
        if stats:
            print(told(answer), file=sys.stderr)
