"""A training step: tokens/s, seconds of its phases, memory, and its share of the matmul roofline.

  python -m benchmarks.train_step --json benchmarks/results/train_step.json
  python -m benchmarks.train_step --model vanilla --profile          print operations by their time instead

`benchmarks/trial.py` describes the sizes and the standard row. Vanilla and the dual tower are measured in
turn in one run. Figures are medians of --repeats steps (minimum to maximum), after two warm-up steps.

tokens/s   image and text tokens of all documents, each counted once, ÷ seconds of the whole `train_step`
forward    the model and its loss
backward   until the last gradient is computed
optimizer  gradient norm, clipping, AdamW, zeroing of the gradients
memory     CPU: peak of a separate process, minus its memory after the imports; CUDA: peak allocated by torch
FLOPs      of forward and backward: counted by torch's counter in the step, and estimated as by `--dry_run`
roofline   matmuls of the step's linear layers alone (vision, projector, decoders, logits), with the same rows
           and type: forward, gradient of the input, gradient of the weight, on operands in memory
share      counted FLOPs ÷ seconds of the step ÷ FLOP/s of the roofline: 100 % for a step of matmuls only
"""

import argparse
import gc
import json
import multiprocessing
import os
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks.about import about
from benchmarks.trial import MARKERS, MODELS, SIZES, Trial, make_config, synchronize
from configs.model import Vocabulary
from training.memory import free_memory
from utils.device import computes_bf16, pick_device
from utils.errors import UserError, run_script

WARM_UP = 2


