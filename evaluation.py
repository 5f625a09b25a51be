"""Evaluate a trained model.

  python evaluation.py --model runs/dual_tower_easyvqa/model --tasks easy_vqa
  python evaluation.py --model DIR --tasks mmstar,captions:coco=captions_val2014.json --output results
  torchrun --nproc-per-node 2 evaluation.py --model DIR --tasks mmstar

--tasks: any lmms-eval task by name; easy_vqa, synthetic and openmoji_captions, which need no network;
captions:SOURCE and questions:SOURCE, with SOURCE as in --data.sources. With --output DIR: DIR/results.json,
DIR/samples_<task>.jsonl and their images; `python -m tools.evaluation_report DIR` renders them as a page.
"""

import argparse
from pathlib import Path

from configs.cli import FlagParser, add_device_flags, add_model_flags, expand_home
from utils.errors import UsageError, UserError, run_script


def make_parser() -> FlagParser:
    parser = FlagParser(
        description=str(__doc__), allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_flags(parser)
    add_device_flags(parser)
    parser.add_argument("--tasks", type=expand_home, default="mmstar", help="comma-separated [mmstar]")
    parser.add_argument("--batch_size", type=int, default=32, help="questions answered together [32]")
    parser.add_argument(
        "--limit", type=int, default=0, help="only the first N questions of each task (0: all)"
    )
    parser.add_argument(
        "--max_new_tokens", type=int, default=0, help="longest answer (0: what a task says, or 64) [0]"
    )
    parser.add_argument(
        "--data_root",
        metavar="DIR",
        help="copies of data sets, DIR/OWNER/NAME as on the Hub: used before the network",
    )
    parser.add_argument(
        "--process_with_media",
        action="store_true",
        help="let tasks see a row's image when they score its answer; most need not",
    )
    parser.add_argument(
        "--caption_metrics",
        default="CIDEr,BLEU-4,ROUGE-L",
        help="of caption tasks; METEOR and SPICE too, with Java [CIDEr,BLEU-4,ROUGE-L]",
    )
    parser.add_argument(
        "--tokenizer",
        choices=("python", "java"),
        default="python",
        help="that splits captions into words [python]",
    )
    parser.add_argument(
        "--matcher",
        choices=("exact", "normalised", "vqa"),
        default="normalised",
        help="when an answer to questions:SOURCE is right [normalised]",
    )
    parser.add_argument(
        "--shots",
        type=int,
        default=0,
        metavar="N",
        help="answered questions about other images before each question of our own tasks [0]",
    )
    parser.add_argument(
        "--random_baseline",
        action="store_true",
        help="also score the same model with random weights: a trained one must exceed it",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="folder for results.json, the samples and their images"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: list[str]) -> None:
    args = make_parser().parse(argv)
    args.tasks = list(dict.fromkeys(name.strip() for name in args.tasks.split(",") if name.strip()))
    if not args.tasks:
        raise UsageError("--tasks needs a name")
    from data.sources import parse_sources

    for kind, colon, source in (name.partition(":") for name in args.tasks):
        if kind in ("captions", "questions") and colon:  # before the imports of lmms-eval
            parse_sources(source, f"--tasks {kind}")
    for name, minimum in (("batch_size", 1), ("limit", 0), ("max_new_tokens", 0), ("shots", 0)):
        if getattr(args, name) < minimum:
            raise UsageError(f"--{name} = {getattr(args, name)} must be at least {minimum}")
    if args.data_root and not Path(args.data_root).is_dir():
        raise UsageError(f"--data_root: {args.data_root} is no folder")
    output = Path(args.output) if args.output else None
    if output is not None:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--output: {output} cannot be a folder: {error.strerror}") from None
    try:
        from eval.results import evaluate
        from models.kernels import use_kernels
    except ModuleNotFoundError as error:
        raise UserError(
            f"the package {error.name} is not installed: "
            "evaluation needs the group eval (pip install -e '.[eval]')"
        ) from None
    use_kernels(args.kernels)
    evaluate(args, output)


if __name__ == "__main__":
    run_script(main)
