"""Write one self-contained HTML page of an evaluation: its scores, and its samples, worst first.

  python -m tools.evaluation_report runs/dual_tower_easyvqa/evaluation         → report.html in that folder
  python -m tools.evaluation_report runs/dual_tower_easyvqa/evaluation --output /tmp/report.html --limit 50

The folder is what `evaluation.py --output DIR` writes.
"""

import argparse
import base64
import html
from collections import Counter
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from configs.cli import FlagParser
from tools.evaluation_results import TaskResult, finite, inside, plain, read_results
from utils.errors import UsageError, run_script
from utils.files import write_text

STYLE = Path(__file__).with_suffix(".css")
BEST = 12  # best samples, after the worst ones
LONGEST = 4000  # letters of a text; the rest is truncated
BINS = 10  # bars of a histogram
SIGNATURES = {b"\xff\xd8\xff": "jpeg", b"\x89PNG": "png"}
# Not printable to Python, but part of good text: line ends, wide spaces, joiners.
PRINTABLE = "\n\t\u00a0\u3000\u200c\u200d"
COLOURS = {"full marks": "good", "no marks": "bad"}


def _escape(value: Any, longest: int | None = None) -> str:
    """Escape markup, unprintable letters, and those that change the writing direction."""
    letters = plain(value)[:longest]
    text = "".join(c if c.isprintable() or c in PRINTABLE else f"\\u{ord(c):04x}" for c in letters)
    return html.escape(text, quote=True)


def _number(value: Any) -> str:
    """Format a number: 0.3148, 1,204.50, 17, NaN, –."""
    if not finite(value) or isinstance(value, bool):
        return _escape(value, 80) or "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}" if abs(value) < 10 else f"{value:,.2f}"


def block(value: Any, file: str, kind: str = "") -> str:
    """Draw a text with its own lines and direction; a very long one is truncated, with a note."""
    text = plain(value)
    if not text.strip():
        return f'<div class="text quiet {kind}">{"(nothing but white space)" if text else "(empty)"}</div>'
    more = ""
    if len(text) > LONGEST:
        more = f'<p class="quiet">cut here: {_escape(file)} has all {len(text):,} characters</p>'
    return f'<div class="text {kind}" dir="auto">{_escape(text, LONGEST)}</div>{more}'


def picture(folder: Path, name: Any) -> str:
    """Embed an image file as a data URI, byte for byte, or a note if there is none."""
    path = inside(folder, plain(name))
    data = path.read_bytes() if path else b""
    kind = next((kind for signature, kind in SIGNATURES.items() if data.startswith(signature)), None)
    if kind is None:
        problem = "not an image" if path else "missing image"
        return f'<span class="missing">{problem}: {_escape(name, 120)}</span>'
    return f'<img src="data:image/{kind};base64,{base64.b64encode(data).decode()}" alt="{_escape(name)}">'


def histogram(metric: str, values: list[float]) -> str:
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
    caption = f"{_escape(metric)}: {len(values):,} scores, mean {_number(fmean(values))}"
    label = f"histogram of {caption}"
    svg = f'<svg viewBox="0 0 220 86" role="img" aria-label="{label}">{bars}{axis}</svg>'
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def card(task: TaskResult, rank: int, sample: dict[str, Any], verdict: str) -> str:
    """Draw one sample: images, and beside them prompt, references, answer and scores."""
    file, given = task.file, sample.get("reference")
    references = "".join(block(r, file) for r in (given if isinstance(given, list) else [given]) or [None])
    answer = block(sample.get("answer"), file, f"answer {COLOURS.get(verdict, '')}")
    scores = (
        ", ".join(f"{_escape(metric)} <b>{_number(value)}</b>" for metric, value in sample["scores"].items())
        or "none"
    )
    rows = {
        "prompt": block(sample.get("prompt"), file),
        "reference": references,
        f"answer <small>{verdict and f'({verdict})'}</small>": answer,
        "scores": scores,
    }
    fields = "".join(f"<dt>{name}</dt><dd>{content}</dd>" for name, content in rows.items())
    images = "".join(picture(task.folder, name) for name in sample["images"])
    images = images or '<span class="quiet">no image</span>'
    title = f"{rank:,} <small>sample {_escape(sample.get('id'), 80)}</small>"
    return f'<article><h4>{title}</h4><div class="pictures">{images}</div><dl>{fields}</dl></article>'


