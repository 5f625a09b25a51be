"""What `tools.preview` and `tools.stats` share: their command line, progress, and samples whose images can be decoded."""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track

from configs.cli import FlagParser, resolve
from configs.train import Config
from data.datasets import Sample, SampleDataset
from data.images import ImageError
from utils.errors import UsageError

T = TypeVar("T")
PLAIN_SECONDS = 10.0  # between two progress lines where there is no terminal


def arguments(
    argv: list[str], description: str, own: dict[str, tuple[Any, str]]
) -> tuple[argparse.Namespace, Config, dict[str, Any]]:
    """Command line → a tool's own arguments, the configuration, the configuration's flags that were given. `own`: name → default, help."""
    parser = FlagParser(add_help=False, allow_abbrev=False)
    for name, (default, help) in own.items():
        parser.add_argument(
            f"--{name}", type=type(default), default=default, metavar=type(default).__name__.upper()
        )
        description += f"\n  --{name} {type(default).__name__.upper():<4} {help} [{default}]"
    args, rest = parser.parse_known(argv)
    config, flags = resolve(rest, description)
    if config.resume:
        raise UsageError(
            "--resume goes on with a training run; to look at its data, give --config and the flags that it was started with"
        )
    for name, (default, _) in own.items():
        if isinstance(default, int) and getattr(args, name) < 1:
            raise UsageError(f"--{name} = {getattr(args, name)} must be at least 1")
    output = Path(args.output)
    if (
        not output.name or output.is_dir() or not output.parent.is_dir()
    ):  # told now, not after minutes of work
        raise UsageError(f"--output: '{args.output}' is a folder, or lies in one that does not exist")
    return args, config, flags


def watched(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The first `total` items, with a progress bar on a terminal and a line every ten seconds elsewhere, on stderr."""
    if Console(stderr=True).is_terminal:
        yield from track(_first(items, total), what, total, console=Console(stderr=True), transient=True)
        return
    last = time.perf_counter()
    for number, item in enumerate(_first(items, total), 1):
        yield item
        if time.perf_counter() - last >= PLAIN_SECONDS:
            last = time.perf_counter()
            print(f"{what}: {number:,} of {total:,}", file=sys.stderr)


def _first(items: Iterable[T], total: int) -> Iterator[T]:
    """`islice`, which does not ask for one item more than it gives."""
    if total:
        for number, item in enumerate(items, 1):
            yield item
            if number == total:
                return


class Decoder:
    """Samples → samples with tiles; None where an image turns out damaged, which is counted once a record."""

    def __init__(self, dataset: SampleDataset) -> None:
        self.dataset = dataset
        self.damaged: set[tuple[int, int]] = set()  # source, record

    def __call__(self, sample: Sample) -> Sample | None:
        if sample.key[:2] in self.damaged:
            return None
        try:
            return self.dataset.decoded(sample)
        except ImageError as error:
            self.damaged.add(sample.key[:2])
            self.dataset.count(sample.source, Counter([f"image_{error.reason}"]))
            return None
