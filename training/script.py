"""What the two training scripts share: configuration → data → model → loop → exported model."""

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
from eval.validation import (
    BestCheckpoint,
    TrainingTasks,
    Validation,
    forget_samples,
    save_picture,
    save_samples,
)
from models.layers import pick_device
from models.modality_projector import check_kind
from models.weights.lora import check_lora
from training.checkpoint import move_to_abandoned
from training.distributed import check_world, opened
from training.estimate import dry_run
from training.export import export, export_checkpoint, export_final, unsharded
from training.feature_cache import FeatureCache
from training.fit_memory import fit_batch_size
from training.hub_push import Pusher
from training.logging import RunLog
from training.precision import autocast
from training.run_dir import locked, open_run, write_config
from training.setup import Data, check_compiler, data_identity, prepare, resolve_config, vocabulary_of
from training.signals import Stopped, ending_in_order
from training.trackers import Trackers
from training.trainer import TrainingCallbacks, train
from utils.errors import UsageError
from utils.ranks import DistributedContext, torchrun_context

NEW_TOKENIZER = ".tokenizer"
TORCHRUN = (
    ("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1", "--shutdown-timeout", "600")
    if torch.__version__ >= (2, 13)
    else ()
)  # signals go on to the ranks, which have minutes to end a step and save it


def run_training(config: Config, flags: dict[str, Any], model_class: Any) -> None:
    """Train `model_class` and export it. `flags` are those that the command line gave."""
    check_script(config, model_class)
    if not config.resume and not config.fit_memory:  # else by the run's own configuration, below
        check_world(config, torchrun_context())
    Trackers.check(config.log)
    check_compiler(config)
    check_kind(config.model.projector)
    check_lora(config.lora, config.model.towers)
    for tower in config.model.towers:
        if getattr(config.lora, tower).r and getattr(config.train, f"lr_{tower}") == 0:
            raise UsageError(f"--lora.{tower}.r: adapters learn with train.lr_{tower}, which is 0")
    if config.dry_run:
        config = resolve_config(config, flags)
        if config.fit_memory:
            config, why = fit_batch_size(config, model_class, vocabulary_of(config))
            print(why)
        dry_run(config, model_class, vocabulary_of(config))
        return
    if any(name.startswith("eval.") for name in flags):
        TrainingTasks(config.eval)  # raises now, before anything is written
    with ending_in_order(), ExitStack() as until_the_end, opened(pick_device(config.train.device)) as world:
        chosen: list[str] = []

        def settled(new: Config) -> Config:
            new = resolve_config(new, flags)
            new = replace(
                new, data=replace(new.data, streams=new.data.streams or world.size)
            )  # of data, as many as there are ranks where nothing else is said
            if new.fit_memory:
                new, why = fit_batch_size(new, model_class, vocabulary_of(new), world)
                chosen.append(why)
            check_world(new, world)
            return new

        def open_and_lock() -> tuple[Config, Path, Path | None, bool]:
            config_now, folder, checkpoint = open_run(
                config, flags, settled, lambda folder: until_the_end.enter_context(locked(folder))
            )
            new = not (folder / "config.json").exists()
            check_script(config_now, model_class)
            check_world(config_now, world, resumed=not new)
            return config_now, folder, checkpoint, new

        config, folder, checkpoint, new = world.run_on_rank0(open_and_lock)
        Trackers.check(config.log)
        if new and world.first:
            until_the_end.enter_context(removing_new_tokenizer(folder))
        with world.rank0_first():
            tasks = TrainingTasks(config.eval)
            model, data, validation, cache, log = prepare(
                config,
                folder,
                folder / (NEW_TOKENIZER if new else "tokenizer"),
                checkpoint,
                model_class,
                world,
            )
            for line in chosen:
                log.say(line)
            pusher = None
            if config.hub.repo and world.first:
                to_folder = partial(
                    export_checkpoint,
                    model_class=model_class,
                    tokenizer=data.tokenizer,
                    config=config,
                    run=folder,
                )
                pusher = Pusher(config.hub, model_class.model_type, folder, to_folder, log.say)
        _train_and_export(
            config, folder, checkpoint, model, data, validation, tasks, cache, log, world, pusher
        )


def check_script(config: Config, model_class: Any) -> None:
    vanilla = config.model.left_context == "none"
    if vanilla != (model_class.model_type == "vanilla"):
        raise UsageError(
            f"model.left_context = {config.model.left_context} is trained by train_{'vanilla' if vanilla else 'dual_tower'}.py"
        )


@contextmanager
def removing_new_tokenizer(folder: Path) -> Iterator[None]:
    """A new run's, under the name that it has until the run begins; also that of a start that was killed."""
    shutil.rmtree(folder / NEW_TOKENIZER, ignore_errors=True)
    try:
        yield
    finally:
        shutil.rmtree(folder / NEW_TOKENIZER, ignore_errors=True)


