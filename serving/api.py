"""The HTTP interface: OpenAI's endpoints, image handles, metrics, and the page.

request → limits, key → prepare (in a thread: images, prompt) → engine → events → one answer, or a stream
"""

import asyncio
import functools
import hmac
import json
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from torch import Tensor

from configs.model import GenerationConfig
from data.conversations import HALF_CHARACTER, IMAGE_PART, checked, text_of
from data.images import Tiles
from data.render import Document
from models.image_store import ImageBlock, block_key
from serving.attention import attention_maps
from serving.constraints import Constraint, Grammars
from serving.engine import Engine
from serving.guard import Guard
from serving.media import Limits, handle_of, image_bytes, stored_image, tiles_of
from serving.protocol import AttentionRequest, ChatRequest, CompletionRequest, ModelCard, Sampling
from serving.replies import Shape, refusal
from serving.requests import Delta, Done, Event, Refused, StoredImage, has_handles, left_blocks
from serving.requests import Request as EngineRequest
from utils.errors import UserError

PAGE = Path(__file__).with_name("page.html")
COMPUTING = 2  # threads that decode images, compile schemas or draw maps at a time
CODES = {
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    413: "too_large",
    429: "too_many_requests",
}
STREAM = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # for proxies
T = TypeVar("T")


class Settings(NamedTuple):
    """How a server is run."""

    name: str  # of the model
    api_keys: tuple[str, ...] = ()
    limits: Limits = Limits()
    body_bytes: int = 64 << 20
    max_tokens: int = 512  # of an answer whose request sets no limit


class Prompt(NamedTuple):
    """A request's prompt, rendered, with its images."""

    document: Document
    blocks: list[ImageBlock | StoredImage]
    tiles: Any  # of a vanilla model


