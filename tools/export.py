"""Add to a model folder the code and files by which transformers loads it.

  python -m tools.export runs/dual_tower_easyvqa/model

Training adds them to what it saves; this program is for folders of an earlier version. A folder of an older
format is saved anew in the current one first, because transformers loads tensors by name.
"""

import argparse
from pathlib import Path

from configs.cli import FlagParser
from data.tokenizer import Tokenizer
from hf.export import add_hf_code
from models.weights.folder import FORMAT, is_nanovlm, read_model_config
from utils.errors import run_script


def update_format(folder: Path) -> None:
    """Save a model folder of an older format in the current one, tensors under their current names."""
    config = read_model_config(folder)
    if is_nanovlm(config) or config["format"] == FORMAT:
        return
    from models.dual_tower.dual_tower import DualTowerVLM
    from models.vision_language_model import VisionLanguageModel
    from models.weights.model_folder import load_model, save_model

    model = load_model({c.model_type: c for c in (DualTowerVLM, VisionLanguageModel)}, folder)
    save_model(model, folder)
    print(f"{folder} was of format {config['format']} and is now of format {FORMAT}")


def main(argv: list[str]) -> None:
    parser = FlagParser(
        prog="python -m tools.export",
        description=str(__doc__),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="model folder")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    folder = parser.parse(argv).folder
    tokenizer = Tokenizer.load(folder)
    update_format(folder)
    add_hf_code(folder, tokenizer)
    tokenizer.save(folder)  # with the current chat template
    print(f"{folder} now loads with transformers (docs/transformers.md)")


if __name__ == "__main__":
    run_script(main)
