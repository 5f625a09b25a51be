"""The training loop, the same for every model."""

import json
import math
import random
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import torch

from configs.serialization import to_dict
from configs.train import Config, TrainConfig
from data.loader import merged
from models.language_model import DecoderBlock
from training.checkpoint import Saver, abandon_later, checkpoints, load_checkpoint
from training.diagnostics import Diagnostics, FlopsMeter
from training.distributed import wrap_model
from training.ema import ema_weights, swap_ema
from training.logging import RunLog
from training.optim import freeze, make_optimizers
from training.precision import grad_scaler, load_scale, scale_state
from training.process_memory import FreedMemory
from training.signals import Stopped, StopSignals
from training.step import Batch, train_step
from training.watchdog import Watchdog
from utils.device import compute_dtype, pick_device
from utils.errors import UserError
from utils.files import append_text
from utils.ranks import SINGLE_PROCESS, DistributedContext

SPIKE, NORMS = 5.0, 100  # a spike is a gradient norm above SPIKE × the median of the last NORMS


class Batches(Protocol):
    """An endless iterator of batches whose position can be saved."""

    def __next__(self) -> Batch: ...
    def state(self) -> dict[int, Any]: ...
    def load_state(self, states: list[Any]) -> None: ...
    def sources(self) -> list[str]: ...
    def dropped(self) -> Counter[tuple[str, str]]: ...
    def samples(self) -> list[str]: ...
    def close(self) -> None: ...


@dataclass
class TrainingCallbacks:
    """What the loop gets from outside: the data, the evaluation, and hooks."""

    batches: Batches
    # Step → metrics. May print, write samples and export the best model.
    evaluate: Callable[[int], dict[str, Any]]
    before_checkpoint: Callable[[], None]
    # Stored with each checkpoint; plain JSON.
    data_identity: dict[str, Any] = field(default_factory=dict)
    # Rank 0: called after each checkpoint is written, in the saver's thread.
    saved: Callable[[Path], None] = lambda checkpoint: None
    # Rank 0: the checkpoints that are being read, and must not be deleted.
    in_use: Callable[[], list[Path]] = list
    # Rank 0: the step of the best model so far, whose checkpoint is retained; −1: none.
    best: Callable[[], int] = lambda: -1
    # Rank 0: called when nothing can fail any more. The run continues after this step; had it gone further?
    begin: Callable[[int, bool], None] = lambda step, rewound: None


def train(
    config: Config,
    model: Any,
    callbacks: TrainingCallbacks,
    folder: Path,
    log: RunLog,
    checkpoint: Path | None,
    world: DistributedContext = SINGLE_PROCESS,
) -> None:
    """Train `model` until step `config.max_steps`, from `checkpoint` if there is one.

    A signal raises `Stopped` once its step is saved. At the end the model holds the average of `train.ema`.
    """
    device = pick_device(config.train.device)
    freed_memory = FreedMemory(device)
    run = Trainer(config, model, callbacks, folder, log, device, world)
    _continue_from(run, checkpoint)
    if config.train.ema:
        log.say(f"validated and exported: a moving average of the weights (train.ema = {config.train.ema:g})")
    succeeded = False
    try:
        with (
            Watchdog(config.train.stall_minutes) as watchdog,
            # Under torchrun a Ctrl-C comes twice: from the terminal, and passed on by torchrun.
            StopSignals(patience=1 if world.size == 1 else 2) as stop,
        ):
            if run.pending_evaluation:
                run.evaluate()
                run.save()  # without a pending evaluation
            while run.step < config.max_steps:
                watchdog.progress()
                values = run.train_one_step()
                run.saver.prepare(model, run.optimizers)
                run.log_values(values)
                if run.is_evaluation_due:
                    run.evaluate()
                saved, stopped = run.save_if_due(stop.name)
                freed_memory.after_step()
                if stopped and run.step < config.max_steps:
                    run.saver.wait()
                    succeeded = True
                    raise Stopped(
                        f"{stop.name or 'another rank received a signal'}: stopped after step {run.step}, "
                        f"whose checkpoint is {saved}"
                    )
            run.saver.wait()
            swap_ema(run.optimizers)
            succeeded = True
    finally:
        log.stop(succeeded)
        callbacks.batches.close()


def _continue_from(run: "Trainer", checkpoint: Path | None) -> None:
    """Load `checkpoint`, drop what the run wrote after it, and open log and trackers."""
    log, config = run.log, run.config
    logged = run.resume_from(checkpoint) if checkpoint is not None else 0
    # Nothing is retained if the run was killed before its first checkpoint.
    retained = log.read_until(run.step, logged)
    if run.world.is_rank0:
        # First of all: from now on `--resume auto` continues from this step.
        abandoned = abandon_later(run.folder / "checkpoints", run.step)
        for path in abandoned:
            log.say(f"{path.name} is of a later step, or damaged: it is now {path}; delete it when you like")
        run.callbacks.begin(run.step, bool(abandoned))
        log.truncate(retained)
    log.start(run.step, config.max_steps)
    log.track(config.log, to_dict(config), run.step if checkpoint is not None else None)