class Server:
    """The endpoints of one engine."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self.settings, self.predictor = engine, settings, engine.predictor
        self.grammars = Grammars(self.predictor.renderer.tokenizer)
        self.computing = threading.Semaphore(COMPUTING)
        self.created = int(time.time())
        self.longest_token = max(map(len, self.predictor.renderer.tokenizer.backend.get_vocab()))

    # Requests.

    def key_of(self, request: Request) -> str:
        """The request's API key; "" where none is needed. `Refused` for a missing or a wrong one."""
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if not self.settings.api_keys:
            return ""
        valid = [hmac.compare_digest(key.strip().encode(), own.encode()) for own in self.settings.api_keys]
        if scheme.lower() != "bearer" or not any(valid):
            raise Refused(401, "invalid_api_key", "a valid API key is needed: Authorization: Bearer KEY")
        return key.strip()

    async def prepare(self, work: Callable[..., T], *args: Any) -> T:
        """Run blocking work in a thread. Errors of the user become `Refused`."""

        def on_one_core() -> T:
            torch.set_num_threads(1)  # of this thread
            return work(*args)

        try:
            return await run_in_threadpool(on_one_core)
        except UserError as error:
            raise Refused(400, "invalid_request", str(error)) from None

    def load_image(self, part: dict[str, Any], api_key: str) -> Tiles | StoredImage:
        """The image of a content part."""
        if "id" in part:
            return stored_image(part["id"], api_key)
        data = image_bytes(part, self.settings.limits)  # it may come from the web
        with self.computing:
            return tiles_of(self.predictor, data, self.settings.limits)[0]

    def chat_prompt(self, raw: list[dict[str, Any]], api_key: str) -> Prompt:
        """Render a conversation up to the assistant's next message."""
        raw = [m | {"role": "system"} if m.get("role") == "developer" else m for m in raw]
        messages, images, checked_messages = [], [], checked(raw, "messages")
        self.check_characters(sum(len(text_of(message)) for message in checked_messages))
        for message in checked_messages:
            content = message["content"]
            if HALF_CHARACTER.search(text_of(message)):
                raise Refused(400, "invalid_request", "a message holds half a UTF-16 character")
            if not isinstance(content, str):
                images += [part for part in content if part["type"] == "image"]
                content = [part if part["type"] == "text" else IMAGE_PART for part in content]
            messages.append({"role": message["role"], "content": content})
        limits, predictor = self.settings.limits, self.predictor
        if len(images) > limits.images:
            raise Refused(
                400,
                "too_many_images",
                f"there are {len(images)} images, at most {limits.images} are accepted",
            )
        has_system = predictor.renderer.tokenizer.template.has_system
        if messages[0]["role"] == "system" and not has_system:
            raise Refused(400, "unsupported", "this model's chat template has no system role")
        loaded = [self.load_image(part, api_key) for part in images]
        if messages[-1]["role"] == "user":
            document = predictor.prompt(loaded, messages)  # type: ignore[arg-type]  # it reads their grids
        else:
            document = predictor.renderer.prompt(messages, [image.grid for image in loaded])
        tiles = predictor.tiles_of([[image for image in loaded if isinstance(image, Tiles)]])
        return Prompt(document, left_blocks(predictor, document, loaded), tiles)

    def text_prompt(self, text: str) -> Prompt:
        self.check_characters(len(text))
        ids = self.predictor.renderer.tokenizer.encode(text)
        if not ids:
            raise Refused(400, "invalid_request", "'prompt' is empty")
        return Prompt(Document([], [], [], ids, list(range(len(ids))), []), [], None)

    def check_characters(self, count: int) -> None:
        """Refuse a text that is too long whatever its tokens are, before it is rendered and tokenized."""
        limit = self.predictor.model.right.config.max_positions * self.longest_token
        if count > limit:
            raise Refused(
                400,
                "context_length_exceeded",
                f"the text has {count:,} characters: no prompt of more than {limit:,} fits",
            )

    def answer_tokens(self, prompt: Prompt, requested: int | None) -> int:
        """How many tokens an answer may have."""
        left = self.predictor.model.right.config.max_positions - prompt.document.length
        if (requested or 1) > left:
            raise Refused(
                400,
                "context_length_exceeded",
                f"the prompt has {prompt.document.length} tokens (images included): {max(left, 0)} are left",
            )
        if requested == 0:
            raise Refused(400, "invalid_request", "'max_tokens' must be at least 1")
        return requested or min(left, self.settings.max_tokens)

    def need_handles(self) -> None:
        if not has_handles(self.predictor):
            raise Refused(
                400, "no_handles", "this model does not encode an image on its own: send it with each request"
            )

    async def encode(self, http: Request, prompt: Prompt) -> Done:
        """Have a prompt's images encoded, or found in the store."""
        answers = Answers(self.engine, http)
        nothing = GenerationConfig(max_new_tokens=1)
        request = EngineRequest(
            prompt.document, prompt.blocks, nothing, functools.partial(answers.receive, 0), encode_only=True
        )
        answers.requests.append(request)
        self.engine.submit(request)
        _, event = await answers.first()
        assert isinstance(event, Done)
        return event

    # Answers.

    def constraints(self, body: Sampling) -> list[Constraint | None]:
        """Compile the constraint of each of the `n` answers."""
        with self.computing:
            return [self.grammars.constraint(body.response_format) for _ in range(body.n or 1)]

    async def submit(
        self, http: Request, prompt: Prompt, body: Sampling, tokens: int, top_logprobs: int | None
    ) -> "Answers":
        """Queue the `n` answers of a request."""
        constraints: list[Constraint | None] = [None] * (body.n or 1)
        if body.response_format:
            constraints = await self.prepare(self.constraints, body)
        answers = Answers(self.engine, http)
        try:
            for index, settings in enumerate(body.settings(tokens)):
                request = EngineRequest(
                    prompt.document,
                    prompt.blocks,
                    settings,
                    functools.partial(answers.receive, index),
                    tiles=prompt.tiles,
                    stops=body.stops,
                    top_logprobs=top_logprobs,
                    constraint=constraints[index],
                )
                answers.requests.append(request)
                self.engine.submit(request)
        except Refused:
            answers.cancel()
            raise
        return answers

    async def reply(
        self, http: Request, prompt: Prompt, body: Sampling, tokens: int, shape: Shape
    ) -> Response:
        """Answer in one piece or as a stream, in a `shape`: chat or plain completion."""
        answers = await self.submit(http, prompt, body, tokens, shape.top_logprobs)
        shape.prompt_tokens = prompt.document.length
        events = answers.events(await answers.first())
        if body.stream:
            usage = bool((body.stream_options or {}).get("include_usage"))
            return StreamingResponse(shape.stream(events, usage), 200, STREAM, "text/event-stream")
        async with aclosing(events):
            return JSONResponse(await shape.whole(events))


