"""A training step: tokens a second, where its seconds go, its memory, and how near it comes to bare matrix products.

  python -m benchmarks.train_step --json benchmarks/results/train_step.json
  python -m benchmarks.train_step --model vanilla --profile                  operations by their share of a step, instead

The standard row: one packed row of six documents, each an image, 59 tokens of question and 60 of answer, all of it
supervised; no padding, no markers. Random weights, every part trained with AdamW, through `training.loop.train_step`.

222m       SigLIP-B/16 at 224 pixels, 49 tokens an image, and decoders of SmolLM2-135M's sizes, over 49,152 text tokens
450m       SigLIP 2 B/16 at 512 pixels, 64 tokens an image, and decoders of SmolLM2-360M's sizes
tiny       what tests and the guard run

Vanilla has the images in its one decoder, the dual tower in its left one. Both are measured in turn in one run; figures are
medians of --repeats steps (least to most), two steps before them are not counted.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.about import about
from configs.errors import UserError, run_script
from configs.schema import Config, DataConfig, DecoderConfig, ModelConfig, MultiTokenConfig, ProjectorConfig, TrainConfig, VisionConfig, Vocabulary
from models.dual_tower.dual_tower import DualTowerVLM
from models.layers import computes_bf16, pick_device
from models.vision_language_model import VisionLanguageModel
from training.estimate import count_flops, trained_shares
from training.fit import free_memory
from training.loop import keep_freed_memory, train_step
from training.optim import make_optimizers
from training.precision import autocast

Batch = dict[str, Tensor]
MODELS: dict[str, Any] = {"vanilla": VisionLanguageModel, "dual_tower": DualTowerVLM}
DOCUMENTS, QUESTION, ANSWER = 6, 59, 60  # of the standard row
WARM_UP = 2
MARKERS = 65  # the global image's and 8 × 8 tiles': rows of the embedding tables, as in a real model


@dataclass(frozen=True)
class Size:
    vision: VisionConfig
    shuffle: int
    decoder: DecoderConfig
    text: int  # tokens of the text vocabulary


SIZES = {
    "tiny": Size(
        VisionConfig("vit_base_patch16_siglip_224", "random", image_size=32, grid=4, options='{"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8}'),
        2,
        DecoderConfig(layers=3, hidden_size=48, heads=4, kv_heads=2, head_size=16, mlp_size=96),
        499,
    ),
    "222m": Size(VisionConfig("vit_base_patch16_siglip_224", "random", image_size=224, grid=14), 2, DecoderConfig(), 49152),
    "450m": Size(
        VisionConfig("vit_base_patch16_siglip_512.v2_webli", "random", image_size=512, grid=32),
        4,
        DecoderConfig(layers=32, hidden_size=960, heads=15, kv_heads=5, head_size=64, mlp_size=2560),
        49152,
    ),
}


def _forward_flops(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def _backward_flops(gradient: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * q[0] * q[1] * q[2] * k[2] * (3 * q[3] + 2 * v[3])  # scores once more, then a gradient for each factor


# Counters before torch 2.15 know neither the kernel of CPUs nor grouped queries.
KERNELS = [getattr(torch.ops.aten, f"_scaled_dot_product_{name}") for name in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")]
ATTENTION = dict.fromkeys(KERNELS, _forward_flops) | {getattr(torch.ops.aten, f"{op.__name__}_backward"): _backward_flops for op in KERNELS}


def make_config(kind: str, size: Size, dtype: str, heads: int = 0) -> Config:
    model = ModelConfig(
        vision=size.vision,
        projector=ProjectorConfig(pixel_shuffle=size.shuffle),
        left=size.decoder,
        right=size.decoder,
        left_context="image" if kind == "dual_tower" else "none",
        multi_token=MultiTokenConfig(heads, mlp_size=size.decoder.mlp_size),
    )
    rates = {f"lr_{part}": 1e-5 for part in ("vision", "projector", "left", "right", "heads")}
    return Config(model=model, data=DataConfig(left_length=1024, right_length=1024), train=TrainConfig(rows=1, dtype=dtype, warmup_steps=0, **rates))


def standard_row(model: ModelConfig, vocabulary: Vocabulary) -> Batch:
    """One packed row, the same at every call. In a document the image comes first, then the question, then the answer."""
    length = model.tokens_per_tile + QUESTION + ANSWER
    generator = torch.Generator().manual_seed(0)
    positions, documents = torch.arange(length).repeat(DOCUMENTS), torch.arange(DOCUMENTS).repeat_interleave(length)
    image = positions < model.tokens_per_tile
    ids = torch.randint(0, vocabulary.text_size, image.shape, generator=generator).masked_fill(image, vocabulary.image_token_id)
    labels = ids.roll(-1).masked_fill((positions < length - ANSWER - 1) | (positions == length - 1), -100)
    left = image if model.left_context != "none" else torch.zeros_like(image)
    columns = {"ids": ids, "positions": positions, "groups": documents}
    batch = {f"left_{name}": column[left] for name, column in (columns | {"images": documents}).items()}
    batch |= {f"right_{name}": column[~left] for name, column in (columns | {"documents": documents}).items()} | {"labels": labels[~left]}
    side = model.vision.image_size
    tiles = torch.randint(0, 256, (DOCUMENTS, 3, side, side), dtype=torch.uint8, generator=generator)
    return {name: column[None] for name, column in batch.items()} | {"tiles": tiles}


class Again:
    """Batches without end, as the loop reads them: the same one each time."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __next__(self) -> Batch:
        return self.batch

    def sources(self) -> list[str]:
        return []

    def samples(self) -> list[str]:
        return []


