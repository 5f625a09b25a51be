"""What a training step costs, as far as it does not depend on the machine, beside values that are kept: more work than before is an error.

  python -m benchmarks.guard             one line a value that changed; exit code 1 where one grew by more than 2 %
  python -m benchmarks.guard --update    keep today's values, where a change is meant

The models and the row of `benchmarks.train_step --size tiny`, fp32, on the CPU. Counted, not timed: every value is the same at every run.
The values belong to one version of torch and timm; beside others nothing is compared.

flops              of forward and backward, by torch's counter
saved_bytes        tensors that the forward keeps for the backward, parameters left out
peak_bytes         tensors that a whole step makes, as many as are alive at a time: activations, gradients, temporaries
step_operations    that a whole step sends through torch's dispatcher; optimizer_operations: those in `optimizer.step()`
logits_rows        rows multiplied by the unembedding, those computed again in the backward included
attention_pairs    queries × keys, summed over rows and layers, the vision encoder's included
graph_breaks       of a right-tower block under torch.compile: attention stands outside
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
from training.estimate import saved_tensor_bytes
from utils.errors import UserError, run_script

KEPT = Path(__file__).parent / "results" / "guard.json"
TOLERANCE = 0.02
MODELS = {
    "vanilla": ("vanilla", 0),
    "dual_tower": ("dual_tower", 0),
    "dual_tower_heads": ("dual_tower", 2),
}  # name → kind, multi-token heads
UPDATE = "python -m benchmarks.guard --update"
Values = dict[str, dict[str, int]]


class Ledger(TorchDispatchMode):
    """What passes through torch's dispatcher."""

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
                self.made(storage)
        if (
            func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
            and out.shape[-1] == self.vocabulary
        ):
            self.logits_rows += out.numel() // self.vocabulary
        return out

    def made(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self.gone, key, size)

    def gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


class AttentionPairs(TorchFunctionMode):
    """Queries × keys of attention, by torch's fused kernel or by products and a softmax."""

    pairs = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            queries, keys = args[:2]
            self.pairs += queries.shape[:-3].numel() * queries.shape[-2] * keys.shape[-2]
        if func in (Tensor.softmax, torch.softmax):
            heads = args[0].shape[1] * (
                args[0].shape[3] if args[0].dim() == 5 else 1
            )  # (n, heads, t, s), or of `SegmentAttention` (n, G, t, H ÷ G, s)
            self.pairs += args[0].numel() // heads
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
    found = torch._dynamo.explain(block)(x, Rotary.at(torch.arange(L, L + T)[None], c), mask, past)
    torch._dynamo.reset()
    return len(found.break_reasons) if found.graph_count else 1  # no graph at all: nothing could be compiled


def measure_one(trial: Trial) -> dict[str, int]:
    trial.step()  # makes the optimizer's state
    values = {"flops": int(trial.flops()["counted"]), "saved_bytes": saved_tensor_bytes(trial.model, trial.forward)}
    ledger, attention = Ledger(len(trial.model.right.unembedding)), AttentionPairs()
    in_optimizer = 0

    def count(sign: int) -> Any:
        def hook(*args: Any) -> None:
            nonlocal in_optimizer
            in_optimizer += sign * ledger.operations

        return hook

    for optimizer in trial.optimizers:
        optimizer.register_step_pre_hook(count(-1))
        optimizer.register_step_post_hook(count(1))
    gc.collect()
    gc.disable()  # a collection in the middle would free what another run still holds
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
    """The kept values. Those of other versions raise `UserError`."""
    kept = json.loads(path.read_text(encoding="utf-8"))
    if kept["versions"] != versions():
        raise UserError(
            f"nothing compared: the kept values belong to {_named(kept['versions'])}, here runs {_named(versions())}"
        )
    return kept["values"]  # type: ignore[no-any-return]


def _named(found: dict[str, str]) -> str:
    return " and ".join(f"{name} {version}" for name, version in found.items())


def compare(kept: Values, now: Values) -> tuple[list[str], list[str]]:
    """→ a line for each value that grew, came or went; and one for each that shrank."""
    grew, shrank = [], []
    was, new = (
        {(model, name): value for model, found in values.items() for name, value in found.items()}
        for values in (kept, now)
    )
    for key in sorted(was.keys() | new.keys()):
        a, b = was.get(key), new.get(key)
        line = f"{key[0]} {key[1]}: was {'not kept' if a is None else f'{a:,}'}, is {'not measured' if b is None else f'{b:,}'}"
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
    parser.add_argument("--update", action="store_true", help="keep today's values")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # tiny tensors: threads only get in one another's way
    if args.update:
        now = measure()
        KEPT.write_text(
            json.dumps({"versions": versions(), "values": now}, indent=2) + "\n", encoding="utf-8"
        )
        print(f"kept {sum(map(len, now.values()))} values in {KEPT}")
        return
    try:
        kept = read(KEPT)
    except UserError as other:
        print(other)
        return
    now = measure()
    grew, shrank = compare(kept, now)
    for line in grew + shrank:
        print(line)
    if grew:
        raise UserError(f"{len(grew)} of {sum(map(len, now.values()))} values are not what is kept")
    print(f"{sum(map(len, now.values()))} values: none grew by more than {TOLERANCE:.0%}")


if __name__ == "__main__":
    run_script(main)
