"""The data path: fill of packed rows, cost of packing, throughput of the loader, start of a stream.

  python -m benchmarks.data --json benchmarks/results/data.json

fill        filled fraction of rows of 4,096 tokens (both streams), with lengths like The Cauldron's
throughput  640 × 480 JPEGs to packed batches of 512-pixel tiles, against a plain loop of Pillow and tokenizer
            with as many processes
memory      resident memory of the loader and its workers over 50,000 samples
streaming   time to the first batch of a local set of 100,000 rows: streamed, converted, and in tars
"""

import argparse
import io
import json
import multiprocessing
import os
import platform
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.about import about
from configs.model import VisionConfig
from configs.train import DataConfig
from data.collators import collate
from data.datasets import Sample, SampleDataset, SampleStream, decode
from data.images import open_pixels
from data.loader import Loader
from data.mixture import InMemoryRecords, Mixture, Source
from data.packing import Budget, RowStream, Window
from data.render import Document, Renderer
from data.sources import open_sources
from data.tokenizer import Tokenizer
from utils.errors import run_script

ROOT = Path(__file__).resolve().parent.parent
BLOCK = 65  # a tile's marker and 64 image tokens
VISION = VisionConfig(image_size=512, grid=32)
TEXT = (
    "the a of and in on with red blue chart table person street value year what which how many is are left "
    "right top number shown"
)
WORDS = TEXT.split()


def cauldron_like(count: int, seed: int) -> list[Sample]:
    """Samples with lengths like The Cauldron's: text lognormal(4.9, 0.9) clipped to 16…3000, 1 to 17 tiles.

    Their token lists have the right length and only zeros.
    """
    rng = np.random.default_rng(seed)
    text = np.clip(rng.lognormal(4.9, 0.9, count), 16, 3000).astype(int)
    tiles = rng.choice([1, 2, 3, 5, 7, 9, 13, 17], count, p=[0.3, 0.05, 0.1, 0.2, 0.1, 0.15, 0.05, 0.05])
    lists = {n: [0] * n for n in {*text.tolist(), *(BLOCK * tiles).tolist()}}
    return [
        Sample(
            (0, i, 0),
            torch.empty(n, 0),
            [Document(lists[n * BLOCK], lists[n * BLOCK], lists[n * BLOCK], lists[t], lists[t], lists[t])],
        )
        for i, (n, t) in enumerate(zip(tiles.tolist(), text.tolist(), strict=True))
    ]


def in_one_stream(sample: Sample) -> Sample:
    """The sample with all its tokens in the right stream."""
    ids = [0] * (sample.left_length + sample.right_length)
    return Sample(sample.key, sample.tiles, [Document([], [], [], ids, [], [])])


def fill(samples: int, window: int, repeats: int) -> dict[str, Any]:
    """Pack rows of 4,096 tokens through a full window; samples left in it at the end are not packed."""
    out: dict[str, Any] = {}
    for name, budget in (
        ("two budgets", Budget(40 * BLOCK, 4096 - 40 * BLOCK, BLOCK)),
        ("vanilla", Budget(0, 4096)),
    ):
        fills, costs, dropped = [], [], []
        for seed in range(repeats):
            drawn = cauldron_like(samples, seed)
            if name == "vanilla":
                drawn = [in_one_stream(sample) for sample in drawn]
            usable = [s for s in drawn if s.right_length <= budget.right]
            dropped.append(1 - len(usable) / len(drawn))
            waiting, rows, packed, used = Window(budget), 0, 0, 0
            started = time.perf_counter()
            for sample in usable:
                waiting.add(sample)
                if len(waiting) == window:
                    row = waiting.take_row()
                    rows, packed = rows + 1, packed + len(row)
                    used += sum(s.left_length + s.right_length for s in row)
            costs.append((time.perf_counter() - started) / packed * 1e6)
            fills.append(used / (rows * (budget.left + budget.right)))
        out[name] = {
            "fill": statistics.median(fills),
            "fill_least": min(fills),
            "us_per_sample": statistics.median(costs),
            "us_most": max(costs),
            "too_long": statistics.median(dropped),
        }
    return out


