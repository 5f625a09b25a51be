"""Serve a trained model: OpenAI's endpoints, a page to try it, image handles.

python serve.py --checkpoint runs/dual_tower_easyvqa/model          then open http://127.0.0.1:8000
python serve.py --checkpoint MODEL --host 0.0.0.0 --api-key KEY --store image_kvs

An image is encoded once: its KV answers any number of questions, also after a restart if there is a --store.
docs/serving.md has clients, handles, limits and metrics.
"""

import argparse
from pathlib import Path

from configs.cli import FlagParser, add_device_flags, add_model_flags
from utils.errors import UsageError, run_script


def make_parser() -> FlagParser:
    parser = FlagParser(
        description=str(__doc__), allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_flags(parser)
    add_device_flags(parser)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen at [127.0.0.1: this machine alone]")
    add("--port", type=int, default=8000, help="port to listen at [8000]")
    add("--name", help="the model's name in requests [the folder's, or the Hub id]")
    add("--store", metavar="DIR", help="folder that keeps image KVs, also for other processes")
    add(
        "--api_key",
        action="append",
        default=[],
        metavar="KEY",
        help="a key that clients must send; may be repeated",
    )
    add(
        "--allowed_media_domains",
        default="",
        metavar="HOSTS",
        help="hosts whose images are fetched, with commas; *.HOST: all below it [none]",
    )
    add(
        "--speculative",
        choices=("auto", "on", "off"),
        default="auto",
        help="draft with the multi-token heads [auto]",
    )
    add("--max_rows", type=int, default=64, help="answers that are decoded together, at most [64]")
    add("--max_waiting", type=int, default=256, help="requests that wait for their turn; more get 429 [256]")
    add("--cache_gb", type=float, default=2.0, help="memory of the decoding cache [2]")
    add("--store_gb", type=float, default=1.0, help="memory of image KVs [1]")
    add("--max_tokens", type=int, default=512, help="length of an answer whose request sets none [512]")
    add("--max_body_mb", type=float, default=64.0, help="size of a request [64]")
    add("--max_images", type=int, default=16, help="images of a request [16]")
    add("--max_image_mb", type=float, default=20.0, help="size of an image's file [20]")
    add("--max_pixels", type=int, default=40_000_000, help="pixels of an image [40 million]")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: list[str]) -> None:
    args = make_parser().parse(argv)
    for name in (
        "max_rows",
        "max_waiting",
        "cache_gb",
        "store_gb",
        "max_tokens",
        "max_body_mb",
        "max_images",
        "max_image_mb",
        "max_pixels",
    ):
        if not 0 < getattr(args, name) < 1e12:  # nor NaN
            raise UsageError(f"--{name} must be a number above 0")
    if not 0 < args.port < 65536:
        raise UsageError(f"--port = {args.port} must be from 1 to 65535")
    if "" in (args.host, args.store):
        raise UsageError("--host and --store must not be empty")
    if not all(key.isascii() and key.isprintable() and key == key.strip() != "" for key in args.api_key):
        raise UsageError("--api_key must be of printable ASCII characters, without spaces around it")
    try:
        from serving.run import serve
    except ModuleNotFoundError as error:
        raise UsageError(
            f"serving needs the package {error.name}: pip install 'dualtowervlm[serve]'"
        ) from None
    serve(args, Path(args.config) if args.config else None)


if __name__ == "__main__":
    run_script(main)
