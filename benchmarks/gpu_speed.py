"""Speed and memory on the device: the measurements of `benchmarks.gpu`. Weights and batches are random.

On a GPU a training step has as many standard rows (`benchmarks.trial`) in one forward as `ROWS` says, or half
as many until they fit into its memory; elsewhere, and if `quick`, it has one.
"""

import gc
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from tokenizers import Tokenizer as HFTokenizer
from tokenizers.models import WordLevel

from benchmarks.decode import decode_steps, plain
from benchmarks.gpu_checks import Figures, size_of, vocabulary_of
from benchmarks.memory import sized
from benchmarks.trial import DOCUMENTS, MODELS, SIZES, Trial, make_config, synchronize
from configs.cli import preset
from configs.model import GenerationConfig
from data.render import Document
from models.dual_tower.dual_tower import DualTowerVLM
from models.generation import forward_cached, generate
from models.image_store import ImageBlock, ImageStore, encode_rows
from models.kernels import KERNELS, in_use
from models.kernels.compiled_decode import compile_decoding
from models.kernels.flex_attention import FlexLayout
from serving.engine import Engine
from serving.requests import Delta, Request
from training.memory import OVERHEAD, RepeatedBatch, fit_batch_size, full_batch
from training.trainer import Trainer, batch_counts, memory
from utils.device import compute_dtype, pick_device

ROWS = {"222m": 16, "450m": 8, "tiny": 1}
DRAFTS, BATCHES = 4, (1, 8, 64)


def describe(name: str) -> Figures:
    """The device called `name`: dtype and kernels that training takes, and what else its parts need."""
    device = pick_device(name, "--device")
    cuda = device.type == "cuda"
    dtype = compute_dtype("auto", device)
    with torch.enable_grad():
        probe = torch.empty(0, dtype=dtype, device=device)
        kernels = [kernel.__name__ for each in KERNELS.values() for kernel in each if in_use(kernel, probe)]
        triton = FlexLayout.applies(probe)
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if cuda else "cpu",
        "device_memory_gb": torch.cuda.get_device_properties(device).total_memory / 1e9 if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "dtype": str(dtype).removeprefix("torch."),
        "kernels": kernels,
        "triton": triton,
        "compiler": triton if cuda else shutil.which("g++") is not None,
    }


def free(device: torch.device) -> None:
    gc.collect()  # a trial and its hooks reference each other
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


# Training.


def train(size: str, compiled: bool, device: torch.device, quick: bool) -> Figures:
    """A step of vanilla and of the dual tower.

    On a CPU, `quick` compiles without Inductor: a C++ compiler would take longer than all parts together.
    """
    if quick and device.type == "cpu":
        with patch.object(torch, "compile", partial(torch.compile, backend="eager")):
            return _train("tiny", compiled, device, 2)
    return _train("tiny" if quick else size, compiled, device, 10 if device.type == "cuda" else 3)


def _train(size: str, compiled: bool, device: torch.device, repeats: int) -> Figures:
    out: Figures = {}
    for kind in MODELS:
        rows = ROWS[size] if device.type == "cuda" else 1
        while kind not in out:
            free(device)
            try:
                out[kind] = _steps(kind, size, compiled, device, rows, repeats)
            except torch.OutOfMemoryError:
                if rows == 1:
                    raise
                rows //= 2
    return out


def _steps(
    kind: str, size: str, compiled: bool, device: torch.device, rows: int, repeats: int
) -> dict[str, float]:
    started = time.perf_counter()
    trial = Trial(kind, size, "auto", device, local_rows=rows, compiled=compiled)
    for _ in range(2):
        trial.step()
    warm_up = time.perf_counter() - started
    seconds = statistics.median(trial.step()["step"] for _ in range(repeats))
    return {
        "tokens_per_s": trial.tokens / seconds,
        "samples_per_s": rows * DOCUMENTS / seconds,
        **trial.trainer.flops_meter.of(batch_counts(trial.row), seconds),
        "memory_gb": memory(device),
        "rows": rows,
        "step_s": seconds,
        "warm_up_s": warm_up,
    }


