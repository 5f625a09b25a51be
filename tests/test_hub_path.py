"""The full-size config's downloads from the Hub, at a tiny size, over real HTTP on loopback.

The Cauldron, both decoders and the encoder's weights, by their ids.
"""

import io
import json
import subprocess
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from configs.cli import preset
from data.sources import CAULDRON_SUBSETS, THE_CAULDRON
from tests.conftest import TURNS, random_tiles
from tests.hub_server import Hub, hub
from tests.programs import at_hub, run_program
from tests.test_hub import tiny_llama
from tests.test_parquet import write
from utils.files import read_json

ROOT = Path(__file__).parent.parent
CONFIG = preset("dual_tower_cauldron")
VISION, DECODER = f"timm/{CONFIG.model.vision.name}", CONFIG.model.right.weights
OPTIONS = {"embed_dim": 32, "depth": 2, "num_heads": 2}
SMALL = [
    "--max_steps",
    "1",
    "--train.local_batch_size",
    "1",
    "--train.global_batch_size",
    "1",
    "--train.dtype",
    "fp32",
    "--train.eval_every",
    "0",
    "--data.window",
    "8",
    "--data.workers",
    "0",
]
SMALL += [
    "--data.validation_images",
    "50",
    "--data.left_length",
    "130",
    "--data.right_length",
    "300",
    "--model.vision.options",
    json.dumps(OPTIONS),
]


def cauldron_rows(subset: str) -> list[dict]:
    rows = []
    for i in range(3):
        held = io.BytesIO()
        Image.fromarray(random_tiles(1, i)[0].permute(1, 2, 0).numpy()).save(held, "png")
        texts = [{**turn, "source": subset} for turn in TURNS[: 1 + i % 2]]
        rows.append({"images": [{"bytes": held.getvalue(), "path": None}], "texts": texts})
    return rows


@pytest.fixture(scope="module")
def repos(tmp_path_factory) -> dict[str, Path]:
    """Id → folder, as on the Hub.

    The Cauldron with all its subsets, a Llama with a chat template, timm's encoder.
    """
    root = tmp_path_factory.mktemp("repos")
    for subset in CAULDRON_SUBSETS:
        write(root / "cauldron" / subset / "train-00000-of-00001.parquet", cauldron_rows(subset), group=2)
    listed = "".join(
        f"- config_name: {subset}\n  data_files:\n  - split: train\n    path: {subset}/train-*\n"
        for subset in CAULDRON_SUBSETS
    )
    (root / "cauldron" / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")
    tiny_llama(root / "llama", max_position_embeddings=4096)
    torch.manual_seed(7)
    encoder = timm.create_model(CONFIG.model.vision.name, pretrained=False, **OPTIONS)
    (root / "encoder").mkdir()
    save_file(encoder.state_dict(), root / "encoder" / "model.safetensors")
    return {f"datasets/{THE_CAULDRON}": root / "cauldron", DECODER: root / "llama", VISION: root / "encoder"}


def run(command: list[str], address: Hub, folder: Path) -> subprocess.CompletedProcess:
    return run_program(command, folder, partial(at_hub, str(address), str(folder / "hf")))


def test_the_full_size_config_by_its_own_ids(repos, tmp_path):
    """Only sizes and the number of steps are changed; sources and weights are those that the config names."""
    command = [
        str(ROOT / "train_dual_tower.py"),
        "--config",
        "dual_tower_cauldron",
        *SMALL,
        "--output_dir",
        "run",
        "--cache_dir",
        "cache",
    ]
    with hub(repos) as address:
        done = run(command, address, tmp_path)
    assert done.returncode == 0, done.stderr
    assert {
        path.split(f"{THE_CAULDRON}/resolve/")[1].split("/")[1]
        for path in address.served
        if "parquet" in path
    } == set(CAULDRON_SUBSETS)
    trained, started = (
        load_file(tmp_path / "run" / "model" / "model.safetensors"),
        load_file(repos[VISION] / "model.safetensors"),
    )
    backbone = {
        name: trained[f"left.vision_encoder.backbone.{name}"]
        for name in started
        if f"left.vision_encoder.backbone.{name}" in trained
    }
    assert len(backbone) > 20 and all(
        torch.allclose(tensor, started[name], atol=1e-4) for name, tensor in backbone.items()
    )  # after one step of the warm-up
    theirs = load_file(repos[DECODER] / "model.safetensors")
    assert torch.allclose(
        trained["right.layers.1.mlp.down_proj.weight"],
        theirs["model.layers.1.mlp.down_proj.weight"],
        atol=1e-4,
    )
    assert read_json(tmp_path / "run" / "config.json")["model"]["left"]["weights"] == DECODER
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert all(f"- {name}" in card.splitlines() for name in (VISION, DECODER, THE_CAULDRON))


def test_the_data_set_is_what_load_dataset_makes_of_it(repos, tmp_path):
    """The same rows for both readers."""
    code = f"""
import json
from datasets import Image, load_dataset
from data.columns import columns_of, record_of
from data.parquet import TableRecords, table_files
theirs = load_dataset({THE_CAULDRON!r}, "ocrvqa", split="train")
system, files = table_files({THE_CAULDRON!r}, "ocrvqa", False)
ours = TableRecords("ocrvqa", files["train"], system, {{}}, 1 << 20)
columns = columns_of(theirs.column_names, {{}}, "it")
equal = [record_of(row, columns) | {{"id": record["id"]}} == record \
for row, record in zip(theirs, ours, strict=True)]
print(json.dumps([len(theirs), all(equal), len({{record["id"] for record in ours}})]))
"""
    (tmp_path / "compare.py").write_text(code)
    with hub(repos) as address:
        done = run(["compare.py"], address, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [3, True, 3]
