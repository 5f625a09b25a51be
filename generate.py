"""Ask a trained model about an image.

  python generate.py --checkpoint runs/dual_tower_easyvqa/model --image FILE --prompt "what color is the shape?"

Several --prompt are answered from one image KV: the image is encoded once. --json prints one object a prompt.
"""

import argparse
import json
import sys
from pathlib import Path

from configs.command_line import FlagParser, add_flags, load_json, override
from configs.errors import UsageError, run_script
from configs.schema import GenerationConfig


def main(argv: list[str]) -> None:
    parser = FlagParser(description=str(__doc__), allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="model folder, as training exports it (runs/NAME/model)")
    parser.add_argument("--image", metavar="FILE", help="the image that the prompts are about; none: text only")
    parser.add_argument("--prompt", action="append", required=True, help="a question; may be given several times")
    parser.add_argument("--json", action="store_true", help="print one JSON object a prompt")
    parser.add_argument("--config", metavar="FILE", help="JSON file with defaults for the flags under 'generation'")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_flags(parser, GenerationConfig, GenerationConfig(), group="generation")
    flags = vars(parser.parse(argv))
    settings = load_json(GenerationConfig, Path(flags["config"])) if flags["config"] else GenerationConfig()
    settings = override(settings, flags)
    for prompt in flags["prompt"]:
        if not prompt.strip():
            raise UsageError("--prompt is empty: give a question")
        if any("\ud800" <= c <= "\udfff" for c in prompt):
            raise UsageError("--prompt is not valid UTF-8")
    if flags["image"] == "":
        raise UsageError("--image is empty: give a file, or leave the flag out for text alone")

    from eval.answering import Answerer

    answerer = Answerer.from_pretrained(flags["checkpoint"])
    images = [answerer.tiles(flags["image"])] if flags["image"] else []
    live = sys.stdout.isatty() and not flags["json"]
    for prompt in flags["prompt"]:
        if live:
            print(f"{prompt}  →  ", end="", flush=True)
        shown = ""

        def on_text(text: str) -> None:
            nonlocal shown
            if not text.endswith("\ufffd"):  # a character whose bytes have not all come
                print(text[len(shown) :], end="", flush=True)
                shown = text

        answer = answerer.answer([(images, prompt)], settings, on_text if live else None)[0]
        if flags["json"]:
            fields = {"prompt": prompt, "answer": answer.text, "ttft_ms": round(answer.ttft_ms, 2), "tokens_per_s": round(answer.tokens_per_s, 1)}
            print(json.dumps(fields | {"image_kv": answer.image_kv}))
        elif live:
            print(answer.text[len(shown) :])
        else:
            print(answer.text if len(flags["prompt"]) == 1 else f"{prompt}  →  {answer.text}")


if __name__ == "__main__":
    run_script(main)
