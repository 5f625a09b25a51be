"""Load on a server: clients that ask, leave, and send nonsense. Whole answers are compared with known ones.

python -m tests.serving_load --seconds 1800
"""

import argparse
import asyncio
import base64
import io
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import torch
import uvicorn
from PIL import Image

from configs.model import GenerationConfig, MultiTokenConfig
from data.conversations import ask
from data.render import Renderer
from data.tokenizer import Tokenizer
from eval.predictor import Predictor
from serving.api import Settings, create_app
from serving.engine import Engine
from serving.metrics import Metrics
from serving.run import KEEP_ALIVE_SECONDS
from tests.conftest import TINY_MODEL, TURNS, lively_model, random_tiles

WITH_HEADS = replace(TINY_MODEL, multi_token=MultiTokenConfig(heads=3, mlp_size=32))
QUESTIONS = [turn["user"] for turn in TURNS] + ["describe the image, " * 6]
BAD_BODIES = (
    b"",
    b"{",
    b"[]",
    b'{"messages": 5}',
    b'{"messages": [{"role": "user"}]}',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": "hot"}',
    b"\xff\xfe",
    b"[" * 50_000,
)


def lively_predictor(tokenizer: Tokenizer) -> Predictor:
    """A model with multi-token heads whose answers differ from question to question."""
    model = lively_model(tokenizer, WITH_HEADS)
    torch.nn.init.normal_(model.heads.down.weight, std=0.3)
    return Predictor(model, Renderer(tokenizer, WITH_HEADS.tokens_per_tile))


def png(seed: int, side: int = 64) -> bytes:
    file = io.BytesIO()
    Image.fromarray(random_tiles(1, seed, side)[0].permute(1, 2, 0).numpy()).save(file, "png")
    return file.getvalue()


def image_part(data: bytes) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def user(text: str, *images: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


class Served(NamedTuple):
    address: str
    server: uvicorn.Server

    def tasks(self) -> list[str]:
        """What the server's event loop has to do for requests."""
        coroutines = [task.get_coro() for task in asyncio.all_tasks(self.server.servers[0].get_loop())]
        names = [coroutine.__qualname__ for coroutine in coroutines]
        return [name for name in names if name not in ("Server.serve", "LifespanOn.main")]


@contextmanager
def serving(engine: Engine, settings: Settings) -> Iterator[Served]:
    """Serve in a thread."""
    app = create_app(engine, settings)
    config = uvicorn.Config(app, log_level="warning", timeout_keep_alive=KEEP_ALIVE_SECONDS)
    server = uvicorn.Server(config)
    sock = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([sock],))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Served(f"http://127.0.0.1:{sock.getsockname()[1]}", server)
    finally:
        server.should_exit = True
        thread.join()
        sock.close()


def is_idle(engine: Engine) -> bool:
    return not (engine.waiting or engine.ready or engine.prefill or engine.answers or engine.batch.rows)


