"""A training step: tokens a second, where its seconds go, its memory, and how near it comes to bare matrix products.

  python -m benchmarks.train_step --json benchmarks/results/train_step.json
  python -m benchmarks.train_step --model vanilla --profile                  operations by their own time, instead

The standard row and the sizes stand in `benchmarks/trial.py`.

Vanilla and the dual tower are measured in turn in one run; figures are medians of --repeats steps (least to most), two steps before
them are not counted.

tokens/s   image and text tokens of all documents, each counted once, ÷ seconds of the whole `train_step`
forward    the model and its loss; backward: until the last gradient stands; optimizer: gradient norm, clipping, AdamW, zeroing
memory     CPU: the most that a process of its own holds, beyond what it held after its imports; CUDA: the most that torch allocated
FLOPs      of forward and backward: counted, by torch's counter on the very step; and as `--dry_run` estimates them
products   the step's linear layers alone (vision, projector, decoders, logits: the shapes that dominate), at its own number of
           rows and in its type: forward, gradient of the input, gradient of the weight, on operands that lie ready
share      counted FLOPs ÷ seconds of the step ÷ FLOP/s of the products: 100 % if a step were nothing but products
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
from models.layers import computes_bf16, pick_device
from training.fit_memory import free_memory
from utils.errors import UserError, run_script

WARM_UP = 2


class Products:
    """Bare matrix products of a step's linear layers."""

    def __init__(
        self, shapes: Counter[tuple[int, int, int]], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shapes, self.device = shapes, device
        self.operands = {
            (r, i, o): [torch.randn(shape, device=device).to(dtype) for shape in ((r, i), (o, i), (r, o))]
            for r, i, o in shapes
        }

    def seconds(self) -> dict[tuple[int, int, int], float]:
        """Of one layer of each shape: its three products, measured anew."""
        out = {}
        calls = 20 if self.device.type == "cuda" else 2
        for shape, (x, w, g) in self.operands.items():
            for count in (1, calls):  # the first is not counted
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
    """Bytes of this process in memory: VmRSS now, VmHWM at most (where there is no /proc, the most so far for both)."""
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(rf"{field}:\s+(\d+)", status.read_text())
        assert found is not None, f"/proc/self/status has no {field}"
        return int(found[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_memory(kind: str, size: str, dtype: str, device: torch.device, rows: int) -> int:
    """Bytes that three steps take, at most. For a process of its own: a peak does not go away again."""
    before = resident("VmRSS")
    trial = Trial(kind, size, dtype, device, rows=rows)
    for _ in range(3):
        trial.step()
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM") - before


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args).result()
        except BrokenProcessPool:
            raise UserError(
                f"the process that ran {function.__name__}({', '.join(map(str, args))}) was killed: most likely memory ran out, take a smaller --size"
            ) from None


def check_memory(needed: float, device: torch.device, what: str) -> None:
    """More than is free raises `UserError`: on a CPU the system would end some process, perhaps another's."""
    free = free_memory(device)
    if free is not None and needed > free:
        raise UserError(
            f"{what} would take some {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free: take a smaller --size, or one --model at a time"
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


def measure(
    kinds: list[str], size: str, dtype: str, device: torch.device, repeats: int, rows: int
) -> dict[str, Any]:
    parameters = {kind: count_parameters(kind, size) for kind in kinds}
    check_memory(16 * max(parameters.values()), device, "weights, gradients and moments alone")
    memory = {kind: apart(peak_memory, kind, size, dtype, device, rows) for kind in kinds}
    check_memory(sum(memory.values()), device, " and ".join(kinds) + ", side by side,")
    trials = {kind: Trial(kind, size, dtype, device, rows=rows) for kind in kinds}
    flops = {kind: trial.flops() for kind, trial in trials.items()}
    kernels = {
        kind: Products(trial.products(), torch.bfloat16 if dtype == "bf16" else torch.float32, device)
        for kind, trial in trials.items()
    }
    steps: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    alone: dict[str, list[dict[tuple[int, int, int], float]]] = {kind: [] for kind in kinds}
    for turn in range(WARM_UP + repeats):
        for kind, trial in trials.items():
            step = trial.step()
            if turn >= WARM_UP:
                steps[kind].append(step)
                alone[kind].append(kernels[kind].seconds())
    out: dict[str, Any] = {}
    for kind, trial in trials.items():
        rates = [kernels[kind].rate(seconds) for seconds in alone[kind]]
        reached = [flops[kind]["counted"] / step["step"] for step in steps[kind]]
        out[kind] = {
            "parameters": parameters[kind],
            "tokens": trial.tokens,
            "tokens_per_s": spread(trial.tokens / step["step"] for step in steps[kind]),
            "seconds": {
                phase: spread(step[phase] for step in steps[kind])
                for phase in ("step", "forward", "backward", "optimizer")
            },
            "turns": [step["step"] for step in steps[kind]],  # one that another program disturbed stands out
            "peak_memory_bytes": memory[kind],
            "flops": flops[kind],
            "flops_per_s": spread(reached),
            "products_flops_per_s": spread(rates),
            "share_of_products": spread(a / b for a, b in zip(reached, rates, strict=True)),
            "products": [
                {
                    "rows": r,
                    "inputs": i,
                    "outputs": o,
                    "layers": n,
                    "flops_per_s": 6 * r * i * o / statistics.median(s[r, i, o] for s in alone[kind]),
                }
                for (r, i, o), n in kernels[kind].shapes.items()
            ],
        }
    if len(kinds) == 2:
        pairs = list(zip(steps["dual_tower"], steps["vanilla"], strict=True))
        out["ratio"] = {"tokens_per_s": spread(v["step"] / d["step"] for d, v in pairs)}
        out["ratio"] |= {
            f"seconds_{phase}": spread(d[phase] / v[phase] for d, v in pairs)
            for phase in ("forward", "backward", "optimizer")
        }
        for name, values in (
            ("parameters", parameters),
            ("peak_memory", memory),
            ("flops", {kind: f["counted"] for kind, f in flops.items()}),
        ):
            out["ratio"][name] = values["dual_tower"] / values["vanilla"]
    return out


def show(result: dict[str, Any], title: str) -> None:
    kinds = [kind for kind in MODELS if kind in result]
    ratio = result.get("ratio", {})
    table = Table("what", *kinds, *(["dual tower ÷ vanilla"] if ratio else []), title=title)

    def figure(s: dict[str, float], form: str, scale: float = 1.0) -> str:
        return f"{s['median'] * scale:{form}} ({s['least'] * scale:{form}} to {s['most'] * scale:{form}})"

    def add(name: str, cell: Callable[[dict[str, Any]], str], key: str = "") -> None:
        r = ratio.get(key)
        beside = "" if r is None else figure(r, ".2f") if isinstance(r, dict) else f"{r:.2f}"
        table.add_row(name, *(cell(result[kind]) for kind in kinds), *([beside] if ratio else []))

    add("parameters", lambda m: f"{m['parameters']:,}", "parameters")
    add(
        f"tokens/s, {result[kinds[0]]['tokens']:,} a step",
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
            f"{m['flops']['estimate'] / 1e9:,.4g} G ({m['flops']['estimate'] / m['flops']['counted'] - 1:+.1%})"
        ),
    )
    add("GFLOP/s of the step", lambda m: figure(m["flops_per_s"], ",.0f", 1e-9))
    add("GFLOP/s of its bare products", lambda m: figure(m["products_flops_per_s"], ",.0f", 1e-9))
    add("share of the bare products", lambda m: figure(m["share_of_products"], ".0%"))
    Console(width=150).print(table)


def profiled(trial: Trial, rows: int) -> str:
    """One step's operations by their own time."""
    for _ in range(WARM_UP):
        trial.step()
    cuda = trial.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        trial.step()
    return profiler.key_averages().table(
        sort_by=f"self_{'cuda' if cuda else 'cpu'}_time_total", row_limit=rows, max_name_column_width=60
    )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=SIZES, default="222m")
    parser.add_argument("--model", choices=[*MODELS, "both"], default="both")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--dtype", choices=["bf16", "fp32"], help="default: bf16 where the machine computes in it"
    )
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
        help="print the N operations that take most, instead of measuring",
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    if args.rows < 1:
        parser.error(f"--rows {args.rows}: a step has one row at least")
    device = pick_device(args.device, "--device")
    dtype = args.dtype or ("bf16" if computes_bf16(device) else "fp32")
    kinds = list(MODELS) if args.model == "both" else [args.model]
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    head = about() | {
        "timm": timm.__version__,
        "threads": torch.get_num_threads(),
        "device": on,
        "size": args.size,
        "dtype": dtype,
        "rows": args.rows,
        "repeats": max(1, args.repeats),
    }
    try:
        if args.profile:
            for kind in kinds:
                print(
                    f"{kind}, {args.size}, {dtype}",
                    profiled(Trial(kind, args.size, dtype, device, rows=args.rows), args.profile),
                    sep="\n",
                )
                gc.collect()  # a trial and its hooks hold one another
            return
        result = measure(kinds, args.size, dtype, device, head["repeats"], args.rows)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise UserError(
                f"memory ran out on {on}: take a smaller --size, or one --model at a time ({str(error).splitlines()[0]})"
            ) from None
        raise
    place = (
        on
        if device.type == "cuda"
        else f"{head['machine']}, {os.cpu_count()} cores, threads: {head['threads']}"
    )
    show(
        result,
        f"a training step, {args.size}, {dtype}, {args.rows} row{'s' * (args.rows > 1)}, {place}, torch {head['torch']}, {head['date']}",
    )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(head | result, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
