"""Decoding: tokens a second beside bare matrix-vector products, what drafts gain, what a kept image saves, and whether an answer changes.

  python -m benchmarks.decode --json benchmarks/results/decode.json                     random weights of SigLIP-B/16's and SmolLM2-135M's sizes: all but drafts
  python -m benchmarks.decode --checkpoint DIR --json benchmarks/results/decode.json
  python -m benchmarks.decode --checkpoint DIR --sources openmoji        questions with images, instead of the model's own prompts

DIR is a model folder, for the part on drafts with multi-token heads (python -m tools.train_heads). All that is compared is
measured in turn in one run; ratios are medians over repetitions, those of drafts of sums over the prompts, with the median and the least of a prompt beside.

plain     one row, greedy, no drafts: tokens/s, beside products of one vector with every weight that a token needs
passes    what a pass over K + 1 tokens costs, in passes over one: the ceiling of what drafts can gain
drafts    behind the first token: tokens a pass and tokens/s for chains of K drafts, a tree, and what the engine chooses, ÷ plain decoding of the same engine
first     first answers, for which nothing was measured yet, ÷ plain ones; and the same where every draft is wrong, whatever the heads promise
sampled   answers that are drawn: what the engine chooses ÷ plain ones, which are others of the same distribution
same      greedy answers with and without drafts, batch 1 and 8: how many differ
image     the first token of a second question on an image, beside a first question's
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import models.generation
from benchmarks.about import about
from benchmarks.first_answer import saved_model
from configs.model import GenerationConfig
from eval.predictor import Predictor
from models.draft_scheduler import TREE
from models.generation import prefill, verify
from tools.train_heads import HeadsConfig, question_batches
from utils.errors import UsageError, UserError, run_script

FIRST = 6  # questions of `first`
PARTS = "plain", "decode_steps", "drafts", "first", "sampled", "same", "image"
DRAFTED = {"drafts", "first", "sampled", "same"}  # parts that need multi-token heads
ROOT = Path(__file__).resolve().parent.parent


def median_s(function: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a call; the first is not counted."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


@torch.inference_mode()
def plain(predictor: Predictor, tokens: int, repeats: int) -> dict[str, float]:
    """One step of decoding, its model part, and bare products over the same weights, in turn."""
    model = predictor.model
    right, device = model.right, model.device
    weights = [m.weight for m in right.layers.modules() if isinstance(m, torch.nn.Linear)] + [
        right.unembedding
    ]
    vectors = {
        n: torch.randn(1, n, device=device).to(right.unembedding.dtype) for n in {w.shape[1] for w in weights}
    }
    prompt = predictor.renderer.prompt([], [{"user": "Tell me a long story."}])
    ids, positions = (
        torch.tensor([prompt.right_ids], device=device),
        torch.tensor([prompt.right_positions], device=device),
    )
    products, step = [], []
    for _ in range(repeats):
        products.append(median_s(lambda: [F.linear(vectors[w.shape[1]], w) for w in weights], 5))
        cache, states = prefill(model, ids, positions, [[]], tokens)
        state, place = states[:, -1], ids.shape[1]
        started = time.perf_counter()
        for i in range(tokens):
            token = right.logits(state).max(-1).indices
            token.item()  # as streaming does
            state = verify(model, cache, token[:, None], torch.full((1, 1), place + i, device=device))[:, 0]
        step.append((time.perf_counter() - started) / tokens)
    gigabytes = sum(w.numel() * w.element_size() for w in weights) / 1e9
    return {
        "tokens_per_s": 1 / statistics.median(step),
        "bare_products_per_s": 1 / statistics.median(products),
        "share_of_bare": statistics.median(p / s for p, s in zip(products, step, strict=True)),
        "share_least": min(p / s for p, s in zip(products, step, strict=True)),
        "weights_gb": gigabytes,
        "bare_gb_per_s": gigabytes / statistics.median(products),
    }


@torch.inference_mode()
def decode_steps(predictor: Predictor, most: int, repeats: int) -> dict[str, float]:
    """Cost of a pass over K + 1 tokens behind 200 others ÷ of one over 1 token, and of K drafts ÷ the same, the tree's too; logits included."""
    model, device = predictor.model, predictor.model.device
    right = model.right
    ids = torch.randint(0, 1000, (1, 200), device=device)
    cache, states = prefill(model, ids, torch.arange(200, device=device)[None], [[]], TREE + 1)
    lengths, state = cache.lengths, states[:, -1]
    heads = predictor.model.heads
    unembed = heads.unembedder(right.unembedding) if heads is not None else None

    def run(count: int) -> None:
        cache.lengths = lengths
        tokens, places = ids[:, :count], torch.arange(200, 200 + count, device=device)[None]
        right.logits(verify(model, cache, tokens, places)).max(-1).indices.tolist()

    def draft(count: int) -> None:
        heads.draft(
            right.embed_tokens,
            unembed,
            state,
            ids[:, 0],
            count,
            lambda logits: (logits.max(-1).indices, None),
        ).tokens.tolist()

    def tree() -> None:
        heads.tree(
            right.embed_tokens, unembed, state, ids[:, 0], heads.count, GenerationConfig().draft_width, TREE
        ).tokens.tolist()

    out: dict[str, list[float]] = {}
    for _ in range(repeats):
        one = median_s(lambda: run(1), 8)
        for k in (*range(1, most + 1), TREE):
            out.setdefault(f"verify_{k}", []).append(median_s(lambda k=k: run(k + 1), 8) / one)
        for k in range(1, most + 1) if heads is not None else ():
            out.setdefault(f"draft_{k}", []).append(median_s(lambda k=k: draft(k), 8) / one)
        if heads is not None:
            out.setdefault("draft_tree", []).append(median_s(tree, 8) / one)
    return {name: statistics.median(values) for name, values in out.items()}


