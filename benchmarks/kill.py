"""Compare a run that is killed many times with one that is not: metrics and weights must be bit-identical.

  python -m benchmarks.kill --times 20
  python -m benchmarks.kill --times 20 --ranks 2 --parallel fsdp
  python -m benchmarks.kill --times 20 --sources hf=FOLDER

A tiny dual tower trains on easy-VQA, or on `--sources`, and saves a checkpoint after every step. All its
processes get SIGKILL at random moments, while loading or in their first steps; then `--resume auto`
continues. The exit code is 1 if anything differs.

Compared are all numbers of metrics.jsonl that are no times or memory (losses, gradient norms, learning rates,
supervised tokens of each step, validation), and the bytes of the exported weights. Equal losses at every step
mean equal batches: no sample lost, none repeated.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from utils.errors import UserError, run_script

ROOT = Path(__file__).parent.parent
TINY = [
    "vision.image_size=64",
    *(
        f"{tower}.{size}"
        for tower in ("left", "right")
        for size in ("layers=2", "hidden_size=32", "mlp_size=64", "heads=2", "kv_heads=1")
    ),
]
SMALL = [
    "data.limit=40",
    "data.validation_images=8",
    "data.right_length=64",
    "data.window=6",
    "train.local_batch_size=2",
    "train.dtype=fp32",
    "train.checkpoint_every=1",
    "train.eval_every=50",
]
TIMES = (
    "seconds",
    "tokens_per_s",
    "supervised_tokens_per_s",
    "tiles_per_s",
    "data_wait",
    "memory_gb",
    "tflops_per_s",
    "mfu",
)


def command(folder: Path, steps: int, ranks: int, parallel: str, sources: str) -> list[str]:
    start = (
        [sys.executable]
        if ranks == 1
        else [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    )
    settings = (
        [f"model.{setting}" for setting in TINY]
        + SMALL
        + [f"data.streams={ranks}", f"train.global_batch_size={2 * ranks}"]
    )
    flags = [part for setting in settings for part in ("--" + setting.split("=")[0], setting.split("=")[1])]
    run = [
        "--data.sources",
        sources,
        "--max_steps",
        str(steps),
        "--output_dir",
        str(folder / "run"),
        "--cache_dir",
        str(folder / "cache"),
        "--parallel",
        parallel,
    ]
    return [*start, str(ROOT / "train_dual_tower.py"), *flags, *run]


class Process:
    """One process of the run."""

    def __init__(self, command: list[str], log: Path) -> None:
        with log.open("ab") as out:
            self.popen = subprocess.Popen(
                command, stdout=out, stderr=out, cwd=log.parent, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )

    def kill(self) -> None:
        """Kill all processes at once, also those that torchrun started in sessions of their own."""
        pids = [self.popen.pid]
        for pid in pids:  # grows in the loop
            with suppress(FileNotFoundError):
                pids += [
                    int(child)
                    for task in Path(f"/proc/{pid}/task").iterdir()
                    for child in (task / "children").read_text().split()
                ]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.popen.wait()


def results_of(run: Path) -> tuple[list[dict[str, Any]], str]:
    """A run's metrics without times and memory, and the hash of its weights."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
    weights = (run / "model" / "model.safetensors").read_bytes()
    return metrics, hashlib.sha256(weights).hexdigest()


def whole(folder: Path, args: argparse.Namespace) -> float:
    """The run without kills → seconds until its first step."""
    folder.mkdir()
    started = time.monotonic()
    run = command(folder, args.steps, args.ranks, args.parallel, args.sources)
    process = Process(run, folder / "log.txt")
    metrics = folder / "run" / "metrics.jsonl"
    while process.popen.poll() is None and not metrics.exists():
        time.sleep(0.02)
    first = time.monotonic() - started
    if process.popen.wait():
        raise UserError(
            "the run failed before anything was killed: "
            f"{(folder / 'log.txt').read_text().strip().splitlines()[-1]}"
        )
    return first


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kill",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sources", default="easy_vqa", help="--data.sources of the runs")
    args = parser.parse_args(argv)
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary) / name for name in ("whole", "killed")]
        start = whole(folders[0], args)
        print(f"the whole run: {args.steps} steps, the first after {start:.1f} s", flush=True)
        folders[1].mkdir()
        run = command(folders[1], args.steps, args.ranks, args.parallel, args.sources)
        run += ["--resume", "auto"]
        metrics, checkpoints = folders[1] / "run" / "metrics.jsonl", folders[1] / "run" / "checkpoints"
        in_save = 0
        for number in range(1, args.times + 1):
            process, before = Process(run, folders[1] / "log.txt"), size(metrics)
            begun = moments.random() < 0.75  # otherwise kill while it loads
            while begun and process.popen.poll() is None and size(metrics) <= before:
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 1.5 if begun else start))
            if process.popen.poll() is not None:
                raise UserError(
                    f"after {number - 1} kills the run ended by itself, with code "
                    f"{process.popen.returncode}: take more --steps, or see its log: {tail(folders[1])}"
                )
            process.kill()
            saving = any(checkpoints.glob(".step_*"))
            in_save += saving
            newest = max((path.name for path in checkpoints.glob("step_*")), default="none")
            print(f"kill {number}: newest checkpoint {newest}{', in mid-save' if saving else ''}", flush=True)
        if Process(run, folders[1] / "log.txt").popen.wait():
            raise UserError(f"the last start failed: {tail(folders[1])}")
        (a, weights), (b, others) = (results_of(folder / "run") for folder in folders)
    differ = [(x, y) for x, y in zip(a, b, strict=False) if x != y]
    if len(a) != len(b) or differ or weights != others:
        raise UserError(
            f"not the same: {len(a)} and {len(b)} rows of metrics, "
            f"weights {'equal' if weights == others else 'differ'}, first difference: {differ[:1]}"
        )
    print(
        f"{args.times} kills of {args.ranks} process(es), {in_save} in mid-save: "
        f"{len(a)} rows of metrics and the weights are the same, bit for bit"
    )


def size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def tail(folder: Path) -> str:
    """The last error lines of the log, else its end."""
    lines = (folder / "log.txt").read_text(errors="replace").strip().splitlines()
    return " | ".join([line for line in lines[-200:] if line.startswith("error:")][-2:] or lines[-3:])


if __name__ == "__main__":
    run_script(main)
