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
import traceback
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from configs.serialization import to_dict
from configs.train import Config, TrainConfig
from data.loader import merged
from models.language_model import DecoderBlock
from models.layers import pick_device
from training.checkpoint import Saver, abandon_later, checkpoints, load_checkpoint
from training.diagnostics import Diagnostics, FlopsMeter
from training.distributed import parallel
from training.ema import ema_weights, swap_ema
from training.logging import RunLog
from training.optim import freeze, make_optimizers
from training.precision import computed_in, grad_scaler, load_scale, scale_state
from training.step import Batch, train_step
from utils.errors import UserError
from utils.files import append_text
from utils.ranks import SINGLE_PROCESS, DistributedContext

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
    """SIGINT, SIGTERM and SIGUSR1 become a `name` that the loop reads after each step. SIGINT `patience` times more than once interrupts at once."""

    def __init__(self, patience: int = 1) -> None:
        self.name, self.patience, self.interrupts = "", patience, 0

    def __enter__(self) -> "StopSignals":
        main = threading.current_thread() is threading.main_thread()  # Python takes signals nowhere else
        self.before = {
            number: signal.signal(number, self._note)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
            if main
        }
        return self

    def _note(self, number: int, frame: Any) -> None:
        self.interrupts += number == signal.SIGINT
        if self.interrupts > self.patience and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    def __exit__(self, *error: object) -> None:
        for (
            number,
            handler,
        ) in self.before.items():  # one who was told to stop is about to: a second word changes nothing
            signal.signal(number, signal.SIG_IGN if self.name and number != signal.SIGINT else handler)


@dataclass
class TrainingCallbacks:
    """What the loop does not know by itself: data, evaluation, and what to keep besides the weights."""

    batches: Batches
    evaluate: Callable[
        [int], dict[str, Any]
    ]  # step → metrics; may print, write samples and keep the best model
    before_checkpoint: Callable[[], None]
    kept: dict[str, Any] = field(default_factory=dict)  # of the data, with each checkpoint; plain JSON
    saved: Callable[[Path], None] = lambda checkpoint: (
        None
    )  # on the first rank, behind each checkpoint, in its thread
    best: Callable[[], int] = lambda: (
        -1
    )  # on the first rank: the step of the best model so far, whose checkpoint is kept
    # On the first rank, when nothing can be refused any more: behind which step the run goes on, and whether it had gone further.
    begin: Callable[[int, bool], None] = lambda step, back: None


def train(
    config: Config,
    model: Any,
    task: TrainingCallbacks,
    folder: Path,
    log: RunLog,
    checkpoint: Path | None,
    world: DistributedContext = SINGLE_PROCESS,
) -> None:
    """Train `model` for `config.max_steps` optimizer steps, from `checkpoint` where there is one. A signal raises `Stopped`, once the step is saved. At the end the model has the averages of `train.ema`."""
    device = pick_device(config.train.device)
    if device.type == "cpu":
        keep_freed_memory()
    run = Trainer(config, model, task, folder, log, device, world)
    logged = run.go_on_from(checkpoint) if checkpoint is not None else 0
    rewound = log.rewound(run.step, logged)  # to nothing, where a run was killed before its first checkpoint
    if world.is_rank0:
        aside = abandon_later(
            folder / "checkpoints", run.step
        )  # first of all: from here on `auto` goes on from this step
        for path in aside:
            log.say(
                f"{path.name} is of a later step, or damaged: it is now {path}, where nothing looks at it"
            )
        task.begin(run.step, bool(aside))
        log.rewind(rewound)
    log.start(run.step, config.max_steps)
    log.track(config.log, to_dict(config), run.step if checkpoint is not None else None)
    if config.train.ema:
        log.say(f"validated and exported: a moving average of the weights (train.ema = {config.train.ema:g})")
    well = False  # ended as it should
    try:
        with (
            Watchdog(config.train.stall_minutes) as watchdog,
            StopSignals(patience=1 if world.size == 1 else 2) as stop,
        ):  # torchrun passes on what the terminal sent to all
            if run.pending_evaluation:
                run.evaluate()
                run.save()  # which owes nothing
            while run.step < config.max_steps:
                watchdog.progress()
                values = run.learn()
                run.saver.prepare(model, run.optimizers)
                run.tell(values)
                if run.evaluates:
                    run.evaluate()
                saved, stopped = run.save_if_due(stop.name)
                if stopped and run.step < config.max_steps:
                    run.saver.wait()
                    well = True
                    raise Stopped(
                        f"{stop.name or 'another rank was told to stop'}: stopped after step {run.step}, whose checkpoint is {saved}"
                    )
            run.saver.wait()
            swap_ema(run.optimizers)
            well = True
    finally:
        log.stop(well)
        task.batches.close()