def questions_of(predictor: Predictor, config: HeadsConfig, count: int) -> list[tuple[list[Any], str]]:
    out: list[tuple[list[Any], str]] = []
    for batch in question_batches(predictor, config, held_out=True):
        out += [([predictor.tiles(image) for image in images], text) for images, text in batch]
        if len(out) >= count:
            return out[:count]
    raise AssertionError("question_batches() does not end")


def drafts(
    predictor: Predictor, questions: list[Any], untimed: list[Any], tokens: int, most: int
) -> dict[str, dict[str, float]]:
    """Every prompt answered alone, by plain decoding and with each shape of drafts, in turn; what chooses between these has answered the `untimed` before."""
    base = GenerationConfig(max_new_tokens=tokens, speculative="off")
    predictor.answer(questions[:1], base)
    kinds = {
        "plain": base,
        "auto": replace(base, speculative="auto"),
        "tree": replace(base, speculative="on"),
    }
    kinds |= {
        f"K={k}": replace(base, speculative="on", draft_tokens=k, draft_width=1) for k in range(1, most + 1)
    }
    for question in untimed:
        predictor.answer([question], kinds["auto"])
    made: dict[str, list[Any]] = {name: [] for name in kinds}
    for question in questions:
        predictor.answer([question], replace(base, max_new_tokens=1))  # its images are encoded
        for name, settings in kinds.items():
            made[name].append(predictor.answer([question], settings)[0])
    out = {}
    behind = {name: [behind_first(a, tokens) for a in answers] for name, answers in made.items()}
    for name, answers in made.items():
        count, decode_steps, seconds = (sum(column) for column in zip(*behind[name], strict=True))
        if not decode_steps:
            raise UserError("the answers have one token or none: there is nothing to time")
        ratios = [
            (c / s) / (pc / ps)
            for (c, _, s), (pc, _, ps) in zip(behind[name], behind["plain"], strict=True)
            if c and pc
        ]
        out[name] = {
            "tokens_per_s": count / seconds,
            "tokens_per_step": count / decode_steps,
            "speedup": count / seconds / (out["plain"]["tokens_per_s"] if out else count / seconds),
            "speedup_median": statistics.median(ratios),
            "speedup_least": min(ratios),
            "whole_call": statistics.median(
                a.tokens_per_s / p.tokens_per_s
                for a, p in zip(answers, made["plain"], strict=True)
                if a.tokens and p.tokens
            ),
            "tokens": sum(a.tokens for a in answers) / len(answers),
            "differ": sum(a.text != p.text for a, p in zip(answers, made["plain"], strict=True)),
        }
    return out


