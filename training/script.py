"""Shared by the two training scripts: configuration → data → model → loop → exported model."""

import os
import shlex
import shutil
import sys
from collections import ChainMap, Counter
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from configs.train import Config
from data.datasets import drop_report
from eval.validation import TrainingTasks, save_samples
from models.kernels import kernels_in_training, use_kernels
from models.modality_projector import check_kind
from models.weights.lora import check_lora
from training.callbacks import Watchdog
from training.diagnostics import Diagnostics
from training.distributed import check_world, process_group
from training.dry_run import dry_run
from training.evaluation import Evaluation
from training.export import export_checkpoint, export_final, unsharded
from training.hub_push import Pusher
from training.logging import RunLog
from training.memory import fit_batch_size
from training.run_dir import NEW_TOKENIZER, check_free, find_run, lock_new_folder, locked, resume_run
from training.scaling import parse_gpus
from training.setup import (
    check_compiler,
    data_identity,
    prepare,
    resolve_config,
    resolve_feature_cache,
    vocabulary_of,
)
from training.signals import Stopped, exit_on_signals
from training.trackers import Trackers
from training.trainer import Trainer
from utils.device import compute_dtype, describe_device, pick_device
from utils.errors import UsageError
from utils.ranks import DistributedContext, torchrun_context

# torchrun passes signals on to the ranks, which have minutes to end a step and save it.
TORCHRUN = (
    ("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1", "--shutdown-timeout", "600")
    if torch.__version__ >= "2.13"
    else ()
)


class OpenRun(NamedTuple):
    """A run whose folder is locked."""

    config: Config  # the one in force: a resumed run has its own
    folder: Path
    checkpoint: Path | None  # to resume from
    is_new: bool
    note: str = ""  # for the log, which is not open yet

    @property
    def tokenizer(self) -> Path:
        return self.folder / (NEW_TOKENIZER if self.is_new else "tokenizer")


def run_training(config: Config, flags: dict[str, Any], model_class: Any) -> None:
    """Train `model_class` and export it. `flags`: the flags that the command line gave."""
    check_before_start(config, flags, model_class)
    use_kernels(config.kernels)
    if config.dry_run:
        print_estimate(config, flags, model_class)
        return
    if any(name.startswith("eval.") for name in flags):
        TrainingTasks(config.eval)  # raises before anything is written
    with exit_on_signals(), ExitStack() as stack, process_group(pick_device(config.train.device)) as world:
        run = world.run_on_rank0(partial(open_run, config, flags, model_class, world, stack))
        use_kernels(run.config.kernels)  # a resumed run's own
        Trackers.check(run.config.log)
        if run.is_new and world.is_rank0:
            shutil.rmtree(run.tokenizer, ignore_errors=True)  # of a killed process
            stack.callback(shutil.rmtree, run.tokenizer, ignore_errors=True)  # if the run does not begin
        train_and_export(run, model_class, world)


def check_before_start(config: Config, flags: dict[str, Any], model_class: Any) -> None:
    """Raise for settings that cannot work, before anything is loaded or written."""
    check_script(config, model_class)
    if config.gpus:
        parse_gpus(config.gpus)
    if config.fit_memory and "train.local_batch_size" in flags:
        raise UsageError(
            "--train.local_batch_size is what --fit-memory chooses: give one of them; "
            "--train.global_batch_size stays as it is"
        )
    # A resumed run and --fit-memory are checked later, with the configuration that they result in.
    if not config.resume and not config.fit_memory:
        check_world(config, torchrun_context())
    Trackers.check(config.log)
    check_compiler(config)
    check_kind(config.model.projector)
    check_lora(config.lora, config.model.towers)
    for tower in config.model.towers:
        if getattr(config.lora, tower).r and getattr(config.train, f"lr_{tower}") == 0:
            raise UsageError(f"--lora.{tower}.r: adapters learn with train.lr_{tower}, which is 0")


def check_script(config: Config, model_class: Any) -> None:
    """Raise `UsageError` if the configuration belongs to the other training script."""
    vanilla = config.model.left_context == "none"
    if vanilla != (model_class.model_type == "vanilla"):
        raise UsageError(
            f"model.left_context = {config.model.left_context} is trained by "
            f"train_{'vanilla' if vanilla else 'dual_tower'}.py"
        )


