"""Ask a trained model about an image.

python generate.py --checkpoint runs/dual_tower_easyvqa/model --image FILE --prompt "what color is the shape?"
python generate.py --checkpoint runs/dual_tower_easyvqa/model --image FILE --chat --stats

Several --prompt are answered from one image KV: the image is encoded once; with --store DIR also in later
calls. --json prints one object per prompt. In a chat `/image FILE` adds an image, and an empty line or Ctrl-D
ends it.
"""

import argparse
import gc
import sys
from pathlib import Path
from typing import Any

from configs.cli import FlagParser, add_device_flags, add_flags, add_model_flags, override
from configs.model import GenerationConfig
from configs.serialization import load_json
from data.conversations import ask
from utils.errors import UsageError, run_script


def make_parser() -> FlagParser:
    parser = FlagParser(
        description=str(__doc__), allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_flags(parser)
    add_device_flags(parser)
    parser.add_argument(
        "--image",
        action="append",
        metavar="FILE",
        help="the image that the prompts are about; may be given several times; none: text only",
    )
    parser.add_argument("--prompt", action="append", help="a question; may be given several times")
    parser.add_argument("--system", default="", metavar="TEXT", help="the system message")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end an answer before this text; may be given several times",
    )
    parser.add_argument("--chat", action="store_true", help="ask in turns, on the terminal")
    parser.add_argument("--json", action="store_true", help="print one JSON object a prompt")
    parser.add_argument(
        "--stats", action="store_true", help="show time to first token, tokens/s, tokens per decode step"
    )
    parser.add_argument(
        "--store",
        metavar="DIR",
        help="folder that keeps image KVs: an image is not encoded again in a later call",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the decode step, for GPUs: half a minute longer to the first answer",
    )
    parser.add_argument(
        "--sampling_defaults", metavar="FILE", help="JSON file with defaults for the flags under 'generation'"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_flags(parser, GenerationConfig, GenerationConfig(), group="generation")
    return parser


def check(flags: dict[str, Any], settings: GenerationConfig) -> None:
    """Raise `UsageError` for flags that contradict one another."""
    if flags["chat"] == bool(flags["prompt"]) or (flags["chat"] and flags["json"]):
        raise UsageError("give --prompt, or --chat without --json")
    for prompt in flags["prompt"] or ():
        if not prompt.strip():
            raise UsageError("--prompt is empty: give a question")
        if any("\ud800" <= c <= "\udfff" for c in prompt):
            raise UsageError("--prompt is not valid UTF-8")
    if settings.logprobs and not flags["json"]:
        raise UsageError("--logprobs needs --json: add it, or leave --logprobs out")
    if flags["store"] == "":
        raise UsageError("--store is empty: give a folder, or leave the flag out")
    if "" in (flags["image"] or ()):
        raise UsageError("--image is empty: give a file, or leave the flag out for text alone")
    drawn = [name for name in ("temperature", "top_k", "top_p", "min_p", "seed") if name in flags]
    if drawn and not settings.sampling:
        raise UsageError(f"--{drawn[0]} is for --sampling alone: add it, or leave --{drawn[0]} out")


def main(argv: list[str]) -> None:
    flags = vars(make_parser().parse(argv))
    defaults = flags["sampling_defaults"]
    settings = load_json(GenerationConfig, Path(defaults)) if defaults else GenerationConfig()
    settings = override(settings, flags)
    check(flags, settings)

    gc.disable()  # saves about a sixth of the imports' time: nearly all that they make stays
    from eval.chat import Chat, answer_all, talk
    from eval.predictor import Predictor
    from models.kernels import use_kernels

    gc.enable()

    use_kernels(flags["kernels"])
    store, config = (Path(flags[name]) if flags[name] else None for name in ("store", "config"))
    predictor = Predictor.from_pretrained(
        flags["checkpoint"], flags["dtype"], flags["device"], store, config, flags["compile"]
    )
    images = [predictor.tiles(image) for image in flags["image"] or ()]
    if flags["chat"]:
        chat = Chat(predictor, settings, flags["stop"], flags["system"])
        if talk(predictor, chat, images, flags["stats"]) and not sys.stdin.isatty():
            sys.exit(1)  # errors; a terminal has shown them
        return
    questions = [ask(prompt, len(images), flags["system"]) for prompt in flags["prompt"]]
    answer_all(predictor, questions, images, settings, flags["stop"], flags["json"], flags["stats"])


if __name__ == "__main__":
    run_script(main)