class Trainer:
    """A model in training: its optimizers, the work after each step, and its state in checkpoints."""

    def __init__(
        self,
        config: Config,
        model: Any,
        callbacks: TrainingCallbacks,
        folder: Path,
        log: RunLog,
        device: torch.device,
        world: DistributedContext,
    ) -> None:
        c = config.train
        self.config, self.callbacks, self.folder, self.log = config, callbacks, folder, log
        self.device, self.world = device, world
        freeze(model, c)
        self.model = model.to(device).train()  # a frozen encoder stays in evaluation mode
        set_blocks(model, c)
        self.flops_meter = FlopsMeter(model, device, world.size)
        self.parallel_model = wrap_model(
            model, config.parallel, device, compute_dtype(c.dtype, device), world
        )
        self.optimizers = make_optimizers(model, c)
        self.scaler = grad_scaler(c, device, world.size)
        self.diagnostics = Diagnostics(model, self.optimizers)
        self.saver = Saver(
            folder / "checkpoints", c.keep_checkpoints, world, callbacks.saved, callbacks.in_use
        )
        self.saved_at = time.monotonic()
        self.step = 0  # steps that are done
        self.failed = 0  # consecutive steps without an update, up to this one
        self.norms: deque[float] = deque(maxlen=NORMS)
        self.dropped: dict[str, int] = {}  # as last logged
        self.pending_evaluation = False  # the evaluation after this step failed

    @property
    def is_evaluation_due(self) -> bool:
        """Whether a validation or a task follows this step."""
        c, e = self.config.train, self.config.eval
        return self.step == self.config.max_steps or any(
            every and self.step % every == 0 for every in (c.eval_every, e.tasks_every if e.tasks else 0)
        )

    def resume_from(self, checkpoint: Path) -> int:
        """Load a checkpoint; return the last step that metrics.jsonl had lines of at that time."""
        state = load_checkpoint(checkpoint, self.model, self.optimizers, self.world)
        self.step, self.failed = state["step"], state["skipped"]
        self.norms.extend(state.get("norms", []))
        self.dropped = state.get("dropped", {})
        self.pending_evaluation = state.get("pending_evaluation", False)
        load_scale(self.scaler, state.get("scaler", {}), self.world.size)
        try:
            self.callbacks.batches.load_state(state["data"])
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(
                f"checkpoint {checkpoint}: its data position does not fit this data set ({error!r})"
            ) from error
        self.log.say(f"resumed from {checkpoint} after step {self.step}")
        return int(state.get("logged", 0))

    def save(self) -> Path:
        """Start to write a checkpoint of this step; return its folder."""

        def state() -> dict[str, Any]:
            data = merged(self.world.gather(self.callbacks.batches.state()))
            return {
                "skipped": self.failed,
                "norms": list(self.norms),
                "logged": self.log.logged,
                "dropped": self.dropped,
                "pending_evaluation": self.pending_evaluation,
                "data": data,
                "scaler": scale_state(self.scaler, self.world.size),
            } | self.callbacks.data_identity

        def before() -> None:
            self.log.sync()  # after a crash, too, metrics.jsonl holds a checkpoint's steps
            self.callbacks.before_checkpoint()

        self.saved_at = time.monotonic()
        return self.saver.save(self.step, self.model, self.optimizers, state, before)

    def save_if_due(self, signal: str) -> tuple[Path | None, bool]:
        """Save if due, or if any rank received a signal. → the checkpoint, and whether one did."""
        c = self.config.train
        self.saver.protected_step = self.callbacks.best()
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

    def train_one_step(self) -> dict[str, Any]:
        """Take one step; return its values for the log. Too many failed steps in a row raise `UserError`."""
        c, self.step = self.config.train, self.step + 1
        diagnosed = bool(c.diagnostics_every) and self.step % c.diagnostics_every == 0

        def before_update() -> None:
            self.saver.copied()
            if diagnosed:
                self.diagnostics.capture()

        values = train_step(
            self.config,
            self.parallel_model,
            self.optimizers,
            self.callbacks.batches,
            self.step,
            self.device,
            self.world,
            before_update,
            self.flops_meter,
            self.scaler,
        )
        failed = "skipped" in values or "overflow" in values
        if diagnosed and not failed:
            values["update_ratios"], histograms = self.diagnostics.report()
            self.log.histograms(self.step, histograms)
        self.failed = self.failed + 1 if failed else 0
        if "overflow" in values:
            self.log.say(
                f"step {self.step} skipped: its gradients overflow fp16 at a loss scale of "
                f"{values['overflow']:g}, which is halved"
            )
        elif failed:
            _log_skipped(values, self.step, self.folder, self.log, self.world)
        else:
            _log_spike(values, self.norms, c.clip, self.step, self.log)
        if self.failed == c.skips:
            self._give_up("overflow" in values)
        return values

    def _give_up(self, overflow: bool) -> NoReturn:
        """Raise `UserError` after too many failed steps."""
        self.saver.wait()
        saved = checkpoints(self.folder / "checkpoints")
        advice = (
            "begin a new run with --train.dtype bf16, or fp32"
            if overflow
            else f"look at {self.folder / 'skipped.jsonl'}, or begin a new run with lower learning rates"
        )
        last = f"the last checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
        raise UserError(
            f"no finite loss and gradient in {self.failed} steps, up to {self.step}: {advice} ({last})"
        )

    def log_values(self, values: dict[str, Any]) -> None:
        """Show a step's values, and write them to metrics.jsonl every `train.log_every` steps."""
        loss = math.nan if values["loss"] is None else values["loss"]
        self.log.step(self.step, loss, values["tokens_per_s"])
        # Rare events are always written.
        rare = values["loss"] is None or not values.keys().isdisjoint(("overflow", "spike", "update_ratios"))
        if self.step % self.config.train.log_every and self.step != self.config.max_steps and not rare:
            return
        before = self.dropped
        if self.world.size == 1 or self.is_evaluation_due:
            dropped = sum(self.world.gather(self.callbacks.batches.dropped()), Counter())
            self.dropped = {f"{source}: {reason}": n for (source, reason), n in sorted(dropped.items())}
        changed = {"dropped": self.dropped} if self.dropped != before and self.dropped else {}
        self.log.metrics({"step": self.step} | values | changed)

    def evaluate(self) -> None:
        """Evaluate after this step.

        If that fails in a single process, a checkpoint is saved, and a resumed run repeats the evaluation.
        Several ranks do not fail together: they resume from the last checkpoint.
        """
        self.saver.copied()  # because the moving average changes places with the weights
        try:
            evaluate(self.model, self.optimizers, self.callbacks, self.step, self.log)
            self.pending_evaluation = False
        except Exception:
            if self.world.size == 1:
                self.pending_evaluation = True
                self.save()
                self.saver.wait()
            raise