class Answers:
    """The answers of a request: their events come from the engine's thread to the event loop.

    A client that goes away frees their rows.
    """

    def __init__(self, engine: Engine, http: Request) -> None:
        self.engine, self.loop = engine, asyncio.get_running_loop()
        self.queue = asyncio.Queue[tuple[int, Event] | None]()  # None: the client has gone
        self.requests: list[EngineRequest] = []
        self.watch = self.loop.create_task(self._watch(http))

    def receive(self, index: int, event: Event) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.queue.put_nowait, (index, event))

    def cancel(self) -> None:
        for request in self.requests:
            self.engine.cancel(request)

    async def _watch(self, http: Request) -> None:
        """Wait until the client has gone; it also counts as such once it has its response."""
        while (await http.receive())["type"] != "http.disconnect":
            pass
        self.cancel()
        self.queue.put_nowait(None)

    async def first(self) -> tuple[int, Event]:
        """The first event. `Refused` if it is one, or the client has gone."""
        event = await self.queue.get()
        if event is None:
            raise Refused(499, "gone", "the client has gone")
        if isinstance(event[1], Refused):
            self.cancel()
            raise event[1]
        return event

    async def events(self, event: tuple[int, Event] | None) -> AsyncGenerator[tuple[int, Event]]:
        """All events, from the first, `event`."""
        open_answers = len(self.requests)
        try:
            while event is not None:
                yield event
                open_answers -= not isinstance(event[1], Delta)
                if not open_answers:
                    return
                event = await self.queue.get()
        finally:
            self.cancel()


# The application.