class Trainer:
    """A model in training: optimizers, what happens after each step, and what a checkpoint holds of it."""

    def __init__(
        self,
        config: Config,
        model: Any,
        task: TrainingCallbacks,
        folder: Path,
        log: RunLog,
        device: torch.device,
        world: DistributedContext,
    ) -> None:
        c = config.train
        self.config, self.task, self.folder, self.log, self.device, self.world = (
            config,
            task,
            folder,
            log,
            device,
            world,
        )
        self.model = model.to(device).train()
        freeze(model, c)
        set_blocks(model, c)
        self.flops_meter = FlopsMeter(model, device, world.size)
        self.called = parallel(model, config.parallel, device, computed_in(c, device), world)
        self.optimizers = make_optimizers(model, c)
        self.scaler = grad_scaler(c, device, world.size)
        self.details = Diagnostics(model, self.optimizers)
        self.saver = Saver(folder / "checkpoints", c.keep_checkpoints, world, task.saved)
        self.saved_at = time.monotonic()
        self.step = 0  # steps that are done
        self.failed = 0  # steps in a row, up to this one, from which nothing was learnt
        self.norms: deque[float] = deque(maxlen=NORMS)
        self.dropped: dict[str, int] = {}  # as it was told last
        self.pending_evaluation = False  # the evaluation after this step, which failed

    @property
    def evaluates(self) -> bool:
        """Is there a validation, or a task, after this step?"""
        c, e = self.config.train, self.config.eval
        return self.step == self.config.max_steps or any(
            every and self.step % every == 0 for every in (c.eval_every, e.tasks_every if e.tasks else 0)
        )

    def go_on_from(self, checkpoint: Path) -> int:
        """→ the last step of which metrics.jsonl had lines then."""
        state = load_checkpoint(checkpoint, self.model, self.optimizers, self.world)
        self.step, self.failed = state["step"], state["skipped"]
        self.norms.extend(state.get("norms", []))
        self.dropped, self.pending_evaluation = (
            state.get("dropped", {}),
            state.get("pending_evaluation", False),
        )
        load_scale(self.scaler, state.get("scaler", {}), self.world.size)
        try:
            self.task.batches.load_state(state["data"])
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(
                f"checkpoint {checkpoint}: its data position does not fit this data set ({error!r})"
            ) from error
        self.log.say(f"resumed from {checkpoint} after step {self.step}")
        return int(state.get("logged", 0))

    def save(self) -> Path:
        def state() -> dict[str, Any]:
            data = merged(self.world.gather(self.task.batches.state()))
            told = {
                "skipped": self.failed,
                "norms": list(self.norms),
                "logged": self.log.logged,
                "dropped": self.dropped,
                "pending_evaluation": self.pending_evaluation,
            }
            return told | {"data": data, "scaler": scale_state(self.scaler, self.world.size)} | self.task.kept

        def before() -> None:
            self.log.sync()  # a checkpoint's steps have their lines, whatever happens to the machine
            self.task.before_checkpoint()

        self.saved_at = time.monotonic()
        return self.saver.save(self.step, self.model, self.optimizers, state, before)

    def save_if_due(self, signal: str) -> tuple[Path | None, bool]:
        """→ the checkpoint, and whether a rank was told to stop."""
        c = self.config.train
        self.saver.protected_step = self.task.best()
        late = self.world.is_rank0 and (
            0 < c.checkpoint_minutes * 60 <= time.monotonic() - self.saved_at
            or self.saver.protected_step == self.step
        )
        due = torch.tensor([bool(signal), late], dtype=torch.int64)
        self.world.sum(due)
        stopped = bool(due[0])
        if (
            due.any()
            or self.step == self.config.max_steps
            or (c.checkpoint_every and self.step % c.checkpoint_every == 0)
        ):
            return self.save(), stopped
        return None, stopped

    def learn(self) -> dict[str, Any]:
        """One step → its values for the log. After too many in a row from which nothing was learnt `UserError`."""
        c, self.step = self.config.train, self.step + 1
        looked = bool(c.diagnostics_every) and self.step % c.diagnostics_every == 0

        def before_update() -> None:
            self.saver.copied()
            if looked:
                self.details.look()

        values = train_step(
            self.config,
            self.called,
            self.optimizers,
            self.task.batches,
            self.step,
            self.device,
            self.world,
            before_update,
            self.flops_meter,
            self.scaler,
        )
        failed = "skipped" in values or "overflow" in values
        if looked and not failed:
            values["update_ratios"], histograms = self.details.found()
            self.log.histograms(self.step, histograms)
        self.failed = self.failed + 1 if failed else 0
        if "overflow" in values:
            self.log.say(
                f"step {self.step} skipped: its gradients overflow fp16 at a loss scale of {values['overflow']:g}, which is halved"
            )
        elif failed:
            _log_skipped(values, self.step, self.folder, self.log, self.world)
        else:
            _log_spike(values, self.norms, c.clip, self.step, self.log)
        if self.failed == c.skips:
            self.saver.wait()
            kept = checkpoints(self.folder / "checkpoints")
            do = (
                "begin a new run with --train.dtype bf16, or fp32"
                if "overflow" in values
                else f"look at {self.folder / 'skipped.jsonl'}, or begin a new run with lower learning rates"
            )
            raise UserError(
                f"no finite loss and gradient in {self.failed} steps, up to {self.step}: {do} ({f'the last checkpoint is {kept[-1]}' if kept else 'there is no checkpoint yet'})"
            )
        return values

    def tell(self, values: dict[str, Any]) -> None:
        """A step's values, on the screen and, at its cadence, in metrics.jsonl."""
        self.log.step(
            self.step, math.nan if values["loss"] is None else values["loss"], values["tokens_per_s"]
        )
        rare = values["loss"] is None or not values.keys().isdisjoint(
            ("overflow", "spike", "update_ratios")
        )  # never left out
        if self.step % self.config.train.log_every and self.step != self.config.max_steps and not rare:
            return
        before = self.dropped
        if self.world.size == 1 or self.evaluates:
            dropped = sum(self.world.gather(self.task.batches.dropped()), Counter())
            self.dropped = {f"{source}: {reason}": n for (source, reason), n in sorted(dropped.items())}
        self.log.metrics(
            {"step": self.step}
            | values
            | ({"dropped": self.dropped} if self.dropped != before and self.dropped else {})
        )

    def evaluate(self) -> None:
        """What was learnt is not lost to a task that fails, and the task is taken up again; of several ranks, which do not fail together, that is the last checkpoint's business."""
        self.saver.copied()  # averages change places with weights
        try:
            evaluate(self.model, self.optimizers, self.task, self.step, self.log)
            self.pending_evaluation = False
        except Exception:
            if self.world.size == 1:
                self.pending_evaluation = True
                self.save()
                self.saver.wait()
            raise