def set_blocks(model: Any, config: TrainConfig) -> None:
    """Apply `train.recompute` and `train.compile` to every decoder block."""
    for block in model.modules():
        if isinstance(block, DecoderBlock):
            block.recompute = config.recompute
            block.compiled = torch.compile(block.run) if config.compile else None


def _log_spike(values: dict[str, Any], norms: deque[float], clip: float, step: int, log: RunLog) -> None:
    """Add "spike" to the metrics if the gradient norm is far above the last ones.

    A warning is printed only if the norm is above `clip` too. Near a loss of 0 there are hundreds of spikes
    that clipping does not change.
    """
    norm = values["grad_norm"]
    if len(norms) >= NORMS // 5 and norm > SPIKE * (usual := statistics.median(norms)) > 0:
        values["spike"] = norm / usual
        if norm > clip:
            log.say(
                f"warning: step {step}: the gradient norm {norm:.3g} is {norm / usual:.0f} times the median "
                f"of the last {len(norms)} steps ({usual:.3g})"
            )
    norms.append(norm)


def _log_skipped(
    values: dict[str, Any], step: int, folder: Path, log: RunLog, world: DistributedContext
) -> None:
    """Write the samples of a skipped step, of all ranks, to `skipped.jsonl`."""
    reason = values.pop("skipped")
    samples = [sample for rank in world.gather(values.pop("samples")) for sample in rank]
    path = folder / "skipped.jsonl"
    if world.is_rank0:
        append_text(path, json.dumps({"skipped": reason, "samples": samples, "step": step}) + "\n")
    log.say(f"warning: step {step} skipped ({reason}): the batch's samples are in {path}")


def evaluate(
    model: Any, optimizers: list[torch.optim.Optimizer], callbacks: TrainingCallbacks, step: int, log: RunLog
) -> None:
    """Evaluate the model (its moving average, if any) in evaluation mode without gradients; log the metrics.

    Random states are restored: training continues as if there had been no evaluation.
    """
    model.eval()
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 (other libraries use it)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.no_grad(), torch.random.fork_rng(devices), ema_weights(optimizers):
        values = callbacks.evaluate(step)
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    model.train()
    log.metrics({"step": step} | values)
