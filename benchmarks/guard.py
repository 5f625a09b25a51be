"""Compare the machine-independent costs of a training step with stored reference values; growth is an error.

  python -m benchmarks.guard             a line per changed value; exit code 1 if one grew by more than 2 %
  python -m benchmarks.guard --update    store today's values, after an intended change

Measures the models and the row of `benchmarks.train_step --size tiny`, fp32, on the CPU. Values are counted,
not timed: they are the same in every run. They belong to one version of torch and timm; with others nothing
is compared.

flops                 of forward and backward, by torch's counter
saved_bytes           tensors saved for the backward, without parameters
peak_bytes            tensors of a whole step that are alive at a time: activations, gradients, temporaries
step_operations       operations of a whole step that torch dispatches
optimizer_operations  those of `optimizer.step()`
logits_rows           rows multiplied by the unembedding, recomputation in the backward included
attention_pairs       queries × keys, summed over rows and layers, the vision encoder included
graph_breaks          of a right-tower block under torch.compile; attention is outside the graph
"""

import argparse
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.trial import Trial
from models.kv_cache import ImageContext
from models.layers import Rotary
from training.memory import saved_tensor_bytes
from utils.errors import UserError, run_script

REFERENCE = Path(__file__).parent / "results" / "guard.json"
TOLERANCE = 0.02
MODELS = {
    "vanilla": ("vanilla", 0),
    "dual_tower": ("dual_tower", 0),
    "dual_tower_heads": ("dual_tower", 2),
}  # name → kind, multi-token heads
UPDATE = "python -m benchmarks.guard --update"
Values = dict[str, dict[str, int]]


class Ledger(TorchDispatchMode):
    """Count dispatched operations, rows of logits, and the bytes of live tensors."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.operations = self.logits_rows = self.alive = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        if func.namespace != "aten":
            return out
        self.operations += 1
        for tensor in tree_leaves(out):
            if (
                isinstance(tensor, Tensor)
                and (storage := tensor.untyped_storage())._cdata not in given | self.known
            ):
                self.track(storage)
        if (
            func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
            and out.shape[-1] == self.vocabulary
        ):
            self.logits_rows += out.numel() // self.vocabulary
        return out

    def track(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self.release, key, size)

    def release(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


class AttentionPairs(TorchFunctionMode):
    """Count queries × keys of attention, by torch's fused kernel or by matmuls and a softmax."""

    pairs = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            queries, keys = args[:2]
            self.pairs += queries.shape[:-3].numel() * queries.shape[-2] * keys.shape[-2]
        if func in (Tensor.softmax, torch.softmax):
            scores = args[0]  # (n, heads, t, s), or (n, G, t, H ÷ G, s) of `SegmentAttention`
            heads = scores.shape[1] * (scores.shape[3] if scores.dim() == 5 else 1)
            self.pairs += scores.numel() // heads
        return func(*args, **(kwargs or {}))


def graph_breaks(trial: Trial) -> int:
    c, block = trial.config.model.right, trial.model.right.layers[0]
    T, L = 8, (4 if "left" in trial.config.model.towers else 0)
    image_kv = (
        torch.zeros(1, c.kv_heads, L, c.head_size, requires_grad=True),
        torch.zeros(1, c.kv_heads, L, c.head_size, requires_grad=True),
    )
    past = ImageContext([image_kv], Rotary.at(torch.arange(L)[None], c)) if L else None
    x, mask = (
        torch.zeros(1, T, c.hidden_size, requires_grad=True),
        torch.ones(1, 1, T, L + T, dtype=torch.bool),
    )
    torch._dynamo.reset()
    explanation = torch._dynamo.explain(block)(x, Rotary.at(torch.arange(L, L + T)[None], c), mask, past)
    torch._dynamo.reset()
    return len(explanation.break_reasons) if explanation.graph_count else 1  # no graph: nothing was compiled


