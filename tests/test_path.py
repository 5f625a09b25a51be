"""The files that one image and question pass: from the source to the loss, and from the prompt to the answer.

A trace of real calls with plain kernels, `configs/` and `utils/` aside.
"""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from configs.cli import preset
from configs.model import GenerationConfig
from eval.chat import answer_all
from eval.predictor import Predictor
from models.dual_tower.dual_tower import DualTowerVLM
from models.kernels import use_kernels
from tests.conftest import TINY_MODEL, tiny_model
from training.setup import build_data
from training.trainer import Trainer

ROOT = str(Path(__file__).parent.parent) + "/"
ASIDE = ("configs/", "utils/", "tests/", ".venv/")
# Both towers are this decoder, so it is entered for images first, and for text again.
DECODER = {
    "models/dual_tower/dual_tower.py",
    "models/dual_tower/dual_language_model.py",
    "models/language_model.py",
    "models/layers.py",
    "models/masks.py",
    "models/kv_cache.py",
    "models/kernels/__init__.py",
}


def traced(run) -> tuple[list[str], set[tuple[str, str]]]:
    """→ the project's files in the order in which they are entered, and the calls from file to file."""
    files: list[str] = []
    calls: set[tuple[str, str]] = set()

    def name(frame) -> str:
        file = frame.f_code.co_filename
        path = file.removeprefix(ROOT) if file.startswith(ROOT) else ""
        return "" if path.startswith(ASIDE) else path

    def profile(frame, event, argument) -> None:
        if event != "call" or not (file := name(frame)):
            return
        if file not in files:
            files.append(file)
        caller = frame.f_back
        while caller is not None and not name(caller):
            caller = caller.f_back
        if caller is not None and name(caller) != file:
            calls.add((name(caller), file))

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return files, calls


def backward(files: list[str], calls: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Calls to a file that was entered earlier, other than the decoder's."""
    at = {file: i for i, file in enumerate(files)}
    return {(a, b) for a, b in calls if at[b] < at[a] and b not in DECODER}


@pytest.fixture(autouse=True)
def plain():
    use_kernels("plain")
    yield
    use_kernels("auto")


def test_from_source_to_loss(tmp_path):
    config = preset("dual_tower_easyvqa")
    data_config = replace(config.data, limit=20, validation_images=2)
    config = replace(config, data=data_config, model=replace(TINY_MODEL, left_context="image"))

    train_config = replace(config.train, local_batch_size=2, global_batch_size=2)
    config = replace(config, train=train_config)
    data = build_data(config, tmp_path)
    model = DualTowerVLM(config.model, data.tokenizer.vocabulary)
    trainer = Trainer(config, model, data.batches)
    files, _ = traced(trainer.train_step)
    to_loss = files[: files.index("models/losses.py") + 1]
    assert to_loss[0] == "training/trainer.py"
    assert "data/images.py" in to_loss and "models/vision_encoder.py" in to_loss
    assert len(to_loss) <= 20, to_loss  # and the source itself, which is read before: one more
    _, calls = traced(lambda: model(**next(data.batches)))  # the loop calls both data and model
    assert backward(to_loss, calls) == set()


def test_from_prompt_to_answer(tokenizer, tmp_path, capsys):
    tiny_model(tokenizer).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    predictor = Predictor.from_pretrained(tmp_path)

    def ask() -> None:
        images = [predictor.tiles(tmp_path / "red.png")]
        answer_all(predictor, ["what is it?"], images, GenerationConfig(max_new_tokens=3), [], False, False)

    files, calls = traced(ask)
    assert "models/vision_encoder.py" in files and "models/generation.py" in files
    assert len(files) + 1 <= 19, files  # generate.py calls this
    tiles_first = {("eval/chat.py", "eval/predictor.py")}
    streamed = {("models/generation.py", "eval/predictor.py"), ("eval/predictor.py", "eval/chat.py")}
    assert backward(files, calls) - tiles_first - streamed == set()
