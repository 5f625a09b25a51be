"""What is logged with the loss: update ratios, histograms, FLOP/s, spikes; and the watchdog."""

import ctypes
import json
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from configs.train import Config, TrainConfig
from data.collators import collate
from models.masks import left_mask, right_mask
from tests.conftest import TINY_MODEL, random_tiles, tiny_model
from tests.programs import run_program
from tests.test_dual_tower import make_sample
from training.callbacks import Callback
from training.diagnostics import Diagnostics, FlopsMeter
from training.feature_cache import FeatureCache
from training.flops import count_flops, trained_shares
from training.setup import check_compiler
from training.trainer import Trainer, batch_counts
from utils.errors import UsageError


@pytest.fixture
def rows(renderer, tokenizer):
    samples = [
        make_sample(renderer, images, [[{"user": "is it a?", "assistant": "a"}] * turns], seed=turns)
        for turns, images in ((1, 1), (2, 1), (3, 2))
    ]
    return collate([samples[:2], samples[2:]], tokenizer.global_image)


class Given:
    """The same batch again and again."""

    def __init__(self, batch):
        self.batch = batch

    def __next__(self):
        return self.batch

    def sources(self):
        return []

    def samples(self):
        return []


def test_update_ratios_and_histograms_are_of_what_changed(tokenizer, rows):
    model = tiny_model(tokenizer)
    config = Config(
        model=TINY_MODEL,
        train=TrainConfig(
            dtype="fp32", warmup_steps=0, lr_vision=1e-3, weight_decay=0.0, diagnostics_every=1
        ),
    )
    trackers = SimpleNamespace(histograms=lambda step, spread: spreads.append(spread))
    diagnostics, log = Diagnostics(), SimpleNamespace(trackers=trackers)
    spreads, before = [], {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = {}

    class Gradients(Callback):
        def before_update(self, trainer):
            for name, p in model.named_parameters():
                if p.grad is not None:
                    gradients[name] = p.grad.clone()

    trainer = Trainer(config, model, Given(rows), log=log, callbacks=[diagnostics, Gradients()])
    diagnostics.begin(trainer)
    values = trainer.train_step()
    diagnostics.after_step(trainer, values)
    ratios, (spread,) = values["update_ratios"], spreads
    assert set(ratios) == {"vision", "projector", "left", "right"}
    names = {id(p): name for name, p in model.named_parameters()}
    for part in ("projector", "left", "right"):  # no tensor of theirs is longer than what is looked at
        members = [names[id(p)] for p in model.parts()[part].parameters()]
        now = dict(model.named_parameters())
        moved = torch.cat([(now[n].detach() - before[n]).flatten() for n in members if n in gradients]).norm()
        assert ratios[part] == pytest.approx(
            (moved / torch.cat([before[n].flatten() for n in members if n in gradients]).norm()).item(),
            rel=1e-4,
        )
    layer = [g.flatten() for n, g in gradients.items() if n.startswith("right.layers.0.")]
    counts, edges = spread["gradients/right.layers.0"]
    expected = np.histogram(torch.cat(layer).numpy(), bins=64)
    assert (
        counts.sum() == sum(map(len, layer))
        and np.array_equal(counts, expected[0])
        and np.allclose(edges, expected[1])
    )
    assert {"weights/right.layers.0", "weights/left.decoder.layers.0", "gradients/right.embed_tokens"} <= set(
        spread
    )


def test_achieved_flops_are_those_of_real_tokens(tokenizer, rows):
    """Pairs of a query and a key are counted from positions; the masks say which they are."""
    model = tiny_model(tokenizer)
    config = Config(model=TINY_MODEL, train=TrainConfig(dtype="fp32", warmup_steps=0, lr_vision=1e-3))
    trainer = Trainer(config, model, Given(rows))
    flops_meter, seen = trainer.flops_meter, {}
    real = flops_meter.of
    flops_meter.of = lambda counts, seconds: seen.update(counts) or real(counts, seconds)
    values = trainer.train_step()
    left = left_mask(
        rows["left_positions"], rows["left_groups"], rows["left_images"], isolation=False, attention="causal"
    ).dense()[:, 0][rows["left_groups"] >= 0]
    right = right_mask(
        rows["right_positions"],
        rows["right_documents"],
        rows["right_groups"],
        rows["left_positions"],
        rows["left_groups"],
    ).dense()[:, 0][rows["right_documents"] >= 0]
    assert seen["right_pairs"] == int(right.sum()) and seen["right"] == len(right)
    text_between = seen["left_pairs"] - int(
        left.sum()
    )  # the second image stands behind text that the left stream does not hold
    assert 0 <= text_between < 0.5 * seen["left_pairs"] and seen["left"] == len(left)
    flops = count_flops(model)
    whole = flops.training(batch_counts(rows), trained_shares(model))
    assert (
        0.3 * whole
        < values["tflops_per_s"] * 1e12 * (seen["supervised"] / values["supervised_tokens_per_s"])
        < whole
    )  # padding and what nobody sees left out
    assert "mfu" not in values
    flops_meter.peak = 1e12
    assert flops_meter.of(seen, 2.0)["mfu"] == pytest.approx(flops_meter.of(seen, 2.0)["tflops_per_s"])


def test_a_spike_is_logged(tokenizer):
    messages: list[str] = []

    def spikes(norms: list[float], clip: float = 0.0) -> list[float | None]:
        config = Config(model=TINY_MODEL, train=TrainConfig(clip=clip))
        trainer = Trainer(config, tiny_model(tokenizer), None, log=SimpleNamespace(say=messages.append))
        result = []
        for trainer.step, norm in enumerate(norms, 1):
            values = {"grad_norm": norm}
            trainer.check(values)
            result.append(values.get("spike"))
        return result

    assert spikes([1.0] * 25 + [4.9, 5.1, 1.0]) == [None] * 26 + [pytest.approx(5.1), None]
    assert messages == [
        "warning: step 27: the gradient norm 5.1 is 5 times the median of the last 26 steps (1)"
    ]
    assert spikes([1.0, 100.0]) == [None, None] and len(messages) == 1  # too few to know what is usual
    # Where gradients are clipped, it is logged in the metrics alone.
    assert spikes([1.0] * 25 + [50.0], clip=1.0)[-1] == pytest.approx(50) and len(messages) == 1


def slow_third_step():
    real = Trainer.train_step

    def step(trainer):
        if trainer.step == 2:
            time.sleep(2)
        return real(trainer)

    Trainer.train_step = step


ROOT = Path(__file__).parent.parent
SMALL = [
    part
    for setting in (
        *(
            f"model.{tower}.{size}"
            for tower in ("left", "right")
            for size in ("layers=1", "hidden_size=32", "mlp_size=64", "heads=2", "kv_heads=1")
        ),
        "model.vision.image_size=64",
        "data.limit=20",
        "data.validation_images=4",
        "data.right_length=64",
        "train.local_batch_size=2",
        "train.global_batch_size=2",
    )
    for part in ("--" + setting).split("=")
]


def test_a_step_that_stalls_has_its_stacks_printed_and_goes_on(tmp_path):
    flags = [*SMALL, "--train.dtype", "fp32"]
    flags += [
        "--max_steps",
        "4",
        "--output_dir",
        "run",
        "--cache_dir",
        "cache",
        "--train.stall_minutes",
        "0.02",
        "--train.diagnostics_every",
        "2",
    ]
    done = run_program([str(ROOT / "train_dual_tower.py"), *flags], tmp_path, before=slow_third_step)
    assert done.returncode == 0, done.stderr
    assert (
        "no step for 0.02 minutes" in done.stderr
        and "thread MainThread, most recent call last:" in done.stderr
        and "Fatal" not in done.stderr
    )
    assert "in slow_third_step" not in done.stderr and "trainer.py" in done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    looked = [row["step"] for row in rows if "update_ratios" in row]
    assert looked == [2, 4] and all(row["tflops_per_s"] > 0 for row in rows if "grad_norm" in row)


def busy_under_a_watchdog() -> None:
    """Hundreds of dumps of threads at work, which may end a process if written from another thread."""
    from training.callbacks import Watchdog

    over = time.monotonic() + 3
    watchdog = Watchdog(1e-9)
    watchdog.begin()
    workers = [
        threading.Thread(
            target=lambda: [json.dumps(list(range(50))) for _ in iter(lambda: time.monotonic() < over, False)]
        )
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    watchdog.end(True)
    sys.exit(7)


def hold_the_interpreter() -> None:
    """A C function that hangs with the interpreter's lock: no thread of Python's can say so."""
    from training.callbacks import Watchdog

    watchdog = Watchdog(0.01)
    watchdog.begin()
    ctypes.PyDLL(None).sleep(4)
    watchdog.end(True)
    sys.exit(7)


def test_the_watchdog_ends_nothing_and_sees_what_holds_the_interpreter(tmp_path):
    done = run_program(["-c"], tmp_path, before=busy_under_a_watchdog)
    assert done.returncode == 7 and done.stderr.count("no step for 1e-09 minutes") > 10, done.stderr[-500:]
    done = run_program(["-c"], tmp_path, before=hold_the_interpreter)
    assert (
        done.returncode == 7
        and "hold_the_interpreter" in done.stderr
        and "no step" not in done.stderr.partition("hold_the_interpreter")[0]
    ), done.stderr[-500:]


def test_training_without_a_standard_error(tmp_path):
    command = shlex.join(
        [
            sys.executable,
            str(ROOT / "train_dual_tower.py"),
            *SMALL,
            "--max_steps",
            "2",
            "--output_dir",
            "run",
            "--cache_dir",
            "cache",
        ]
    )
    done = subprocess.run(["bash", "-c", f"{command} 2>&-"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "run" / "model" / "config.json").is_file()


def test_compile_without_a_compiler_is_one_line(monkeypatch):
    config = Config(train=TrainConfig(compile=True, device="cpu"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UsageError, match="no no-such-compiler"):
        check_compiler(config)
    check_compiler(Config())
    monkeypatch.setenv("CXX", "sh")
    check_compiler(config)


def test_flops_of_a_cached_encoder_are_of_the_tiles_it_computed(tokenizer, tmp_path):
    """In training: neither cached tiles nor those of a validation between two steps."""
    model = tiny_model(tokenizer).train()
    encoder = model.parts()["vision"].requires_grad_(False)
    encoder.cache = FeatureCache(tmp_path, 1 << 24)
    meter = FlopsMeter(model, torch.device("cpu"), 1)
    names = ("tiles", "left", "right", "left_pairs", "right_pairs", "supervised")
    tiles, rates = random_tiles(5), []
    for batch in (tiles[:3], tiles[:3], tiles[:4]):
        encoder(batch)
        with torch.no_grad():
            encoder(tiles[4:] ^ len(rates) + 1)  # validation, other tiles every time
        counts = dict.fromkeys(names, 0) | {"tiles": len(batch)}
        rates.append(meter.of(counts, 1.0)["tflops_per_s"] * 1e12)
    assert rates == pytest.approx([3 * meter.flops.tile, 0, meter.flops.tile]) and meter.flops.tile > 0