class MatmulRoofline:
    """The matrix products of a step's linear layers alone."""

    def __init__(
        self, shapes: Counter[tuple[int, int, int]], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shapes, self.device = shapes, device
        self.operands = {
            (r, i, o): [torch.randn(shape, device=device).to(dtype) for shape in ((r, i), (o, i), (r, o))]
            for r, i, o in shapes
        }

    def seconds(self) -> dict[tuple[int, int, int], float]:
        """Measure the three products of one layer of each shape."""
        out = {}
        calls = 20 if self.device.type == "cuda" else 2
        for shape, (x, w, g) in self.operands.items():
            for count in (1, calls):  # the first is a warm-up
                synchronize(self.device)
                started = time.perf_counter()
                for _ in range(count):
                    F.linear(x, w), g @ w, g.T @ x
                synchronize(self.device)
                out[shape] = (time.perf_counter() - started) / count
        return out

    def rate(self, seconds: dict[tuple[int, int, int], float]) -> float:
        """FLOP/s over all layers."""
        flops = sum(6 * rows * inputs * outputs * n for (rows, inputs, outputs), n in self.shapes.items())
        return flops / sum(seconds[shape] * n for shape, n in self.shapes.items())


def resident(field: str) -> int:
    """Resident bytes of this process: VmRSS now, VmHWM at the peak. Without /proc both give the peak."""
    status = Path("/proc/self/status")
    if status.exists():
        match = re.search(rf"{field}:\s+(\d+)", status.read_text())
        assert match is not None, f"/proc/self/status has no {field}"
        return int(match[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_memory(kind: str, size: str, dtype: str, device: torch.device, rows: int) -> int:
    """Peak bytes of three steps. Call it in a new process: a peak does not decrease."""
    before = resident("VmRSS")
    trial = Trial(kind, size, dtype, device, rows=rows)
    for _ in range(3):
        trial.step()
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM") - before


def in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args).result()
        except BrokenProcessPool:
            raise UserError(
                f"the process of {function.__name__}({', '.join(map(str, args))}) was killed: "
                "most likely memory ran out; take a smaller --size"
            ) from None


def check_memory(needed: float, device: torch.device, what: str) -> None:
    """Raise `UserError` if more than the free memory is needed: the system could kill another process."""
    free = free_memory(device)
    if free is not None and needed > free:
        raise UserError(
            f"{what} would take some {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free: "
            "take a smaller --size, or one --model at a time"
        )


def count_parameters(kind: str, size: str) -> int:
    with torch.device("meta"):
        model = MODELS[kind](
            make_config(kind, SIZES[size], "fp32").model, Vocabulary(SIZES[size].text, MARKERS)
        )
    return sum(p.numel() for p in model.parameters())


def spread(values: Iterable[float]) -> dict[str, float]:
    values = list(values)
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


Seconds = dict[str, float]  # of the phases of a step
LayerSeconds = dict[tuple[int, int, int], float]  # of a layer of each shape


def measure(
    kinds: list[str], size: str, dtype: str, device: torch.device, repeats: int, rows: int
) -> dict[str, Any]:
    parameters = {kind: count_parameters(kind, size) for kind in kinds}
    check_memory(16 * max(parameters.values()), device, "weights, gradients and moments alone")
    memory = {kind: in_new_process(peak_memory, kind, size, dtype, device, rows) for kind in kinds}
    check_memory(sum(memory.values()), device, " and ".join(kinds) + ", side by side,")
    trials = {kind: Trial(kind, size, dtype, device, rows=rows) for kind in kinds}
    flops = {kind: trial.flops() for kind, trial in trials.items()}
    rooflines = {
        kind: MatmulRoofline(trial.products(), torch.bfloat16 if dtype == "bf16" else torch.float32, device)
        for kind, trial in trials.items()
    }
    steps: dict[str, list[Seconds]] = {kind: [] for kind in kinds}
    matmuls: dict[str, list[LayerSeconds]] = {kind: [] for kind in kinds}
    for repeat in range(WARM_UP + repeats):
        for kind, trial in trials.items():
            step = trial.step()
            if repeat >= WARM_UP:
                steps[kind].append(step)
                matmuls[kind].append(rooflines[kind].seconds())
    out: dict[str, Any] = {}
    for kind, trial in trials.items():
        out[kind] = {
            "parameters": parameters[kind],
            "tokens": trial.tokens,
            "tokens_per_s": spread(trial.tokens / step["step"] for step in steps[kind]),
            "seconds": {
                phase: spread(step[phase] for step in steps[kind])
                for phase in ("step", "forward", "backward", "optimizer")
            },
            "turns": [step["step"] for step in steps[kind]],  # shows steps that another program disturbed
            "peak_memory_bytes": memory[kind],
            "flops": flops[kind],
        } | compare_with_roofline(flops[kind]["counted"], steps[kind], rooflines[kind], matmuls[kind])
    if len(kinds) == 2:
        out["ratio"] = ratios(out, steps)
    return out


def compare_with_roofline(
    flops: float, steps: list[Seconds], roofline: MatmulRoofline, matmuls: list[LayerSeconds]
) -> dict[str, Any]:
    """FLOP/s of the steps and of the matrix products alone, and their ratio."""
    rates = [roofline.rate(seconds) for seconds in matmuls]
    reached = [flops / step["step"] for step in steps]
    return {
        "flops_per_s": spread(reached),
        "products_flops_per_s": spread(rates),
        "share_of_products": spread(a / b for a, b in zip(reached, rates, strict=True)),
        "products": [
            {
                "rows": r,
                "inputs": i,
                "outputs": o,
                "layers": n,
                "flops_per_s": 6 * r * i * o / statistics.median(s[r, i, o] for s in matmuls),
            }
            for (r, i, o), n in roofline.shapes.items()
        ],
    }


def ratios(results: dict[str, Any], steps: dict[str, list[Seconds]]) -> dict[str, Any]:
    """The dual tower ÷ vanilla; times are compared step by step."""
    dual, vanilla = results["dual_tower"], results["vanilla"]
    pairs = list(zip(steps["dual_tower"], steps["vanilla"], strict=True))
    phases = ("forward", "backward", "optimizer")
    return (
        {"tokens_per_s": spread(v["step"] / d["step"] for d, v in pairs)}
        | {f"seconds_{phase}": spread(d[phase] / v[phase] for d, v in pairs) for phase in phases}
        | {
            "parameters": dual["parameters"] / vanilla["parameters"],
            "peak_memory": dual["peak_memory_bytes"] / vanilla["peak_memory_bytes"],
            "flops": dual["flops"]["counted"] / vanilla["flops"]["counted"],
        }
    )


def show(result: dict[str, Any], title: str) -> None:
    kinds = [kind for kind in MODELS if kind in result]
    ratio = result.get("ratio", {})
    table = Table("what", *kinds, *(["dual tower ÷ vanilla"] if ratio else []), title=title)

    def figure(s: dict[str, float], form: str, scale: float = 1.0) -> str:
        return f"{s['median'] * scale:{form}} ({s['least'] * scale:{form}} to {s['most'] * scale:{form}})"

    def add(name: str, cell: Callable[[dict[str, Any]], str], key: str = "") -> None:
        r = ratio.get(key)
        ratio_cell = "" if r is None else figure(r, ".2f") if isinstance(r, dict) else f"{r:.2f}"
        table.add_row(name, *(cell(result[kind]) for kind in kinds), *([ratio_cell] if ratio else []))

    add("parameters", lambda m: f"{m['parameters']:,}", "parameters")
    add(
        f"tokens/s, {result[kinds[0]]['tokens']:,} per step",
        lambda m: figure(m["tokens_per_s"], ".1f"),
        "tokens_per_s",
    )
    add("seconds of a step", lambda m: figure(m["seconds"]["step"], ".3f"))
    for phase in ("forward", "backward", "optimizer"):
        add(f"  {phase}", lambda m, phase=phase: figure(m["seconds"][phase], ".3f"), f"seconds_{phase}")
    add("peak memory, GiB", lambda m: f"{m['peak_memory_bytes'] / 2**30:.2f}", "peak_memory")
    add("FLOPs of a step, counted", lambda m: f"{m['flops']['counted'] / 1e9:,.4g} G", "flops")
    add(
        "FLOPs of a step, estimated",
        lambda m: (
            f"{m['flops']['estimate'] / 1e9:,.4g} G "
            f"({m['flops']['estimate'] / m['flops']['counted'] - 1:+.1%})"
        ),
    )
    add("GFLOP/s of the step", lambda m: figure(m["flops_per_s"], ",.0f", 1e-9))
    add("GFLOP/s of the matmul roofline", lambda m: figure(m["products_flops_per_s"], ",.0f", 1e-9))
    add("share of the matmul roofline", lambda m: figure(m["share_of_products"], ".0%"))
    Console(width=150).print(table)


def profiled(trial: Trial, rows: int) -> str:
    """Profile one step: a table of the operations with the largest own time."""
    for _ in range(WARM_UP):
        trial.step()
    cuda = trial.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        trial.step()
    return profiler.key_averages().table(
        sort_by=f"self_{'cuda' if cuda else 'cpu'}_time_total", row_limit=rows, max_name_column_width=60
    )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=SIZES, default="222m")
    parser.add_argument("--model", choices=[*MODELS, "both"], default="both")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="default: bf16 if the hardware supports it")
    parser.add_argument(
        "--rows", type=int, default=1, help="rows of a step, one after the other (default: 1)"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--profile",
        type=int,
        nargs="?",
        const=25,
        metavar="N",
        help="print the N slowest operations instead of measuring",
    )
    parser.add_argument("--json", type=Path)
    return parser