def fit_memory(device: torch.device, quick: bool) -> Figures:
    """What `--fit-memory 12` chooses for the 222M pair on The Cauldron, and what two steps then take."""
    if quick:
        config, limit = make_config("dual_tower", SIZES["tiny"], "auto", rows=4), 2.0
        config = replace(config, data=replace(config.data, left_length=64, right_length=128))
    else:
        config, limit = sized(preset("dual_tower_cauldron_222m")), 12.0
    config = replace(config, fit_memory=str(limit), train=replace(config.train, device=str(device)))
    vocabulary = vocabulary_of(size_of(quick))
    config, line = fit_batch_size(config, DualTowerVLM, vocabulary)
    free(device)
    rows = config.train.local_batch_size
    batch = full_batch(config, vocabulary, rows)
    trainer = Trainer(config, DualTowerVLM(config.model, vocabulary), RepeatedBatch(batch))
    values = [trainer.train_step() for _ in range(2)][-1]
    synchronize(device)
    figures = {"limit_gb": limit, "rows": rows, "tokens_per_s": values["tokens_per_s"], "choice": line}
    if device.type != "cuda":
        return figures | {"process_gb": memory(device)}
    taken = (torch.cuda.max_memory_reserved(device) + OVERHEAD) / 1e9
    return figures | {"allocated_gb": memory(device), "taken_gb": taken, "within_limit": taken <= limit}


# Decoding.


def decoder(device: torch.device, quick: bool) -> DualTowerVLM:
    torch.manual_seed(0)
    size = size_of(quick)
    config = make_config("dual_tower", SIZES[size], "auto", heads=DRAFTS).model
    model = DualTowerVLM(config, vocabulary_of(size))
    return model.to(device, compute_dtype("auto", device)).eval()