def create_app(engine: Engine, settings: Settings) -> FastAPI:
    """The ASGI application; it starts and stops `engine`."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await run_in_threadpool(engine.close)

    app = FastAPI(
        title="DualTowerVLM", docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan
    )
    server = Server(engine, settings)
    app.state.server = server
    _add_errors(app)
    _add_answers(app, server)
    _add_images(app, server)
    _add_status(app, server)
    app.add_middleware(
        Guard,
        key_of=server.key_of,
        body_bytes=settings.body_bytes,
        max_requests=2 * (engine.max_waiting + engine.batch.max_rows),
        metrics=engine.metrics,
    )
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return refusal(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:] if isinstance(part, str))
        message = (
            f"'{field}': {first['msg']}" if field else "the body must be a JSON object (application/json)"
        )
        return refusal(Refused(400, "invalid_request", message))

    @app.exception_handler(HTTPException)
    async def missing(_: Request, error: HTTPException) -> Response:
        code = CODES.get(error.status_code, "invalid_request")
        return refusal(Refused(error.status_code, code, str(error.detail)))

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return refusal(Refused(500, "internal_error", "the server failed: its log has the error"))


def _add_answers(app: FastAPI, server: Server) -> None:
    tokenizer, name = server.predictor.renderer.tokenizer, server.settings.name

    def check(body: Sampling) -> None:
        body.refuse_unsupported()
        if body.model not in (None, "", server.settings.name):
            raise Refused(404, "model_not_found", f"this server has the model '{server.settings.name}' only")

    @app.post("/v1/chat/completions")
    async def chat(http: Request, body: ChatRequest, key: str = Depends(server.key_of)) -> Response:
        check(body)
        prompt = await server.prepare(server.chat_prompt, body.messages, key)
        tokens = server.answer_tokens(prompt, body.answer_limit)
        top = (body.top_logprobs or 0) if body.logprobs else None
        return await server.reply(http, prompt, body, tokens, Shape(tokenizer, name, True, body.n or 1, top))

    @app.post("/v1/completions")
    async def completion(
        http: Request, body: CompletionRequest, key: str = Depends(server.key_of)
    ) -> Response:
        check(body)
        prompt = await server.prepare(server.text_prompt, body.prompt)
        tokens = server.answer_tokens(prompt, body.answer_limit)
        shape = Shape(tokenizer, name, False, body.n or 1, body.logprobs)
        return await server.reply(http, prompt, body, tokens, shape)


def _add_images(app: FastAPI, server: Server) -> None:
    predictor = server.predictor

    def upload_prompt(data: bytes, is_json: bool, key: str) -> tuple[Prompt, dict[str, Any]]:
        """The prompt of one image alone, and what is known about the image."""
        limits = server.settings.limits
        if is_json:
            try:
                data = image_bytes(json.loads(data), limits)
            except (ValueError, RecursionError):
                raise Refused(
                    400, "invalid_request", "the body is neither an image nor JSON with a 'url'"
                ) from None
        with server.computing:
            tiles, (width, height) = tiles_of(predictor, data, limits)
        document = predictor.renderer.prompt([{"role": "user", "content": [IMAGE_PART]}], [tiles.grid])
        (block,) = left_blocks(predictor, document, [tiles])
        assert isinstance(block, ImageBlock)
        handle = handle_of(StoredImage(block_key(predictor.model, block), tiles.grid), key)
        card = {"id": handle, "object": "image", "width": width, "height": height, "tokens": len(block.ids)}
        return Prompt(document, [block], None), card

    @app.post("/v1/images")
    async def upload(http: Request, key: str = Depends(server.key_of)) -> Response:
        server.need_handles()
        is_json = http.headers.get("content-type", "").startswith("application/json")
        prompt, card = await server.prepare(upload_prompt, await http.body(), is_json, key)
        done = await server.encode(http, prompt)
        return JSONResponse({**card, "image_kv": done.image_kv})

    def attention_prompt(body: AttentionRequest, key: str) -> tuple[Prompt, list[int]]:
        """The conversation, and the answer's tokens up to the one that is asked about."""
        server.check_characters(len(body.answer))
        prompt, ids = server.chat_prompt(body.messages, key), predictor.renderer.tokenizer.encode(body.answer)
        if body.token >= len(ids):
            raise Refused(
                400, "invalid_request", f"'token' is {body.token}: the answer has {len(ids)} tokens"
            )
        server.answer_tokens(prompt, body.token + 1)
        return prompt, ids[: body.token + 1]

    def maps_of(*args: Any) -> list[Tensor]:
        with server.computing:
            return attention_maps(predictor, *args)

    @app.post("/v1/attention")
    async def attention(http: Request, body: AttentionRequest, key: str = Depends(server.key_of)) -> Response:
        server.need_handles()
        prompt, ids = await server.prepare(attention_prompt, body, key)
        kvs = (await server.encode(http, prompt)).kvs
        maps = await server.prepare(maps_of, prompt.document, kvs, ids)
        images = [{"rows": len(m), "columns": len(m[0]), "weights": m.tolist()} for m in maps]
        return JSONResponse({"images": images, "token": predictor.renderer.tokenizer.decode(ids[-1:])})


def _add_status(app: FastAPI, server: Server) -> None:
    model = server.predictor.model

    @app.get("/v1/models")
    async def models(_: str = Depends(server.key_of)) -> dict[str, Any]:
        card = ModelCard(
            id=server.settings.name,
            created=server.created,
            max_model_len=model.right.config.max_positions,
            architecture=model.model_type,
            system=server.predictor.renderer.tokenizer.template.has_system,
            handles=has_handles(server.predictor),
            heads=model.heads.count if model.heads is not None else 0,
        )
        return {"object": "list", "data": [card.model_dump()]}

    @app.get("/health")
    async def health() -> Response:
        if not server.engine.thread.is_alive():
            return refusal(Refused(503, "stopped", "the engine has stopped"))
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(server.engine.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))