def main(argv: list[str]) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.rows < 1:
        parser.error(f"--rows {args.rows}: a step has at least one row")
    device = pick_device(args.device, "--device")
    dtype = args.dtype or ("bf16" if computes_bf16(device) else "fp32")
    kinds = list(MODELS) if args.model == "both" else [args.model]
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    head = about() | {
        "timm": timm.__version__,
        "threads": torch.get_num_threads(),
        "device": device_name,
        "size": args.size,
        "dtype": dtype,
        "rows": args.rows,
        "repeats": max(1, args.repeats),
    }
    try:
        if args.profile:
            for kind in kinds:
                trial = Trial(kind, args.size, dtype, device, rows=args.rows)
                print(f"{kind}, {args.size}, {dtype}", profiled(trial, args.profile), sep="\n")
                del trial
                gc.collect()  # a trial and its hooks reference each other
            return
        result = measure(kinds, args.size, dtype, device, head["repeats"], args.rows)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise UserError(
                f"memory ran out on {device_name}: take a smaller --size, or one --model at a time "
                f"({str(error).splitlines()[0]})"
            ) from None
        raise
    machine = device_name
    if device.type != "cuda":
        machine = f"{head['machine']}, {os.cpu_count()} cores, threads: {head['threads']}"
    step = f"a training step, {args.size}, {dtype}, {args.rows} row{'s' * (args.rows > 1)}"
    show(result, f"{step}, {machine}, torch {head['torch']}, {head['date']}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(head | result, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
