"""`--gpus`: sums by hand, malformed values, and the figures of docs/scaling.md."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs.cli import preset, resolve
from configs.model import DecoderConfig, Vocabulary
from configs.train import Config
from models.dual_tower.dual_tower import DualTowerVLM
from models.vision_language_model import VisionLanguageModel
from tests.conftest import TINY_MODEL, tiny_model
from tests.programs import run_program
from tests.test_readme import PAGES, commands
from training import scaling
from training.flops import Flops, count_flops, trained_shares
from training.memory import trial_model
from training.scaling import GPUS, DataSet, estimate_network, estimate_time, figure, parse_gpus, sample_counts
from training.setup import resolve_config, vocabulary_of
from utils.errors import UsageError

ROOT = Path(__file__).parent.parent
PAGE = PAGES["scaling.md"]
BLOCKS = list(
    zip(
        [command for command in commands(PAGE) if "1xH100," in command],
        re.findall(r"^```\n(H100 SXM.*?)^```$", PAGE, re.S | re.M),
        strict=True,
    )
)
FLOPS = Flops(tile=100, left_token=10, right_token=20, supervised_token=5, left_pair=1, right_pair=2)
TRAINED = {"vision": 1.0, "projector": 1.0, "left": 1.0, "right": 1.0}


def test_a_sample_by_hand():
    """One tile of 1 + 4 tokens, 3 text tokens, 2 of them supervised; three forwards of each."""
    data = DataSet(samples=1000, images=1, text=3, answers=2)
    config = replace(Config(), model=TINY_MODEL)
    left, right = 5 * 10 + 15 * 1, 3 * 20 + (6 + 7 + 8) * 2
    dual = FLOPS.model_flops(sample_counts(config, data), TRAINED)
    assert dual == 3 * (100 + left + right + 2 * 5)
    vanilla = replace(config, model=replace(TINY_MODEL, left_context="none"))
    one = FLOPS.model_flops(sample_counts(vanilla, data), TRAINED)
    assert one == 3 * (100 + 8 * 20 + 36 * 2 + 2 * 5)
    assert scaling.seconds(1000 * dual, GPUS["H100"], 8) == pytest.approx(1000 * dual / (8 * 0.4 * 989e12))


def test_an_image_has_the_tiles_of_the_config():
    config, data = replace(Config(), model=TINY_MODEL), scaling.DATA_SETS["FineVision"]
    assert scaling.tiles_of(config, data) == 0.71
    vision = replace(TINY_MODEL.vision, image_size=512, max_side=2048)
    tiled = replace(config, model=replace(TINY_MODEL, vision=vision))
    assert scaling.tiles_of(tiled, data) == pytest.approx(0.71 * 5)  # 2 × 2 of 512 pixels, and the whole


def test_loader_cores():
    """The constants are the stored measurements; a sample of five tiles costs 10.19 ms for 3.51."""
    measured = json.loads((ROOT / "benchmarks/results/data.json").read_text())["throughput"]
    ms = measured["ms_per_sample"]
    assert pytest.approx(measured["samples_per_s_per_worker"], rel=0.01) == scaling.WORKER_SAMPLES_PER_S
    assert pytest.approx(ms["tokenise"] + ms["pack"], rel=0.01) == scaling.TEXT_MS
    assert pytest.approx(ms["decode"], rel=0.01) == scaling.IMAGE_MS
    assert pytest.approx(ms["resize"] + ms["collate"], rel=0.01) == scaling.TILE_MS
    assert scaling.loader_cores(2710, images=1, tiles=1) == pytest.approx(10)
    assert scaling.loader_cores(2710, images=1, tiles=5) == pytest.approx(29.03, rel=1e-3)


def test_network(tokenizer):
    """7 ÷ 8 of what a ring passes on. Weights of blocks and encoder are gathered twice, the others once.

    The left tower's last layer makes keys and values only and is no block.
    """
    assert scaling.ddp_bytes(100, 8) == 700 and scaling.ddp_bytes(100, 1) == 0
    assert scaling.fsdp_bytes(1000, 2, 100, 3, 8) == 7 / 8 * (3 * 2000 + 400)
    model = tiny_model(tokenizer)
    twice = re.compile(r"right\.layers\.[012]\.|left\..*layers\.[01]\.|vision_encoder\.")
    by_name = sum(p.numel() * (2 if twice.search(name) else 1) for name, p in model.named_parameters())
    assert scaling.gathered_elements(model) == by_name


def test_memory_of_a_rank(tokenizer):
    """FSDP2 saves 7 ÷ 8 of weights and AdamW; of gradients only if each rank has one forward a step."""
    config = replace(Config(), model=TINY_MODEL)
    train = replace(config.train, local_batch_size=1, dtype="bf16")
    with torch.device("meta"):
        model = trial_model(config, DualTowerVLM, tokenizer.vocabulary)
    size = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for rows, gradients in ((8, 4), (16, 0)):
        these = replace(config, train=replace(train, global_batch_size=rows, optimizer="adamw"))
        values = scaling.estimate_memory(these, DualTowerVLM, tokenizer.vocabulary, model, GPUS["H100"], 8)
        saved = values["memory, DDP, GB"] - values["memory, FSDP2, GB"]
        assert saved == pytest.approx(7 / 8 * (4 * size + (8 + gradients) * trained) / 1e9, rel=1e-3)
        assert values["optimizer, DDP, ms"] == pytest.approx(28 * trained / 3.35e12 * 1e3)


def test_flags():
    assert parse_gpus("8xH100") == (GPUS["H100"], [8])
    assert parse_gpus("RTX4090") == (GPUS["RTX4090"], [1])
    assert parse_gpus("1xL4,64xL4") == (GPUS["L4"], [1, 64])
    with pytest.raises(UsageError, match="B300 is unknown; known are H100, A100, L4, RTX4090"):
        parse_gpus("8xB300")
    for malformed in ("8", "8x", "xH100", "0xH100", "-1xH100", "8 H100", "8xH100,", "8xH100,8xA100"):
        with pytest.raises(UsageError, match="such as 8xH100|is unknown"):
            parse_gpus(malformed)
    with pytest.raises(UsageError, match="gpus has no effect, for dry_run is off"):
        Config(gpus="8xH100")


@pytest.mark.parametrize(
    ("gpus", "status", "message"),
    [
        ("8xH100", 2, "8 ranks cannot share the forwards"),
        ("4xA100", 0, "A100 80GB SXM"),
        ("8*H100", 2, "such as"),
    ],
)
def test_a_dry_run(tmp_path, gpus, status, message):
    """Of the default config, whose step has one forward of 20 rows."""
    small = ["--train.local_batch_size", "5", "--model.vision.weights", "random"]
    done = run_program([ROOT / "train_dual_tower.py", "--dry_run", "--gpus", gpus, *small], tmp_path)
    assert (done.returncode, message in done.stdout + done.stderr) == (status, True), done.stderr
    assert not list(tmp_path.iterdir())


def rows_of(block: str) -> dict[str, list[str]]:
    """The cells of a printed table."""
    lines = [line.strip("│ ").split("│") for line in block.splitlines() if line.startswith("│")]
    return {name.strip(): [cell.strip() for cell in cells] for name, *cells in lines}


@pytest.mark.parametrize(("command", "block"), BLOCKS, ids=["222M", "450M", "870M"][: len(BLOCKS)])
def test_the_figures_of_the_page(command, block):
    """Time and network are computed again; of memory, what FSDP2 saves."""
    config, flags = resolve(shlex.split(command)[2:], "")
    config = resolve_config(config, flags)
    vocabulary = vocabulary_of(config)
    with torch.device("meta"):
        model = trial_model(config, DualTowerVLM, vocabulary)
    flops, rows, (gpu, counts) = count_flops(model), rows_of(block), parse_gpus(config.gpus)
    size = sum(p.numel() for p in model.parameters())
    for column, count in enumerate(counts):
        values = estimate_time(config, vocabulary, model, flops, gpu, count)
        values |= estimate_network(config, model, values["a step of full rows, s"], count)
        for name, value in values.items():
            assert rows[name][column] == figure(value), name
        ddp, fsdp = (float(rows[f"memory, {kind}, GB"][column]) for kind in ("DDP", "FSDP2"))
        whole = 12 if config.train.micro_batches > count else 16
        assert ddp - fsdp == pytest.approx(whole * size * (1 - 1 / count) / 1e9, abs=0.2)


def test_nanovlms_published_run():
    """1.7 M samples of 50 image and 78 text tokens in 6 hours of an H100, as the page states it."""
    config = preset("dual_tower_cauldron_222m")
    vision = replace(config.model.vision, weights="random")
    model = replace(
        config.model, left_context="none", vision=vision, left=DecoderConfig(), right=DecoderConfig()
    )
    data = replace(config.data, left_length=0, right_length=1024)
    config = resolve_config(replace(config, model=model, data=data), {})
    with torch.device("meta"):
        vanilla = trial_model(config, VisionLanguageModel, Vocabulary(49152, 0))
    assert sum(p.numel() for p in vanilla.parameters()) // 10**6 == 222
    sample = count_flops(vanilla).model_flops(
        sample_counts(config, DataSet(samples=1.7e6, images=1, text=78, answers=78)), trained_shares(vanilla)
    )
    mfu = 1.7e6 * sample / (6 * 3600 * GPUS["H100"].flops)
    hours = scaling.seconds(1.7e6 * sample, GPUS["H100"], 1) / 3600
    assert f"{sample / 1e12:.3f} TFLOP" in PAGE and f"{mfu:.1%}".replace("%", " %") in PAGE
    assert f"{hours:.2f} hours" in PAGE