def until(condition: Any, seconds: float = 10) -> bool:
    """Whether a condition becomes true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


class Question(NamedTuple):
    """A request, and its right answer."""

    image: int | None
    body: dict[str, Any]
    text: str
    truncated: bool


class Load:
    """Clients of the server at `address`, which serves the model of `predictor`."""

    def __init__(self, address: str, predictor: Predictor, images: int = 24, seed: int = 0) -> None:
        self.address, self.draw = address, random.Random(seed)
        self.images = [png(seed) for seed in range(images)]
        self.handles: dict[int, str] = {}
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        alone = Predictor(predictor.model, predictor.renderer)  # with a store of its own
        self.questions = [self._question(alone, n) for n in range(4 * images)]

    def _question(self, predictor: Predictor, number: int) -> Question:
        draw = self.draw
        image = number % len(self.images) if number % 4 else None
        text, stop = draw.choice(QUESTIONS), draw.choice([[], [], ["e"], ["th", "a "]])
        tokens = draw.choice([1, 2, 8, 24, 48])
        tiles = [] if image is None else [predictor.tiles(self.images[image])]
        settings = GenerationConfig(max_new_tokens=tokens, speculative="off")
        answer = predictor.answer([(tiles, ask(text, len(tiles)))], settings, stops=stop)[0]
        shown = [] if image is None else [image_part(self.images[image])]
        body = {"messages": user(text, *shown), "max_tokens": tokens, "stop": stop}
        return Question(image, body, answer.text, answer.truncated)

    async def run(self, seconds: float, clients: int = 64, requests: int = 1 << 60) -> None:
        """Ask until `seconds` are over, or so many `requests` were made."""
        end = time.monotonic() + seconds
        limits = httpx.Limits(max_connections=2 * clients)
        async with httpx.AsyncClient(base_url=self.address, timeout=60, limits=limits) as http:

            async def client() -> None:
                while time.monotonic() < end and self.outcomes.total() < requests:
                    kind = self.draw.choices(list(KINDS), weights=list(KINDS.values()))[0]
                    try:
                        outcome = await getattr(self, kind)(http)
                    except (httpx.HTTPError, ValueError, KeyError) as error:
                        outcome = f"{kind}: {type(error).__name__}: {error} {error.__cause__!r}"
                        self.wrong.append(outcome)
                    self.outcomes[outcome] += 1

            await asyncio.gather(*(client() for _ in range(clients)))

    def check(self, kind: str, response: httpx.Response, status: int) -> str:
        """Expect a status, with an error in OpenAI's form if it is none of success."""
        if response.status_code == 429 and response.headers["retry-after"]:
            return "queue full"
        if response.status_code != status or (status >= 400 and not response.json()["error"]["message"]):
            self.wrong.append(f"{kind}: {response.status_code} {response.text[:200]}")
        return f"{kind}: {response.status_code}"

    def compare(self, kind: str, question: Question, text: str, reason: str | None) -> str:
        if (text, reason) != (question.text, "length" if question.truncated else "stop"):
            self.wrong.append(f"{kind}: {text!r} ({reason}), not {question.text!r}: {question.body}"[:2000])
        return kind

    async def whole(self, http: httpx.AsyncClient, question: Question | None = None) -> str:
        question = question or self.draw.choice(self.questions)
        response = await http.post("/v1/chat/completions", json=question.body)
        if response.status_code != 200:
            return self.check("whole", response, 200)
        choice = response.json()["choices"][0]
        return self.compare("whole", question, choice["message"]["content"], choice["finish_reason"])

    async def streamed(self, http: httpx.AsyncClient, leave_after: int = 1 << 30) -> str:
        question = self.draw.choice(self.questions)
        text, reason, lines = "", None, 0
        async with http.stream("POST", "/v1/chat/completions", json=question.body | {"stream": True}) as got:
            if got.status_code != 200:
                await got.aread()
                return self.check("streamed", got, 200)
            async for line in got.aiter_lines():
                if not line or line == "data: [DONE]":
                    continue
                (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                text += choice["delta"].get("content", "")
                reason, lines = choice["finish_reason"] or reason, lines + 1
                if lines > leave_after:
                    return "left while streaming"
        return self.compare("streamed", question, text, reason)

    async def leave_stream(self, http: httpx.AsyncClient) -> str:
        return await self.streamed(http, leave_after=self.draw.randrange(4))

    async def leave(self, http: httpx.AsyncClient) -> str:
        with suppress(TimeoutError):
            async with asyncio.timeout(self.draw.random() * 0.2):
                return await self.whole(http)
        return "left"

    async def bad_body(self, http: httpx.AsyncClient) -> str:
        headers = {"Content-Type": "application/json"}
        data = self.draw.choice(BAD_BODIES)
        response = await http.post("/v1/chat/completions", content=data, headers=headers)
        return self.check("bad body", response, 400)

    async def broken_image(self, http: httpx.AsyncClient) -> str:
        data = self.draw.choice(self.images)[: self.draw.randrange(3000)]
        response = await http.post("/v1/chat/completions", json={"messages": user("x?", image_part(data))})
        return self.check("broken image", response, 400)

    async def huge_image(self, http: httpx.AsyncClient) -> str:
        header = self.images[0][:16] + (15_000).to_bytes(4) * 2 + self.images[0][24:]
        return self.check("huge image", await http.post("/v1/images", content=header), 400)

    async def wrong_handle(self, http: httpx.AsyncClient) -> str:
        part = {"type": "image", "id": f"img-{self.draw.randbytes(16).hex()}-1x1-{'0' * 32}"}
        response = await http.post("/v1/chat/completions", json={"messages": user("x?", part)})
        return self.check("wrong handle", response, 404)

    async def handle(self, http: httpx.AsyncClient) -> str:
        """Ask by a handle; where the store has lost the image, upload it again."""
        question = self.draw.choice([q for q in self.questions if q.image is not None])
        assert question.image is not None
        for _ in range(10):
            if question.image not in self.handles:
                response = await http.post("/v1/images", content=self.images[question.image])
                if response.status_code != 200:
                    return self.check("upload", response, 200)
                self.handles[question.image] = response.json()["id"]
            (message,) = question.body["messages"]
            part = {"type": "image", "id": self.handles[question.image]}
            messages = [message | {"content": [part, *message["content"][1:]]}]
            response = await http.post("/v1/chat/completions", json=question.body | {"messages": messages})
            if response.status_code == 404:
                self.handles.pop(question.image, None)
                continue
            if response.status_code != 200:
                return self.check("handle", response, 200)
            choice = response.json()["choices"][0]
            return self.compare("handle", question, choice["message"]["content"], choice["finish_reason"])
        return "handle: lost again and again"


KINDS = {  # methods of `Load` → how often
    "whole": 35,
    "streamed": 20,
    "handle": 10,
    "leave": 8,
    "leave_stream": 8,
    "bad_body": 6,
    "broken_image": 5,
    "wrong_handle": 5,
    "huge_image": 3,
}


def memory_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=1 << 60, help="end after so many")
    args = parser.parse_args()
    text = [t for turn in TURNS for t in ("user\n", turn["user"], "assistant\n", turn["assistant"])]
    predictor = lively_predictor(Tokenizer.train(text * 3, 300))
    predictor.store.memory_bytes = 16 * 4 * 3 * 2 * 5 * 32 * 4  # of some images: others are encoded again
    engine = Engine(predictor, Metrics(), drafts="on", max_rows=16, max_waiting=48)
    with serving(engine, Settings("tiny")) as served:
        load = Load(served.address, predictor)
        started = time.monotonic()
        total = 0
        while total < args.requests and (left := started + args.seconds - time.monotonic()) > 0:
            asyncio.run(load.run(min(30, left), args.clients, args.requests))
            seconds, total = time.monotonic() - started, load.outcomes.total()
            print(f"{seconds:6.0f} s {total:8d} requests {memory_mb():8.1f} MB", flush=True)
        print("idle afterwards:", until(lambda: is_idle(engine) and not served.tasks()))
    for outcome, count in load.outcomes.most_common():
        print(f"{count:8d} {outcome}")
    print(f"{len(load.wrong)} wrong", *load.wrong[:20], sep="\n")


if __name__ == "__main__":
    main()