def _train_and_export(
    config: Config,
    folder: Path,
    checkpoint: Path | None,
    model: Any,
    data: Data,
    validation: Validation,
    tasks: TrainingTasks,
    cache: FeatureCache,
    log: RunLog,
    world: DistributedContext,
    pusher: Pusher | None,
) -> None:
    model_class, trained = type(model), model  # FSDP changes the class
    shown: list[dict[str, Any]] = []  # the last predictions
    warned: list[str] = []
    e = config.eval
    best = BestCheckpoint(folder, e.best, validation.metrics(e.captions) | tasks.metrics)

    def evaluate(step: int) -> dict[str, Any]:
        model = unsharded(trained, config, model_class)
        with autocast(config.train, pick_device(config.train.device)):
            scores = validation.score(model, world)
        shown[:] = validation.predictions(model, 8, world)
        if world.first:
            save_samples(folder / "samples", step, shown)
            log.predictions(step, shown, folder / "samples" / f"step_{step:06d}.png")
            log.picture(
                step,
                "tokens",
                save_picture(
                    validation.agreement.picture(), folder / "samples" / f"step_{step:06d}_tokens.png"
                ),
            )
        more = "".join(
            f", {name.removeprefix('accuracy_')} {value:.2%}"
            for name, value in scores.items()
            if name.startswith("accuracy_")
        )
        captions = validation.cider(model, e.captions, e.caption_tokens, world)
        if captions is not None:
            scores["cider"] = captions.score
            more += f", CIDEr {captions.score:.3f}"
            if captions.warning and captions.warning not in warned:
                warned.append(captions.warning)
                log.say(f"warning: {captions.warning}")
        log.say(f"step {step}: validation loss {scores['loss']:.4f}, accuracy {scores['accuracy']:.2%}{more}")
        for p in shown[:4]:
            said = " ".join(p["prediction"].split())  # on one line
            log.say(
                f"    {p['question']}  →  {said}"
                + ("" if p["prediction"] == p["answer"] else f"   (truth: {p['answer']})")
            )
        dropped = {
            f"{source}: {reason}": n for (source, reason), n in sorted(data.validation.dropped.items())
        }
        logged = {
            f"validation_{k}": v for k, v in (scores | ({"dropped": dropped} if dropped else {})).items()
        }
        if step == config.max_steps or (e.tasks_every and step % e.tasks_every == 0):
            found = tasks.score(model, data.validation.renderer, world)
            for name, value in found.items():
                log.say(f"    {name} {value:.4f}")
            logged |= found
        if world.first and best.is_beaten(step, logged):
            export(model, folder / "best", data.tokenizer, config, folder, logged)
            best.note(step, logged)
        return logged

    def saved(checkpoint: Path) -> None:
        if (
            pusher is not None and checkpoint.name != f"step_{config.max_steps:06d}"
        ):  # the last one's model is pushed when it is exported
            pusher.saved(checkpoint)

    begin = partial(_begin, config, folder, best)
    task = TrainingCallbacks(
        data.batches,
        evaluate,
        cache.save,
        data_identity(data),
        saved,
        lambda: best.step if world.first else -1,
        begin,
    )
    try:
        train(config, model, task, folder, log, checkpoint, world)
        if best.warning:
            log.say(f"warning: {best.warning}")
    except Stopped as stopped:
        log.say(f"{stopped}\n{_how_to_go_on(folder, world)}")
        return
    dropped = sum(world.gather(data.batches.dropped()), Counter())
    model = unsharded(trained, config, model_class)
    if not world.first:
        return
    if not shown:  # a run that was already at its end
        shown = validation.predictions(model.eval(), 8)
        save_samples(folder / "samples", config.max_steps, shown)
    if dropped:
        log.say(f"training records dropped: {by_source(dropped)}")
    export_final(model, config, folder, data.tokenizer, shown[0], log, pusher)


def _begin(config: Config, folder: Path, best: BestCheckpoint, step: int, back: bool) -> None:
    """Nothing is refused any more: the folder becomes a run, or goes on behind `step`; `back`: it was further."""
    write_config(config, folder)
    if (folder / NEW_TOKENIZER).is_dir():
        (folder / NEW_TOKENIZER).rename(folder / "tokenizer")
    aside = partial(move_to_abandoned, folder=folder / "checkpoints")
    best.go_back(step, aside)
    for exported in (folder / "model", folder / "adapters") if back else ():  # of the end that it had
        if exported.exists():
            aside(exported)
    forget_samples(folder / "samples", step)


def _how_to_go_on(folder: Path, world: DistributedContext) -> str:
    script = [sys.argv[0], "--output_dir", str(folder), "--resume", "auto"]
    if (
        nodes := world.size // int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    ) > 1:  # no rank knows what their torchruns were told
        return f"go on with the same torchrun on each of the {nodes} nodes, and behind its own flags:\n  {shlex.join(script)}"
    torchrun = (
        ["-m", "torch.distributed.run", "--nproc-per-node", str(world.size), *TORCHRUN, "--"]
        if world.size > 1
        else []
    )
    return f"go on with:\n  {shlex.join([sys.executable, *torchrun, *script])}"
