"""Check and measure a GPU machine: correctness, training, memory, decoding; a table and a JSON file.

  bash benchmarks/gpu.sh --json benchmarks/results/gpu.json
  bash benchmarks/gpu.sh --parts sdpa,train_222m --minutes 3
  bash benchmarks/gpu.sh --nanovlm ../nanoVLM          nanoVLM's training step and decoding, too
  bash benchmarks/gpu.sh --device cpu --quick          every part at toy size, to see that the script works

It needs torch, torchvision, transformers, timm and what comes with them, but not `datasets` and no network:
weights and batches are random. Each part runs in a process of its own with a time limit, the important ones
first. A part that fails, hangs or runs out of memory does not stop the others. A part that was not run, for
lack of time, CUDA, Triton or a checkout, is in the table with the reason. The exit status is 1 if one failed.

sdpa, flex_attention       attention and its gradients against a softmax over all scores
packed                     a packed row against its documents one by one, and what leaks between them
drafts                     greedy answers in fp32 with and without drafts
resume                     training from a checkpoint against an uninterrupted run
distributed                NCCL (CPU: gloo) and FSDP2 with one rank
train_222m, train_450m     training steps of both models; …_compiled with --train.compile
fit_memory                 --fit-memory 12 for the 222M pair: its choice, and what steps then take
decoding                   one row; share_of_bandwidth: of a copy in the device's memory
decoding_compiled          the same with --compile
draft_speed                at batch 1, 8, 64, where every draft is accepted: the upper bound
second_question            first token of a first and of a second question on an image, whose KV is stored
server                     its engine with 64 clients: tokens/s, time to first token (no HTTP)
nanovlm                    the checkout's training step and decoding, of the same sizes
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import gpu_checks, gpu_speed
from benchmarks.about import about
from benchmarks.gpu_checks import Figures
from utils.device import pick_device
from utils.errors import UserError, run_script

MIN_SECONDS = 5.0  # a part is not started with less of the budget


@dataclass(frozen=True)
class Part:
    function: Callable[[torch.device, bool], Figures]
    limit_s: float
    needs: Literal["", "triton", "compiler", "nanovlm"] = ""


PARTS = {  # in the order of importance
    "sdpa": Part(gpu_checks.sdpa, 40),
    "flex_attention": Part(gpu_checks.flex_attention, 90, "triton"),
    "packed": Part(gpu_checks.packed, 90),
    "drafts": Part(gpu_checks.drafts, 60),
    "train_222m": Part(partial(gpu_speed.train, "222m", False), 90),
    "resume": Part(gpu_checks.resume, 60),
    "distributed": Part(gpu_checks.distributed, 60),
    "decoding": Part(partial(gpu_speed.decoding, False), 60),
    "decoding_compiled": Part(partial(gpu_speed.decoding, True), 120, "compiler"),
    "train_222m_compiled": Part(partial(gpu_speed.train, "222m", True), 150, "compiler"),
    "fit_memory": Part(gpu_speed.fit_memory, 90),
    "draft_speed": Part(gpu_speed.drafts, 60),
    "second_question": Part(gpu_speed.second_question, 40),
    "server": Part(gpu_speed.serving, 60),
    "train_450m": Part(partial(gpu_speed.train, "450m", False), 90),
    "nanovlm": Part(gpu_speed.nanovlm, 90, "nanovlm"),
    "train_450m_compiled": Part(partial(gpu_speed.train, "450m", True), 150, "compiler"),
}


@dataclass(frozen=True)
class Result:
    """What became of a part. `reason`: why it failed or was not run."""

    status: Literal["ok", "failed", "not run"]
    seconds: float = 0.0
    reason: str = ""
    figures: Figures | None = None


def in_process(function: Callable[..., Figures], arguments: tuple[Any, ...], limit_s: float) -> Result:
    """Call `function` in a new process, which is killed with its children after `limit_s` seconds."""
    context = multiprocessing.get_context("fork")  # this process has imported everything, but uses no CUDA
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(sender, function, arguments))
    started = time.perf_counter()
    process.start()
    sender.close()
    try:
        answered = receiver.poll(limit_s)
        status, value = receiver.recv() if answered else ("failed", f"longer than {limit_s:g} s")
    except EOFError:
        process.join()
        code = process.exitcode or 0
        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        hint = ": most likely memory ran out" if code == -signal.SIGKILL else ""
        status, value = "failed", f"its process ended with {cause}{hint}"
    finally:
        seconds = time.perf_counter() - started
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    return Result("ok", seconds, figures=value) if status == "ok" else Result("failed", seconds, value)


def _call(sender: Connection, function: Callable[..., Figures], arguments: tuple[Any, ...]) -> None:
    """In the new process: send ("ok", figures) or ("failed", the reason)."""
    os.setsid()
    try:
        sender.send(("ok", function(*arguments)))
    except BaseException as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        sender.send(("failed", f"{type(error).__name__}: {lines[0][:300]}"))


def call_part(name: str, device: str, quick: bool, nanovlm: Path | None) -> Figures:
    function = PARTS[name].function
    extra = (nanovlm,) if PARTS[name].needs == "nanovlm" else ()
    return function(*extra, pick_device(device), quick)


def missing(part: Part, machine: Figures, quick: bool, nanovlm: Path | None) -> str:
    """Why this machine cannot run a part; empty if it can."""
    on_cpu = machine["device"] == "cpu"
    if part.needs == "triton" and not machine["triton"]:
        return "it needs CUDA and Triton"
    if part.needs == "compiler" and not machine["compiler"] and not (quick and on_cpu):
        return "torch.compile needs a C++ compiler" if on_cpu else "torch.compile needs Triton"
    if part.needs == "nanovlm" and nanovlm is None:
        return "it needs a nanoVLM checkout: --nanovlm DIR"
    return ""


def run_parts(names: list[str], machine: Figures, args: argparse.Namespace, end: float) -> dict[str, Result]:
    """Run parts until `end`, and print a line for each."""
    results: dict[str, Result] = {}
    for name in PARTS:
        part, left = PARTS[name], end - time.perf_counter()
        if name not in names:
            results[name] = Result("not run", reason="it is not among --parts")
        elif reason := missing(part, machine, args.quick, args.nanovlm):
            results[name] = Result("not run", reason=reason)
        elif left < MIN_SECONDS:
            results[name] = Result("not run", reason=f"the {args.minutes:g} minutes are spent")
        else:
            arguments = (name, machine["device"], args.quick, args.nanovlm)
            result = in_process(call_part, arguments, min(left, part.limit_s))
            if result.status == "failed" and time.perf_counter() >= end and left < part.limit_s:
                reason = f"stopped after {result.seconds:.0f} s: the {args.minutes:g} minutes are spent"
                result = Result("not run", result.seconds, reason)
            results[name] = result
            print(f"{name}: {result.status} {result.reason} ({result.seconds:.1f} s)", flush=True)
    return results


def lines_of(figures: Figures) -> list[str]:
    """Figures as lines of a table; nested ones have a line each."""

    def text(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    flat = ", ".join(f"{name} {text(v)}" for name, v in figures.items() if not isinstance(v, dict))
    nested = [f"{name}: {', '.join(lines_of(v))}" for name, v in figures.items() if isinstance(v, dict)]
    return [*([flat] if flat else []), *nested]


def show(machine: Figures, results: dict[str, Result]) -> None:
    table = Table("part", "result", "s", "figures, or the reason", title=title_of(machine), show_lines=True)
    for name, result in results.items():
        cell = "\n".join(lines_of(result.figures)) if result.figures is not None else result.reason
        style = {"ok": "green", "failed": "red"}.get(result.status, "")
        seconds = f"{result.seconds:.1f}" if result.seconds else ""
        table.add_row(name, result.status, seconds, cell, style=style)
    Console(width=130, markup=False).print(table)


def title_of(machine: Figures) -> str:
    size = machine["device_memory_gb"]
    memory = f", {size:.0f} GB" if size else ""
    kernels = ", ".join(machine["kernels"]) or "plain"
    return f"device {machine['device_name']}{memory}; dtype {machine['dtype']}; kernels {kernels}"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bash benchmarks/gpu.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated (default: all)")
    parser.add_argument("--nanovlm", type=Path, metavar="DIR", help="a checkout of nanoVLM")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--minutes", type=float, default=8.0, help="for the whole run (default: 8)")
    return parser


def main(argv: list[str]) -> None:
    started, parser = time.perf_counter(), make_parser()
    args = parser.parse_args(argv)
    names = args.parts.split(",")
    if unknown := sorted(set(names) - set(PARTS)):
        parser.error(f"--parts: no part is named {unknown[0]!r}; there are {', '.join(PARTS)}")
    if args.nanovlm is not None:
        args.nanovlm = args.nanovlm.absolute()
    described = in_process(gpu_speed.describe, (args.device,), 120)
    if described.figures is None:
        raise UserError(described.reason)
    machine = described.figures
    print(title_of(machine), flush=True)
    results = run_parts(names, machine, args, started + 60 * args.minutes)
    show(machine, results)
    if args.json:
        parts = {name: {k: v for k, v in vars(r).items() if v} for name, r in results.items()}
        document = about() | machine | {"quick": args.quick, "minutes": args.minutes, "parts": parts}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(document, indent=2) + "\n")
    if any(result.status == "failed" for result in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
