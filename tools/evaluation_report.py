"""Write one self-contained HTML page of an evaluation: its scores, and its samples, worst first.

  python -m tools.evaluation_report runs/dual_tower_easyvqa/evaluation         → report.html in that folder
  python -m tools.evaluation_report runs/dual_tower_easyvqa/evaluation --output /tmp/report.html --limit 50

The folder is what `evaluation.py --output DIR` writes.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from markupsafe import Markup, escape

from configs.cli import FlagParser
from tools import pages
from tools.evaluation_results import TaskResult, finite, inside, plain, read_results
from utils.errors import UsageError, run_script
from utils.files import write_text

BEST = 12  # best samples, after the worst ones
LONGEST = 4000  # letters of a text; the rest is truncated
BINS = 10  # bars of a histogram
SIGNATURES = {b"\xff\xd8\xff": "jpeg", b"\x89PNG": "png"}
COLOURS = {"full marks": "good", "no marks": "bad"}


def _number(value: Any) -> str:
    """Format a number: 0.3148, 1,204.50, 17, NaN, –."""
    if not finite(value) or isinstance(value, bool):
        return plain(value)[:80] or "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}" if abs(value) < 10 else f"{value:,.2f}"


def picture(folder: Path, name: Any) -> tuple[str, str, bytes | str]:
    """Return an image file's name, kind and bytes; without an image, no kind, and the problem."""
    path = inside(folder, plain(name))
    data = path.read_bytes() if path else b""
    kind = next((kind for signature, kind in SIGNATURES.items() if data.startswith(signature)), "")
    return plain(name), kind, data if kind else "not an image" if path else "missing image"


def histogram(metric: str, values: list[float]) -> Markup:
    """Draw a histogram of scores from 0 to 1, or over their range if that is wider."""
    low, high = (0.0, 1.0) if all(0 <= v <= 1 for v in values) else (min(values), max(values))
    counts = Counter(min(int((v - low) / (high - low or 1.0) * BINS), BINS - 1) for v in values)
    bars = ""
    for i, n in sorted(counts.items()):
        x, top = 22 * i + 1, 70 - max(1.0, 56 * n / max(counts.values()))
        bars += f'<rect x="{x}" y="{top:.1f}" width="20" height="{70 - top:.1f}"/>'
        bars += f'<text x="{x + 10}" y="{top - 4:.1f}" text-anchor="middle">{n:,}</text>'
    axis = f'<path d="M0 70.5H220"/><text x="0" y="82">{low:.4g}</text>'
    axis += f'<text x="220" y="82" text-anchor="end">{high:.4g}</text>'
    caption = f"{escape(pages.printable(metric))}: {len(values):,} scores, mean {_number(fmean(values))}"
    label = f"histogram of {caption}"
    svg = f'<svg viewBox="0 0 220 86" role="img" aria-label="{label}">{bars}{axis}</svg>'
    return Markup(f"<figure>{svg}<figcaption>{caption}</figcaption></figure>")


def card(task: TaskResult, rank: int, sample: dict[str, Any], verdict: str) -> dict[str, Any]:
    """Return what the page shows of one sample."""
    given = sample.get("reference")
    return {
        "rank": rank,
        "id": plain(sample.get("id")),
        "images": [picture(task.folder, name) for name in sample["images"]],
        "prompt": plain(sample.get("prompt")),
        "references": [plain(text) for text in (given if isinstance(given, list) else [given]) or [None]],
        "answer": plain(sample.get("answer")),
        "verdict": verdict,
        "scores": [(metric, _number(value)) for metric, value in sample["scores"].items()],
    }


def score_rows(task: TaskResult) -> Iterator[tuple[Any, ...]]:
    """Yield metric, whether lower is better, note, score, standard error and random-weights baseline.

    Scores that are not above the baseline, or within two standard errors of it, have a note.
    """
    for metric, score in task.facts["scores"].items():
        error = task.facts["standard_errors"].get(metric)
        baseline, sign = task.facts["random_baseline"].get(metric), task.sign(metric)
        note = _baseline_note(score, error, baseline, sign)
        error_text = f"± {_number(error)}" if finite(error) else "–"
        yield metric, sign < 0, note, _number(score), error_text, _number(baseline)


def _baseline_note(score: Any, error: Any, baseline: Any, sign: int) -> str:
    if not finite(score) or not finite(baseline):
        return ""
    above = sign * (score - baseline)
    if finite(error) and abs(above) <= 2 * error:
        return "within two standard errors of random weights"
    return "no better than random weights" if above <= 0 else ""