def seconds_of(function: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - started


def copy_gb_per_s(device: torch.device, quick: bool) -> float:
    """Bytes that a copy in the device's memory reads and writes in a second, in GB."""
    source = torch.ones(1 << (24 if quick else 30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / 1e9 / min(seconds_of(lambda: target.copy_(source), device) for _ in range(5))


def decoding(compiled: bool, device: torch.device, quick: bool) -> Figures:
    """Plain decoding of one row; its share of the memory bandwidth is that of reading the weights."""
    copied, model = copy_gb_per_s(device, quick), decoder(device, quick)
    if compiled and quick and device.type == "cpu":  # Inductor would take longer than all parts together
        model.right.compiled_step = torch.compile(forward_cached, backend="eager", fullgraph=True)
    elif compiled:
        compile_decoding(model)
    if compiled:
        plain(model, 4, 1)  # compiles
    figures = plain(model, 8 if quick else 128, 1 if quick else 3)
    read = figures["weights_gb"] * figures["tokens_per_s"]
    return figures | {"copy_gb_per_s": copied, "share_of_bandwidth": read / copied}


def drafts(device: torch.device, quick: bool) -> Figures:
    """Decoding with drafts ÷ without, where each draft is accepted; costs in steps of one token per row.

    The right tower's blocks add nothing, so that every answer repeats a token, as the heads draft it.
    """
    model, tokens = decoder(device, quick), 10 if quick else 64
    with torch.no_grad():
        for block in model.right.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    out: Figures = {}
    for rows in BATCHES:
        ids = torch.arange(1, 17, device=device).repeat(rows, 1)
        positions = torch.arange(16, device=device).repeat(rows, 1)
        figures = {}
        for name, mode in (("plain", "off"), ("drafts", "on")):
            settings = GenerationConfig(max_new_tokens=tokens, speculative=mode, draft_tokens=DRAFTS)
            for _ in range(2):  # the first is a warm-up
                result = generate(model, ids, positions, [[]] * rows, -1, settings)
            rate = rows * (tokens - 1) / (result.seconds - result.first_token_s)
            figures[f"{name}_tokens_per_s"] = rate
        figures["speedup"] = figures["drafts_tokens_per_s"] / figures["plain_tokens_per_s"]
        figures["tokens_per_step"] = (tokens - 1) / (result.decode_steps[0] - 1)
        out[f"batch {rows}"] = figures
    costs = decode_steps(model, DRAFTS, 1 if quick else 3, BATCHES)
    return out | {"costs": {name: cost for name, cost in costs.items() if f"_{DRAFTS}" in name}}


def second_question(device: torch.device, quick: bool) -> Figures:
    """The first token of a first question on an image of five tiles, and of a second one."""
    model = decoder(device, quick)
    config, vocabulary, store = model.config, model.vocabulary, ImageStore()
    tiles, side = 2 if quick else 5, config.vision.image_size
    block = [vocabulary.first_marker_id] + [vocabulary.image_token_id] * config.tokens_per_tile
    ids = torch.arange(1, 33, device=device)[None]
    positions = tiles * len(block) + torch.arange(32, device=device)[None]
    settings = GenerationConfig(max_new_tokens=1)

    def ask(pixels: torch.Tensor) -> None:
        images = encode_rows(
            model, [[ImageBlock(pixels, block * tiles, [0] * len(block) * tiles, 0)]], store
        )[0]
        answers.append(generate(model, ids, positions, images, -1, settings).tokens)

    first, second = [], []
    for _ in range(2 if quick else 6):
        answers: list[Any] = []
        pixels = torch.randint(0, 256, (tiles, 3, side, side), dtype=torch.uint8)
        first.append(seconds_of(lambda: ask(pixels), device))  # noqa: B023 (called at once)
        second.append(seconds_of(lambda: ask(pixels), device))  # noqa: B023
        assert answers[0] == answers[1], "the stored image KV changes the answer"
    a, b = statistics.median(first[1:]), statistics.median(second[1:])
    return {"first_ms": 1e3 * a, "second_ms": 1e3 * b, "ratio": a / b, "tiles": tiles}


# The server.


class Silent:
    """Metrics that are not kept: the package that keeps them may be missing."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *values: Any) -> Any:
        return self


def serving(device: torch.device, quick: bool) -> Figures:
    """The server's engine without HTTP: clients that ask again as soon as they are answered.

    Each of them asks about one of eight images, which is encoded once.
    """
    model, clients, answers, tokens = decoder(device, quick), 8 if quick else 64, 2, 8 if quick else 64
    size = model.right.unembedding.shape[0]
    words = {f"w{i}": i for i in range(size)}
    tokenizer = SimpleNamespace(backend=HFTokenizer(WordLevel(words, "w0")), turn_end=-1)
    tokenizer.decode = tokenizer.backend.decode
    renderer = SimpleNamespace(tokenizer=tokenizer)
    predictor = SimpleNamespace(model=model, renderer=renderer, store=ImageStore())
    engine = Engine(predictor, Silent(), max_rows=clients, cache_bytes=8 << 30)  # type: ignore[arg-type]
    config, vocabulary, side = model.config, model.vocabulary, model.config.vision.image_size
    block = [vocabulary.first_marker_id] + [vocabulary.image_token_id] * config.tokens_per_tile
    pixels = torch.randint(0, 256, (8, 1, 3, side, side), dtype=torch.uint8)
    first_token: list[float] = []
    ended: list[int] = []

    def ask(client: int, left: int) -> None:
        n, text = len(block), 32
        numbers = list(range(n)), [0] * n, list(range(1, 1 + text)), list(range(n, n + text))
        document = Document(block, *numbers, [])
        image = ImageBlock(pixels[client % len(pixels)], block, [0] * n, 0)
        started = time.perf_counter()

        def on_event(event: Any) -> None:
            if isinstance(event, Delta) and len(first_token) < clients * answers and not seen:
                seen.append(event)
                first_token.append(time.perf_counter() - started)
            elif not isinstance(event, Delta):
                ended.append(event.tokens)
                if left > 1:
                    ask(client, left - 1)

        seen: list[Any] = []
        settings = GenerationConfig(max_new_tokens=tokens)
        engine.submit(Request(document, [image], settings, on_event))

    started = time.perf_counter()
    for client in range(clients):
        ask(client, answers)
    while len(ended) < clients * answers:
        engine.turn()
    synchronize(device)
    seconds = time.perf_counter() - started
    return {
        "clients": clients,
        "tokens_per_s": sum(ended) / seconds,
        "first_token_ms": 1e3 * statistics.median(first_token),
        "first_token_last_ms": 1e3 * max(first_token),
    }


# nanoVLM.


def nanovlm(folder: Path, device: torch.device, quick: bool) -> Figures:
    """A nanoVLM checkout, in a Python of its own: its packages have the same names as this project's."""
    command = [sys.executable, str(Path(__file__).with_name("gpu_nanovlm.py")), str(folder), device.type]
    dtype = str(compute_dtype("auto", device)).removeprefix("torch.")
    arguments = [dtype, "quick" if quick else "full"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [""])[-1]
        raise RuntimeError(f"gpu_nanovlm.py ended with {done.returncode}: {reason}")
    return json.loads(done.stdout.splitlines()[-1])
