"""Exchange model folders with the Hugging Face Hub.

python -m tools.hub push runs/dual_tower_easyvqa/model NAME --private  a folder → NAME or OWNER/NAME
python -m tools.hub pull OWNER/NAME models/mine                        OWNER/NAME[@REVISION] → a folder
python -m tools.hub info OWNER/NAME                                    its model and files; also of a folder
python -m tools.hub card runs/dual_tower_easyvqa                       rewrite its model card, with scores
"""

import argparse
import shutil
from dataclasses import replace
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from configs.cli import FlagParser
from configs.serialization import load_json
from configs.train import Config
from models.weights.folder import MODEL_TYPES, damaged, find_model, read_model_config, weight_files
from utils.errors import UsageError, UserError, run_script
from utils.files import read_json, replacing_folder
from utils.hub import fetch, is_hub_id, kind_of, open_repo, push, repo_info


def push_folder(args: argparse.Namespace) -> None:
    from models.weights.tensors import check_weights  # imports PyTorch

    folder = Path(args.folder)
    kind = str(kind_of(read_model_config(folder)))  # raises before a repository is created
    check_weights(folder)
    if not (folder / "tokenizer.json").is_file() and kind in MODEL_TYPES:
        raise UserError(f"{folder} holds no tokenizer.json: not a complete model folder")
    repo = open_repo(args.repo, kind, args.private or None, branch=args.branch)
    print(f"pushed: {push(folder, repo, args.message, args.branch)}")


def pull(args: argparse.Namespace) -> None:
    to = Path(args.folder)
    if to.exists():
        raise UsageError(f"{to} exists already: choose another folder")
    if not is_hub_id(args.repo):
        raise UsageError(f"'{args.repo}' is no repository: OWNER/NAME or OWNER/NAME@REVISION")
    find_model(args.repo)  # raises before the weights are fetched
    source = fetch(args.repo, ["*"], "the model")
    read_model_config(source)  # raises if the format is not supported
    numbers(source)  # raises if a weight file is damaged
    with replacing_folder(to) as temp_path:
        shutil.copytree(source, temp_path, dirs_exist_ok=True)
    print(f"pulled: {to}")


def info(args: argparse.Namespace) -> None:
    if is_hub_id(args.source):
        state, files = repo_info(args.source)
        if "config.json" not in dict(files):
            raise UserError(f"{args.source} holds no config.json, so no model of this project")
        head = read_json(fetch(args.source, ["config.json"], "config.json") / "config.json")
        if not isinstance(head, dict):
            raise UserError(
                f"config.json of {args.source} describes no model: "
                f"it holds {type(head).__name__}, not an object"
            )
    else:
        folder = Path(args.source)
        head, state = read_model_config(folder), f"{numbers(folder):,} numbers"
        files = sorted((path.name, path.stat().st_size) for path in folder.iterdir() if path.is_file())
    print(f"{args.source}: model of type {head.get('model_type')}, format {head.get('format')}; {state}")
    for name, size in files:
        print(f"{size:16,} bytes  {name}")


def numbers(folder: Path) -> int:
    """Count the numbers in a folder's tensors, from the files' headers alone.

    A truncated file raises `UserError`.
    """
    count = 0
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="np") as file:
                count += sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise damaged(path, error) from None
    return count


def card(args: argparse.Namespace) -> None:
    from models.dual_tower.dual_tower import DualTowerVLM
    from models.vision_language_model import VisionLanguageModel
    from models.weights.model_folder import load_model
    from training.run_card import write_card

    run, results = Path(args.run), Path(args.run) / "evaluation" / "results.json"
    config = load_json(Config, run / "config.json")
    if args.licence:
        config = replace(config, hub=replace(config.hub, licence=args.licence))
    folder = run / "model"
    model = load_model({c.model_type: c for c in (DualTowerVLM, VisionLanguageModel)}, folder)
    newer = results.is_file() and results.stat().st_mtime >= (folder / "config.json").stat().st_mtime
    if results.is_file() and not newer:
        print(f"{results} is older than the model: left out")
    write_card(model, config, run, folder, evaluation=results if newer else None)
    print(f"written: {folder / 'README.md'}")


def main(argv: list[str]) -> None:
    parser = FlagParser(
        prog="python -m tools.hub",
        description=str(__doc__),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="push|pull|info|card")
    add = commands.add_parser("push", help="a model folder → a repository")
    add.add_argument("folder", metavar="DIR")
    add.add_argument("repo", metavar="REPO", help="NAME or OWNER/NAME; created if it does not exist")
    add.add_argument(
        "--private",
        action="store_true",
        help="create a private repository; an existing public one is refused",
    )
    add.add_argument("--branch", help="push to this branch, created if it does not exist [main]")
    add.add_argument("--message", default="Push a model of DualTowerVLM", help="commit message")
    add.set_defaults(do=push_folder)
    add = commands.add_parser("pull", help="a repository → a folder")
    add.add_argument("repo", metavar="OWNER/NAME[@REVISION]")
    add.add_argument("folder", metavar="DIR", help="new folder")
    add.set_defaults(do=pull)
    add = commands.add_parser("info", help="the model and files of a repository or folder")
    add.add_argument("source", metavar="REPO_OR_DIR")
    add.set_defaults(do=info)
    add = commands.add_parser("card", help="rewrite the card of a run's model")
    add.add_argument("run", metavar="RUN")
    add.add_argument(
        "--licence", default="", help="licence of the weights, by the Hub's name [hub.licence of the run]"
    )
    add.set_defaults(do=card)
    args = parser.parse(argv)
    args.do(args)


if __name__ == "__main__":
    run_script(main)
