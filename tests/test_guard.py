"""A training step does no more work than benchmarks/results/guard.json records.

More work is detected. The step benchmark runs on tiny models.
"""

import json
import logging
import warnings

import pytest
import torch
import torch.nn.functional as F

import benchmarks.guard as guard
import benchmarks.train_step as train_step
from benchmarks.trial import MODELS, Trial
from models.language_model import LanguageModel
from models.layers import MLP, Attention
from utils.errors import UserError

CPU = torch.device("cpu")
logging.getLogger("torch.__trace").setLevel(
    logging.CRITICAL
)  # under a failed test its lines would fill pages


@pytest.fixture(scope="module")
def now() -> guard.Values:
    return guard.measure()


def test_no_more_work_than_in_the_reference(now):
    try:
        stored = guard.read(guard.REFERENCE)
    except UserError as other:
        pytest.skip(str(other))
    grew, shrank = guard.compare(stored, now)
    assert not grew, "\n".join(grew)
    for line in shrank:
        warnings.warn(line, stacklevel=1)


def test_the_values_are_those_computed_by_hand(now):
    """Values that can be computed by hand.

    720: the logits of six answers of 60 tokens, computed again in the backward. Attention: three layers of
    738 tokens, and of 6 × 16 patches; the left tower's last layer has none.

    A document has 123 tokens, of which 119 are text. It is a span of its own, with its keys (left and right,
    123) padded to 128. The six images of 4 tokens are one span of 24 keys, padded to 32.
    """
    patches = 3 * 6 * 16**2
    assert now["vanilla"]["logits_rows"] == now["dual_tower"]["logits_rows"] == 720
    assert now["vanilla"]["attention_pairs"] == 3 * 6 * 123 * 128 + patches
    assert now["dual_tower"]["attention_pairs"] == 2 * 24 * 32 + 3 * 6 * 119 * 128 + patches
    assert now["dual_tower_heads"]["logits_rows"] == 720 + 2 * 6 * (59 + 58)


def test_more_work_is_caught(now, monkeypatch):
    """Every value that grows is reported.

    Logits of every token, attention twice, an additional saved tensor, a graph break, an unfused optimizer.
    """
    once, plain = Attention.forward, MLP.forward

    def all_logits(self, hidden, labels):
        return F.cross_entropy(self.logits(hidden).flatten(0, 1), labels.flatten(), reduction="sum")

    def breaking(self, x):
        torch._dynamo.graph_break()
        return plain(self, x.exp().log())

    monkeypatch.setattr(LanguageModel, "loss", all_logits)
    monkeypatch.setattr(
        Attention,
        "forward",
        lambda self, x, rotary, mask, past: (
            (once(self, x, rotary, mask, past) + once(self, x, rotary, mask, past)) / 2
        ),
    )
    monkeypatch.setattr(MLP, "forward", breaking)
    trial = Trial("vanilla", "tiny", "fp32", CPU)
    for group in [g for o in trial.trainer.optimizers for g in o.param_groups]:
        group["fused"] = False
    grew, shrank = guard.compare({"vanilla": now["vanilla"]}, {"vanilla": guard.measure_one(trial)})
    assert [line.split(":")[0] for line in grew] == sorted(
        f"vanilla {name}" for name in now["vanilla"]
    ) and not shrank


def test_a_run_is_like_the_one_before(now):
    assert guard.measure_one(Trial("dual_tower", "tiny", "fp32", CPU)) == now["dual_tower"]


def test_growth_fails_and_a_gain_is_reported(tmp_path, monkeypatch, capsys):
    values = {"vanilla": {"flops": 1000, "graph_breaks": 0}}
    monkeypatch.setattr(guard, "REFERENCE", tmp_path / "guard.json")
    monkeypatch.setattr(guard, "measure", lambda: values)

    def run(*flags: str, **measured: int) -> str:
        values["vanilla"] = {"flops": 1000, "graph_breaks": 0} | measured
        guard.main(list(flags))
        return capsys.readouterr().out

    run("--update")
    assert "none grew" in run() and "none grew" in run(flops=1019)
    with pytest.raises(UserError, match="1 of 2 values"):
        run(flops=1021)
    assert (
        "vanilla flops: was 1,000, is 1,021, +2.1% (python -m benchmarks.guard --update, if that is meant)"
        in capsys.readouterr().out
    )
    for more in ({"graph_breaks": 1}, {"another": 5}):
        with pytest.raises(UserError):
            run(**more)
    assert "to keep the gain" in run(flops=900)
    run("--update", flops=1100)
    assert "none grew" in run(flops=1100)
    stored = json.loads(guard.REFERENCE.read_text())
    guard.REFERENCE.write_text(json.dumps(stored | {"versions": {"torch": "1.0", "timm": "1.0"}}))
    assert "nothing compared" in run(flops=5000)


@pytest.mark.parametrize("kind", MODELS)
def test_the_standard_row(kind):
    trial = Trial(kind, "tiny", "bf16", CPU)
    assert trial.tokens == 6 * (4 + 59 + 60) and int((trial.row["labels"] != -100).sum()) == 6 * 60
    last, answered = trial.row["right_ids"][0, -2:].tolist(), trial.row["labels"][0, -2:].tolist()
    assert answered == [last[1], -100]
    flops = trial.flops()
    # What is seen, and what segments compute; exactly: tests/test_estimate.py.
    assert 0.75 * flops["counted"] < flops["estimate"] < flops["counted"]


def test_several_rows_a_step():
    """Tokens and FLOPs are summed over all micro-batches.

    Their phases add up to the step, and the next step starts from zero.
    """
    one, three = Trial("vanilla", "tiny", "fp32", CPU), Trial("vanilla", "tiny", "fp32", CPU, rows=3)
    assert (
        three.tokens == 3 * one.tokens
        and {name: 3 * value for name, value in one.flops().items()} == three.flops()
    )
    forwards: list[int] = []
    three.model.register_forward_hook(lambda *_: forwards.append(1))
    for steps in (1, 2):
        seconds = three.step()
        assert len(forwards) == 3 * steps and len(three.marks["forward"]) == len(three.marks["backward"]) == 3
        assert 0 < seconds["forward"] + seconds["backward"] + seconds["optimizer"] <= seconds["step"]


def test_a_step_is_measured_and_profiled(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_step, "in_new_process", lambda function, *args: function(*args))
    flags = ["--size", "tiny", "--device", "cpu", "--dtype", "bf16"]
    train_step.main([*flags, "--repeats", "2", "--json", str(tmp_path / "step.json")])
    assert "tokens/s" in capsys.readouterr().out
    report = json.loads((tmp_path / "step.json").read_text())
    for kind in MODELS:
        seconds = {phase: s["median"] for phase, s in report[kind]["seconds"].items()}
        assert min(seconds.values()) > 0 and sum(seconds.values()) <= 2 * seconds["step"] * 1.1
        assert 0 < report[kind]["share_of_products"]["median"] < 1
    assert report["ratio"]["parameters"] > 1 and report["torch"] and report["repeats"] == 2
    train_step.main([*flags, "--model", "vanilla", "--profile", "5"])
    assert "Self CPU" in capsys.readouterr().out


def test_missing_hardware_is_reported(monkeypatch):
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device = 'cuda' cannot be used"):
            train_step.main(["--size", "tiny", "--device", "cuda"])
    with pytest.raises(UserError, match="side by side, would take some 1048576.0 GiB"):
        train_step.check_memory(2**50, CPU, "vanilla and dual_tower, side by side,")