def measure_one(trial: Trial) -> dict[str, int]:
    trial.step()  # creates the optimizer's state
    values = {
        "flops": int(trial.flops()["counted"]),
        "saved_bytes": saved_tensor_bytes(trial.model, trial.forward),
    }
    ledger, attention = Ledger(len(trial.model.right.unembedding)), AttentionPairs()
    in_optimizer = 0

    def count(sign: int) -> Any:
        def hook(*args: Any) -> None:
            nonlocal in_optimizer
            in_optimizer += sign * ledger.operations

        return hook

    for optimizer in trial.trainer.optimizers:
        optimizer.register_step_pre_hook(count(-1))
        optimizer.register_step_post_hook(count(1))
    gc.collect()
    gc.disable()  # a collection during the step would change the peak
    try:
        with attention, ledger:
            trial.step()
    finally:
        gc.enable()
    values |= {
        "peak_bytes": ledger.peak,
        "step_operations": ledger.operations,
        "optimizer_operations": in_optimizer,
    }
    return values | {
        "logits_rows": ledger.logits_rows,
        "attention_pairs": attention.pairs,
        "graph_breaks": graph_breaks(trial),
    }


def measure() -> Values:
    with torch.random.fork_rng(devices=[]):
        return {
            name: measure_one(Trial(kind, "tiny", "fp32", torch.device("cpu"), heads))
            for name, (kind, heads) in MODELS.items()
        }


def versions() -> dict[str, str]:
    return {"torch": torch.__version__.split("+")[0], "timm": timm.__version__}


def read(path: Path) -> Values:
    """The reference values. Raises `UserError` if they belong to other versions of torch or timm."""
    reference = json.loads(path.read_text(encoding="utf-8"))
    if reference["versions"] != versions():
        raise UserError(
            f"nothing compared: the reference values belong to {_format_versions(reference['versions'])}, "
            f"installed are {_format_versions(versions())}"
        )
    values: Values = reference["values"]
    return values


def _format_versions(versions: dict[str, str]) -> str:
    return " and ".join(f"{name} {version}" for name, version in versions.items())


def compare(reference: Values, now: Values) -> tuple[list[str], list[str]]:
    """→ lines for values that grew, are new or are missing; lines for values that shrank."""
    grew, shrank = [], []
    was, new = (
        {(model, name): value for model, costs in values.items() for name, value in costs.items()}
        for values in (reference, now)
    )
    for key in sorted(was.keys() | new.keys()):
        a, b = was.get(key), new.get(key)
        before, after = "not stored" if a is None else f"{a:,}", "not measured" if b is None else f"{b:,}"
        line = f"{key[0]} {key[1]}: was {before}, is {after}"
        if a is None or b is None:
            grew.append(f"{line} ({UPDATE}, if that is meant)")
        elif b > a * (1 + TOLERANCE):
            grew.append(f"{line}{f', {b / a - 1:+.1%}' if a else ''} ({UPDATE}, if that is meant)")
        elif b < a * (1 - TOLERANCE):
            shrank.append(f"{line}, {b / a - 1:+.1%} ({UPDATE}, to keep the gain)")
    return grew, shrank


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.guard",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--update", action="store_true", help="store today's values")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # faster for tiny tensors
    if args.update:
        now = measure()
        REFERENCE.write_text(
            json.dumps({"versions": versions(), "values": now}, indent=2) + "\n", encoding="utf-8"
        )
        print(f"stored {sum(map(len, now.values()))} values in {REFERENCE}")
        return
    try:
        reference = read(REFERENCE)
    except UserError as other:
        print(other)
        return
    now = measure()
    grew, shrank = compare(reference, now)
    for line in grew + shrank:
        print(line)
    if grew:
        raise UserError(f"{len(grew)} of {sum(map(len, now.values()))} values are not the reference values")
    print(f"{sum(map(len, now.values()))} values: none grew by more than {TOLERANCE:.0%}")


if __name__ == "__main__":
    run_script(main)
