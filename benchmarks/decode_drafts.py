"""The parts of `benchmarks.decode` about drafts: questions, measurements, table rows."""

import statistics
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from rich.table import Table

from configs.model import GenerationConfig
from eval.predictor import Predictor
from models.multi_token import Drafts, MultiTokenHeads
from tools.train_heads import HeadsConfig, question_batches
from utils.errors import UserError


def questions_of(predictor: Predictor, config: HeadsConfig, count: int) -> list[tuple[list[Any], str]]:
    """`count` held-out questions: (the images' tiles, text)."""
    out: list[tuple[list[Any], str]] = []
    for batch in question_batches(predictor, config, held_out=True):
        out += [([predictor.tiles(image) for image in images], text) for images, text in batch]
        if len(out) >= count:
            return out[:count]
    raise AssertionError("question_batches() does not end")


def drafts(
    predictor: Predictor, questions: list[Any], tokens: int, max_drafts: int
) -> dict[str, dict[str, float]]:
    """Answer each question alone, by plain decoding, with `auto` and with each number of drafts, in turn."""
    base = GenerationConfig(max_new_tokens=tokens, speculative="off")
    predictor.answer(questions[:1], base)
    kinds = {"plain": base, "auto": replace(base, speculative="auto")}
    for k in range(1, max_drafts + 1):
        kinds[f"K={k}"] = replace(base, speculative="on", draft_tokens=k)
    answers: dict[str, list[Any]] = {name: [] for name in kinds}
    for question in questions:
        predictor.answer([question], replace(base, max_new_tokens=1))  # encode its images
        for name, settings in kinds.items():
            answers[name].append(predictor.answer([question], settings)[0])
    out: dict[str, dict[str, float]] = {}
    timings = {name: [after_first_token(a, tokens) for a in column] for name, column in answers.items()}
    for name, column in answers.items():
        count, decode_steps, seconds = (sum(values) for values in zip(*timings[name], strict=True))
        if not decode_steps:
            raise UserError("the answers have one token or none: there is nothing to time")
        ratios = [
            (c / s) / (pc / ps)
            for (c, _, s), (pc, _, ps) in zip(timings[name], timings["plain"], strict=True)
            if c and pc
        ]
        pairs = list(zip(column, answers["plain"], strict=True))
        out[name] = {
            "tokens_per_s": count / seconds,
            "tokens_per_step": count / decode_steps,
            "speedup": count / seconds / (out["plain"]["tokens_per_s"] if out else count / seconds),
            "speedup_median": statistics.median(ratios),
            "speedup_least": min(ratios),
            "whole_call": statistics.median(
                a.tokens_per_s / p.tokens_per_s for a, p in pairs if a.tokens and p.tokens
            ),
            "tokens": sum(a.tokens for a in column) / len(column),
            "differ": sum(a.text != p.text for a, p in pairs),
        }
    return out


def wrong(predictor: Predictor, questions: list[Any]) -> dict[str, dict[str, float]]:
    """Whole calls with every draft wrong, by number of tokens, each in turn with a plain one."""
    original, out = MultiTokenHeads.draft, {}

    def draft(*arguments: Any) -> Drafts:
        result = original(*arguments)
        return result._replace(tokens=(result.tokens + 1) % predictor.model.vocabulary.text_size)

    for tokens in (16, 64, 256):
        ratios = []
        settings = GenerationConfig(max_new_tokens=tokens)
        for question in questions:
            plain = predictor.answer([question], replace(settings, speculative="off"))[0]
            with patch.object(MultiTokenHeads, "draft", draft):
                auto = predictor.answer([question], settings)[0]
            if plain.tokens == auto.tokens:
                ratios.append(auto.tokens_per_s / plain.tokens_per_s)
        out[str(tokens)] = {
            "speedup_median": statistics.median(ratios),
            "speedup_least": min(ratios),
            "answers": len(ratios),
        }
    return out


SAMPLED = {"temperature 0.7": {"temperature": 0.7}, "top-p 0.9": {"top_p": 0.9}, "top-k 50": {"top_k": 50}}


def sampled(predictor: Predictor, questions: list[Any], tokens: int) -> dict[str, dict[str, float]]:
    """Sampled answers to each question, with `auto` and without drafts, in turn."""
    out = {}
    for name, settings_of in SAMPLED.items():
        base = GenerationConfig(max_new_tokens=tokens, sampling=True, **settings_of)  # type: ignore[arg-type]
        kinds = {"plain": replace(base, speculative="off"), "auto": base}
        for settings in kinds.values():
            predictor.answer(questions[:1], settings)
        timings: dict[str, list[tuple[int, int, float]]] = {kind: [] for kind in kinds}
        for number, question in enumerate(questions):
            for kind, settings in kinds.items():
                answer = predictor.answer([question], replace(settings, seed=number))[0]
                timings[kind].append(after_first_token(answer, tokens))
        sums = {kind: [sum(column) for column in zip(*parts, strict=True)] for kind, parts in timings.items()}
        speed = {kind: count / seconds for kind, (count, _, seconds) in sums.items()}
        out[name] = {
            "tokens_per_s": speed["auto"],
            "speedup": speed["auto"] / speed["plain"],
            "tokens_per_step": sums["auto"][0] / sums["auto"][1],
        }
    return out


def after_first_token(answer: Any, max_tokens: int) -> tuple[int, int, float]:
    """Tokens, decode steps and seconds of an answer after its first token.

    The end token counts, so that plain decoding has one token per decode step.
    """
    if not answer.tokens:
        return 0, 0, 0.0
    return (
        answer.tokens - 1 + (answer.tokens < max_tokens),
        answer.decode_steps - 1,
        answer.tokens / answer.tokens_per_s - answer.ttft_ms / 1000,
    )


def same(predictor: Predictor, questions: list[Any], tokens: int) -> dict[str, int]:
    """Count the greedy answers that differ with drafts, at batch 1 and 8."""
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


def add_draft_rows(table: Table, results: dict[str, Any]) -> None:
    """Add the results of the measurements above to the printed table."""
    for name, d in results.get("drafts", {}).items():
        table.add_row(
            name,
            f"{d['tokens_per_s']:.1f} tokens/s, {d['tokens_per_step']:.2f} tokens per step, "
            f"{d['speedup']:.2f} × plain (median {d['speedup_median']:.2f}, minimum "
            f"{d['speedup_least']:.2f}; whole calls {d['whole_call']:.2f}); {d['differ']} answers differ",
        )
    for tokens, f in results.get("wrong", {}).items():
        table.add_row(
            f"answers of {tokens} tokens, all drafts wrong",
            f"{f['speedup_median']:.2f} × plain (minimum {f['speedup_least']:.2f} of {f['answers']} answers)",
        )
    for name, d in results.get("sampled", {}).items():
        table.add_row(
            f"sampled, {name}",
            f"{d['tokens_per_s']:.1f} tokens/s, {d['tokens_per_step']:.2f} tokens per step, "
            f"{d['speedup']:.2f} × plain",
        )
    if s := results.get("same"):
        table.add_row(
            "answers that drafts change",
            f"{s['differ_at_batch_1']} of {s['prompts']} at batch 1, {s['differ_at_batch_8']} at batch 8",
        )