def jpegs(folder: Path, count: int) -> list[dict[str, Any]]:
    """Records with noisy images, 640 × 480 pixels and about 100 kB each, and texts of some 190 tokens."""
    rng = np.random.default_rng(0)
    records = []
    for i in range(count):
        soft = Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)).resize(
            (640, 480), Image.Resampling.BICUBIC
        )
        pixels = np.asarray(soft).astype(np.float32) + rng.normal(0, 6, (480, 640, 3))
        path = folder / f"{i}.jpg"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        words = rng.choice(WORDS, int(rng.lognormal(4.9, 0.5)))
        records.append(
            {
                "images": [str(path)],
                "texts": [
                    {
                        "user": " ".join(words[: len(words) // 2]),
                        "assistant": " ".join(words[len(words) // 2 :]) or "yes",
                    }
                ],
                "id": str(i),
            }
        )
    return records


def plain_share(records: list[dict[str, Any]], tokenizer_folder: Path) -> float:
    """The baseline: seconds of Pillow's decoder, bicubic resize and the tokenizer."""
    torch.set_num_threads(1)
    tokenizer = Tokenizer.load(tokenizer_folder)
    started = time.perf_counter()
    for record in records:
        image = Image.open(record["images"][0]).convert("RGB").resize((512, 512), Image.Resampling.BICUBIC)
        np.asarray(image)
        for turn in record["texts"]:
            tokenizer.encode(turn["user"]), tokenizer.encode(turn["assistant"])
    return time.perf_counter() - started


def make_loader(sources: list[Source], tokenizer: Tokenizer, config: DataConfig, workers: int) -> Loader:
    dataset = SampleDataset(sources, Renderer(tokenizer, BLOCK - 1), VISION, config, 8192, keep=False)
    rows = RowStream(
        SampleStream(dataset, Mixture(sources, 0)),
        Budget(config.left_length, config.right_length, BLOCK),
        config.window,
    )
    return Loader(rows, 4, tokenizer.global_image, workers)


def loader_of(records: list[dict[str, Any]], tokenizer: Tokenizer, workers: int) -> Loader:
    config = DataConfig(left_length=4 * BLOCK, right_length=1024, window=64)
    sources = [Source("jpegs", InMemoryRecords(records), 0, len(records))]
    return make_loader(sources, tokenizer, config, workers)


def samples_per_s(loader: Loader, seconds: float) -> float:
    for _ in islice(loader, 4):  # the workers start
        pass
    started, samples = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        samples += len(next(loader)["tiles"])  # one tile per sample
    rate = samples / (time.perf_counter() - started)
    loader.close()
    return rate


def throughput(folder: Path, workers: int, seconds: float, repeats: int) -> dict[str, Any]:
    records = jpegs(folder, 400)
    tokenizer = Tokenizer.train((t["user"] for r in records for t in r["texts"]), 512)
    tokenizer.save(folder)
    plain, ours = [], []
    for _ in range(repeats):  # side by side
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            shares = pool.map(partial(plain_share, tokenizer_folder=folder), [records] * workers)
        plain.append(sum(len(records) / s for s in shares))
        ours.append(samples_per_s(loader_of(records, tokenizer, workers), seconds))
    return {
        "workers": workers,
        "plain_samples_per_s_per_worker": statistics.median(plain) / workers,
        "samples_per_s_per_worker": statistics.median(ours) / workers,
        "ratio": statistics.median(o / p for o, p in zip(ours, plain, strict=True)),
        "ratio_least": min(o / p for o, p in zip(ours, plain, strict=True)),
        "ms_per_sample": split_of_time(records, tokenizer),
    }


def split_of_time(records: list[dict[str, Any]], tokenizer: Tokenizer) -> dict[str, float]:
    """Milliseconds a sample in one process, by stage."""
    torch.set_num_threads(1)
    spent: dict[str, float] = {}

    def timed(name: str, function: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = function()
        spent[name] = spent.get(name, 0.0) + (time.perf_counter() - started) * 1e3 / len(records)
        return result

    loader = loader_of(records, tokenizer, 0)
    dataset, window = loader.dataset, Window(loader.rows.budget)
    samples = [timed("tokenise", partial(dataset.samples, 0, i, True))[0] for i in range(len(records))]
    for record in records:
        timed("decode", partial(open_pixels, record["images"][0]))
    whole = [timed("resize", partial(decode, s, VISION)) for s in samples]
    spent["resize"] -= spent["decode"]  # decode() opens the image too
    for sample in whole:
        window.add(sample)
    rows = [timed("pack", window.take_row) for _ in range(len(records) // 5)]
    timed(
        "collate", lambda: [collate(rows[i : i + 4], tokenizer.global_image) for i in range(0, len(rows), 4)]
    )
    torch.set_num_threads(os.cpu_count() or 1)
    return spent


def resident_mb() -> float:
    """Proportional set size of this process and its children, in MiB."""
    total = 0
    for pid in ("self", *Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def memory(folder: Path, workers: int, samples: int) -> dict[str, Any]:
    """Memory after each tenth of `samples` distinct samples with small images."""
    rng = np.random.default_rng(0)
    files = []
    for i in range(200):
        files.append(str(folder / f"small{i}.jpg"))
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(files[-1])
    records = [
        {
            "images": [files[i % 200]],
            "texts": [{"user": f"what is {i}?", "assistant": f"number {i}"}],
            "id": str(i),
        }
        for i in range(samples)
    ]
    tokenizer = Tokenizer.train(("what is number 0123456789?",), 300)
    loader = loader_of(records, tokenizer, workers)
    loader.dataset.vision = VisionConfig(image_size=64, grid=4)
    curve, seen, due = [], 0, samples // 10
    while seen < samples:
        seen += len(next(loader)["tiles"])
        if seen >= due:
            curve.append(round(resident_mb(), 1))
            due += samples // 10
    loader.close()
    return {
        "samples": samples,
        "mb_after_each_tenth": curve,
        "growth": curve[-1] / curve[0] - 1,
        "growth_second_half": curve[-1] / curve[4] - 1,
    }


def streaming(folder: Path, rows: int) -> dict[str, Any]:
    """Seconds to the first batch of one set, streamed, converted and as tars.

    Parquet files of 10,000 rows, 100 per row group; tars of 10,000 samples, with img2dataset's notes.
    """
    import datasets
    import pyarrow
    import pyarrow.parquet

    datasets.config.HF_DATASETS_CACHE = folder / "converted"
    datasets.disable_progress_bars()
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (224, 224, 3), dtype=np.uint8)).save(
        file, "JPEG", quality=90
    )
    image, total = file.getvalue(), 0
    (folder / "set").mkdir()
    (folder / "tars").mkdir()
    for shard in range(rows // 10_000):
        numbers = range(shard * 10_000, (shard + 1) * 10_000)
        images = [image + i.to_bytes(4, "big") for i in numbers]
        table = pyarrow.table(
            {
                "images": [[{"bytes": data, "path": None}] for data in images],
                "texts": [[{"user": f"which of {i}?", "assistant": f"{i}"}] for i in numbers],
            }
        )
        path = folder / "set" / f"train-{shard:05d}.parquet"
        pyarrow.parquet.write_table(table, path, row_group_size=100)
        total += path.stat().st_size
        with tarfile.open(folder / "tars" / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, data in zip(numbers, images, strict=True):
                for ending, content in (("jpg", data), ("txt", f"{number}".encode())):
                    member = tarfile.TarInfo(f"{number:09d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    result: dict[str, Any] = {"rows": rows, "mb_on_disk": total / 2**20}
    for name, spec in (
        ("streamed", f"tables/set={folder}"),
        ("converted", f"hf={folder}/set"),
        ("converted before", f"hf={folder}/set"),
        ("tars", f"hf={folder}/tars"),
    ):
        started = time.perf_counter()
        config = DataConfig(sources=spec, left_length=4 * BLOCK, right_length=1024, window=256)
        sources, _ = open_sources(config)
        next(make_loader(sources, Tokenizer.train(("which of 0123456789?",), 300), config, 0))
        result[name] = time.perf_counter() - started
    return result


PARTS = ["packing", "throughput", "memory", "streaming"]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--samples", type=int, default=100_000, help="samples of each repetition of `fill`")
    parser.add_argument("--window", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="seconds of each measurement of throughput"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=100_000, help="rows of the streamed set")
    parser.add_argument("--memory_samples", type=int, default=50_000)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as work:
        measured: dict[str, Callable[[], Any]] = {
            "packing": lambda: fill(args.samples, args.window, args.repeats),
            "throughput": lambda: throughput(Path(work), args.workers, args.seconds, args.repeats),
            "memory": lambda: memory(Path(work), args.workers, args.memory_samples),
            "streaming": lambda: streaming(Path(work), args.rows),
        }
        results = {part: measured[part]() for part in args.parts}
    show(results)
    if args.json:
        head = about() | {"window": args.window}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(head | results, indent=2) + "\n")


def show(results: dict[str, Any]) -> None:
    title = f"data path, {platform.processor() or platform.machine()}, {os.cpu_count()} cores, {date.today()}"
    table = Table("what", "figure", title=title)
    for name, r in results.get("packing", {}).items():
        table.add_row(
            f"fill, {name}",
            f"{r['fill']:.2%} (minimum {r['fill_least']:.2%}); {r['us_per_sample']:.1f} µs per sample "
            f"(maximum {r['us_most']:.1f}); {r['too_long']:.2%} too long",
        )
    if t := results.get("throughput"):
        table.add_row(
            f"loader, {t['workers']} workers", f"{t['samples_per_s_per_worker']:.0f} samples/s per worker"
        )
        table.add_row(
            f"plain loop, {t['workers']} processes",
            f"{t['plain_samples_per_s_per_worker']:.0f} samples/s per process; "
            f"loader ÷ loop {t['ratio']:.2f} (minimum {t['ratio_least']:.2f})",
        )
        table.add_row(
            "ms per sample, one process",
            ", ".join(f"{stage} {ms:.2f}" for stage, ms in t["ms_per_sample"].items()),
        )
    if m := results.get("memory"):
        table.add_row(
            f"memory over {m['samples']:,} samples",
            f"{m['mb_after_each_tenth'][0]:.0f} MB after a tenth, "
            f"{m['mb_after_each_tenth'][-1]:.0f} MB at the end "
            f"({m['growth_second_half']:+.1%} in the second half)",
        )
    if s := results.get("streaming"):
        forms = ("streamed", "converted", "converted before", "tars")
        table.add_row(
            f"first batch of {s['rows']:,} rows, {s['mb_on_disk']:.0f} MB",
            ", ".join(f"{form} {s[form]:.1f} s" for form in forms),
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    run_script(main)
