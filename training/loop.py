"""The training loop: one for every model."""

import ctypes
import faulthandler
import json
import math
import random
import signal
import statistics
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from configs.command_line import to_dict
from configs.errors import UserError
from configs.files import append_text
from configs.ranks import ALONE, World
from configs.schema import Config, TrainConfig
from data.loader import merged
from models.language_model import Block
from models.layers import pick_device
from training.averages import averaged, swap_averages
from training.checkpoint import Saver, load_checkpoint
from training.details import Achieved, Details
from training.distributed import parallel
from training.logging import RunLog
from training.optim import freeze, make_optimizers
from training.precision import computed_in, grad_scaler
from training.step import Batch, train_step

SPIKE, NORMS = 5.0, 100  # a gradient norm so many times the median of the last so many is told


class Batches(Protocol):
    """Batches without end, which say where they are."""

    def __next__(self) -> Batch: ...
    def state(self) -> dict[int, Any]: ...
    def load_state(self, states: list[Any]) -> None: ...
    def sources(self) -> list[str]: ...
    def dropped(self) -> Mapping[tuple[str, str], int]: ...
    def samples(self) -> list[str]: ...
    def close(self) -> None: ...


class Stopped(Exception):
    """A signal ended training early; the message names the checkpoint."""


class StopSignals:
    """SIGINT, SIGTERM and SIGUSR1 become a `name` that the loop reads after each step. SIGINT `patience` times more interrupts at once."""

    def __init__(self, patience: int = 1) -> None:
        self.name, self.patience = "", patience

    def __enter__(self) -> "StopSignals":
        main = threading.current_thread() is threading.main_thread()  # Python takes signals nowhere else
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1) if main}
        return self

    def _note(self, number: int, frame: Any) -> None:
        if self.name and number == signal.SIGINT:
            self.patience -= 1
            if self.patience <= 0:
                raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


@dataclass
class Task:
    """What the loop does not know by itself: data, evaluation, and what to keep besides the weights."""

    batches: Batches
    evaluate: Callable[[int], dict[str, Any]]  # step → metrics; may print, write samples and keep the best model
    before_checkpoint: Callable[[], None]
    tokenizer: str = ""  # its fingerprint, kept with each checkpoint
    saved: Callable[[Path], None] = lambda checkpoint: None  # on the first rank, behind each checkpoint, in its thread


def train(config: Config, model: Any, task: Task, folder: Path, log: RunLog, checkpoint: Path | None, world: World = ALONE) -> None:
    """Train `model` for `config.max_steps` optimizer steps, from `checkpoint` where there is one. A signal raises `Stopped`, once the step is saved. At the end the model has the averages of `train.ema`."""
    c, device = config.train, pick_device(config.train.device)
    if device.type == "cpu":
        keep_freed_memory()
    model.to(device).train()
    freeze(model, c)
    set_blocks(model, c)
    achieved = Achieved(model, device, world.size)
    run = parallel(model, config.parallel, device, computed_in(c, device), world)  # what is called
    optimizers = make_optimizers(model, c)
    scaler = grad_scaler(c, device)
    details = Details(model, optimizers)
    norms: deque[float] = deque(maxlen=NORMS)
    done = skipped = 0  # steps; those before this one, in a row, that were skipped
    if checkpoint is not None:
        state = load_checkpoint(checkpoint, model, optimizers, world)
        done, skipped = state["step"], state["skipped"]
        norms.extend(state.get("norms", []))
        scaler.load_state_dict(state.get("scaler", {}))
        try:
            task.batches.load_state(state["data"])
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(f"checkpoint {checkpoint}: its data position does not fit this data set ({error!r})") from error
        log.say(f"resumed from {checkpoint} after step {done}")

    log.rewind(done)  # to nothing, where a run was killed before its first checkpoint
    saver = Saver(folder / "checkpoints", c.keep_checkpoints, world, task.saved)

    def save(step: int) -> Path:
        def state() -> dict[str, Any]:
            return {"data": merged(world.gather(task.batches.state())), "skipped": skipped, "norms": list(norms), "scaler": scaler.state_dict(), "tokenizer": task.tokenizer}

        return saver.save(step, model, optimizers, state, task.before_checkpoint)

    log.start(done, config.max_steps)
    log.track(config.log, to_dict(config), done if checkpoint is not None else None)
    if c.ema:
        log.say(f"validated and exported: a moving average of the weights (train.ema = {c.ema:g})")
    well = False  # ended as it should
    saved_at = time.monotonic()
    dropped: dict[str, Any] = {}
    try:
        with StopSignals(patience=1 if world.size == 1 else 2) as stop:  # torchrun passes on what the terminal sent to all
            for step in range(done + 1, config.max_steps + 1):
                watch(c.stall_minutes)
                looked = bool(c.detail_every) and step % c.detail_every == 0

                def before_update(looked: bool = looked) -> None:
                    saver.copied()
                    if looked:
                        details.look()

                values = train_step(config, run, optimizers, task.batches, step, device, world, before_update, achieved, scaler)
                failed = "skipped" in values or "overflow" in values
                if looked and not failed:
                    values["update_ratios"], histograms = details.found()
                    log.histograms(step, histograms)
                skipped = skipped + 1 if failed else 0
                if "overflow" in values:
                    log.say(f"step {step} skipped: its gradients overflow fp16 at a loss scale of {values['overflow']:g}, which is halved")
                elif failed:
                    _note_skipped(values, step, folder, log, world)
                else:
                    _tell_spike(values, norms, step, log)
                if skipped == c.skips:
                    saver.wait()
                    at = f"the last checkpoint stands in {folder / 'checkpoints'}"
                    raise UserError(f"no finite loss and gradient in {skipped} steps, up to {step}: lower the learning rates, or look at skipped.jsonl ({at})")
                log.step(step, math.nan if values["loss"] is None else values["loss"], values["tokens_per_s"])
                last = step == config.max_steps
                evaluated = last or any(every and step % every == 0 for every in (c.eval_every, config.eval.tasks_every if config.eval.tasks else 0))
                if step % c.log_every == 0 or last:
                    before = dropped
                    if world.size == 1 or evaluated:
                        dropped = {"dropped": {f"{source}: {reason}": n for (source, reason), n in sorted(sum(world.gather(task.batches.dropped()), Counter()).items())}}
                    log.metrics({"step": step} | values | (dropped if dropped != before and any(dropped.values()) else {}))
                if evaluated:
                    saver.copied()  # averages change places with weights
                    try:
                        evaluate(model, optimizers, task, step, log)
                    except Exception:
                        if world.size == 1:
                            save(step)  # what was learnt is not lost to a task that fails
                            saver.wait()
                        raise
                due = torch.tensor([bool(stop.name), world.first and 0 < c.checkpoint_minutes * 60 <= time.monotonic() - saved_at], dtype=torch.int64)
                world.sum(due)
                stopped, late = due.tolist()
                if last or stopped or late or (c.checkpoint_every and step % c.checkpoint_every == 0):
                    saved, saved_at = save(step), time.monotonic()
                if stopped and not last:
                    saver.wait()
                    well = True
                    raise Stopped(f"{stop.name or 'another rank was told to stop'}: stopped after step {step}, whose checkpoint is {saved}")
            saver.wait()
            swap_averages(optimizers)
            well = True
    finally:
        watch(0)
        log.stop(well)
        task.batches.close()