def section(task: TaskResult, limit: int) -> dict[str, Any]:
    """Return what the page shows of a task: its `limit` worst samples, then the best of the others."""
    facts = task.facts
    labels = {
        "truncated": "{} answers truncated at the token limit",
        "seconds": "{} seconds",
        "tokens_per_s": "{} tokens/s",
        "task_hash": "task {}",
    }
    content: dict[str, Any] = {
        "name": task.name,
        "file": task.file,
        "count": _number(facts.get("samples")),
        "scores": list(score_rows(task)),
        "line": " · ".join(
            text.format(_number(facts[name])) for name, text in labels.items() if facts.get(name)
        ),
        "first_prompt": plain(facts["first_prompt"]) if facts.get("first_prompt") else "",
        "problems": [],
        "note": None,
        "best": [],
    }
    if task.samples is None:
        content["problems"] = [f"There is no {task.file} in this folder: no samples to show."]
        return content
    ranked, values = task.ranked(), task.values()
    count = facts.get("samples")
    if count not in (None, len(ranked)):
        counts = f"results.json counts {_number(count)} samples, {task.file} holds {len(ranked):,}"
        content["problems"] = [f"{counts}: they may be of two runs."]
    tops = {metric: 1 if max(scores) <= 1 else 100 for metric, scores in values.items()}
    scored = sum(key is not None for key, _ in ranked)
    worst = ranked[: limit or None]
    best = ranked[len(worst) : scored][::-1][:BEST]
    omitted = len(ranked) - len(worst) - len(best)
    note = f"{len(worst):,} of {len(ranked):,}"
    note += f", {omitted:,} left out (--limit 0 shows all)" * bool(omitted)
    note += f", {len(ranked) - scored:,} without a score (last)" * (scored < len(ranked))
    cards = [
        card(task, rank, sample, task.verdict(sample, tops)) for rank, (_, sample) in enumerate(worst, 1)
    ]
    best_cards = [card(task, scored - i, s, task.verdict(s, tops)) for i, (_, s) in enumerate(best)]
    histograms = [histogram(*pair) for pair in values.items()]
    return content | {"note": note, "histograms": histograms, "worst": cards, "best": best_cards}


def page(results: dict[str, Any], tasks: list[TaskResult], date: datetime, limit: int) -> str:
    """Draw the whole HTML page."""
    model = plain(results.get("model")) or "unnamed model"
    facts = {"evaluated": date.strftime("%Y-%m-%d %H:%M %Z")} | {
        part: ", ".join(f"{k} {plain(v)}" for k, v in results[part].items()) or "–"
        for part in ("versions", "settings")
    }
    return pages.render(
        "evaluation_report.html",
        title=f"{model}: evaluation",
        model=model,
        facts=facts,
        tasks=[section(task, limit) for task in tasks],
        warnings=[f"{task.name}: {plain(text)}" for task in tasks for text in task.facts["warnings"]],
        longest=LONGEST,
        colours=COLOURS,
    )


def main(argv: list[str]) -> None:
    parser = FlagParser(
        prog="python -m tools.evaluation_report",
        description=str(__doc__),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", help="folder that evaluation.py --output wrote")
    parser.add_argument("--output", metavar="FILE", help="file to write [DIR/report.html]")
    parser.add_argument(
        "--limit", type=int, default=200, help="samples shown of each task, the worst ones (0: all) [200]"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse(argv)
    if args.limit < 0:
        raise UsageError(f"--limit = {args.limit} must be 0 or more")
    folder = Path(args.folder)
    results = read_results(folder)
    output = folder / "report.html" if args.output is None else Path(args.output)
    if (
        (output.exists() and not output.is_file())
        or not output.parent.is_dir()
        or output.suffix in (".json", ".jsonl")
    ):
        raise UsageError(
            f"--output: '{output}' is no file, lies in a folder that does not exist, "
            "or has the name of JSON: give a file that ends in .html"
        )
    tasks = [TaskResult(name, facts, folder) for name, facts in results["tasks"].items()]
    date = datetime.fromtimestamp((folder / "results.json").stat().st_mtime).astimezone()
    text = page(results, tasks, date, args.limit)
    write_text(output, text)
    samples = sum(len(task.samples or []) for task in tasks)
    megabytes = len(text) / 2**20
    print(f"{output}: tasks {len(tasks)}, samples {samples}, {megabytes:.1f} MB; open it in a browser")


if __name__ == "__main__":
    run_script(main)