def score_table(tasks: list[TaskResult]) -> str:
    """Tabulate scores, standard errors and random-weights baselines.

    Scores that are not above the baseline, or within two standard errors of it, have a note.
    """
    rows = [
        "<thead><tr><th>metric</th><th>score</th><th>standard error</th><th>random weights</th></tr></thead>"
    ]
    for number, task in enumerate(tasks, 1):
        link = f'<a href="#task-{number}">{_escape(task.name)}</a>'
        count = f"<small>{_number(task.facts.get('samples'))} samples</small>"
        rows.append(f'<tr class="task"><th colspan="4">{link} {count}</th></tr>')
        for metric, score in task.facts["scores"].items():
            error = task.facts["standard_errors"].get(metric)
            baseline = task.facts["random_baseline"].get(metric)
            mark = _baseline_note(score, error, baseline, task.sign(metric))
            notes = "<small>lower is better</small> " * (task.sign(metric) < 0)
            notes += f"<em>{mark}</em>" * bool(mark)
            cells = (
                f"{_escape(metric)} {notes}",
                _number(score),
                f"± {_number(error)}" if finite(error) else "–",
                _number(baseline),
            )
            rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    footnote = "Random weights: the same model untrained, scored with the same matcher, where known."
    return f'<div class="wide"><table>{"".join(rows)}</table></div><p class="quiet">{footnote}</p>'


def _baseline_note(score: Any, error: Any, baseline: Any, sign: int) -> str:
    if not finite(score) or not finite(baseline):
        return ""
    above = sign * (score - baseline)
    if finite(error) and abs(above) <= 2 * error:
        return "within two standard errors of random weights"
    return "no better than random weights" if above <= 0 else ""


def section(task: TaskResult, number: int, limit: int) -> str:
    """Draw a task: its first prompt, the distribution of its scores, and its samples."""
    facts, file = task.facts, _escape(task.file)
    labels = {
        "truncated": "{} answers truncated at the token limit",
        "seconds": "{} seconds",
        "tokens_per_s": "{} tokens/s",
        "task_hash": "task {}",
    }
    line = " · ".join(text.format(_number(facts[name])) for name, text in labels.items() if facts.get(name))
    out = f'<h2>{_escape(task.name)}</h2><p class="quiet">{line}</p>'
    if facts.get("first_prompt"):
        summary = "<summary>the first prompt, as the model reads it</summary>"
        out += f"<details>{summary}{block(facts['first_prompt'], 'results.json')}</details>"
    if task.samples is None:
        out += f'<p class="missing">There is no {file} in this folder: no samples to show.</p>'
    else:
        out += _samples(task, number, limit)
    return f'<section id="task-{number}">{out}</section>'


def _samples(task: TaskResult, number: int, limit: int) -> str:
    """Draw the histograms of a task's scores, then its `limit` worst samples, then the best of the others."""
    ranked, values, out = task.ranked(), task.values(), []
    count = task.facts.get("samples")
    if count not in (None, len(ranked)):
        counts = f"results.json counts {_number(count)} samples, {_escape(task.file)} holds {len(ranked):,}"
        out.append(f'<p class="missing">{counts}: they may be of two runs.</p>')
    tops = {metric: 1 if max(scores) <= 1 else 100 for metric, scores in values.items()}
    scored = sum(key is not None for key, _ in ranked)
    worst = ranked[: limit or None]
    best = ranked[len(worst) : scored][::-1][:BEST]
    omitted = len(ranked) - len(worst) - len(best)
    note = f"{len(worst):,} of {len(ranked):,}"
    note += f", {omitted:,} left out (--limit 0 shows all)" * bool(omitted)
    note += f", {len(ranked) - scored:,} without a score (last)" * (scored < len(ranked))
    note += f', <a href="#best-{number}">the {len(best)} best</a> at the end' * bool(best)
    out.append(f'<div class="histograms">{"".join(histogram(*pair) for pair in values.items())}</div>')
    out.append(f"<h3>Worst first <small>{note}</small></h3>")
    out += [card(task, rank, sample, task.verdict(sample, tops)) for rank, (_, sample) in enumerate(worst, 1)]
    if best:
        title = f"Best first <small>{len(best)} of those not shown above</small>"
        out.append(f'<h3 id="best-{number}">{title}</h3>')
    out += [card(task, scored - i, sample, task.verdict(sample, tops)) for i, (_, sample) in enumerate(best)]
    return "".join(out)


def page(results: dict[str, Any], tasks: list[TaskResult], date: datetime, limit: int) -> str:
    """Draw the whole HTML page.

    All text of the evaluation is escaped. The content security policy also forbids scripts and fetches.
    """
    model = _escape(plain(results.get("model")) or "unnamed model")
    facts = {"evaluated": date.strftime("%Y-%m-%d %H:%M %Z")} | {
        part: ", ".join(f"{k} {plain(v)}" for k, v in results[part].items())
        for part in ("versions", "settings")
    }
    head = "".join(f"<dt>{name}</dt><dd>{_escape(value or '–')}</dd>" for name, value in facts.items())
    warnings = "".join(
        f"<li>{_escape(task.name)}: {_escape(text)}</li>" for task in tasks for text in task.facts["warnings"]
    )
    sections = "".join(section(task, number, limit) for number, task in enumerate(tasks, 1))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">\
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" \
content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{model}: evaluation</title><style>{STYLE.read_text(encoding="utf-8")}</style></head><body>
<header><h1>{model}</h1><dl>{head}</dl></header>
{score_table(tasks)}{f'<h2>Warnings</h2><ul class="warnings">{warnings}</ul>' if warnings else ""}
{sections}
</body></html>
"""


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
