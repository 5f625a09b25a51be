"""The process group of torchrun's ranks, and DDP or FSDP2 around a model. A single process needs neither."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from configs.train import Config
from models.language_model import DecoderBlock
from utils.errors import UsageError, UserError
from utils.ranks import DistributedContext, torchrun_context

CONNECTION_ERRORS = (  # parts of the errors that a lost rank causes
    "closed by peer",
    "Connection reset",
    "Broken pipe",
    "Socket closed",
    "NCCL",
    "Timed out waiting",
    "gloo",
)


def check_world(config: Config, world: DistributedContext, resumed: bool = False) -> None:
    """Raise `UsageError` if a new or `resumed` run cannot use this number of ranks."""
    train, streams = config.train, config.data.streams or world.size
    if config.parallel == "fsdp" and world.size == 1:
        raise UsageError(
            "--parallel fsdp shares a model among ranks, but there is one: start the script with torchrun "
            "--nproc-per-node N, or go on with --parallel ddp"
        )
    if config.parallel == "fsdp" and (config.lora.left.nf4 or config.lora.right.nf4):
        raise UsageError("--lora.*.nf4: 4-bit weights cannot be shared among ranks: not with --parallel fsdp")
    if train.global_batch_size % train.local_batch_size:
        raise UsageError(
            f"train.global_batch_size = {train.global_batch_size} rows of a step is not a multiple of "
            f"train.local_batch_size = {train.local_batch_size} rows of a forward: change one of them"
        )
    if world.size % streams and streams % world.size:
        raise UsageError(
            f"{world.size} ranks cannot take the data's {streams} streams: one number must be a multiple "
            "of the other (--data.streams, set at a run's start)"
        )
    for kind, number in (("ranks", world.size), ("streams", streams)):
        if train.micro_batches % number:
            advice = (
                "the run keeps both, so resume with a number of ranks that divides it"
                if resumed
                else "lower --train.local_batch_size, or raise --train.global_batch_size"
            )
            raise UsageError(
                f"{number} {kind} cannot share the forwards of a step equally: train.global_batch_size = "
                f"{train.global_batch_size} ÷ train.local_batch_size = {train.local_batch_size} "
                f"makes {train.micro_batches}; {advice}"
            )


@contextmanager
def process_group(device: torch.device) -> Iterator[DistributedContext]:
    """Open the process group of torchrun's ranks: gloo on CPU, NCCL on CUDA.

    Raises `UserError` when another rank is lost.
    """
    world = torchrun_context()
    if world.size == 1:
        yield world
        return
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UsageError(
            f"the environment has WORLD_SIZE = {world.size}, but no {missing[0]}: start several ranks with "
            "torchrun, or unset WORLD_SIZE for one process"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield world
    except RuntimeError as error:
        if any(word in str(error) for word in CONNECTION_ERRORS):
            raise UserError(
                f"another rank was lost ({' '.join(str(error).split())[:100]}): its own message says why; "
                "--resume auto goes on from the last checkpoint"
            ) from error
        raise
    finally:
        dist.destroy_process_group()


def wrap_model(
    model: Any, kind: str, device: torch.device, dtype: torch.dtype, world: DistributedContext
) -> Any:
    """Wrap a model in DDP or FSDP2 (`kind`); FSDP2 computes in `dtype` and replaces the parameters.

    A single process gets the model itself.
    """
    # Rows without an image run the encoder too, or other ranks would wait for it. A single process does so as
    # well: the optimizer sees the same gradients.
    model.parts()["projector"].blank_tile = True
    if world.size == 1:
        return model
    if kind == "ddp":
        return DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
        )
    mesh = init_device_mesh(device.type, (world.size,))
    policy = (
        MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        if dtype != torch.float32
        else MixedPrecisionPolicy()
    )
    encoder = model.parts()["vision"]
    # Some ranks may have a frozen encoder's features cached: the others must not wait for them.
    frozen = set(encoder.parameters()) if encoder.frozen else set()
    for block in (m for m in model.modules() if isinstance(m, DecoderBlock)):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    if not encoder.frozen:
        # Batch norm keeps its statistics in fp32 and needs fp32 weights; autocast still computes in `dtype`.
        own = MixedPrecisionPolicy() if any(isinstance(m, _BatchNorm) for m in encoder.modules()) else policy
        for block in (*getattr(encoder.backbone, "blocks", []), encoder):
            fully_shard(block, mesh=mesh, mp_policy=own)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=frozen)
    return model


def gradient_sync(model: Any, last: bool) -> AbstractContextManager[None]:
    """Around a micro-batch: exchange gradients with the other ranks only after the `last` one."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a tensor that may be sharded over the ranks; every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
