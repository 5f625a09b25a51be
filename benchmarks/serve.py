"""The server: throughput of several clients, time to first token, and the engine's own time.

  python -m benchmarks.serve --json benchmarks/results/serve.json
  python -m benchmarks.serve --checkpoint DIR --clients 1,16 --seconds 5

Without --checkpoint the model has SigLIP-B/16's and SmolLM2-135M's sizes, and random weights. `serve.py` runs
as a process of its own; clients are coroutines of this one, and share its cores.

throughput   tokens/s of 1, 4, 16 and 64 clients that ask one question after another: open text; captions of
             new images; captions of four images that are repeated. ÷ the same requests in this process, one
             after another (`Predictor.answer`), measured before
first_token  of a new image of five tiles, and of a second question on it by its handle; over HTTP, one client
overhead     of the engine in a turn with 16 rows: its time ÷ that of the batch's decode step alone
"""

import argparse
import asyncio
import base64
import io
import json
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.about import about
from benchmarks.first_answer import saved_model
from configs.model import GenerationConfig
from eval.predictor import Predictor
from models.generation import decode_step
from serving.engine import Engine
from serving.metrics import Metrics
from serving.requests import Request
from utils.errors import UserError, run_script

ROOT = Path(__file__).resolve().parent.parent
TOKENS = {"open text": 64, "captions, new images": 32, "captions, four images": 32}
QUESTION = "Describe what you see in one sentence."
ROWS = 16  # of `overhead`


def picture(seed: int) -> bytes:
    """A PNG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((448, 448)).save(buffer, "PNG")
    return buffer.getvalue()


def image_seed(kind: str, number: int, offset: int) -> int | None:
    """The image of a client's request; None for text alone."""
    return {"open text": None, "captions, new images": offset + number}.get(kind, number % 4)


def body_of(kind: str, number: int, offset: int, model: str) -> dict[str, Any]:
    """The request `number` of a kind. `offset` makes images new."""
    seed, content = image_seed(kind, number, offset), [{"type": "text", "text": f"{QUESTION} ({number})"}]
    if seed is not None:
        url = "data:image/png;base64," + base64.b64encode(picture(seed)).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})  # type: ignore[dict-item]
    messages = [{"role": "user", "content": content}]
    return {"model": model, "messages": messages, "max_tokens": TOKENS[kind], "stream": False}


