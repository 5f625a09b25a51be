"""The server as its clients see it: every greedy answer is `Predictor`'s, whatever happens beside it."""

import asyncio
import json
import os
import signal
import socket
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import httpx
import openai
import pytest
import tokenizers
from tokenizers import decoders, models

from configs.model import GenerationConfig
from data.conversations import ask, checked, with_images
from data.render import Renderer
from eval.predictor import Predictor
from models.weights.model_folder import save_model
from serving.api import Settings
from serving.batch import Batch
from serving.engine import Engine
from serving.metrics import Metrics
from serving.requests import Text
from tests.conftest import TINY_MODEL, lively_model
from tests.programs import ROOT, Program, run_program
from tests.serving_load import Load, Served, image_part, is_idle, lively_predictor, png, serving, until, user

MODEL = "tiny"


class Service(NamedTuple):
    address: str
    served: Served
    engine: Engine
    alone: Predictor  # the same model, with a store of its own

    def expected(self, text: str, image: bytes | None = None, tokens: int = 16, stops: Any = ()) -> Any:
        tiles = [self.alone.tiles(image)] if image is not None else []
        settings = GenerationConfig(max_new_tokens=tokens, speculative="off")
        return self.alone.answer([(tiles, ask(text, len(tiles)))], settings, stops=stops)[0]

    def chat(self, **body: Any) -> httpx.Response:
        body = {"messages": user("is it?"), "max_tokens": 16} | body
        return httpx.post(f"{self.address}/v1/chat/completions", json=body, timeout=60)

    @property
    def is_idle(self) -> bool:
        return until(lambda: is_idle(self.engine) and not self.served.tasks())


def start(stack: ExitStack, tokenizer: Any, settings: Settings, **options: Any) -> Service:
    predictor = lively_predictor(tokenizer)
    engine = Engine(predictor, Metrics(), drafts="on", **options)
    served = stack.enter_context(serving(engine, settings))
    return Service(served.address, served, engine, Predictor(predictor.model, predictor.renderer))


@pytest.fixture(scope="module")
def service(tokenizer):
    with ExitStack() as stack:
        yield start(stack, tokenizer, Settings(MODEL))


@pytest.fixture(scope="module")
def small(tokenizer):
    """One row, and one request that waits."""
    with ExitStack() as stack:
        yield start(stack, tokenizer, Settings(MODEL), max_rows=1, max_waiting=1)


@pytest.fixture
def slow(monkeypatch):
    slow_down(monkeypatch.setattr)


def slow_down(put: Any = setattr) -> None:
    step = Batch.step

    def slow_step(batch: Batch) -> None:
        time.sleep(0.02)
        step(batch)

    put(Batch, "step", slow_step)


@pytest.fixture(scope="module")
def client(service):
    with openai.OpenAI(base_url=f"{service.address}/v1", api_key="any", max_retries=0) as client:
        yield client


# Clients.


@pytest.mark.parametrize("text", ["what is it?", "describe the image"])
def test_openai(service, client, text):
    image = png(len(text))
    expected = service.expected(text, image)
    for time_asked in range(2):
        answer = client.chat.completions.create(
            model=MODEL, messages=user(text, image_part(image)), max_tokens=16
        )
        assert answer.choices[0].message.content == expected.text
        assert answer.choices[0].finish_reason == ("length" if expected.truncated else "stop")
        usage = answer.usage
        assert usage.completion_tokens == expected.tokens and usage.prompt_tokens > 5
        assert usage.prompt_tokens_details.cached_tokens == 5 * time_asked
        assert answer.dualtower["image_kv"] == ("reused" if time_asked else "computed")