def first(predictor: Predictor, questions: list[Any]) -> dict[str, dict[str, float]]:
    """Whole calls, each in turn with a plain one; kernels are prepared, but what drafts cost and how often they stand is not known."""
    shapes, drafted, out = predictor.model.heads.schedulers, models.generation._drafts, {}

    def wrong(*arguments: Any) -> Any:
        made = drafted(*arguments)
        return made._replace(tokens=(made.tokens + 1) % predictor.model.vocabulary.text_size)

    for name, made in (("first", drafted), ("wrong", wrong)):
        for tokens in (16, 64, 256):
            ratios = []
            for question in questions:
                shapes.clear()
                with patch.object(models.generation, "_drafts", made):
                    plain, auto = (
                        predictor.answer(
                            [question], GenerationConfig(max_new_tokens=tokens, speculative=mode)
                        )[0]
                        for mode in ("off", "auto")
                    )  # type: ignore[arg-type]
                if plain.tokens == auto.tokens:
                    ratios.append(auto.tokens_per_s / plain.tokens_per_s)
            out[f"{name}_{tokens}"] = {
                "speedup_median": statistics.median(ratios),
                "speedup_least": min(ratios),
                "answers": len(ratios),
            }
    return out


SAMPLED = {"temperature 0.7": {"temperature": 0.7}, "top-p 0.9": {"top_p": 0.9}, "top-k 50": {"top_k": 50}}


def sampled(predictor: Predictor, questions: list[Any], tokens: int) -> dict[str, dict[str, float]]:
    """Drawn answers to each question, with what the engine chooses and without drafts, in turn."""
    out = {}
    for name, how in SAMPLED.items():
        base = GenerationConfig(max_new_tokens=tokens, sampling=True, **how)  # type: ignore[arg-type]
        kinds = {"plain": replace(base, speculative="off"), "auto": base}
        for settings in kinds.values():
            predictor.answer(questions[:1], settings)
        made: dict[str, list[tuple[int, int, float]]] = {kind: [] for kind in kinds}
        for number, question in enumerate(questions):
            for kind, settings in kinds.items():
                made[kind].append(
                    behind_first(predictor.answer([question], replace(settings, seed=number))[0], tokens)
                )
        sums = {kind: [sum(column) for column in zip(*parts, strict=True)] for kind, parts in made.items()}
        speed = {kind: count / seconds for kind, (count, _, seconds) in sums.items()}
        out[name] = {
            "tokens_per_s": speed["auto"],
            "speedup": speed["auto"] / speed["plain"],
            "tokens_per_step": sums["auto"][0] / sums["auto"][1],
        }
    return out


def behind_first(answer: Any, most: int) -> tuple[int, int, float]:
    """Of an answer, behind its first token: tokens (the one that ends it is one), passes, seconds. So plain decoding makes one token a pass."""
    if not answer.tokens:
        return 0, 0, 0.0
    return (
        answer.tokens - 1 + (answer.tokens < most),
        answer.decode_steps - 1,
        answer.tokens / answer.tokens_per_s - answer.ttft_ms / 1000,
    )


def same(predictor: Predictor, questions: list[Any], tokens: int) -> dict[str, int]:
    """How many of the answers differ with drafts, batch 1 and 8."""
    out = {"prompts": len(questions)}
    for size in (1, 8):
        differ = 0
        for start in range(0, len(questions), size):
            part = questions[start : start + size]
            on, off = (
                predictor.answer(part, GenerationConfig(max_new_tokens=tokens, speculative=mode))
                for mode in ("on", "off")
            )  # type: ignore[arg-type]
            differ += sum(a.text != b.text for a, b in zip(on, off, strict=True))
        out[f"differ_at_batch_{size}"] = differ
    return out


