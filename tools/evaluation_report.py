"""Look at an evaluation: its scores, and its samples, worst first, images beside the answers. One HTML page that needs nothing else.

  python -m tools.evaluation_report runs/dual_tower_easyvqa/evaluation                                    → report.html in that folder
  python -m tools.evaluation_report runs/dual_tower_easyvqa/evaluation --output /tmp/report.html --limit 50

The folder is what `evaluation.py --output DIR` writes.
"""

import argparse
import base64
import html
import json
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from configs.cli import FlagParser
from utils.errors import UsageError, UserError, run_script
from utils.files import file_name, read_json, write_text

FORMAT = 2  # of results.json
BEST, LONGEST, BINS = (
    12,
    4000,
    10,
)  # samples shown from the other end; letters of a text that are shown; bars of a histogram
SIGNATURES = {b"\xff\xd8\xff": "jpeg", b"\x89PNG": "png"}
KEPT = "\n\t\u00a0\u3000\u200c\u200d"  # not printable to Python, but part of good text: line ends, wide spaces, joiners
COLOURS = {"full marks": "good", "no marks": "bad"}
PARTS = {
    "scores": dict,
    "standard_errors": dict,
    "random_baseline": dict,
    "higher_is_better": dict,
    "warnings": list,
}


@dataclass(frozen=True)
class TaskResult:
    """One task of results.json, in the folder that also holds its samples."""

    name: str
    facts: dict[str, Any]
    folder: Path

    @property
    def file(self) -> str:
        return f"samples_{file_name(self.name)}.jsonl"

    @cached_property
    def samples(self) -> list[dict[str, Any]] | None:
        """What the samples file holds; None where there is none."""
        if (path := _inside(self.folder, self.file)) is None:
            return None
        samples, mend = [], "delete that line, or evaluate again"
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            where = f"{self.folder / self.file}, line {number}"
            if line.strip():
                try:
                    samples.append(json.loads(line.decode()))
                except (ValueError, RecursionError) as error:
                    raise UserError(
                        f"{where} is not valid JSON ({getattr(error, 'msg', error)}): {mend}"
                    ) from None
                _fill(samples[-1], {"images": list, "scores": dict}, where, mend)
        return samples

    @cached_property
    def lower(self) -> set[str]:
        """The metrics of which lower is better. A group names them `task: metric`, its samples `metric`."""
        names = [name for name, higher in self.facts["higher_is_better"].items() if higher is False]
        return {*names, *(name.rpartition(": ")[2] for name in names)}

    def sign(self, metric: str) -> int:
        return -1 if metric in self.lower else 1

    def values(self) -> dict[str, list[float]]:
        """The finite scores of all samples, by metric."""
        scores = [
            (metric, value)
            for sample in self.samples or []
            for metric, value in sample["scores"].items()
            if _finite(value)
        ]
        return {metric: [float(value) for name, value in scores if name == metric] for metric in dict(scores)}

    def ranked(self) -> list[tuple[float | None, dict[str, Any]]]:
        """(key, sample), worst first: the key is the mean score, where lower is better of the negative. Ties keep the file's order; None comes last."""
        scores = [
            [self.sign(metric) * value for metric, value in s["scores"].items() if _finite(value)]
            for s in self.samples or []
        ]
        pairs = [
            (fmean(values) if values else None, s)
            for values, s in zip(scores, self.samples or [], strict=True)
        ]
        return sorted(pairs, key=lambda pair: (pair[0] is None, pair[0] or 0.0))

    def verdict(self, sample: dict[str, Any], tops: dict[str, int]) -> str:
        """`full marks` or `no marks` where all scores of a sample say so, else nothing. `tops`: how far up each metric goes."""
        said = set()
        for metric, score in sample["scores"].items():
            if isinstance(score, int | float):
                full, none = (tops.get(metric, 1), 0)[:: self.sign(metric)]
                said.add("full marks" if score == full else "no marks" if score == none else "")
        return said.pop() if len(said) == 1 else ""


def _finite(value: Any) -> bool:
    return (
        isinstance(value, int | float) and abs(value) < 1e300
    )  # neither NaN, nor an integer beyond all floats