def print_estimate(config: Config, flags: dict[str, Any], model_class: Any) -> None:
    """`--dry_run`: print parameters, FLOPs and memory; with `--gpus` also what these need."""
    config = resolve_config(config, flags)
    if config.fit_memory:
        config, reason = fit_batch_size(config, model_class, vocabulary_of(config))
        print(reason)
    dry_run(config, model_class, vocabulary_of(config))


def open_run(
    config: Config, flags: dict[str, Any], model_class: Any, world: DistributedContext, stack: ExitStack
) -> OpenRun:
    """Find the run to resume, or resolve a new one's configuration; lock its folder until `stack` closes.

    For rank 0. Nothing is written but the lock: `begin_run` follows when nothing can fail any more.
    """
    folder, checkpoint = find_run(config)
    if folder is not None:
        stack.enter_context(locked(folder))
        config, checkpoint = resume_run(flags, folder, checkpoint)
        check_script(config, model_class)
        check_world(config, world, resumed=True)
        return OpenRun(config, folder, checkpoint, is_new=False)
    check_free(config)
    config, note = resolve_config(config, flags), ""
    config = replace(config, data=replace(config.data, streams=config.data.streams or world.size))
    if config.fit_memory:
        config, note = fit_batch_size(config, model_class, vocabulary_of(config), world)
    check_world(config, world)
    return OpenRun(config, lock_new_folder(config, stack), None, is_new=True, note=note)


def train_and_export(run: OpenRun, model_class: Any, world: DistributedContext) -> None:
    """Train until the last step, then export the model. After a stop signal only a checkpoint is saved."""
    config, folder, checkpoint = run.config, run.folder, run.checkpoint
    with world.rank0_first():
        tasks = TrainingTasks(config.eval)
        log = RunLog(folder, silent=not world.is_rank0)
        device, dtype = pick_device(config.train.device), config.train.dtype
        log.say(
            f"{describe_device(device)}, {str(compute_dtype(dtype, device)).removeprefix('torch.')}, "
            f"kernels: {', '.join(kernels_in_training(device)) or 'plain'}"
        )
        model, data, validation = prepare(config, log, run.tokenizer, checkpoint, model_class, world)
        if run.note:
            log.say(run.note)
        pusher = None
        if config.hub.repo and world.is_rank0:
            settings = {"model_class": model_class, "tokenizer": data.tokenizer, "config": config}
            export_to = partial(export_checkpoint, run=folder, **settings)
            pusher = Pusher(config.hub, model_class.model_type, folder, export_to, log.say)
    if run.is_new:
        config = resolve_feature_cache(config, model, data.tokenizer.vocabulary, log, world)
    evaluation, cache = Evaluation(config, folder, validation, tasks), model.parts()["vision"].cache
    optional = (callback for callback in (cache, pusher) if callback is not None)
    callbacks = [Watchdog(config.train.stall_minutes), Diagnostics(), evaluation, *optional]
    trainer = Trainer(config, model, data.batches, folder, log, callbacks, world, data_identity(data))
    try:
        trainer.train(checkpoint)
    except Stopped as stopped:
        log.say(f"{stopped}\n{resume_command(folder, world)}")
        return
    if evaluation.best.warning:
        log.say(f"warning: {evaluation.best.warning}")
    dropped = sum(world.gather(data.batches.dropped()), Counter())
    examples = dict(ChainMap(*world.gather(data.batches.examples())))
    model = unsharded(model, config)
    if not world.is_rank0:
        return
    predictions = evaluation.predictions
    if not predictions:  # the run had already reached its last step
        predictions = validation.predictions(model.eval(), 8)
        save_samples(folder / "samples", config.max_steps, predictions)
    if dropped:
        log.say(f"training records dropped: {drop_report(dropped, examples)}")
    export_final(model, config, folder, data.tokenizer, predictions[0], log, pusher)


def resume_command(folder: Path, world: DistributedContext) -> str:
    """The command line that continues this run, with a line of text before it."""
    script = [sys.argv[0], "--output_dir", str(folder), "--resume", "auto"]
    nodes = world.size // int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    if nodes > 1:  # a rank does not know the flags of torchrun on the nodes
        return (
            f"go on with the same torchrun on each of the {nodes} nodes, and behind its own flags:\n"
            f"  {shlex.join(script)}"
        )
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(world.size), *TORCHRUN, "--"]
    command = [sys.executable, *(torchrun if world.size > 1 else ()), *script]
    return f"go on with:\n  {shlex.join(command)}"