def image(predictor: Predictor, tiles: int, repeats: int) -> dict[str, float]:
    """First token of a first and of a second question on pictures of that many tiles; and whether a kept image changes the answer."""
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
        help="a model folder, for drafts with multi-token heads; without it one of 325 million random weights is made, which has none",
    )
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--sources",
        default="",
        help="questions on held-out images of this source; none: the model's own prompts",
    )
    parser.add_argument(
        "--prompts", type=int, default=200, help="that must not change with drafts; a fifth of them is timed"
    )
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--tiles", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--parts", default="", help=f"some of {','.join(PARTS)}; without it all that the model can do"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    if unknown := set(filter(None, args.parts.split(","))) - set(PARTS):
        raise UsageError(f"--parts: no part is named {sorted(unknown)[0]!r}; there are {', '.join(PARTS)}")
    if args.checkpoint is None:
        with tempfile.TemporaryDirectory() as place:
            measure(args, str(saved_model(Path(place))))
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
                f"{args.checkpoint or 'a model that is made for this'} has no multi-token heads: python -m tools.train_heads gives it some, or leave out --parts {', '.join(sorted(DRAFTED))}"
            )
        r: dict[str, Any] = {}
        if "plain" in parts:
            r["plain"] = plain(predictor, args.tokens, args.repeats)
        if "decode_steps" in parts:
            r["decode_steps"] = decode_steps(predictor, heads.count if heads is not None else 4, args.repeats)
        if DRAFTED & set(parts):
            questions = questions_of(predictor, HeadsConfig(sources=args.sources, seed=12345), args.prompts)
        if "drafts" in parts:
            fifth = max(1, args.prompts // 5)
            r["drafts"] = drafts(
                predictor, questions[:fifth], questions[fifth : 2 * fifth], args.tokens, heads.count
            )
        if "first" in parts:
            r["first"] = first(predictor, questions[:FIRST])
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
    table = Table(
        "what",
        "figure",
        title=f"decoding, {dtype}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores, {date.today()}",
    )
    if p := r.get("plain"):
        table.add_row("plain decoding", f"{p['tokens_per_s']:.1f} tokens/s")
        table.add_row(
            "bare products over the same weights",
            f"{p['bare_products_per_s']:.1f} a second, {p['bare_gb_per_s']:.1f} GB/s; decoding reaches {p['share_of_bare']:.0%} of that (least {p['share_least']:.0%})",
        )
    for name, cost in r.get("decode_steps", {}).items():
        kind, k = name.split("_")
        table.add_row(
            f"{'a pass over ' + str(int(k) + 1) + ' tokens' if kind == 'verify' else 'drafting ' + k} ÷ a pass over one",
            f"{cost:.2f}",
        )
    for name, d in r.get("drafts", {}).items():
        table.add_row(
            name,
            f"{d['tokens_per_s']:.1f} tokens/s, {d['tokens_per_pass']:.2f} tokens a pass, {d['speedup']:.2f} × plain (median {d['speedup_median']:.2f}, least {d['speedup_least']:.2f}; "
            f"whole calls {d['whole_call']:.2f}); {d['differ']} answers differ",
        )
    for name, f in r.get("first", {}).items():
        kind, tokens = name.split("_")
        table.add_row(
            f"a first answer of {tokens} tokens" + ", all drafts wrong" * (kind == "wrong"),
            f"{f['speedup_median']:.2f} × plain (least {f['speedup_least']:.2f} of {f['answers']} answers)",
        )
    for name, d in r.get("sampled", {}).items():
        table.add_row(
            f"drawn, {name}",
            f"{d['tokens_per_s']:.1f} tokens/s, {d['tokens_per_pass']:.2f} tokens a pass, {d['speedup']:.2f} × plain",
        )
    if s := r.get("same"):
        table.add_row(
            "answers that drafts change",
            f"{s['differ_at_batch_1']} of {s['prompts']} at batch 1, {s['differ_at_batch_8']} at batch 8",
        )
    if i := r.get("image"):
        table.add_row(
            "first token, image new / kept",
            f"{i['cold_ms']:.0f} / {i['warm_ms']:.0f} ms: {i['ratio']:.1f} times (least {i['ratio_least']:.1f}); answers equal: {i['equal']}",
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    run_script(main)
