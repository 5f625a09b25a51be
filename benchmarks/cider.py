"""Time of CIDEr for 5,000 captions with 5 references each, in one thread, with Python's and Java's tokenizer.

  python -m benchmarks.cider --json benchmarks/results/cider.json

tokenize     all captions and references to tokens
cider        CIDEr, tokenization included
java         the same with pycocoevalcap's tokenizer, start of the virtual machine included
BLEU-4 …     the other metrics that need no Java, tokenization included
agreement    fraction of captions with the same tokens in Python and Java
"""

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.about import about
from eval.captions import caption_scores, cider
from eval.ptb_tokenizer import tokenize
from utils.errors import UserError, run_script

ROOT = Path(__file__).resolve().parent.parent
FIXTURE = ROOT.parent / "shared" / "fixtures" / "coco_captions" / "ptb_tokens.jsonl"
SUBJECTS = (
    "A man",
    "Two women",
    "The dog's owner",
    'A bus that says "7th St."',
    "A black-and-white cat",
    "Someone who isn't here",
    "A zebra, a giraffe",
)
TEXT = (
    "red small wooden old street sign table water grass holding riding sitting near behind under with and on "
    "in the a of large green phone ball food plate"
)
WORDS = TEXT.split()


def seed_captions(rng: random.Random) -> list[str]:
    """Captions to vary: the fixture's COCO captions, else random ones of the same length."""
    if FIXTURE.is_file():
        return [json.loads(line)["caption"] for line in FIXTURE.read_text().splitlines()]
    return [
        f"{rng.choice(SUBJECTS)} {' '.join(rng.choices(WORDS, k=rng.randint(6, 10)))}." for _ in range(3500)
    ]


def corpus(images: int, references: int, seed: int) -> tuple[list[str], list[list[str]]]:
    """A caption and references for each image: variants of a seed caption with up to four words replaced."""
    rng = random.Random(seed)
    captions = seed_captions(rng)
    words = [word for caption in captions for word in caption.split()]

    def varied(caption: str) -> str:
        split = caption.split()
        for _ in range(rng.randint(0, 4)):
            split[rng.randrange(len(split))] = rng.choice(words)
        return " ".join(split)

    texts = [[varied(first) for _ in range(references + 1)] for first in rng.choices(captions, k=images)]
    return [image[0] for image in texts], [image[1:] for image in texts]


def seconds(function: Callable[[], Any], repeats: int) -> dict[str, float]:
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        taken.append(time.perf_counter() - started)
    return {"median": statistics.median(taken), "least": min(taken), "most": max(taken)}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cider",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--references", type=int, default=5, help="of each image")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args(argv)
    candidates, references = corpus(args.images, args.references, 0)
    captions = [*candidates, *(text for texts in references for text in texts)]
    results: dict[str, Any] = {
        "score": cider(candidates, references).score,
        "seconds": {
            "tokenize": seconds(lambda: [tokenize(caption) for caption in captions], args.repeats),
            "cider": seconds(lambda: cider(candidates, references), args.repeats),
            "BLEU-4": seconds(lambda: caption_scores(candidates, references, ["BLEU-4"]), args.repeats),
            "ROUGE-L": seconds(lambda: caption_scores(candidates, references, ["ROUGE-L"]), args.repeats),
        },
    }
    try:
        results["score_java"] = cider(candidates, references, tokenizer="java").score
        results["seconds"]["java"] = seconds(
            lambda: cider(candidates, references, tokenizer="java"), args.repeats
        )
        results["agreement"] = agreement(captions)
    except UserError as problem:  # Java is optional
        results["java"] = str(problem)
    show(results, args.images, args.references)
    if args.json:
        head = about() | {
            "captions": "coco" if FIXTURE.is_file() else "made up",
            "images": args.images,
            "references": args.references,
            "repeats": args.repeats,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(head | results, indent=2) + "\n")


def agreement(captions: list[str]) -> float:
    from eval.ptb_tokenizer import tokenize_java

    return sum(
        tokenize(caption) == tokens for caption, tokens in zip(captions, tokenize_java(captions), strict=True)
    ) / len(captions)


def show(results: dict[str, Any], images: int, references: int) -> None:
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    title = f"{images:,} captions, {references} references each, {machine}, {date.today()}"
    table = Table("what", "figure", title=title)
    for name, s in results["seconds"].items():
        table.add_row(
            "cider, Java's tokens" if name == "java" else name,
            f"{s['median']:.2f} s ({s['least']:.2f} to {s['most']:.2f})",
        )
    if "agreement" in results:
        table.add_row(
            "CIDEr, Python's and Java's tokens", f"{results['score']:.6f}, {results['score_java']:.6f}"
        )
        table.add_row("captions with the same tokens", f"{results['agreement']:.3%}")
    else:
        table.add_row("Java", results["java"])
    Console(width=130).print(table)


if __name__ == "__main__":
    run_script(main)
