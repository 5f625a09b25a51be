"""Shared by `tools.preview` and `tools.stats`: command line, progress, decoding of samples."""

import argparse
import sys
import time
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
PLAIN_SECONDS = 10.0  # between two progress lines without a terminal


def arguments(
    argv: list[str], description: str, own: dict[str, tuple[Any, str]]
) -> tuple[argparse.Namespace, Config, dict[str, Any]]:
    """Parse a command line: the tool's own arguments, the configuration, the configuration's given flags.

    `own`: name → (default, help) of the tool's own flags.
    """
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
            "--resume goes on with a training run; "
            "to look at its data, give --config and the flags that it was started with"
        )
    for name, (default, _) in own.items():
        if isinstance(default, int) and getattr(args, name) < 1:
            raise UsageError(f"--{name} = {getattr(args, name)} must be at least 1")
    output = Path(args.output)
    if not output.name or output.is_dir() or not output.parent.is_dir():  # raise before minutes of work
        raise UsageError(f"--output: '{args.output}' is a folder, or lies in one that does not exist")
    return args, config, flags


def track_progress(items: Iterable[T], total: int, label: str) -> Iterator[T]:
    """Yield the first `total` items and report progress on stderr.

    A terminal gets a progress bar, anything else a line every `PLAIN_SECONDS`.
    """
    if Console(stderr=True).is_terminal:
        yield from track(_first(items, total), label, total, console=Console(stderr=True), transient=True)
        return
    last = time.perf_counter()
    for number, item in enumerate(_first(items, total), 1):
        yield item
        if time.perf_counter() - last >= PLAIN_SECONDS:
            last = time.perf_counter()
            print(f"{label}: {number:,} of {total:,}", file=sys.stderr)


def _first(items: Iterable[T], total: int) -> Iterator[T]:
    """Yield the first `total` items without asking the iterator for one more."""
    if total:
        for number, item in enumerate(items, 1):
            yield item
            if number == total:
                return


class Decoder:
    """Adds the tiles to a sample; returns None if an image is damaged, counted once per record."""

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
            self.dataset.drop(*sample.key[:2], f"image_{error.reason}", error)
            return None
