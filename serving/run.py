"""From flags to a running server."""

import argparse
import signal
import socket
import sys
import traceback
from contextlib import suppress
from pathlib import Path

import torch
import uvicorn

from eval.predictor import Predictor
from models.kernels import use_kernels
from serving.api import Settings, create_app
from serving.engine import Engine
from serving.media import Limits
from serving.metrics import Metrics
from utils.device import describe_device
from utils.errors import UserError

# Longer than clients and proxies keep a connection (5 and 60 s): one that the server closes first may just
# have got a request.
KEEP_ALIVE_SECONDS = 75


def make_engine(args: argparse.Namespace, config: Path | None) -> Engine:
    """The engine for `serve.py`'s flags.

    Only the engine's thread computes in parallel. OpenMP's threads of other teams, once started, make its own
    wait asleep at every operation: a decode step on two cores then takes a quarter longer.
    """
    use_kernels(args.kernels)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    store = Path(args.store) if args.store else None
    predictor = Predictor.from_pretrained(args.checkpoint, args.dtype, args.device, store, config)
    torch.set_num_threads(threads)
    predictor.store.memory_bytes = int(args.store_gb * 1e9)
    return Engine(
        predictor,
        Metrics(report),
        drafts=args.speculative,
        max_rows=args.max_rows,
        cache_bytes=int(args.cache_gb * 1e9),
        max_waiting=args.max_waiting,
        threads=threads,
    )


def make_settings(args: argparse.Namespace) -> Settings:
    """The server's settings for `serve.py`'s flags."""
    path = Path(args.checkpoint)
    name = args.name or (path.parent.name if path.name == "model" else args.checkpoint)
    domains = tuple(d.strip().lower() for d in args.allowed_media_domains.split(",") if d.strip())
    limits = Limits(domains, int(args.max_image_mb * 2**20), args.max_pixels, args.max_images)
    return Settings(name, tuple(args.api_key), limits, int(args.max_body_mb * 2**20), args.max_tokens)


def report(error: Exception) -> None:
    """Write an error of the engine to stderr, for the operator."""
    with suppress(OSError):  # stderr may be closed
        traceback.print_exception(error, file=sys.stderr)


def serve(args: argparse.Namespace, config: Path | None) -> None:
    """Serve until SIGTERM or Ctrl-C; answers that run are finished first. `UserError` if it cannot start."""
    engine, settings = make_engine(args, config), make_settings(args)
    heads = engine.model.heads.count if engine.model.heads is not None else 0
    dtype = str(engine.model.right.embed_tokens.weight.dtype).removeprefix("torch.")
    print(
        f"{settings.name}: {describe_device(engine.model.device)}, {dtype}, {heads} multi-token heads",
        flush=True,
    )
    app = create_app(engine, settings)
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", server_header=False, timeout_keep_alive=KEEP_ALIVE_SECONDS)
    )
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    try:
        sock = socket.create_server((args.host, args.port), family=family)
    except OSError as error:
        raise UserError(f"--port {args.port} at {args.host} cannot be used: {error.strerror}") from None
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"open http://{host}:{args.port} · endpoints under /v1 · Ctrl-C stops", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # uvicorn raises it again at its end
    server.run(sockets=[sock])