def set_blocks(model: Any, config: TrainConfig) -> None:
    for block in model.modules():
        if isinstance(block, DecoderBlock):
            block.recompute = config.recompute
            block.compiled = torch.compile(block.run) if config.compile else None


class Watchdog:
    """Each silence of so many minutes (0: none) has the stacks of all threads printed to stderr.

    A thread of Python's does it, which disturbs no other. Where it cannot run, for one holds the interpreter's lock and hangs, `faulthandler`
    does, after twice the time: beside threads at work that may end the process.
    """

    def __init__(self, minutes: float) -> None:
        self.seconds, self.last, self.over = minutes * 60, time.monotonic(), threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self.seconds and sys.__stderr__ is not None:
            self.thread.start()
        return self

    def progress(self) -> None:
        """Training goes on: a new silence begins."""
        self.last = time.monotonic()

    def __exit__(self, *error: object) -> None:
        self.over.set()
        if self.thread.is_alive():
            self.thread.join()

    def _watch(self) -> None:
        rest = self.seconds
        while True:
            faulthandler.dump_traceback_later(2 * self.seconds + 1, file=sys.__stderr__)  # begins anew
            if self.over.wait(max(0.1, rest)):
                break
            rest = self.last + self.seconds - time.monotonic()
            if rest <= 0:
                print(_stacks(self.seconds / 60), end="", file=sys.__stderr__, flush=True)
                rest, self.last = self.seconds, time.monotonic()
        faulthandler.cancel_dump_traceback_later()


