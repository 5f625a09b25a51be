"""Shared by the two training scripts: configuration → data → model → loop → exported model."""

import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from configs.train import Config
from data.datasets import by_source
from eval.validation import TrainingTasks, save_samples
from models.kernels import use_kernels
from models.modality_projector import check_kind
from models.weights.lora import check_lora
from training.callbacks import Watchdog
from training.diagnostics import Diagnostics
from training.distributed import check_world, process_group
from training.dry_run import dry_run
from training.evaluation import Evaluation
from training.export import export_checkpoint, export_final, unsharded
from training.hub_push import Pusher
from training.memory import fit_batch_size
from training.run_dir import NEW_TOKENIZER, locked, open_run
from training.setup import Prepared, check_compiler, data_identity, prepare, resolve_config, vocabulary_of
from training.signals import Stopped, exit_on_signals
from training.trackers import Trackers
from training.trainer import Trainer
from utils.device import pick_device
from utils.errors import UsageError
from utils.ranks import DistributedContext, torchrun_context

# torchrun passes signals on to the ranks, which have minutes to end a step and save it.
TORCHRUN = (
    ("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1", "--shutdown-timeout", "600")
    if torch.__version__ >= "2.13"
    else ()
)


def run_training(config: Config, flags: dict[str, Any], model_class: Any) -> None:
    """Train `model_class` and export it. `flags`: the flags that the command line gave."""
    check_before_start(config, flags, model_class)
    use_kernels(config.kernels)
    if config.dry_run:
        print_estimate(config, flags, model_class)
        return
    if any(name.startswith("eval.") for name in flags):
        TrainingTasks(config.eval)  # raises before anything is written
    with (
        exit_on_signals(),
        ExitStack() as until_the_end,
        process_group(pick_device(config.train.device)) as world,
    ):
        notes: list[str] = []  # for the log, which is not open yet
        open_folder = partial(open_and_lock, config, flags, model_class, world, until_the_end, notes)
        config, folder, checkpoint, is_new = world.run_on_rank0(open_folder)
        use_kernels(config.kernels)  # a resumed run's own
        Trackers.check(config.log)
        if is_new and world.is_rank0:
            until_the_end.enter_context(removing_new_tokenizer(folder))
        with world.rank0_first():
            tasks = TrainingTasks(config.eval)
            tokenizer = folder / (NEW_TOKENIZER if is_new else "tokenizer")
            prepared = prepare(config, folder, tokenizer, checkpoint, model_class, world)
            for note in notes:
                prepared.log.say(note)
            pusher = None
            if config.hub.repo and world.is_rank0:
                pusher = make_pusher(config, folder, prepared, model_class)
        train_and_export(config, folder, checkpoint, prepared, tasks, world, pusher)


def check_before_start(config: Config, flags: dict[str, Any], model_class: Any) -> None:
    """Raise for settings that cannot work, before anything is loaded or written."""
    check_script(config, model_class)
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
    """`--dry_run`: print parameters, FLOPs and memory."""
    config = resolve_config(config, flags)
    if config.fit_memory:
        config, reason = fit_batch_size(config, model_class, vocabulary_of(config))
        print(reason)
    dry_run(config, model_class, vocabulary_of(config))


def open_and_lock(
    config: Config,
    flags: dict[str, Any],
    model_class: Any,
    world: DistributedContext,
    until_the_end: ExitStack,
    notes: list[str],
) -> tuple[Config, Path, Path | None, bool]:
    """Open and lock the run folder. → configuration in force, folder, checkpoint to resume, is the run new?

    For rank 0. `until_the_end` holds the lock; lines for the log are added to `notes`.
    """
    config, folder, checkpoint = open_run(
        config,
        flags,
        partial(resolve_new_run, flags=flags, model_class=model_class, world=world, notes=notes),
        lambda folder: until_the_end.enter_context(locked(folder)),
    )
    is_new = not (folder / "config.json").exists()
    check_script(config, model_class)
    check_world(config, world, resumed=not is_new)
    return config, folder, checkpoint, is_new


def resolve_new_run(
    config: Config, flags: dict[str, Any], model_class: Any, world: DistributedContext, notes: list[str]
) -> Config:
    """Resolve a new run's configuration: sizes, data streams (by default one a rank), local batch size."""
    config = resolve_config(config, flags)
    config = replace(config, data=replace(config.data, streams=config.data.streams or world.size))
    if config.fit_memory:
        config, reason = fit_batch_size(config, model_class, vocabulary_of(config), world)
        notes.append(reason)
    check_world(config, world)
    return config


@contextmanager
def removing_new_tokenizer(folder: Path) -> Iterator[None]:
    """Remove a tokenizer whose run never began: at the end, and at the start that of a killed process."""
    shutil.rmtree(folder / NEW_TOKENIZER, ignore_errors=True)
    try:
        yield
    finally:
        shutil.rmtree(folder / NEW_TOKENIZER, ignore_errors=True)


def make_pusher(config: Config, folder: Path, prepared: Prepared, model_class: Any) -> Pusher:
    """Open the Hub repository of `--hub.repo`."""
    export_to = partial(
        export_checkpoint,
        model_class=model_class,
        tokenizer=prepared.data.tokenizer,
        config=config,
        run=folder,
    )
    return Pusher(config.hub, model_class.model_type, folder, export_to, prepared.log.say)


def train_and_export(
    config: Config,
    folder: Path,
    checkpoint: Path | None,
    prepared: Prepared,
    tasks: TrainingTasks,
    world: DistributedContext,
    pusher: Pusher | None,
) -> None:
    """Train until the last step, then export the model. After a stop signal only a checkpoint is saved."""
    data, log = prepared.data, prepared.log
    evaluation = Evaluation(config, folder, prepared.validation, tasks)
    callbacks = [
        Watchdog(config.train.stall_minutes),
        Diagnostics(),
        evaluation,
        prepared.cache,
        *([pusher] if pusher is not None else []),
    ]
    trainer = Trainer(
        config, prepared.model, data.batches, folder, log, callbacks, world, data_identity(data)
    )
    try:
        trainer.train(checkpoint)
    except Stopped as stopped:
        log.say(f"{stopped}\n{resume_command(folder, world)}")
        return
    if evaluation.best.warning:
        log.say(f"warning: {evaluation.best.warning}")
    dropped = sum(world.gather(data.batches.dropped()), Counter())
    model = unsharded(prepared.model, config)
    if not world.is_rank0:
        return
    predictions = evaluation.predictions
    if not predictions:  # the run had already reached its last step
        predictions = prepared.validation.predictions(model.eval(), 8)
        save_samples(folder / "samples", config.max_steps, predictions)
    if dropped:
        log.say(f"training records dropped: {by_source(dropped)}")
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
    torchrun = (
        ["-m", "torch.distributed.run", "--nproc-per-node", str(world.size), *TORCHRUN, "--"]
        if world.size > 1
        else []
    )
    return f"go on with:\n  {shlex.join([sys.executable, *torchrun, *script])}"
