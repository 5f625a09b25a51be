"""Side by side: this working tree and another commit's, on this machine. See tests/golden/__init__.py."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.kill import TIMES

ROOT = Path(__file__).parent.parent.parent
TOWERS = {
    f"model.{tower}.{size}": value
    for tower in ("left", "right")
    for size, value in {"layers": 2, "hidden_size": 32, "mlp_size": 64, "heads": 2, "kv_heads": 1}.items()
}
SMALL = TOWERS | {
    "model.vision.image_size": 64,
    "data.limit": 60,
    "data.validation_images": 8,
    "data.right_length": 64,
    "data.window": 12,
    "train.local_batch_size": 2,
    "train.global_batch_size": 4,
    "train.dtype": "fp32",
    "train.diagnostics_every": 7,
    "train.eval_every": 25,
    "train.checkpoint_every": 15,
}
CASES: dict[str, dict[str, Any]] = {
    "dual tower": {},
    "vanilla": {"config": "vanilla_easyvqa"},
    "heads": {"model.multi_token.heads": 2, "model.multi_token.mlp_size": 32, "train.head_warmup": 5},
    "LoRA": {"lora.left.r": 4, "lora.right.r": 4, "lora.right.dropout": 0.1},
    "tiles": {
        "model.vision.max_side": 128,
        "model.vision.enlarge": "true",
        "data.left_length": 128,
        "train.lr_vision": 1e-3,
    },
    "prefix": {"model.left_context": "prefix", "model.image_isolation": "false", "data.left_length": 96},
    "Muon": {"train.optimizer": "muon", "train.clip": 0},
    "AdamW, EMA, wsd": {
        "train.optimizer": "adamw",
        "train.ema": 0.9,
        "train.schedule": "wsd",
        "train.recompute": "true",
    },
    "two sources, chain": {
        "data.sources": "easy_vqa,openmoji",
        "data.turns": "chain",
        "data.right_length": 160,
        "model.left_attention": "causal",
    },
    "two ranks, DDP": {"ranks": 2},
    "two ranks, FSDP2": {"ranks": 2, "parallel": "fsdp"},
}
RENAMED = {
    "right.heads.stands": "heads.acceptance_rates",
    "right.heads.": "heads.",
}  # names in model.safetensors, older → newer
OLD_FLAGS = {
    "train.local_batch_size": "train.rows",
    "train.global_batch_size": "train.accumulation",
    "train.diagnostics_every": "train.detail_every",
}


@contextmanager
def working_tree(commit: str) -> Iterator[Path]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "base"
        subprocess.run(
            ["git", "worktree", "add", "--detach", "--quiet", str(path), commit], cwd=ROOT, check=True
        )
        try:
            yield path
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(path)], cwd=ROOT, check=True)


def flags_of(tree: Path, case: dict[str, Any]) -> list[str]:
    """The command-line flags of a configuration, as the given tree spells them.

    Older trees have no `global_batch_size`: they count rows, and the micro-batches of all ranks together.
    """
    values = SMALL | {key: value for key, value in case.items() if key != "ranks"}
    settings = tree / "configs" / "train.py"
    if tree != ROOT:
        values.pop("kernels", None)
    if not settings.exists() or "local_batch_size" not in settings.read_text():
        values["train.global_batch_size"] //= values["train.local_batch_size"]
        values = {OLD_FLAGS.get(key, key): value for key, value in values.items()}
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]


def start(tree: Path, case: dict[str, Any], steps: int, folder: Path) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True)
    ranks, script = (
        case.get("ranks", 1),
        "train_vanilla.py" if "vanilla" in str(case.get("config")) else "train_dual_tower.py",
    )
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    )
    run = [
        "--max_steps",
        str(steps),
        "--output_dir",
        str(folder / "run"),
        "--cache_dir",
        str(folder / "cache"),
    ]
    with (folder / "log.txt").open("wb") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return subprocess.Popen(
            [sys.executable, *launcher, str(tree / script), *flags_of(tree, case), *run],
            stdout=log,
            stderr=log,
            cwd=folder,
            env=environment,
        )


def both(trees: list[Path], case: dict[str, Any], steps: int, folder: Path) -> list[Path]:
    """Run folders of the two trees, trained at the same time."""
    folders = [folder / name for name in ("base", "here")]
    started = [start(tree, case, steps, run_folder) for tree, run_folder in zip(trees, folders, strict=True)]
    for process, run_folder in zip(started, folders, strict=True):
        if process.wait():
            raise SystemExit(f"{run_folder.name} failed:\n{(run_folder / 'log.txt').read_text()[-2000:]}")
    return [run_folder / "run" for run_folder in folders]


def metrics(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {
        current_name(name): tensor for name, tensor in load_file(run / "model" / "model.safetensors").items()
    }


def current_name(name: str) -> str:
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name


def same(base: Path, here: Path) -> str:
    """The first difference between two runs, or "".

    Compares every number of metrics.jsonl except times, and the exported weights, bit for bit.
    """
    a, b = metrics(base), metrics(here)
    if len(a) != len(b):
        return f"{len(a)} and {len(b)} rows of metrics"
    for x, y in zip(a, b, strict=True):
        if x != y:
            return f"step {x['step']}: " + "; ".join(
                f"{key}: {x.get(key)} and {y.get(key)}" for key in {**x, **y} if x.get(key) != y.get(key)
            )
    c, d = weights(base), weights(here)
    if c.keys() != d.keys():
        return f"other tensors: {sorted(c.keys() ^ d.keys())[:3]}"
    return next((f"weights differ: {name}" for name in c if not torch.equal(c[name], d[name])), "")


def gradients(run: Path) -> dict[str, torch.Tensor]:
    """Those of a first step, which AdamW's and Muon's first moments hold as their fraction."""
    out = {}
    for file in sorted((run / "checkpoints" / "step_000001").glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if name.endswith((".exp_avg", ".momentum_buffer")):
                out[current_name(name)] = tensor.float() * (10 if name.endswith(".exp_avg") else 20)
    return out


def near(base: Path, here: Path, tolerance: float) -> str:
    """Compare loss and gradients after one step.

    The loss must agree to a tenth of `tolerance`, each tensor's gradient to `tolerance` relative to its norm.
    """
    (a, *_), (b, *_) = metrics(base), metrics(here)
    if abs(a["loss"] - b["loss"]) > tolerance / 10 * max(1.0, abs(a["loss"])):
        return f"losses {a['loss']} and {b['loss']}"
    c, d = gradients(base), gradients(here)
    if c.keys() != d.keys() or not c:
        return f"other gradients: {sorted(c.keys() ^ d.keys())[:3]}"
    largest = max(float(tensor.norm()) for tensor in c.values())
    for name, gradient in c.items():
        error = float((gradient - d[name]).norm()) / max(float(gradient.norm()), 1e-3 * largest)
        if error > tolerance:
            return f"the gradient of {name} differs by {error:.2e} of its norm"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("commit", nargs="?", help="to compare with")
    parser.add_argument(
        "--close",
        action="store_true",
        help="for changed operations: one step; losses to 1e-6, gradients to 1e-5, in bf16 to 1e-3 and 1e-2 "
        "(two of its rounding units)",
    )
    parser.add_argument("--kernels", choices=("auto", "plain"), default="auto", help="of this tree")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--write", action="store_true", help="store references.json")
    args = parser.parse_args()
    if args.write:
        from tests.golden.references import write

        return write()
    if not args.commit:
        parser.error("give a commit, or --write")
    different = 0
    with working_tree(args.commit) as tree, TemporaryDirectory() as folder:
        for name, case in CASES.items():
            if args.only not in name:
                continue
            for dtype in ("fp32", "bf16") if args.close else ("fp32",):
                changes = {"train.dtype": dtype, "kernels": args.kernels} | (
                    {"train.clip": 0, "train.eval_every": 0, "train.ema": 0} if args.close else {}
                )
                runs = both(
                    [tree, ROOT],
                    case | changes,
                    1 if args.close else args.steps,
                    Path(folder) / f"{name} {dtype}",
                )
                differences = near(*runs, 1e-5 if dtype == "fp32" else 1e-2) if args.close else same(*runs)
                print(
                    f"{name}, {dtype}: {differences or ('near' if args.close else 'equal to the bit')}",
                    flush=True,
                )
                different += bool(differences)
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