def test_openai_stream(service, client):
    image, text = png(50), "what is it?"
    expected = service.expected(text, image, 40)
    assert expected.truncated  # so that no end of turn is among the tokens
    stream = client.chat.completions.create(
        model=MODEL,
        messages=user(text, image_part(image)),
        max_completion_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = stream
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected.text
    assert chunks[-1].choices[0].finish_reason == ("length" if expected.truncated else "stop")
    assert last.choices == [] and last.usage.completion_tokens == expected.tokens
    drafts = [c.dualtower["tokens"] for c in chunks if getattr(c, "dualtower", None)]
    assert sum(map(len, drafts)) == expected.tokens and last.dualtower["decode_steps"] == len(drafts)
    assert any(len(tokens) > 1 for tokens in drafts), "no draft was accepted"


def test_openai_async(service):
    questions = [("is it?", png(n) if n % 3 else None, n) for n in range(12)]

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{service.address}/v1", api_key="any") as client:

            async def one(text: str, image: bytes | None, n: int) -> str:
                parts = [image_part(image)] if image else []
                options = {"model": MODEL, "messages": user(text, *parts), "max_tokens": 10 + n}
                if n % 2:
                    answer = await client.chat.completions.create(**options)
                    return answer.choices[0].message.content
                stream = await client.chat.completions.create(**options, stream=True)
                return "".join([c.choices[0].delta.content or "" async for c in stream])

            return await asyncio.gather(*(one(*question) for question in questions))

    texts = asyncio.run(run())
    assert texts == [service.expected(text, image, 10 + n).text for text, image, n in questions]


def test_openai_logprobs_n_and_stop(service, client):
    messages = user("what is it?")
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=9, logprobs=True, top_logprobs=3, n=3
    )
    expected = service.expected("what is it?", tokens=9)
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert answer.usage.completion_tokens == 3 * expected.tokens
    for choice in answer.choices:
        entries = choice.logprobs.content
        assert choice.message.content == expected.text and len(entries) == expected.tokens
        assert b"".join(bytes(e.bytes) for e in entries).decode(errors="replace") and entries[0].logprob <= 0
        assert all(e.top_logprobs[0].logprob >= e.top_logprobs[2].logprob for e in entries)
        assert all(e.logprob == e.top_logprobs[0].logprob for e in entries)  # greedy
    one = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=2, logprobs=True, top_logprobs=1, temperature=3, seed=5
    )
    assert [len(e.top_logprobs) for e in one.choices[0].logprobs.content] == [1, 1]
    sampled = [
        client.chat.completions.create(
            model=MODEL, messages=messages, max_tokens=12, temperature=1.2, top_p=0.95, seed=seed, n=2
        )
        for seed in (1, 1, 2)
    ]
    texts = [[c.message.content for c in answer.choices] for answer in sampled]
    assert texts[0][0] != texts[0][1] and texts[0] != texts[2]
    stop = expected.text[3]
    stopped = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=9, stop=[stop])
    assert stopped.choices[0].message.content == expected.text[: expected.text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


def test_conversations(service):
    """A system message, several turns and images, and an answer that is to be continued."""
    images = [png(80), png(81)]
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": "answer in one word"},
        *user("what is it?", image_part(images[0])),
        {"role": "assistant", "content": "a rectangle"},
        *user("and this?", image_part(images[1])),
    ]
    tiles = [service.alone.tiles(image) for image in images]
    settings = GenerationConfig(max_new_tokens=20, speculative="off")
    for more in ([], [{"role": "assistant", "content": "it is"}]):
        conversation = with_images(checked([{**messages[0], "role": "system"}, *messages[1:], *more]), 2)
        expected = service.alone.answer([(tiles, conversation)], settings)[0].text
        answer = service.chat(messages=messages + more, max_tokens=20).json()
        assert answer["choices"][0]["message"]["content"] == expected


