"""Decoding speed: against the matmul roofline, with drafts, and with a cached image KV.

  python -m benchmarks.decode --json benchmarks/results/decode.json
  python -m benchmarks.decode --checkpoint DIR --json benchmarks/results/decode.json
  python -m benchmarks.decode --checkpoint DIR --sources openmoji        questions with images

DIR is a model folder; for drafts its model needs multi-token heads (python -m tools.train_heads). Without
it, a model of SigLIP-B/16's and SmolLM2-135M's sizes with random weights is measured, without drafts.
Without --sources the questions are the model's own prompts.

All sides of a ratio are measured in turn in one run. A ratio is the median over repetitions. For drafts it
is a ratio of sums over the prompts, next to the median and minimum over single prompts.

plain         one row, greedy, no drafts: tokens/s, against the matmul roofline: the product of one vector
              with every weight that a token needs
decode_steps  cost of a decode step over K + 1 tokens ÷ of one over 1 token: it bounds the gain by drafts
drafts        after the first token: tokens per decode step, and tokens/s ÷ plain decoding; for K drafts and
              --speculative auto
wrong         whole calls with every draft wrong ÷ plain ones: what --speculative auto may lose
sampled       sampled answers: --speculative auto ÷ plain ones (other samples of the same distribution)
same          greedy answers with and without drafts, batch 1 and 8: how many differ
image         time to first token: a second question on an image against the first one
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from benchmarks.about import about
from benchmarks.decode_drafts import add_draft_rows, drafts, questions_of, same, sampled, wrong
from benchmarks.first_answer import saved_model
from configs.model import GenerationConfig
from eval.predictor import Predictor
from models.generation import VLM, decode_step, prefill
from tools.train_heads import HeadsConfig
from utils.errors import UsageError, UserError, run_script

PROMPT = 32  # tokens of `plain`'s prompt
WRONG = 6  # questions of `wrong`
PARTS = "plain", "decode_steps", "drafts", "wrong", "sampled", "same", "image"
DRAFTED = {"drafts", "wrong", "sampled", "same"}  # parts that need multi-token heads
ROOT = Path(__file__).resolve().parent.parent


def median_s(function: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a call, after one warm-up call."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


@torch.inference_mode()
def plain(model: VLM, tokens: int, repeats: int) -> dict[str, float]:
    """Decode steps and the matmul roofline of the same weights, in turn."""
    right, device = model.right, model.device
    weights = [m.weight for m in right.layers.modules() if isinstance(m, torch.nn.Linear)] + [
        right.unembedding
    ]
    vectors = {
        n: torch.randn(1, n, device=device).to(right.unembedding.dtype) for n in {w.shape[1] for w in weights}
    }
    ids = torch.randint(0, min(1000, model.vocabulary.text_size), (1, PROMPT), device=device)
    positions = torch.arange(PROMPT, device=device)[None]
    roofline, step = [], []
    for _ in range(repeats):
        roofline.append(median_s(lambda: [F.linear(vectors[w.shape[1]], w) for w in weights], 5))
        cache, states = prefill(model, ids, positions, [[]], tokens)
        state, start = states[:, -1], ids.shape[1]
        started = time.perf_counter()
        for i in range(tokens):
            token = right.logits(state).max(-1).indices
            token.item()  # as streaming does
            position = torch.full((1, 1), start + i, device=device)
            state = decode_step(model, cache, token[:, None], position)[:, 0]
        step.append((time.perf_counter() - started) / tokens)
    shares = [r / s for r, s in zip(roofline, step, strict=True)]
    gigabytes = sum(w.numel() * w.element_size() for w in weights) / 1e9
    return {
        "tokens_per_s": 1 / statistics.median(step),
        "bare_products_per_s": 1 / statistics.median(roofline),
        "share_of_bare": statistics.median(shares),
        "share_least": min(shares),
        "weights_gb": gigabytes,
        "bare_gb_per_s": gigabytes / statistics.median(roofline),
    }


@torch.inference_mode()
def decode_steps(
    model: VLM, max_drafts: int, repeats: int, batch_sizes: tuple[int, ...] = (1, 8)
) -> dict[str, float]:
    """Costs ÷ that of a decode step over 1 token per row, logits included, after 200 tokens.

    `verify_K`: a decode step over K + 1 tokens; `draft_K`: drafting K tokens; `…_rows_8`: of eight rows.
    """
    out: dict[str, list[float]] = {}
    for rows in batch_sizes:
        suffix = f"_rows_{rows}" if rows > 1 else ""
        verify, draft = _step_parts(model, rows, max_drafts)
        for _ in range(repeats):
            one = median_s(lambda verify=verify: verify(0), 8)
            for k in range(1, max_drafts + 1):
                seconds = median_s(lambda k=k, verify=verify: verify(k), 8)
                out.setdefault(f"verify_{k}{suffix}", []).append(seconds / one)
            for k in range(1, max_drafts + 1) if model.heads is not None else ():
                seconds = median_s(lambda k=k, draft=draft: draft(k), 8)
                out.setdefault(f"draft_{k}{suffix}", []).append(seconds / one)
    return {name: statistics.median(values) for name, values in out.items()}


def _step_parts(model: VLM, rows: int, max_drafts: int) -> tuple[Callable[[int], None], ...]:
    """Functions that verify and that draft so many tokens per row."""
    right, heads, device = model.right, model.heads, model.device
    ids = torch.randint(0, min(1000, model.vocabulary.text_size), (rows, 200), device=device)
    positions = torch.arange(200 + max_drafts + 1, device=device).expand(rows, -1)
    cache, states = prefill(model, ids, positions[:, :200], [[]] * rows, max_drafts + 1)
    lengths = cache.lengths
    draftable = heads.draftable(right.unembedding) if heads is not None else None

    def verify(count: int) -> None:
        cache.truncate(lengths)
        states = decode_step(model, cache, ids[:, : count + 1], positions[:, 200 : 201 + count])
        right.logits(states).max(-1).indices.tolist()

    def draft(count: int) -> None:
        embedding, last = right.embed_tokens, ids[:, 0]
        heads.draft(embedding, draftable, states[:, -1], last, count, GenerationConfig()).tokens.tolist()

    return verify, draft


def image(predictor: Predictor, tiles: int, repeats: int) -> dict[str, float]:
    """Time to first token of a first and a second question on images of `tiles` tiles.

    `equal`: whether the reused image KV gives the same answers.
    """
    from data.images import Tiles

    side, ratios, cold_ms, warm_ms, equal = predictor.model.config.vision.image_size, [], [], [], True
    grid = (1, 1) if tiles == 1 else (1, tiles - 1)
    settings = GenerationConfig(max_new_tokens=8)
    generator = torch.Generator().manual_seed(0)
    for i in range(repeats + 1):
        picture = Tiles(
            grid, torch.randint(0, 256, (tiles, 3, side, side), dtype=torch.uint8, generator=generator)
        )
        cold = predictor.answer([([picture], "what is it?")], settings)[0]
        warm = predictor.answer([([picture], "what is it?")], settings)[0]
        equal &= cold.text == warm.text and (cold.image_kv, warm.image_kv) == ("computed", "reused")
        if i:
            ratios.append(cold.ttft_ms / warm.ttft_ms)
            cold_ms.append(cold.ttft_ms)
            warm_ms.append(warm.ttft_ms)
    return {
        "ratio": statistics.median(ratios),
        "ratio_least": min(ratios),
        "cold_ms": statistics.median(cold_ms),
        "warm_ms": statistics.median(warm_ms),
        "equal": equal,
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint",
        help="model folder (default: a model with 325 million random weights and no multi-token heads)",
    )
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--sources",
        default="",
        help="ask about held-out images of this source (default: the model's own prompts)",
    )
    parser.add_argument(
        "--prompts", type=int, default=200, help="compared with and without drafts; a fifth of them is timed"
    )
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--tiles", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--parts", default="", help=f"some of {','.join(PARTS)} (default: all that the model supports)"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    if unknown := set(filter(None, args.parts.split(","))) - set(PARTS):
        raise UsageError(f"--parts: no part is named {sorted(unknown)[0]!r}; there are {', '.join(PARTS)}")
    if args.checkpoint is None:
        with tempfile.TemporaryDirectory() as folder:
            measure(args, str(saved_model(Path(folder))))
    else:
        measure(args, args.checkpoint)


def measure(args: argparse.Namespace, checkpoint: str) -> None:
    results = {}
    for dtype in args.dtypes.split(","):
        predictor = Predictor.from_pretrained(checkpoint, dtype, args.device)
        heads = predictor.model.heads
        parts = (
            args.parts.split(",")
            if args.parts
            else [part for part in PARTS if args.checkpoint is not None or part not in DRAFTED]
        )
        if heads is None and DRAFTED & set(parts):
            raise UserError(
                f"{args.checkpoint or 'the random model'} has no multi-token heads: "
                "python -m tools.train_heads adds some, "
                f"or leave out --parts {', '.join(sorted(DRAFTED))}"
            )
        r: dict[str, Any] = {}
        if "plain" in parts:
            r["plain"] = plain(predictor.model, args.tokens, args.repeats)
        if "decode_steps" in parts:
            r["decode_steps"] = decode_steps(
                predictor.model, heads.count if heads is not None else 4, args.repeats
            )
        if DRAFTED & set(parts):
            questions = questions_of(predictor, HeadsConfig(sources=args.sources, seed=12345), args.prompts)
        if "drafts" in parts:
            fifth = max(1, args.prompts // 5)
            r["drafts"] = drafts(predictor, questions[:fifth], args.tokens, heads.count)
        if "wrong" in parts:
            r["wrong"] = wrong(predictor, questions[:WRONG])
        if "sampled" in parts:
            r["sampled"] = sampled(predictor, questions[: args.prompts // 10], args.tokens)
        if "same" in parts:
            r["same"] = same(predictor, questions, args.tokens)
        if "image" in parts and predictor.model.config.left_context == "image":
            r["image"] = image(predictor, args.tiles, args.repeats)
        results[dtype] = r
        show(dtype, r)
    if args.json:
        head = about() | {"device": args.device, "sources": args.sources, "tokens": args.tokens}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(head | results, indent=2) + "\n")


def show(dtype: str, r: dict[str, Any]) -> None:
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    table = Table("what", "figure", title=f"decoding, {dtype}, {machine}, {date.today()}")
    if p := r.get("plain"):
        table.add_row("plain decoding", f"{p['tokens_per_s']:.1f} tokens/s")
        table.add_row(
            "matmul roofline",
            f"{p['bare_products_per_s']:.1f} steps/s, {p['bare_gb_per_s']:.1f} GB/s; "
            f"decoding reaches {p['share_of_bare']:.0%} (minimum {p['share_least']:.0%})",
        )
    for name, cost in r.get("decode_steps", {}).items():
        kind, k, *rows = name.split("_")
        what = f"a step over {int(k) + 1} tokens" if kind == "verify" else f"drafting {k}"
        table.add_row(f"{what} ÷ a step over one" + ", of 8 rows" * bool(rows), f"{cost:.2f}")
    add_draft_rows(table, r)
    if i := r.get("image"):
        table.add_row(
            "first token, image new / cached",
            f"{i['cold_ms']:.0f} / {i['warm_ms']:.0f} ms: {i['ratio']:.1f} times "
            f"(minimum {i['ratio_least']:.1f}); answers equal: {i['equal']}",
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    run_script(main)
