"""Write new captions for the images of a data set, with a model of this project or over the OpenAI API.

  python -m tools.recaption --data.sources openmoji --checkpoint runs/NAME/model --output longer.jsonl
  python -m tools.recaption --data.sources hf=FOLDER --endpoint http://localhost:8000/v1 --model NAME
  bash train.sh --data.sources jsonl=longer.jsonl

The output is a data set of JSON lines: an image, the prompt, and its new caption. Images that are not
separate files are saved in a folder next to the output. Run the command again to continue after an
interruption. The endpoint's key is read from the environment variable OPENAI_API_KEY.

Flags, besides those of a configuration:"""

import base64
import io
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from configs.model import GenerationConfig
from data.images import data_url, open_image
from data.mixture import Source
from data.parquet import UnreadableBlock
from data.sources import open_sources
from eval.predictor import Predictor
from tools.inspection import arguments, track_progress
from utils.errors import ImageError, UsageError, UserError, run_script
from utils.files import append_text, lines_of, write_text
from utils.hub import reason_of, status_may_pass, trying

OWN: dict[str, tuple[Any, str]] = {
    "output": ("recaptioned.jsonl", "file of JSON lines to write, or to go on with"),
    "checkpoint": ("", "model folder or Hub id of this project"),
    "endpoint": ("", "address of an OpenAI-compatible server, up to /v1"),
    "model": ("", "name of the endpoint's model"),
    "prompt": ("Describe the image in detail.", "what is asked, and later trained"),
    "max_new_tokens": (200, "maximum length of a caption in tokens"),
    "batch": (8, "images at a time"),
}
ENDINGS = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"RI": ".webp", b"GI": ".gif"}  # by the first two bytes


class Endpoint:
    """An OpenAI-compatible server. Errors: `UserError` if it does not answer, after retries."""

    def __init__(self, address: str, model: str, prompt: str, max_tokens: int) -> None:
        from huggingface_hub import InferenceClient

        self.client = InferenceClient(base_url=address, api_key=os.environ.get("OPENAI_API_KEY", "none"))
        self.address, self.model, self.prompt, self.max_tokens = address, model, prompt, max_tokens

    def caption(self, images: list[Any]) -> list[str]:
        return [self._caption(image) for image in images]

    def _caption(self, image: Any) -> str:
        file = io.BytesIO()
        open_image(image).save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": self.prompt}]

        def ask() -> str:
            answer = self.client.chat_completion(
                [{"role": "user", "content": content}], model=self.model, max_tokens=self.max_tokens
            )
            return answer.choices[0].message.content or ""

        try:
            return trying(self.address, ask, lambda error: status_may_pass(error) is not False)
        except Exception as error:  # every HTTP library has its own
            raise UserError(f"{self.address}: {reason_of(error)}; the same command goes on later") from error


class OwnModel:
    """A model of this project."""

    def __init__(self, checkpoint: str, prompt: str, max_tokens: int) -> None:
        self.predictor, self.prompt = Predictor.from_pretrained(checkpoint), prompt
        self.settings = GenerationConfig(max_new_tokens=max_tokens)

    def caption(self, images: list[Any]) -> list[str]:
        asked = [([self.predictor.tiles(image)], self.prompt) for image in images]
        return [answer.text for answer in self.predictor.answer(asked, self.settings)]


def images_of(sources: list[Source], done: set[str]) -> Iterator[list[tuple[str, Any]]]:
    """Yield, for every record, an id and the image of each image that can be opened and is not `done`."""
    for source in sources:
        for number in range(len(source.records)):
            usable = []
            try:
                images = source.records[number]["images"] or []
            except UnreadableBlock:
                images = []
            for i, image in enumerate(images):
                name = f"{source.name}/{number}" + (f"/{i}" if len(images) > 1 else "")
                with suppress(ImageError):
                    if name not in done:
                        open_image(image)
                        usable.append((name, image))
            yield usable


def written_ids(output: Path) -> set[str]:
    """Return the ids in the output of an earlier run. A last line that was cut off is removed."""
    if not output.is_file():
        return set()
    lines = list(lines_of(output))
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
        write_text(output, b"".join(lines).decode())
    try:
        return {json.loads(line)["id"] for line in lines}
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"--output {output} is not of this program: {error!r}") from None


def path_of(image: Any, name: str, output: Path) -> str:
    """Return the path of an image for the new set; one that is no file is written beside `output`."""
    content = data_url(image)
    if not isinstance(content, bytes):
        return str(Path(content).absolute())
    folder = output.with_name(f"{output.stem}_images")
    folder.mkdir(exist_ok=True)
    path = folder / (name.replace("/", "_") + ENDINGS.get(content[:2], ".img"))
    path.write_bytes(content)
    return str(path.relative_to(output.parent))


def main(argv: list[str]) -> None:
    args, config, _ = arguments(argv, str(__doc__), OWN)
    if bool(args.checkpoint) == bool(args.endpoint) or bool(args.endpoint) != bool(args.model):
        raise UsageError("give either --checkpoint, or --endpoint with --model")
    sources, _ = open_sources(config.data)
    output = Path(args.output)
    done = written_ids(output)
    writer: Any = (
        OwnModel(args.checkpoint, args.prompt, args.max_new_tokens)
        if args.checkpoint
        else Endpoint(args.endpoint, args.model, args.prompt, args.max_new_tokens)
    )
    total, written = sum(len(source.records) for source in sources), 0
    waiting: list[tuple[str, Any]] = []

    def write(batch: list[tuple[str, Any]]) -> None:
        nonlocal written
        captions = writer.caption([image for _, image in batch])
        for (name, image), caption in zip(batch, captions, strict=True):
            messages = [
                {"role": "user", "content": args.prompt},
                {"role": "assistant", "content": caption.strip()},
            ]
            record = {"id": name, "image": path_of(image, name, output), "messages": messages}
            append_text(output, json.dumps(record, ensure_ascii=False) + "\n")
            written += 1

    for usable in track_progress(images_of(sources, done), total, "records captioned"):
        waiting += usable
        while len(waiting) >= args.batch:
            write(waiting[: args.batch])
            del waiting[: args.batch]
    write(waiting)
    print(f"{output}: {written:,} captions written, {len(done):,} were there")


if __name__ == "__main__":
    run_script(main)