@contextmanager
def server(checkpoint: Path) -> Iterator[str]:
    """`serve.py` as a process → its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "serve.py",
        "--checkpoint",
        str(checkpoint),
        "--port",
        str(port),
        "--name",
        "m",
    ]
    process = subprocess.Popen([*command, "--dtype", "fp32"], cwd=ROOT, stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise UserError(f"serve.py ended with {process.returncode}")
            try:
                httpx.get(f"{address}/health")
                break
            except httpx.TransportError:
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait()


def alone(predictor: Predictor, kind: str, requests: int, offset: int) -> float:
    """Tokens/s of requests that are answered in this process, one after another."""
    settings, tokens = GenerationConfig(max_new_tokens=TOKENS[kind]), 0
    started = time.perf_counter()
    for number in range(requests):
        seed = image_seed(kind, number, offset)
        images = [] if seed is None else [predictor.tiles(picture(seed))]
        tokens += predictor.answer([(images, f"{QUESTION} ({number})")], settings)[0].tokens
    return tokens / (time.perf_counter() - started)


async def ask_all(address: str, kind: str, clients: int, seconds: float, offset: int) -> dict[str, float]:
    """Let clients ask for some seconds → tokens/s, and the median time of an answer."""
    tokens, times, end, number = 0, [], time.perf_counter() + seconds, 0
    limits = httpx.Limits(max_connections=None)

    async with httpx.AsyncClient(base_url=address, timeout=600, limits=limits) as http:

        async def client() -> None:
            nonlocal tokens, number
            while time.perf_counter() < end:
                number += 1
                began = time.perf_counter()
                reply = await http.post("/v1/chat/completions", json=body_of(kind, number, offset, "m"))
                reply.raise_for_status()
                times.append(time.perf_counter() - began)
                tokens += reply.json()["usage"]["completion_tokens"]

        started = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        return {
            "tokens_per_s": tokens / (time.perf_counter() - started),
            "answer_s": statistics.median(times),
            "answers": len(times),
        }


def throughput(checkpoint: Path, clients: list[int], seconds: float) -> dict[str, Any]:
    predictor, out = Predictor.from_pretrained(checkpoint, "fp32"), {}
    for kind in TOKENS:
        alone(predictor, kind, 1, 500)  # warm-up
    baseline = {
        kind: statistics.median(alone(predictor, kind, 4, 1000 * n) for n in (1, 2, 3)) for kind in TOKENS
    }
    del predictor
    with server(checkpoint) as address:
        for kind in TOKENS:
            asyncio.run(ask_all(address, kind, 1, 0.1, 5_000))  # warm-up
            for n in clients:
                figures = asyncio.run(ask_all(address, kind, n, seconds, 10_000 * (n + 1)))
                ratio = figures["tokens_per_s"] / baseline[kind]
                out[f"{kind}, {n} clients"] = {**figures, "ratio": ratio}
                print(
                    f"{kind}, {n} clients: {figures['tokens_per_s']:.1f} tokens/s, {ratio:.2f} times",
                    flush=True,
                )
        out["alone"] = {f"{kind}": value for kind, value in baseline.items()}
    return out


def with_tiles(checkpoint: Path, folder: Path) -> Path:
    """A copy of a model that cuts an image of twice its tiles' size into four tiles and an overview."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    vision = config["model"]["vision"]
    vision["max_side"] = 2 * vision["image_size"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def first_token(checkpoint: Path, repeats: int = 7) -> dict[str, float]:
    """Milliseconds to the first token of a new image, and of another question on it."""
    times: dict[str, list[float]] = {"first_ms": [], "second_ms": []}
    with (
        tempfile.TemporaryDirectory() as folder,
        server(with_tiles(checkpoint, Path(folder) / "model")) as address,
        httpx.Client(base_url=address, timeout=600) as http,
    ):
        for n in range(repeats):
            body = body_of("captions, new images", n, 77_000, "m") | {"max_tokens": 1}
            content = body["messages"][0]["content"]
            for name, text in (("first_ms", "what color is it?"), ("second_ms", "what shape is it?")):
                content[1]["text"] = text
                began = time.perf_counter()
                http.post("/v1/chat/completions", json=body).raise_for_status()
                times[name].append(1e3 * (time.perf_counter() - began))
                content[0] = {
                    "type": "image",
                    "id": http.post("/v1/images", content=picture(77_000 + n)).json()["id"],
                }
    first, second = (statistics.median(values[1:]) for values in times.values())
    return {"first_ms": first, "second_ms": second, "ratio": first / second}


@torch.inference_mode()
def overhead(checkpoint: Path, steps: int = 40) -> dict[str, float]:
    """A turn's time ÷ that of the decode step and the logits of the same rows."""
    predictor = Predictor.from_pretrained(checkpoint, "fp32")
    engine, settings = Engine(predictor, Metrics()), GenerationConfig(max_new_tokens=10 * steps)
    for number in range(ROWS):
        prompt = predictor.prompt([], f"{QUESTION} ({number})")
        engine.submit(Request(prompt, [], replace(settings), on_event=lambda event: None))
    while engine.waiting or engine.ready or engine.prefill:
        engine.turn()
    batch, model, turns, bare = engine.batch, predictor.model, [], []

    def timed(call: Callable[[], Any], times: list[float]) -> None:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)

    def step_alone() -> None:
        lengths = batch.cache.lengths
        states = decode_step(model, batch.cache, batch.tokens[:, None], batch.positions[:, None])
        model.right.logits(states)
        batch.cache.truncate(lengths)

    for _ in range(steps):
        timed(step_alone, bare)
        timed(engine.turn, turns)
    assert len(batch.rows) == ROWS, "a row has ended"
    turn, step = statistics.median(turns), statistics.median(bare)
    return {"turn_ms": 1e3 * turn, "step_ms": 1e3 * step, "ratio": turn / step}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--clients", default="1,4,16,64")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement [20]")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint or saved_model(Path(folder) / "model")
        results: dict[str, Any] = {"overhead": overhead(checkpoint)}
        print(f"overhead: {results['overhead']}", flush=True)
        results["first_token"] = first_token(checkpoint)
        results |= throughput(checkpoint, [int(n) for n in args.clients.split(",")], args.seconds)
    table = Table("measurement", "figures")
    for name, figures in results.items():
        table.add_row(name, ", ".join(f"{key} {value:.4g}" for key, value in figures.items()))
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps({**about(), **results}, indent=1) + "\n")


if __name__ == "__main__":
    run_script(main)
