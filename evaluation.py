"""Evaluate a trained model.

  python evaluation.py --model runs/dual_tower_easyvqa/model --tasks easy_vqa

Prints a table; with --output DIR also writes DIR/results.json and DIR/samples_<task>.jsonl.
"""

import argparse
import json
import time
from pathlib import Path

from configs.command_line import FlagParser
from configs.errors import UsageError, nearest, run_script
from configs.files import write_text

TASK_NAMES = ("easy_vqa",)


def main(argv: list[str]) -> None:
    parser = FlagParser(description=str(__doc__), allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="model folder, as training exports it (runs/NAME/model)")
    parser.add_argument("--tasks", default="easy_vqa", help=f"comma-separated: {', '.join(TASK_NAMES)} [easy_vqa]")
    parser.add_argument("--batch_size", type=int, default=32, help="questions answered together [32]")
    parser.add_argument("--limit", type=int, default=0, help="only the first N questions of each task (0: all)")
    parser.add_argument("--output", metavar="DIR", help="folder for results.json and the samples")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse(argv)
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    for name in names:
        if name not in TASK_NAMES:
            raise UsageError(f"--tasks: no task named '{name}'{nearest(name, list(TASK_NAMES))}")
    if not names or args.batch_size < 1 or args.limit < 0:
        raise UsageError("--tasks needs a name, --batch_size at least 1, --limit 0 or more")

    output = Path(args.output) if args.output else None
    if output is not None:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--output: {output} cannot be a folder: {error.strerror}") from None

    import torch
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from eval.answering import Answerer
    from eval.tasks import TASKS

    answerer = Answerer.from_pretrained(args.model)
    console = Console()
    results = {}
    for name in names:
        started = time.perf_counter()
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(name, total=None)
            scores, samples = TASKS[name](answerer, args.batch_size, args.limit, lambda done, total, task=task, bar=bar: bar.update(task, completed=done, total=total))
        results[name] = scores | {"seconds": round(time.perf_counter() - started, 1)}
        table = Table("questions", "count", "accuracy")
        for kind, score in [*scores["kinds"].items(), ("all", scores)]:
            table.add_row(kind, str(score["count"]), f"{score['accuracy']:.2%}")
        console.print(f"{name}: {args.model}", soft_wrap=True)
        console.print(table)
        if output is not None:
            write_text(output / f"samples_{name}.jsonl", "".join(json.dumps(s) + "\n" for s in samples))
    if output is not None:
        head = {"model": str(args.model), "limit": args.limit, "batch_size": args.batch_size, "torch": torch.__version__}
        write_text(output / "results.json", json.dumps(head | {"results": results}, indent=2) + "\n")
        console.print(f"written: {output / 'results.json'}", soft_wrap=True)


if __name__ == "__main__":
    run_script(main)