class Trial:
    """A model with its optimizers and the standard row."""

    def __init__(self, kind: str, size: str, dtype: str, device: torch.device, heads: int = 0) -> None:
        self.config, self.device = make_config(kind, SIZES[size], dtype, heads), device
        if device.type == "cpu":
            keep_freed_memory()  # as `train` does
        vocabulary = Vocabulary(SIZES[size].text, MARKERS)
        torch.manual_seed(0)
        self.model = MODELS[kind](self.config.model, vocabulary).to(device).train()
        self.optimizers = make_optimizers(self.model, self.config.train)
        self.row = standard_row(self.config.model, vocabulary)
        self.batches, self.steps = Again(self.row), 0
        self.tokens = self.row["left_ids"].numel() + self.row["right_ids"].numel()
        self.marks: dict[str, Any] = {}
        self.model.register_forward_pre_hook(lambda *_: self.mark("called"))
        self.model.register_forward_hook(lambda model, args, output: self._after_forward(output.loss_sum))

    def mark(self, name: str) -> None:
        """Note the time: on CUDA as an event among the device's work, so that nothing has to wait."""
        if self.device.type == "cuda":
            self.marks[name] = torch.cuda.Event(enable_timing=True)
            self.marks[name].record()
        else:
            self.marks[name] = time.perf_counter()

    def between(self, first: str, last: str) -> float:
        a, b = self.marks[first], self.marks[last]
        return a.elapsed_time(b) / 1000 if self.device.type == "cuda" else b - a

    def _after_forward(self, loss: Tensor) -> None:
        self.mark("forward")
        if loss.requires_grad:  # called at the start of the backward pass, to be called again at its end
            loss.register_hook(lambda _: torch.autograd.Variable._execution_engine.queue_callback(lambda: self.mark("backward")))

    def step(self) -> dict[str, float]:
        """One optimizer step → its seconds, and those of its phases."""
        self.steps += 1
        self.mark("start")
        values = train_step(self.config, self.model, self.optimizers, self.batches, self.steps, self.device)
        self.mark("end")
        synchronize(self.device)
        if "skipped" in values:
            raise UserError(f"a step that cannot be measured: {values['skipped']}")
        return {
            "step": self.between("start", "end"),
            "forward": self.between("called", "forward"),
            "backward": self.between("forward", "backward"),
            "optimizer": self.between("backward", "end"),
        }

    def forward(self) -> Tensor:
        """As in `train_step` → the sum of the losses."""
        with autocast(self.config.train, self.device):
            output = self.model(**{name: column.to(self.device) for name, column in self.row.items()})
        loss: Tensor = output.loss_sum if output.head_loss_sums is None else output.loss_sum + output.head_loss_sums.sum()
        return loss

    def flops(self) -> dict[str, float]:
        """FLOPs of forward and backward: as estimated, and counted."""
        estimate = count_flops(self.model).training(self.row, trained_shares(self.model))
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            self.forward().backward()
        self.model.zero_grad(set_to_none=True)
        return {"estimate": estimate, "counted": counter.get_total_flops()}

    def products(self) -> Counter[tuple[int, int, int]]:
        """(rows, inputs, outputs) of the linear layers and of the logits, each with how often it comes in a forward."""
        shapes: Counter[tuple[int, int, int]] = Counter()
        linear = [m for m in self.model.modules() if isinstance(m, nn.Linear)]
        hooks = [m.register_forward_pre_hook(lambda m, x: shapes.update([(x[0].numel() // m.in_features, m.in_features, m.out_features)])) for m in linear]
        with torch.no_grad():
            self.forward()
        for hook in hooks:
            hook.remove()
        V, D = self.model.right.unembedding.shape
        shapes[int((self.row["labels"] != -100).sum()), D, V] += 1
        return shapes


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Products:
    """Bare matrix products of a step's linear layers."""

    def __init__(self, shapes: Counter[tuple[int, int, int]], dtype: torch.dtype, device: torch.device) -> None:
        self.shapes, self.device = shapes, device
        self.operands = {(r, i, o): [torch.randn(shape, device=device).to(dtype) for shape in ((r, i), (o, i), (r, o))] for r, i, o in shapes}

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


def peak_memory(kind: str, size: str, dtype: str, device: torch.device) -> int:
    """Bytes that three steps take, at most. For a process of its own: a peak does not go away again."""
    before = resident("VmRSS")
    trial = Trial(kind, size, dtype, device)
    for _ in range(3):
        trial.step()
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM") - before


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args).result()
        except BrokenProcessPool:
            raise UserError(f"the process that ran {function.__name__}({', '.join(map(str, args))}) was killed: most likely memory ran out, take a smaller --size") from None


def check_memory(needed: float, device: torch.device, what: str) -> None:
    """More than is free raises `UserError`: on a CPU the system would end some process, perhaps another's."""
    free = free_memory(device)
    if free is not None and needed > free:
        raise UserError(f"{what} would take some {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free: take a smaller --size, or one --model at a time")


def count_parameters(kind: str, size: str) -> int:
    with torch.device("meta"):
        model = MODELS[kind](make_config(kind, SIZES[size], "fp32").model, Vocabulary(SIZES[size].text, MARKERS))
    return sum(p.numel() for p in model.parameters())


def spread(values: Iterable[float]) -> dict[str, float]:
    values = list(values)
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def measure(kinds: list[str], size: str, dtype: str, device: torch.device, repeats: int) -> dict[str, Any]:
    parameters = {kind: count_parameters(kind, size) for kind in kinds}
    check_memory(16 * max(parameters.values()), device, "weights, gradients and moments alone")
    memory = {kind: apart(peak_memory, kind, size, dtype, device) for kind in kinds}
    check_memory(sum(memory.values()), device, " and ".join(kinds) + ", side by side,")
    trials = {kind: Trial(kind, size, dtype, device) for kind in kinds}
    flops = {kind: trial.flops() for kind, trial in trials.items()}
    kernels = {kind: Products(trial.products(), torch.bfloat16 if dtype == "bf16" else torch.float32, device) for kind, trial in trials.items()}
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
            "seconds": {phase: spread(step[phase] for step in steps[kind]) for phase in ("step", "forward", "backward", "optimizer")},
            "turns": [step["step"] for step in steps[kind]],  # one that another program disturbed stands out
            "peak_memory_bytes": memory[kind],
            "flops": flops[kind],
            "flops_per_s": spread(reached),
            "products_flops_per_s": spread(rates),
            "share_of_products": spread(a / b for a, b in zip(reached, rates, strict=True)),
            "products": [
                {"rows": r, "inputs": i, "outputs": o, "layers": n, "flops_per_s": 6 * r * i * o / statistics.median(s[r, i, o] for s in alone[kind])}
                for (r, i, o), n in kernels[kind].shapes.items()
            ],
        }
    if len(kinds) == 2:
        pairs = list(zip(steps["dual_tower"], steps["vanilla"], strict=True))
        out["ratio"] = {"tokens_per_s": spread(v["step"] / d["step"] for d, v in pairs)}
        out["ratio"] |= {f"seconds_{phase}": spread(d[phase] / v[phase] for d, v in pairs) for phase in ("forward", "backward", "optimizer")}
        for name, values in (("parameters", parameters), ("peak_memory", memory), ("flops", {kind: f["counted"] for kind, f in flops.items()})):
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
    add(f"tokens/s, of rows of {result[kinds[0]]['tokens']:,}", lambda m: figure(m["tokens_per_s"], ".1f"), "tokens_per_s")
    add("seconds of a step", lambda m: figure(m["seconds"]["step"], ".3f"))
    for phase in ("forward", "backward", "optimizer"):
        add(f"  {phase}", lambda m, phase=phase: figure(m["seconds"][phase], ".3f"), f"seconds_{phase}")
    add("peak memory, GiB", lambda m: f"{m['peak_memory_bytes'] / 2**30:.2f}", "peak_memory")
    add("FLOPs of a step, counted", lambda m: f"{m['flops']['counted'] / 1e9:,.4g} G", "flops")
    add("FLOPs of a step, estimated", lambda m: f"{m['flops']['estimate'] / 1e9:,.4g} G ({m['flops']['estimate'] / m['flops']['counted'] - 1:+.1%})")
    add("GFLOP/s of the step", lambda m: figure(m["flops_per_s"], ",.0f", 1e-9))
    add("GFLOP/s of its bare products", lambda m: figure(m["products_flops_per_s"], ",.0f", 1e-9))
    add("share of the bare products", lambda m: figure(m["share_of_products"], ".0%"))
    Console(width=150).print(table)


KINDS = (
    ("attention", r"scaled_dot_product|flash_attention|efficient_attention|cudnn_attention|::(bmm|baddbmm|_softmax\w*)$"),  # on a CPU in bf16 it is plain products
    ("products of linear layers", r"::(mm|addmm|matmul|linear|mkldnn_\w*)$"),
    ("convolution", "convolution|::conv"),
    ("optimizer, gradient norm", r"_fused_adam|_foreach_|linalg_vector_norm|Optimizer"),
    ("casts and copies", r"::(copy_|_to_copy|to|clone|contiguous|cat|fill_|zero_|zeros|zeros_like|new_zeros|roll|stack)$"),
    ("norms", r"rms_norm|layer_norm|::(rsqrt|mean|pow)$"),
    ("loss", "softmax|nll_loss|cross_entropy"),
    ("look-up and scatter", r"embedding|index|scatter|gather|nonzero"),
    ("element by element", r"::(mul|mul_|add|add_|sub|div|div_|neg|silu\w*|gelu\w*|masked_fill_?|where|sum|cos|sin|eq|ne|le|lt|ge|bitwise_\w+|isfinite|abs)$"),
)


def profiled(trial: Trial, top: int, console: Console, name: str) -> None:
    """Print one step's operations by their own time: grouped, and the largest."""
    for _ in range(WARM_UP):
        trial.step()
    cuda = trial.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        wall = trial.step()["step"]
    events = [e for e in profiler.key_averages() if str(e.device_type).endswith("CPU")]  # a kernel's own line would count twice
    seconds = {e.key: (e.self_device_time_total if cuda else e.self_cpu_time_total) / 1e6 for e in events}
    calls = {e.key: e.count for e in events}
    groups: Counter[str] = Counter()
    kinds = {key: next((kind for kind, pattern in KINDS if re.search(pattern, key)), "rest") for key in seconds}
    for key, own in seconds.items():
        groups[kinds[key]] += own
    total = sum(groups.values())
    table = Table("kind", "seconds", "share", title=f"{name}: a step of {wall:.3f} s under the profiler, {total:.3f} s of them in operations{' on the device' if cuda else ''}")
    for kind, own in groups.most_common():
        table.add_row(kind, f"{own:.3f}", f"{own / total:.1%}")
    console.print(table)
    table = Table("operation", "kind", "seconds", "share", "calls", title=f"{name}: the {top} that take most")
    for key in sorted(seconds, key=lambda k: -seconds[k])[:top]:
        table.add_row(key[:80], kinds[key], f"{seconds[key]:.4f}", f"{seconds[key] / total:.1%}", f"{calls[key]:,}")
    console.print(table)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="222m")
    parser.add_argument("--model", choices=[*MODELS, "both"], default="both")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="default: bf16 where the machine computes in it")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--profile", type=int, nargs="?", const=25, metavar="N", help="print the N operations that take most, instead of measuring")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    device = pick_device(args.device, "--device")
    dtype = args.dtype or ("bf16" if computes_bf16(device) else "fp32")
    kinds = list(MODELS) if args.model == "both" else [args.model]
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    head = about() | {"timm": timm.__version__, "threads": torch.get_num_threads(), "device": on, "size": args.size, "dtype": dtype, "repeats": max(1, args.repeats)}
    try:
        if args.profile:
            for kind in kinds:
                profiled(Trial(kind, args.size, dtype, device), args.profile, Console(width=150), f"{kind}, {args.size}, {dtype}")
                gc.collect()  # a trial and its hooks hold one another
            return
        result = measure(kinds, args.size, dtype, device, head["repeats"])
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise UserError(f"memory ran out on {on}: take a smaller --size, or one --model at a time ({str(error).splitlines()[0]})") from None
        raise
    place = on if device.type == "cuda" else f"{head['machine']}, {os.cpu_count()} cores, threads: {head['threads']}"
    show(result, f"a training step, {args.size}, {dtype}, {place}, torch {head['torch']}, {head['date']}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(head | result, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
