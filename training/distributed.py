"""Several processes under torchrun: their process group, and DDP or FSDP2 around a model. Alone, all of it does nothing."""

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

BROKEN = (
    "closed by peer",
    "Connection reset",
    "Broken pipe",
    "Socket closed",
    "NCCL",
    "Timed out waiting",
    "gloo",
)  # how a lost rank is told


def check_world(config: Config, world: DistributedContext, resumed: bool = False) -> None:
    """What a configuration, new or `resumed`, and a number of ranks cannot do together: `UsageError`."""
    train, streams = config.train, config.data.streams or world.size
    if config.parallel == "fsdp" and world.size == 1:
        raise UsageError(
            "--parallel fsdp shares a model among ranks, but there is one: start the script with torchrun --nproc-per-node N, or go on with --parallel ddp"
        )
    if config.parallel == "fsdp" and (config.lora.left.nf4 or config.lora.right.nf4):
        raise UsageError("--lora.*.nf4: 4-bit weights cannot be shared among ranks: not with --parallel fsdp")
    if world.size % streams and streams % world.size:
        raise UsageError(
            f"{world.size} ranks cannot take the data's {streams} streams: one number must be a multiple of the other (--data.streams, set at a run's start)"
        )
    for what, number in (("ranks", world.size), ("streams", streams)):
        if train.micro_batches % number:
            do = (
                "the run keeps both, so resume with a number of ranks that divides it"
                if resumed
                else "lower --train.local_batch_size, or raise --train.global_batch_size"
            )
            raise UsageError(
                f"train.global_batch_size = {train.global_batch_size} is {train.micro_batches} forwards of {train.local_batch_size} rows, which {number} {what} cannot share: {do}"
            )


@contextmanager
def opened(device: torch.device) -> Iterator[DistributedContext]:
    """The process group of torchrun's ranks: gloo on CPU, and NCCL on CUDA. That another rank was lost raises `UserError`."""
    world = torchrun_context()
    if world.size == 1:
        yield world
        return
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UsageError(
            f"WORLD_SIZE = {world.size} stands in the environment without {missing[0]}: start several ranks with torchrun, or unset WORLD_SIZE for one process"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield world
    except RuntimeError as error:
        if any(word in str(error) for word in BROKEN):
            raise UserError(
                f"another rank was lost ({' '.join(str(error).split())[:100]}): its own message says why; --resume auto goes on from the last checkpoint"
            ) from error
        raise
    finally:
        dist.destroy_process_group()


def parallel(
    model: Any, kind: str, device: torch.device, dtype: torch.dtype, world: DistributedContext
) -> Any:
    """What to call in the model's place; its parameters may be others afterwards. Alone it is the model itself. `dtype`: what FSDP computes in."""
    model.blank_tile = True  # rows without image run the encoder all the same, or other ranks would wait for it; alone too, so that the optimizer sees the same gradients
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
    frozen = (
        set(encoder.parameters()) if encoder.frozen else set()
    )  # its features may be known already, on some ranks: nobody must wait for it
    for block in (m for m in model.modules() if isinstance(m, DecoderBlock)):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    if not encoder.frozen:
        # Batch statistics are in fp32, and their layers want weights so; autocast computes in `dtype` all the same.
        own = MixedPrecisionPolicy() if any(isinstance(m, _BatchNorm) for m in encoder.modules()) else policy
        for block in (*getattr(encoder.backbone, "blocks", []), encoder):
            fully_shard(block, mesh=mesh, mp_policy=own)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=frozen)
    return model


def accumulating(model: Any, last: bool) -> AbstractContextManager[None]:
    """Around a micro-batch: gradients go to the other ranks behind the `last` one alone."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()


def gathered(tensor: Tensor) -> Tensor:
    """All of a tensor that may be spread over the ranks; every rank calls it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
