"""One optimizer step's options: averaged weights, fp16 with scaled gradients, losses by source."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from configs.model import MultiTokenConfig
from configs.serialization import load_json
from configs.train import Config, TrainConfig
from data.collators import collate
from data.tokenizer import Tokenizer
from models.dual_tower.dual_tower import DualTowerVLM
from tests.conftest import TINY_MODEL, tiny_model
from tests.programs import run_program
from tests.test_diagnostics import Given
from tests.test_dual_tower import make_sample
from tests.test_training import command
from training.dry_run import dry_run
from training.ema import KEY, ema_weights
from training.export import export_checkpoint
from training.muon import Muon, orthogonal
from training.optim import _norm, grad_scaler
from training.trainer import Trainer
from utils.device import autocast

CPU = torch.device("cpu")


@pytest.fixture
def rows(renderer, tokenizer):
    samples = [
        make_sample(renderer, images, [[{"user": "is it a?", "assistant": "a"}] * turns], seed=turns)
        for turns, images in ((1, 1), (2, 1), (3, 2))
    ]
    return collate([samples[:2], samples[2:]], tokenizer.global_image)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_averaged_weights_are_those_after_each_step(tokenizer, rows, monkeypatch, optimizer):
    """By their definition, in fp64; a skipped step is none. The block swaps and swaps back, to the bit."""
    train = TrainConfig(dtype="fp32", warmup_steps=0, ema=0.5, optimizer=optimizer, lr_vision=0.0)
    config, model = Config(model=TINY_MODEL, train=train), tiny_model(tokenizer)
    trainer, expected = Trainer(config, model, Given(rows)), {}
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(1, 6):
        with monkeypatch.context() as patch:
            if step == 3:
                patch.setattr(model.right, "loss", lambda hidden, labels: hidden.sum()[None] * float("nan"))
            assert ("skipped" in trainer.train_step()) == (step == 3)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, p in model.named_parameters():
            if step == 1:
                expected[name] = p.detach().double()
            elif step != 3:
                expected[name] = decay * expected[name] + (1 - decay) * p.detach().double()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    moved = [name for name in weights if not torch.equal(weights[name], start[name])]
    assert any(name.startswith("right.layers") for name in moved)
    with ema_weights(trainer.optimizers):
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach().double(), expected[name], rtol=1e-5, atol=1e-7)
            assert name not in moved or not torch.equal(p, weights[name]), name
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_muon(shape, monkeypatch):
    """Muon against two references.

    With products in bf16, PyTorch's own, to the bit; in fp32, the iteration's polynomial on each singular
    value, from an fp64 decomposition.
    """
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    monkeypatch.setattr("training.muon.computes_bf16", lambda device: False)
    u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.square().sum().sqrt()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    assert orthogonal(matrix).dtype == torch.float32 and values.min() > 0.6 and values.max() < 1.3
    torch.testing.assert_close(orthogonal(matrix).double(), u @ values.diag() @ v, rtol=0, atol=1e-4)

    monkeypatch.setattr("training.muon.computes_bf16", lambda device: True)
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    groups = [{"params": [p], "lr": 0.1, "weight_decay": 0.01} for p in (ours, theirs)]
    optimizers = Muon(groups[:1]), torch.optim.Muon(groups[1:], adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        gradient = torch.randn(shape)
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            p.grad = gradient.clone()
            optimizer.step()
        assert torch.equal(ours, theirs) and not torch.equal(ours, torch.ones(shape))


def test_averaged_weights_are_validated_exported_and_resumed_bit_for_bit(tmp_path):
    flags = [
        "--cache_dir",
        str(tmp_path / "cache"),
        "--train.ema",
        "0.8",
        "--train.final_lr",
        "1",
        "--train.warmup_steps",
        "0",
        "--train.eval_every",
        "6",
    ]
    for name, steps, more in (("whole", "6", []), ("parts", "3", []), ("parts", "6", ["--resume", "auto"])):
        done = run_program(
            command("--output_dir", str(tmp_path / name), *flags, "--max_steps", steps, *more), tmp_path
        )
        assert done.returncode == 0 and "a moving average of the weights (train.ema = 0.8)" in done.stdout, (
            done.stderr
        )
    ends = [
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])
        for name in ("whole", "parts")
    ]
    assert ends[0]["validation_loss"] == ends[1]["validation_loss"]
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    saved = load_file(next((tmp_path / "whole" / "checkpoints" / "step_000006").glob("*.safetensors")))
    name = next(name for name in weights[0] if name.startswith("right.layers.0.mlp"))
    assert torch.equal(weights[0][name], saved[f"optimizer.{name}.{KEY}"]) and not torch.equal(
        weights[0][name], saved[f"model.{name}"]
    )
    run, config = tmp_path / "whole", load_json(Config, tmp_path / "whole" / "config.json")
    export_checkpoint(
        run / "checkpoints" / "step_000006",
        tmp_path / "pushed",
        DualTowerVLM,
        Tokenizer.load(run / "tokenizer"),
        config,
        run,
    )
    pushed = load_file(tmp_path / "pushed" / "model.safetensors")
    assert all(torch.equal(pushed[name], weights[0][name]) for name in pushed)


def test_the_dry_run_counts_averaged_weights(tokenizer, capsys):
    logged = []
    for decay in (0.0, 0.999):
        dry_run(
            Config(model=TINY_MODEL, train=TrainConfig(ema=decay, local_batch_size=1)),
            DualTowerVLM,
            tokenizer.vocabulary,
        )
        logged.append("averaged weights" in capsys.readouterr().out)
    assert logged == [False, True]


def test_fp16_learns_what_fp32_does(tokenizer, rows):
    """Within what fp16 rounds; gradients are unscaled before their norm is taken and they are clipped."""
    logged = []
    for dtype in ("fp32", "fp16"):
        train = TrainConfig(dtype=dtype, warmup_steps=0, clip=0.1, lr_vision=1e-4)
        config, model = Config(model=TINY_MODEL, train=train), tiny_model(tokenizer)
        trainer = Trainer(config, model, Given(rows))
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=dtype == "fp16")
        logged.append([trainer.train_step() for _ in range(3)])
    assert [line["loss_scale"] for line in logged[1]] == [1024.0] * 3 and "loss_scale" not in logged[0][0]
    for a, b in zip(*logged, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-2) and b["grad_norm"] == pytest.approx(
            a["grad_norm"], rel=5e-2
        )
    assert logged[1][2]["loss"] < logged[1][0]["loss"]


def test_an_overflow_changes_nothing_and_halves_the_scale(tokenizer, rows):
    train = TrainConfig(dtype="fp16", warmup_steps=0, ema=0.9)
    config, model = Config(model=TINY_MODEL, train=train), tiny_model(tokenizer)
    trainer = Trainer(config, model, Given(rows))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    values = trainer.train_step()
    assert (
        grad_scaler(train, CPU).state_dict()["scale"] == 65536.0
        and not grad_scaler(replace(train, dtype="bf16"), CPU).is_enabled()
    )
    assert (
        values["overflow"] == 2.0**60
        and values["loss"] > 0
        and values["grad_norm"] is None
        and "skipped" not in values
    )
    assert scaler.get_scale() == 2.0**59 and not any(optimizer.state for optimizer in trainer.optimizers)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    scaler.update(1024.0)
    trainer.scaler = torch.amp.GradScaler("cpu")
    trainer.scaler.load_state_dict(json.loads(json.dumps(scaler.state_dict())))
    assert trainer.train_step()["loss_scale"] == 1024.0


def test_fp16_steps_without_a_token_to_learn_are_skipped_too(tokenizer, rows):
    train = TrainConfig(dtype="fp16", warmup_steps=0)
    config, model = Config(model=TINY_MODEL, train=train), tiny_model(tokenizer)
    nothing = rows | {"labels": torch.full_like(rows["labels"], -100)}
    given = Given(nothing)
    trainer = Trainer(config, model, given)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    logged = [trainer.train_step(), trainer.train_step()]
    given.batch = rows
    logged.append(trainer.train_step())
    assert [line.get("skipped") for line in logged] == ["no token to learn"] * 2 + [None] and logged[2][
        "loss_scale"
    ] == 1024.0


def overflow_often() -> None:
    import training.trainer

    training.trainer.grad_scaler = lambda *_: torch.amp.GradScaler(
        "cpu", init_scale=2.0**80, backoff_factor=2.0**-30
    )


def test_overflows_are_logged_and_only_in_a_row_the_end(tmp_path):
    """Training continues after two or three overflows, from a scale of 2^80.

    Samples are not reported as the cause. With fewer overflows allowed in a row, the run ends.
    """
    flags = ["--train.dtype", "fp16", "--cache_dir", "cache", "--train.eval_every", "0", "--max_steps", "6"]
    done = run_program(command("--output_dir", "run", *flags), tmp_path, before=overflow_often)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    over = [line["step"] for line in lines if "overflow" in line]
    assert over in ([1, 2], [1, 2, 3]) and done.stdout.count("overflow fp16 at a loss scale of") == len(over)
    assert [line["step"] for line in lines if "loss_scale" in line] == list(range(len(over) + 1, 7)) and not (
        tmp_path / "run" / "skipped.jsonl"
    ).exists()
    done = run_program(
        command("--output_dir", "run2", *flags, "--train.skips", "2"), tmp_path, before=overflow_often
    )
    assert done.returncode == 1 and "no finite loss and gradient in 2 steps, up to 2" in done.stderr, (
        done.stderr
    )


class TwoSources(Given):
    """The three samples of `rows` and where they come from."""

    def sources(self):
        return ["a/x y", "b", "c"]

    def samples(self):
        return ["b 3", "a/x y 0", "a/x y 17"]


@pytest.mark.parametrize("heads", [0, 2])
def test_losses_by_source_are_means_over_that_source_s_tokens(tokenizer, rows, heads):
    """Against the logits of each sample; "c" is not in the batch. Together they are the loss."""
    c = replace(TINY_MODEL, multi_token=MultiTokenConfig(heads=heads, mlp_size=32))
    train = TrainConfig(dtype="fp32", global_batch_size=16)
    model = tiny_model(tokenizer, c)
    with torch.no_grad():
        logits = model.logits(model(**rows).hidden)
    each = F.cross_entropy(
        logits.flatten(0, 1), rows["labels"].flatten(), reduction="none", ignore_index=-100
    ).view_as(rows["labels"])
    of = [
        (rows["right_groups"][0] == 0, 0, "b"),
        (rows["right_groups"][0] == 1, 0, "a/x y"),
        (rows["right_groups"][1] == 0, 1, "a/x y"),
    ]
    sums = {
        name: sum(each[row][here].sum().item() for here, row, n in of if n == name) for name in ("a/x y", "b")
    }
    counts = {
        name: sum(int((rows["labels"][row][here] != -100).sum()) for here, row, n in of if n == name)
        for name in sums
    }
    values = Trainer(Config(model=c, train=train), model, TwoSources(rows)).train_step()
    assert values["source_losses"] == pytest.approx(
        {name: sums[name] / counts[name] for name in sums}, rel=1e-4
    )
    assert (
        sum(sums.values()) / sum(counts.values()) == pytest.approx(values["loss"], rel=1e-4)
        and len(values.get("head_losses", [])) == heads
    )


def test_one_source_has_no_losses_of_its_own(tokenizer, rows):
    train = TrainConfig(dtype="fp32")
    model = tiny_model(tokenizer)
    trainer = Trainer(Config(model=TINY_MODEL, train=train), model, Given(rows))
    assert "source_losses" not in trainer.train_step()


def test_autocast_is_of_the_type_that_is_asked_for():
    for dtype, expected in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        with autocast(dtype, CPU):
            assert F.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == expected


def test_the_norm_of_gradients():
    """By dot products, of all together; views and infinities too."""
    torch.manual_seed(0)
    gradients = [
        torch.randn(1000, 700),
        torch.randn(60, 50).t(),
        torch.randn(3),
        torch.zeros(0),
        torch.tensor(2.0),
    ]
    exact = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    assert _norm(gradients).item() == pytest.approx(exact, rel=1e-6)
    assert _norm([*gradients, torch.tensor([math.inf, 1.0])]).item() == math.inf
    assert math.isnan(_norm([*gradients, torch.tensor([math.nan])]).item())