def _inside(folder: Path, name: str) -> Path | None:
    """File `name` of a folder; None where there is none, or where a path or a link leads out of the folder."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return None
    try:
        path = (folder / name).resolve(strict=True)
        return path if path.is_relative_to(folder.resolve()) and path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # missing, no possible name, links in a circle
        return None


def _fill(holder: Any, parts: dict[str, type], where: str, mend: str = "evaluate again") -> None:
    """Raise unless `holder` is an object with parts of these types. What may be missing from it is there afterwards, and empty."""
    if not isinstance(holder, dict):
        raise UserError(f"{where} is not an object: {mend}")
    for key, kind in parts.items():
        holder[key] = holder.get(key) or kind()
        if not isinstance(holder[key], kind):
            raise UserError(f"{where}: '{key}' is not {'an object' if kind is dict else 'a list'}: {mend}")


def read_results(folder: Path) -> dict[str, Any]:
    """results.json, checked."""
    path = folder / "results.json"
    if not path.is_file():
        raise UsageError(
            f"{folder} {'holds no results.json' if folder.is_dir() else 'is no folder'}: give the one that evaluation.py --output wrote"
        )
    results = read_json(path)
    made = results.get("format", 0) if isinstance(results, dict) else 0
    if made != FORMAT:
        why = (
            "made by a newer version, update this project"
            if _finite(made) and made > FORMAT
            else "made by an older version, or by something else; evaluate again"
        )
        raise UserError(f"{path} is of format {_plain(made)[:80]}, not {FORMAT}: {why}")
    _fill(results, {"settings": dict, "versions": dict, "tasks": dict}, str(path))
    for name, facts in results["tasks"].items():
        _fill(facts, PARTS, f"{path}: task '{name}'")
    return results


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def _escape(value: Any, longest: int | None = None) -> str:
    """Text that is no markup; letters that print nothing, or turn the writing around, are shown as escapes."""
    return html.escape(
        "".join(c if c.isprintable() or c in KEPT else f"\\u{ord(c):04x}" for c in _plain(value)[:longest]),
        quote=True,
    )


def _number(value: Any) -> str:
    """0.3148, 1,204.50, 17, NaN, –."""
    if not _finite(value) or isinstance(value, bool):
        return _escape(value, 80) or "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}" if abs(value) < 10 else f"{value:,.2f}"


def block(value: Any, file: str, kind: str = "") -> str:
    """A text as it stands, its lines and direction kept; a very long one is cut, with a note."""
    text = _plain(value)
    if not text.strip():
        return f'<div class="text quiet {kind}">{"(nothing but white space)" if text else "(empty)"}</div>'
    more = (
        f'<p class="quiet">cut here: {_escape(file)} has all {len(text):,} characters</p>'
        if len(text) > LONGEST
        else ""
    )
    return f'<div class="text {kind}" dir="auto">{_escape(text, LONGEST)}</div>{more}'


def picture(folder: Path, name: Any) -> str:
    """An image of the folder as a data URI, byte for byte, or a text in its place."""
    path = _inside(folder, _plain(name))
    data = path.read_bytes() if path else b""
    kind = next((kind for signature, kind in SIGNATURES.items() if data.startswith(signature)), None)
    if kind is None:
        return f'<span class="missing">{"not an image" if path else "missing image"}: {_escape(name, 120)}</span>'
    return f'<img src="data:image/{kind};base64,{base64.b64encode(data).decode()}" alt="{_escape(name)}">'


def histogram(metric: str, values: list[float]) -> str:
    """How often which score: bars from 0 to 1, or over the range there is."""
    low, high = (0.0, 1.0) if all(0 <= v <= 1 for v in values) else (min(values), max(values))
    counts = Counter(min(int((v - low) / (high - low or 1.0) * BINS), BINS - 1) for v in values)
    bars = ""
    for x, top, n in (
        (22 * i + 1, 70 - max(1.0, 56 * n / max(counts.values())), n) for i, n in sorted(counts.items())
    ):
        bars += f'<rect x="{x}" y="{top:.1f}" width="20" height="{70 - top:.1f}"/><text x="{x + 10}" y="{top - 4:.1f}" text-anchor="middle">{n:,}</text>'
    axis = f'<path d="M0 70.5H220"/><text x="0" y="82">{low:.4g}</text><text x="220" y="82" text-anchor="end">{high:.4g}</text>'
    told = f"{_escape(metric)}: {len(values):,} scores, mean {_number(fmean(values))}"
    return f'<figure><svg viewBox="0 0 220 86" role="img" aria-label="histogram of {told}">{bars}{axis}</svg><figcaption>{told}</figcaption></figure>'


def card(task: TaskResult, rank: int, sample: dict[str, Any], verdict: str) -> str:
    """One sample: images, and beside them prompt, references, answer and scores."""
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
    told = "".join(f"<dt>{name}</dt><dd>{shown}</dd>" for name, shown in rows.items())
    images = (
        "".join(picture(task.folder, name) for name in sample["images"])
        or '<span class="quiet">no image</span>'
    )
    return f'<article><h4>{rank:,} <small>sample {_escape(sample.get("id"), 80)}</small></h4><div class="pictures">{images}</div><dl>{told}</dl></article>'


def score_table(tasks: list[TaskResult]) -> str:
    """Scores, their standard errors and random-weights baselines; what an untrained model might have scored as well is marked in words."""
    rows = [
        "<thead><tr><th>metric</th><th>score</th><th>standard error</th><th>random weights</th></tr></thead>"
    ]
    for number, task in enumerate(tasks, 1):
        rows.append(
            f'<tr class="task"><th colspan="4"><a href="#task-{number}">{_escape(task.name)}</a> <small>{_number(task.facts.get("samples"))} samples</small></th></tr>'
        )
        for metric, score in task.facts["scores"].items():
            error, baseline = (
                task.facts["standard_errors"].get(metric),
                task.facts["random_baseline"].get(metric),
            )
            above = task.sign(metric) * (score - baseline) if _finite(score) and _finite(baseline) else None
            near = above is not None and _finite(error) and abs(above) <= 2 * error
            mark = (
                "within two standard errors of random weights"
                if near
                else "no better than random weights"
                if above is not None and above <= 0
                else ""
            )
            notes = "<small>lower is better</small> " * (task.sign(metric) < 0) + f"<em>{mark}</em>" * bool(
                mark
            )
            cells = (
                f"{_escape(metric)} {notes}",
                _number(score),
                f"± {_number(error)}" if _finite(error) else "–",
                _number(baseline),
            )
            rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f'<div class="wide"><table>{"".join(rows)}</table></div><p class="quiet">Random weights: the same model untrained, scored with the same matcher, where known.</p>'


def section(task: TaskResult, number: int, limit: int) -> str:
    """A task: its first prompt, how its scores are spread, its samples."""
    facts, ranked, values, file = task.facts, task.ranked(), task.values(), _escape(task.file)
    names = {
        "truncated": "{} answers truncated at the token limit",
        "seconds": "{} seconds",
        "tokens_per_s": "{} tokens/s",
        "task_hash": "task {}",
    }
    told = " · ".join(what.format(_number(facts[name])) for name, what in names.items() if facts.get(name))
    out = [f'<h2>{_escape(task.name)}</h2><p class="quiet">{told}</p>']
    if facts.get("first_prompt"):
        out.append(
            f"<details><summary>the first prompt, as the model reads it</summary>{block(facts['first_prompt'], 'results.json')}</details>"
        )
    if task.samples is None:
        return f'<section id="task-{number}">{"".join(out)}<p class="missing">There is no {file} in this folder: no samples to show.</p></section>'
    if facts.get("samples") not in (None, len(ranked)):
        out.append(
            f'<p class="missing">results.json counts {_number(facts["samples"])} samples, {file} holds {len(ranked):,}: they may be of two runs.</p>'
        )
    tops = {metric: 1 if max(scores) <= 1 else 100 for metric, scores in values.items()}
    scored = sum(key is not None for key, _ in ranked)
    shown = ranked[: limit or None]
    best = ranked[len(shown) : scored][::-1][:BEST]
    left = len(ranked) - len(shown) - len(best)
    said = f"{len(shown):,} of {len(ranked):,}" + f", {left:,} left out (--limit 0 shows all)" * bool(left)
    said += f", {len(ranked) - scored:,} without a score (last)" * (
        scored < len(ranked)
    ) + f', <a href="#best-{number}">the {len(best)} best</a> at the end' * bool(best)
    out.append(
        f'<div class="histograms">{"".join(histogram(*pair) for pair in values.items())}</div><h3>Worst first <small>{said}</small></h3>'
    )
    out += [card(task, rank, sample, task.verdict(sample, tops)) for rank, (_, sample) in enumerate(shown, 1)]
    out += [
        f'<h3 id="best-{number}">Best first <small>{len(best)} of those not shown above</small></h3>'
    ] * bool(best)
    out += [card(task, scored - i, sample, task.verdict(sample, tops)) for i, (_, sample) in enumerate(best)]
    return f'<section id="task-{number}">{"".join(out)}</section>'


STYLE = """
:root { color-scheme: light dark; --page: #fbfaf8; --card: #fff; --ink: #22252a; --quiet: #646a73; --line: #e2dfd9; --track: #f3f1ed; --good: #d8efd3; --bad: #f8dcd8; --warn: #8a5a00; --bar: #6d8fb8; }
@media (prefers-color-scheme: dark) { :root { --page: #17191c; --card: #1f2226; --ink: #e4e3df; --quiet: #9aa0a8; --line: #33373d; --track: #282c31; --good: #23502a; --bad: #5a2a28; --warn: #e0b060; } }
* { box-sizing: border-box; } body { margin: 0 auto; max-width: 64rem; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .25rem; } h3 { font-size: 1rem; margin: 1.25rem 0 .6rem; } h4 { grid-column: 1 / -1; margin: 0; font-size: .95rem; } p { margin: .25rem 0; } a { color: inherit; }
small, .quiet, figcaption { color: var(--quiet); font-weight: 400; font-size: .85rem; } em, .missing, .warnings { color: var(--warn); font-style: normal; } td em { font-size: .85rem; }
dl { display: grid; grid-template-columns: 6rem minmax(0, 1fr); gap: .35rem 1rem; margin: 0; align-content: start; } header dl { margin: .75rem 0 1.25rem; } dt { color: var(--quiet); font-size: .85rem; line-height: 1.65; } dt small { display: block; } dd { margin: 0; }
.wide { overflow-x: auto; } table { border-collapse: collapse; overflow-wrap: normal; } td, th { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: baseline; text-align: left; }
td + td, th + th { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; } thead th { color: var(--quiet); font-size: .85rem; font-weight: 400; } .task th { padding-top: .9rem; }
article { display: grid; grid-template-columns: 15rem minmax(0, 1fr); gap: .6rem 1.25rem; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .9rem 1rem; margin: 0 0 .9rem; }
.pictures { display: flex; flex-wrap: wrap; gap: .4rem; align-content: start; align-items: start; } .pictures img { max-width: 100%; max-height: 15rem; border-radius: 4px; } .pictures img:not(:only-child) { max-width: calc(50% - .2rem); }
.pictures .missing { border: 1px dashed; border-radius: 4px; padding: .5rem .75rem; font-size: .85rem; } .answer { background: var(--track); border-radius: 4px; padding: .1rem .5rem; } .good { background: var(--good); } .bad { background: var(--bad); }
.text { white-space: pre-wrap; unicode-bidi: plaintext; max-height: 22rem; overflow: auto; } dd .text + .text { border-top: 1px dotted var(--line); } details { margin: .4rem 0; } summary { cursor: pointer; color: var(--quiet); font-size: .85rem; }
details .text { font: .8rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; background: var(--card); border: 1px solid var(--line); border-radius: 4px; padding: .5rem .75rem; } .histograms { display: flex; flex-wrap: wrap; gap: .75rem 2rem; margin: .75rem 0; }
figure { margin: 0; width: 15rem; max-width: 100%; } svg { display: block; width: 100%; font-size: 9px; } rect { fill: var(--bar); } svg text { fill: var(--quiet); } path { stroke: var(--quiet); }
@media (max-width: 40rem) { body { padding: 1rem .6rem 3rem; } article, dl { grid-template-columns: minmax(0, 1fr); gap: .6rem; padding: .75rem; } dl { gap: 0; padding: 0; } dd { margin: 0 0 .5rem; } dt small { display: inline; } td, th { padding-right: .6rem; } }
"""


def page(results: dict[str, Any], tasks: list[TaskResult], made: datetime, limit: int) -> str:
    """A whole HTML page. Text of the evaluation is escaped; the policy forbids scripts and fetches besides."""
    model = _escape(_plain(results.get("model")) or "unnamed model")
    facts = {"evaluated": made.strftime("%Y-%m-%d %H:%M %Z")} | {
        part: ", ".join(f"{k} {_plain(v)}" for k, v in results[part].items())
        for part in ("versions", "settings")
    }
    head = "".join(f"<dt>{name}</dt><dd>{_escape(value or '–')}</dd>" for name, value in facts.items())
    warnings = "".join(
        f"<li>{_escape(task.name)}: {_escape(said)}</li>" for task in tasks for said in task.facts["warnings"]
    )
    sections = "".join(section(task, number, limit) for number, task in enumerate(tasks, 1))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{model}: evaluation</title><style>{STYLE}</style></head><body>
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
            f"--output: '{output}' is no file, lies in a folder that does not exist, or has the name of JSON: give a file that ends in .html"
        )
    tasks = [TaskResult(name, facts, folder) for name, facts in results["tasks"].items()]
    text = page(
        results,
        tasks,
        datetime.fromtimestamp((folder / "results.json").stat().st_mtime).astimezone(),
        args.limit,
    )
    write_text(output, text)
    print(
        f"{output}: tasks {len(tasks)}, samples {sum(len(task.samples or []) for task in tasks)}, {len(text) / 2**20:.1f} MB; open it in a browser"
    )


if __name__ == "__main__":
    run_script(main)
