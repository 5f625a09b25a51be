"""Serve several replicas of a model with Ray Serve; needs `pip install 'ray[serve]'`.

python -m docs.examples.ray_serve --checkpoint MODEL --replicas 2 --store image_kvs

All other flags are serve.py's. A replica is a process with an engine of its own, on a GPU of its own where
there are GPUs. Requests with the same header X-Image go to the same replica; those without are spread.
"""

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from serve import make_parser
from utils.errors import UsageError, run_script

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


def make_application(args: Namespace) -> Any:
    """The Ray Serve application of `args.replicas` servers."""
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    def make_app() -> Any:  # called in each replica
        from serving.api import create_app
        from serving.run import make_engine, make_settings

        engine = make_engine(args, Path(args.config) if args.config else None)
        return create_app(engine, make_settings(args))

    deployment = serve.deployment(
        serve.ingress(make_app)(),
        name="dualtower",
        num_replicas=args.replicas,
        ray_actor_options={"num_gpus": int(torch.cuda.is_available())},
        max_ongoing_requests=args.max_rows + args.max_waiting,  # of a replica; Ray's default is 5
        graceful_shutdown_timeout_s=600,  # answers that run are finished
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
    )
    return deployment.bind()


def main(argv: list[str]) -> None:
    parser = make_parser()
    parser.description = str(__doc__)
    parser.add_argument("--replicas", type=int, default=2, help="copies of the model [2]")
    args = parser.parse(argv)
    # Ray reads it at import, in every process; on a cluster, set it where `ray start` is called.
    os.environ["RAY_SERVE_SESSION_ID_HEADER_KEY"] = "x-image"
    try:
        from ray import serve
    except ModuleNotFoundError:
        raise UsageError("this example needs Ray Serve: pip install 'ray[serve]'") from None
    serve.start(http_options={"host": args.host, "port": args.port})
    serve.run(make_application(args), blocking=True)


if __name__ == "__main__":
    run_script(main)