def _stacks(minutes: float) -> str:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = {
        ident: frame for ident, frame in sys._current_frames().items() if ident != threading.get_ident()
    }
    told = [
        f"thread {names.get(ident, ident)}, most recent call last:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in frames.items()
    ]
    return f"no step for {minutes:.3g} minutes; training goes on waiting. Where its threads are:\n{''.join(told)}"


def _log_spike(values: dict[str, Any], norms: deque[float], least: float, step: int, log: RunLog) -> None:
    """A gradient norm far above the last ones is "spike" in the metrics, and a line where it is above `least` too: near a loss of 0 there are hundreds that clipping lets through."""
    norm = values["grad_norm"]
    if len(norms) >= NORMS // 5 and norm > SPIKE * (usual := statistics.median(norms)) > 0:
        values["spike"] = norm / usual
        if norm > least:
            log.say(
                f"warning: step {step}: the gradient norm {norm:.3g} is {norm / usual:.0f} times the median of the last {len(norms)} steps ({usual:.3g})"
            )
    norms.append(norm)


def _log_skipped(
    values: dict[str, Any], step: int, folder: Path, log: RunLog, world: DistributedContext
) -> None:
    """The samples of a skipped step, of all ranks, into `skipped.jsonl`."""
    reason, samples = (
        values.pop("skipped"),
        [sample for rank in world.gather(values.pop("samples")) for sample in rank],
    )
    if world.is_rank0:
        append_text(
            folder / "skipped.jsonl", json.dumps({"skipped": reason, "samples": samples, "step": step}) + "\n"
        )
    log.say(
        f"warning: step {step} skipped ({reason}): the batch's samples stand in {folder / 'skipped.jsonl'}"
    )


def keep_freed_memory() -> None:
    """Linux's glibc gives large tensors back to the system at once, and gets them again page by page: a fifth of a step on a CPU (docs/experiments.md). Elsewhere nothing."""
    with suppress(OSError, AttributeError):  # a C library without it
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for option, value in (
            (-4, 0),
            (-1, -1),
            (-2, 1 << 26),
        ):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h
            mallopt(option, value)


def evaluate(
    model: Any, optimizers: list[torch.optim.Optimizer], task: TrainingCallbacks, step: int, log: RunLog
) -> None:
    """Validation between two steps, in evaluation mode and without gradients, of the averages where there are any; the metrics are logged. Training goes on as if there had been none."""
    model.eval()
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 (other libraries use it)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.no_grad(), torch.random.fork_rng(devices), ema_weights(optimizers):
        values = task.evaluate(step)
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    model.train()
    log.metrics({"step": step} | values)