@pytest.mark.parametrize("context", ["none", "prefix"])
def test_models_without_handles(tokenizer, context):
    """They answer about images, too; an image cannot be named."""
    config = replace(TINY_MODEL, left_context=context, image_isolation=context == "none")
    predictor = Predictor(
        lively_model(tokenizer, config), Renderer(tokenizer, config.tokens_per_tile, context)
    )
    engine, image = Engine(predictor, Metrics()), png(82)
    alone = Predictor(predictor.model, predictor.renderer)
    with serving(engine, Settings(MODEL)) as served:
        service = Service(served.address, served, engine, alone)
        for text in ("is it?", "what is it?"):
            answer = service.chat(messages=user(text, image_part(image))).json()["choices"][0]
            assert answer["message"]["content"] == service.expected(text, image).text
        for path, body in (
            ("images", {"url": "x"}),
            ("attention", {"messages": user("x"), "answer": "x", "token": 0}),
        ):
            response = httpx.post(f"{served.address}/v1/{path}", json=body)
            assert response.status_code == 400 and response.json()["error"]["code"] == "no_handles"


def test_openai_several_answers_of_a_new_image(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=user("is it?", image_part(png(60))), max_tokens=2, n=4
    )
    assert answer.dualtower["image_kv"] == "computed"
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_openai_completions_models_and_errors(service, client):
    answer = client.completions.create(model=MODEL, prompt="what is", max_tokens=5, logprobs=2)
    assert answer.choices[0].text and len(answer.choices[0].logprobs.tokens) == 5
    pieces = [
        c.choices[0].text
        for c in client.completions.create(model=MODEL, prompt="what is", max_tokens=5, stream=True)
    ]
    assert "".join(pieces) == answer.choices[0].text
    (model,) = client.models.list().data
    assert model.id == MODEL and model.handles and model.heads == 3
    with pytest.raises(openai.NotFoundError, match="tiny"):
        client.chat.completions.create(model="gpt-4o", messages=user("x"))
    with pytest.raises(openai.BadRequestError, match="are left"):
        client.chat.completions.create(model=MODEL, messages=user("x " * 300))


SCHEMAS: list[dict[str, Any]] = [
    {"enum": ["red", "green", "blue", "it is a \"circle\""]},
    {"type": "boolean"},
    {"type": "integer", "minimum": -20, "maximum": 500},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"type": "string", "maxLength": 8},
    {"type": "string", "pattern": "^[a-f]{2,6}$"},
    {"anyOf": [{"type": "null"}, {"const": 5}]},
    {
        "type": "object",
        "properties": {
            "shape": {"enum": ["circle", "triangle"]},
            "count": {"type": "integer", "minimum": 0, "maximum": 9},
            "labels": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 2},
        },
        "required": ["shape", "count", "labels"],
        "additionalProperties": False,
    },
]  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_json_schemas(client, schema):
    """Every answer validates, whatever the random model would say."""
    pytest.importorskip("llguidance")
    validate = pytest.importorskip("jsonschema").validate
    shape = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    for temperature in (0, 1, 5):
        answer = client.chat.completions.create(
            model=MODEL,
            messages=user("what is it?", image_part(png(1))),
            response_format=shape,
            temperature=temperature,
            seed=temperature,
            n=3,
            max_tokens=150,
        )
        for choice in answer.choices:
            assert choice.finish_reason == "stop"
            validate(json.loads(choice.message.content), schema)


def test_json_streams_beside_plain_answers(service, client):
    pytest.importorskip("llguidance")
    shape = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMAS[-1]}}
    streams = [
        client.chat.completions.create(
            model=MODEL, messages=user("is it?"), max_tokens=100, stream=True, response_format=form
        )
        for form in (shape, {"type": "text"}, shape)
    ]
    texts = ["".join(c.choices[0].delta.content or "" for c in stream) for stream in streams]
    assert json.loads(texts[0]) == json.loads(texts[2])
    assert texts[1] == service.expected("is it?", tokens=100).text