def set_blocks(model: Any, config: TrainConfig) -> None:
    for block in model.modules():
        if isinstance(block, Block):
            block.recompute = config.recompute
            block.compiled = torch.compile(block.run) if config.compile else None


def watch(minutes: float) -> None:
    """From now on a silence of `minutes` has the stacks of all threads printed to stderr, again and again until the next call; 0: no longer."""
    faulthandler.cancel_dump_traceback_later()
    if minutes:
        faulthandler.dump_traceback_later(minutes * 60, repeat=True, file=sys.__stderr__)


def _tell_spike(values: dict[str, Any], norms: deque[float], step: int, log: RunLog) -> None:
    """A gradient norm far above the last ones is a line, and "spike" in the metrics."""
    norm = values["grad_norm"]
    if len(norms) >= NORMS // 5 and norm > SPIKE * (usual := statistics.median(norms)) > 0:
        values["spike"] = norm / usual
        log.say(f"warning: step {step}: the gradient norm {norm:.3g} is {norm / usual:.0f} times the median of the last {len(norms)} steps ({usual:.3g})")
    norms.append(norm)


def _note_skipped(values: dict[str, Any], step: int, folder: Path, log: RunLog, world: World) -> None:
    """The samples of a skipped step, of all ranks, into `skipped.jsonl`."""
    reason, samples = values.pop("skipped"), [sample for rank in world.gather(values.pop("samples")) for sample in rank]
    if world.first:
        append_text(folder / "skipped.jsonl", json.dumps({"skipped": reason, "samples": samples, "step": step}) + "\n")
    log.say(f"warning: step {step} skipped ({reason}): the batch's samples stand in {folder / 'skipped.jsonl'}")


def keep_freed_memory() -> None:
    """Linux's glibc gives large tensors back to the system at once, and gets them again page by page: a fifth of a step on a CPU (docs/experiments.md). Elsewhere nothing."""
    with suppress(OSError, AttributeError):  # a C library without it
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for option, value in ((-4, 0), (-1, -1), (-2, 1 << 26)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h
            mallopt(option, value)


def evaluate(model: Any, optimizers: list[torch.optim.Optimizer], task: Task, step: int, log: RunLog) -> None:
    """Validation between two steps, in evaluation mode and without gradients, of the averages where there are any; the metrics are logged. Training goes on as if there had been none."""
    model.eval()
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 (other libraries use it)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.no_grad(), torch.random.fork_rng(devices), averaged(optimizers):
        values = task.evaluate(step)
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    model.train()
    log.metrics({"step": step} | values)
