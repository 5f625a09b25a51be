"""benchmarks/study.py: summaries of runs written by hand, and going on with an interrupted study."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import benchmarks.study as study
from benchmarks.study import STUDIES, accuracy_at, main, measure, runs_of, summarize, table
from configs.cli import resolve
from utils.errors import UsageError, UserError


def step(number: int, tokens: int, gigaflops: float, seconds: float) -> dict[str, Any]:
    return {
        "step": number,
        "loss": 1 / number,
        "supervised_tokens": 8,
        "supervised_tokens_per_s": 8 / seconds,
        "tokens_per_s": tokens / seconds,
        "tflops_per_s": gigaflops / 1000 / seconds,
        "memory_gb": number / 10,
    }


def validation(number: int, accuracy: float) -> dict[str, Any]:
    scores = {"loss": 2.0, "accuracy": accuracy, "accuracy_easy_vqa": 1.0, "accuracy_count": accuracy / 2}
    return {"step": number} | {f"validation_{name}": value for name, value in scores.items()}


def result(config: str, seed: int, accuracies: list[float], tokens: int, gigaflops: float) -> dict[str, Any]:
    """A run with a validation after each step; all steps are equal."""
    lines = []
    for number, accuracy in enumerate(accuracies, 1):
        lines += [step(number, tokens, gigaflops, 0.5), validation(number, accuracy)]
    return {"config": config, "seed": seed, "flags": [], "parameters": 2_000_000} | measure(lines)


RESULTS = [
    result("small", 0, [0.2, 0.4, 0.6], tokens=100, gigaflops=2),
    result("small", 1, [0.2, 0.6, 0.8], tokens=100, gigaflops=2),
    result("large", 0, [0.1, 0.5, 0.9], tokens=200, gigaflops=3),
    result("large", 1, [0.1, 0.3, 0.5], tokens=200, gigaflops=3),
]


def test_a_run_is_measured_from_its_log():
    lines = [step(1, 100, 2, 0.5), step(2, 60, 1, 0.25), validation(2, 0.5)]
    lines += [{"step": 3, "loss": None, "tokens_per_s": 9.0}, step(4, 40, 1, 0.5), validation(4, 0.75)]
    measured = measure(lines)
    assert (measured["tokens"], measured["flops"]) == (pytest.approx(200), pytest.approx(4e9))
    assert measured["tokens_per_s"] == 200 and measured["memory_gb"] == 0.4
    assert measured["curve"] == [[1, 1.0], [2, 0.5], [4, 0.25]]  # a skipped step has no loss
    first, last = measured["validations"]
    assert (first["step"], first["tokens"], first["flops"]) == (2, pytest.approx(160), pytest.approx(3e9))
    assert last["accuracy"] == 0.75 and last["accuracy_easy_vqa"] == 1.0 and last["accuracy_count"] == 0.375


def test_runs_are_compared_where_they_have_spent_the_same():
    """The cheapest run spends 300 tokens and 6 GFLOPs: `large` has done 1.5 and 2 of its 3 steps then."""
    summary = summarize(RESULTS)
    assert summary["small"]["accuracy"] == summary["small"]["same tokens"] == [0.6, 0.8]
    assert summary["small"]["same TFLOPs"] == pytest.approx([0.6, 0.8])
    assert summary["large"]["accuracy"] == [0.9, 0.5]
    assert summary["large"]["same tokens"] == pytest.approx([0.3, 0.2])
    assert summary["large"]["same TFLOPs"] == pytest.approx([0.5, 0.3])
    assert summary["large"]["same supervised tokens"] == summary["large"]["accuracy"]  # as many a step
    assert accuracy_at(RESULTS[2], "tokens", 500) == pytest.approx(0.7)


def test_the_table_has_mean_and_spread():
    lines = list(table(summarize(RESULTS)))
    assert lines[0] == "| | small, 2 seeds | large, 2 seeds |"
    assert "| accuracy | 70.0 % (60.0 to 80.0) | 70.0 % (50.0 to 90.0) |" in lines
    assert "| same tokens | 70.0 % (60.0 to 80.0) | 25.0 % (20.0 to 30.0) |" in lines
    assert "| same TFLOPs | 70.0 % (60.0 to 80.0) | 40.0 % (30.0 to 50.0) |" in lines
    assert "| accuracy_count | 35.0 % (30.0 to 40.0) | 35.0 % (25.0 to 45.0) |" in lines
    assert "| loss | 2.000 | 2.000 |" in lines and "| parameters, M | 2.00 | 2.00 |" in lines
    assert lines[-3].startswith("| memory, GB | 0.30 |")


@pytest.fixture
def trained(monkeypatch) -> list[list[str]]:
    """Commands of training that were called; each ends at once, but for seed 9, which is interrupted."""
    commands: list[list[str]] = []

    def train(command: list[str], **_: Any) -> subprocess.CompletedProcess:
        commands.append(command)
        folder = Path(command[command.index("--output_dir") + 1])
        if "9" not in command:
            (folder / "model").mkdir(parents=True)
            lines = [step(1, 100, 2, 0.5), validation(1, 0.5)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(study.subprocess, "run", train)
    monkeypatch.setattr(study, "about", dict)
    monkeypatch.setattr(study, "answers", lambda model, config: {"parameters": 1, "samples": []})
    return commands


def test_a_study_goes_on_where_it_was(trained, tmp_path, capsys):
    arguments = ["towers", "--smallest", "--output", str(tmp_path)]
    with pytest.raises(UserError, match="dual tower, seed 9: the run did not end"):
        main([*arguments, "--seeds", "0", "9"])
    scripts = [Path(command[1]).name for command in trained]
    assert scripts == ["train_dual_tower.py", "train_vanilla.py", "train_dual_tower.py"]
    assert all(command[-2:] == ["--resume", "auto"] for command in trained)
    assert not (tmp_path / "summary.md").exists()
    trained.clear()
    main([*arguments, "--seeds", "0"])
    assert trained == [] and "| accuracy | 50.0 % | 50.0 % |" in capsys.readouterr().out
    assert json.loads((tmp_path / "summary.json").read_text())["figures"]["vanilla"]["tokens, M"] == [1e-4]
    assert Image.open(tmp_path / "curves.png").size[0] > 500
    main([*arguments, "--seeds", "1", "--only", "vanilla"])
    assert len(trained) == 1
    with pytest.raises(UserError, match=r"dual_tower-0.json is of other flags: choose another --output"):
        main(["towers", "--output", str(tmp_path)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tower"], "no study 'tower' .did you mean 'towers'"),
        (["towers", "--only", "vanila"], "--only: towers has no 'vanila' .did you mean 'vanilla'"),
    ],
)
def test_a_wrong_name(trained, arguments, message):
    with pytest.raises(UsageError, match=message) as error:
        main(arguments)
    assert "\n" not in str(error.value) and not trained


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_can_start(name):
    """All flags exist; validation comes several times; the folders differ."""
    for smallest in (False, True):
        runs = runs_of(STUDIES[name], [0, 1], [], smallest, Path("out"))
        configs = [resolve(run.flags, "")[0] for run in runs]
        assert all(config.max_steps >= 5 * config.train.eval_every for config in configs)
        assert len({run.json for run in runs}) == len(runs) == 2 * len(STUDIES[name].configs)
        assert len(
            {
                str(config.model) + str(config.train) + str(config.data) + str(config.lora)
                for config in configs
            }
        ) == len(STUDIES[name].configs)