def test_langchain(service):
    chat_models = pytest.importorskip("langchain_openai")
    model = chat_models.ChatOpenAI(
        base_url=f"{service.address}/v1", api_key="any", model=MODEL, max_tokens=12, temperature=0
    )
    messages = pytest.importorskip("langchain_core.messages")
    content = [{"type": "text", "text": "what is it?"}, image_part(png(3))]
    answer = model.invoke([messages.HumanMessage(content=content)])
    streamed = "".join(chunk.content for chunk in model.stream([messages.HumanMessage(content=content)]))
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 12}
    assert answer.content == streamed == service.chat(**body).json()["choices"][0]["message"]["content"]
    assert answer.usage_metadata["output_tokens"] <= 12


def test_llama_cpp_web_client(service):
    """A body as that page sends it; fields that are unknown here are ignored."""
    image, text = png(4), "what color is the shape?"
    body = {
        "messages": user(text, image_part(image)),
        "stream": True,
        "return_progress": True,
        "reasoning_format": "auto",
        "cache_prompt": True,
        "samplers": ["penalties", "dry", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"],
        "temperature": 0,
        "dynatemp_range": 0,
        "dynatemp_exponent": 1,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.05,
        "xtc_probability": 0,
        "xtc_threshold": 0.1,
        "typ_p": 1,
        "typical_p": 1,
        "repeat_last_n": 64,
        "repeat_penalty": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "dry_multiplier": 0,
        "dry_base": 1.75,
        "dry_allowed_length": 2,
        "dry_penalty_last_n": -1,
        "max_tokens": -1,
        "timings_per_token": True,
        "backend_sampling": False,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    response = service.chat(**body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *lines, end = [line for line in response.text.split("\n\n") if line]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    prompt = service.chat(**body | {"stream": False, "max_tokens": 1}).json()["usage"]["prompt_tokens"]
    answer = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
    assert end == "data: [DONE]" and answer == service.expected(text, image, 256 - prompt).text


# Handles.


def test_handles(service):
    image = png(70)
    response = httpx.post(f"{service.address}/v1/images", content=image)
    card = response.json()
    assert (card["width"], card["height"], card["tokens"], card["image_kv"]) == (64, 64, 5, "computed")
    again = httpx.post(f"{service.address}/v1/images", json=image_part(image)["image_url"]).json()
    assert again == card | {"image_kv": "reused"}
    answer = service.chat(messages=user("is it?", {"type": "image", "id": card["id"]})).json()
    assert answer["choices"][0]["message"]["content"] == service.expected("is it?", image).text
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 5
    store = service.engine.predictor.store
    store.memory.clear()
    store.bytes = 0
    for stream in (False, True):
        lost = service.chat(messages=user("is it?", {"type": "image", "id": card["id"]}), stream=stream)
        assert lost.status_code == 404 and lost.json()["error"]["code"] == "image_not_found"


def test_attention_maps(service):
    messages, image = user("is it?", image_part(png(6))), png(6)
    answer = service.expected("is it?", image).text
    body = {"messages": messages, "answer": answer, "token": 1}
    maps = httpx.post(f"{service.address}/v1/attention", json=body).json()["images"]
    weights = maps[0]["weights"]
    assert len(maps) == 1 and len(weights) == 2 and max(map(max, weights)) == pytest.approx(1)
    body["token"] = 999
    assert httpx.post(f"{service.address}/v1/attention", json=body).status_code == 400


# Limits and faults.


def test_bytes_that_are_no_text_end_no_answer():
    """With byte fallback they make tokenizers' stream fail."""
    vocabulary = {"<unk>": 0, "a": 1} | {f"<0x{i:02X}>": 2 + i for i in range(256)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    predictor: Any = SimpleNamespace(
        renderer=SimpleNamespace(tokenizer=SimpleNamespace(backend=backend, decode=backend.decode))
    )
    text = Text(predictor, ())
    for token in [2 + 0x41, 2 + 0xFF, 1, 1]:
        text.add(token)
    assert text.new(over=True).endswith("aa")


def test_a_full_queue(small, slow):
    with httpx.Client(base_url=small.address, timeout=60) as http, ExitStack() as stack:
        body = {"messages": user("is it?"), "max_tokens": 200, "stream": True, "stop": "\0"}
        responses = [stack.enter_context(http.stream("POST", "/v1/chat/completions", json=body))]
        http_async = small.chat(max_tokens=1, n=4)
        assert http_async.status_code == 429 and http_async.headers["retry-after"] == "1"
        assert http_async.json()["error"]["code"] == "queue_full"
        assert responses[0].status_code == 200
    assert small.is_idle
    assert small.chat().json()["choices"][0]["message"]["content"] == small.expected("is it?").text


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_row(small, slow, stream):
    with pytest.raises(httpx.ReadTimeout):
        timeout = httpx.Timeout(5, read=0.1)
        body = {"messages": user("is it?"), "max_tokens": 200, "stream": stream}
        with httpx.stream("POST", f"{small.address}/v1/chat/completions", json=body, timeout=timeout) as got:
            for _ in got.iter_lines():
                assert small.engine.answers
                raise httpx.ReadTimeout("enough")
    started = time.monotonic()
    assert small.is_idle and time.monotonic() - started < 2
    assert small.chat(max_tokens=3).status_code == 200


class Broken(Exception):
    pass


@pytest.mark.parametrize("part", ["step", "prefill", "encode", "join", "text"])
def test_when_the_engine_fails_all_learn_of_it_and_it_goes_on(service, monkeypatch, slow, part):
    """Clients whose answers may be affected get an error; later ones get their answers."""
    names = {
        "step": "serving.batch.decode_step",
        "prefill": "serving.engine.forward_cached",
        "encode": "serving.engine.encode_blocks",
        "join": "serving.batch.SharedCache.join",
        "text": "serving.requests.Text.add",
    }
    failures = []

    def fail(*_: Any, **__: Any) -> None:
        failures.append(part)
        raise Broken("/secret/path")

    async def run() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=service.address, timeout=60) as http:
            bodies = [
                {"messages": user("is it?", image_part(png(90 + n))), "max_tokens": 150, "stream": n % 2 == 1}
                for n in range(6)
            ]
            tasks = [asyncio.create_task(http.post("/v1/chat/completions", json=b)) for b in bodies]
            await asyncio.sleep(0.3)
            with monkeypatch.context() as patch:
                patch.setattr(names[part], fail)
                tasks += [asyncio.create_task(http.post("/v1/chat/completions", json=b)) for b in bodies[:2]]
                late = bodies[0] | {"messages": user("is it?", image_part(png(200 + len(part))))}
                tasks.append(asyncio.create_task(http.post("/v1/chat/completions", json=late)))
                while not failures:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.3)
            return await asyncio.gather(*tasks)

    responses = asyncio.run(run())
    errors = [r for r in responses if r.status_code == 500 or '{"error"' in r.text]
    assert errors and all("Broken" in r.text and "/secret" not in r.text for r in errors)
    assert all(r.status_code in (200, 500) for r in responses)
    assert service.is_idle and service.engine.thread.is_alive() and not service.engine.joining
    answer = service.chat(messages=user("is it?", image_part(png(1)))).json()
    assert answer["choices"][0]["message"]["content"] == service.expected("is it?", png(1)).text
    assert httpx.get(f"{service.address}/health").status_code == 200


def test_metrics(service):
    service.chat()
    text = httpx.get(f"{service.address}/metrics").text
    for name in ("waiting", "running", "tokens_total", "accepted_total", "drafted_total", "batch_rows_count"):
        assert f"dualtower_{name} " in text
    assert 'dualtower_requests_total{route="/v1/chat/completions",status="200"}' in text
    assert 'dualtower_images_total{image_kv="reused"}' in text
    assert 'dualtower_first_token_seconds_bucket{image_kv="none"' in text


def test_the_page(service):
    page = httpx.get(service.address)
    assert page.headers["content-type"].startswith("text/html")
    assert "frame-ancestors 'none'" in page.headers["content-security-policy"]


def test_load(tokenizer):
    """64 clients that ask, leave and send nonsense: whole answers are right, and nothing is left behind."""
    with ExitStack() as stack:
        service = start(stack, tokenizer, Settings(MODEL), max_rows=12, max_waiting=40)
        service.engine.predictor.store.memory_bytes = 100_000
        load = Load(service.address, service.engine.predictor)
        asyncio.run(load.run(seconds=10))
        assert load.wrong == []
        assert service.is_idle and load.outcomes["whole"] > 20, load.outcomes
        assert not service.engine.joining


# The program.


@pytest.fixture(scope="module")
def model_folder(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "model"
    predictor = lively_predictor(tokenizer)
    save_model(predictor.model, folder)
    tokenizer.save(folder)
    return folder


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def serve(folder: Path, port: int, *flags: str) -> tuple[Program, str]:
    command = [ROOT / "serve.py", "--checkpoint", folder, "--port", port, "--device", "cpu", *flags]
    program, address = Program(command, folder.parent, slow_down), f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert program.poll() is None, program.wait()
        try:
            return httpx.get(f"{address}/health").status_code == 200
        except httpx.ConnectError:
            return False

    assert until(answers, 120)
    return program, address


def test_sigterm_finishes_what_runs_and_the_next_process_has_the_images(service, model_folder):
    image, store = png(7), ("--store", str(model_folder.parent / "kvs"))
    program, address = serve(model_folder, free_port(), *store)
    handle = httpx.post(f"{address}/v1/images", content=image).json()["id"]
    by_handle = user("is it?", {"type": "image", "id": handle})
    body = {"messages": by_handle, "max_tokens": 60, "stream": True}
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=60) as got:
        lines = got.iter_lines()
        first = next(lines)
        os.kill(program.pid, signal.SIGTERM)
        lines = [line for line in (first, *lines) if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-1]]
    assert (
        "".join(c["delta"].get("content", "") for c in chunks) == service.expected("is it?", image, 60).text
    )
    done = program.wait()
    assert (done.returncode, done.stderr) == (0, ""), done
    assert f"open {address}" in done.stdout

    program, address = serve(model_folder, free_port(), *store)
    for part in ({"type": "image", "id": handle}, image_part(image)):
        body = {"messages": user("is it?", part), "max_tokens": 16}
        answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()
        assert answer["dualtower"]["image_kv"] == "reused"
        assert answer["choices"][0]["message"]["content"] == service.expected("is it?", image).text
    os.kill(program.pid, signal.SIGKILL)
    assert program.wait().returncode == -signal.SIGKILL


def test_a_busy_port_is_one_line(model_folder):
    with socket.create_server(("127.0.0.1", 0)) as sock:
        command = [ROOT / "serve.py", "--checkpoint", model_folder, "--port", sock.getsockname()[1]]
        done = run_program(command, model_folder.parent)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: --port") and "in use" in done.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prot", "8000"], "--port"),
        (["--port", "0"], "--port = 0"),
        (["--port", "99999"], "--port = 99999"),
        (["--port", "x"], "port"),
        (["--max-rows", "0"], "--max_rows"),
        (["--cache_gb", "nan"], "--cache_gb"),
        (["--max_pixels", "-1"], "--max_pixels"),
        (["--api-key", ""], "--api_key"),
        (["--api-key", "clé"], "--api_key"),
        (["--store", ""], "--store"),
        (["--host", ""], "--host"),
    ],
)
def test_bad_flags_are_one_line(flags, words):
    done = run_program([ROOT / "serve.py", "--checkpoint", "x", *flags], ROOT)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and words in done.stderr


def test_a_missing_model_and_a_bad_host_are_one_line(model_folder, tmp_path):
    done = run_program([ROOT / "serve.py", "--checkpoint", tmp_path / "none"], ROOT)
    assert done.returncode in (1, 2) and len(done.stderr.splitlines()) == 1
    done = run_program(
        [ROOT / "serve.py", "--checkpoint", model_folder, "--host", "no.such.host.invalid"], ROOT
    )
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
