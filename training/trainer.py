"""The training loop, the same for every model: read `Trainer.train`, then `Trainer.train_step`."""

import json
import math
import random
import resource
import statistics
import sys
import time
from collections import ChainMap, Counter, deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor

from configs.serialization import to_dict
from configs.train import Config
from data.datasets import Drop, drop_report
from data.loader import merged
from models.language_model import DecoderBlock
from models.multi_token import chains
from training.callbacks import Callback
from training.checkpoint import Saver, abandon_later, checkpoints, load_checkpoint
from training.diagnostics import FlopsMeter, sources_of
from training.distributed import gradient_sync, wrap_model
from training.ema import ema_weights, swap_ema, update_ema
from training.logging import RunLog
from training.optim import (
    clip_gradients,
    freeze,
    grad_scaler,
    head_weights,
    load_scale,
    make_optimizers,
    scale_state,
    set_learning_rates,
)
from training.process_memory import FreedMemory
from training.run_dir import begin_run
from training.signals import Stopped, StopSignals
from utils.device import autocast, compute_dtype, pick_device
from utils.errors import UserError
from utils.files import append_text
from utils.ranks import SINGLE_PROCESS, DistributedContext

Batch = dict[str, Tensor]
SPIKE, NORMS = 5.0, 100  # a spike is a gradient norm above SPIKE × the median of the last NORMS


class Batches(Protocol):
    """An endless iterator of batches: all that `train_step` needs."""

    def __next__(self) -> Batch: ...
    def sources(self) -> list[str]: ...
    def samples(self) -> list[str]: ...


class ResumableBatches(Batches, Protocol):
    """Batches whose position can be saved, for `train`."""

    def state(self) -> dict[int, Any]: ...
    def load_state(self, states: list[Any]) -> None: ...
    def dropped(self) -> Counter[Drop]: ...
    def examples(self) -> dict[Drop, str]: ...
    def close(self) -> None: ...


@dataclass
class StepData:
    """The micro-batches of one step on this rank, and what all ranks' micro-batches hold together."""

    micro_batches: list[Batch]
    samples: list[list[str]]  # of each micro-batch: source and record number of its groups, row by row
    sources: list[str]  # names of all sources; empty if there is only one
    counts: dict[str, int]  # see `Trainer._count`
    head_targets: Tensor  # (K,) supervised positions of each multi-token head
    seconds_waited: float


class Trainer:
    """A model in training: its optimizers, its steps, and its state in checkpoints.

    Moves `model` to the device of `train.device` and freezes its parts whose learning rate is 0. `folder` and
    `log` are for `train`; a trial that only takes steps needs neither. `data_identity`: plain JSON that every
    checkpoint holds.
    """

    def __init__(
        self,
        config: Config,
        model: Any,
        batches: Batches,
        folder: Path = Path(),
        log: RunLog | None = None,
        callbacks: Sequence[Callback] = (),
        world: DistributedContext = SINGLE_PROCESS,
        data_identity: dict[str, Any] | None = None,
    ) -> None:
        c = config.train
        self.config, self.folder, self.world = config, folder, world
        self.batches: Any = batches  # `train` needs `ResumableBatches`
        self.callbacks, self.data_identity = callbacks, data_identity or {}
        self.log = log or RunLog(folder, silent=True)
        self.device = pick_device(c.device)
        self.freed_memory = FreedMemory(self.device)
        freeze(model, c)
        self.model = model.to(self.device).train()  # a frozen encoder stays in evaluation mode
        for block in (m for m in model.modules() if isinstance(m, DecoderBlock)):
            block.recompute = c.recompute
            block.compiled = torch.compile(block.run) if c.compile else None
        self.flops_meter = FlopsMeter(model, self.device, world.size)
        dtype = compute_dtype(c.dtype, self.device)
        self.parallel_model = wrap_model(model, config.parallel, self.device, dtype, world)
        self.optimizers = make_optimizers(model, c)
        self.scaler = grad_scaler(c, self.device, world.size)
        self.saver = Saver(folder / "checkpoints", c.keep_checkpoints, world, self._saved, self._in_use)
        self.saved_at = time.monotonic()
        self.step = 0  # steps that are done, or the one under way
        self.failed = 0  # consecutive steps without an update, up to this one
        self.norms: deque[float] = deque(maxlen=NORMS)
        self.dropped: dict[str, int] = {}  # as last logged
        self.pending_evaluation = False  # the evaluation after this step failed

    def train(self, checkpoint: Path | None = None) -> None:
        """Train until step `max_steps`, from `checkpoint` if there is one.

        A signal raises `Stopped` once its step is saved. In the end the model holds its average weights, if
        there are any (`train.ema`).
        """
        self._begin(checkpoint)
        succeeded = False
        try:
            # Under torchrun a Ctrl-C comes twice: from the terminal, and passed on by torchrun.
            with StopSignals(patience=1 if self.world.size == 1 else 2) as stop:
                if self.pending_evaluation:
                    self.evaluate()
                    self.save()  # without a pending evaluation
                while self.step < self.config.max_steps:
                    values = self.train_step()
                    self.saver.prepare(self.model, self.optimizers)
                    self.check(values)
                    for callback in self.callbacks:
                        callback.after_step(self, values)
                    self.log_values(values)
                    if self.is_evaluation_due:
                        self.evaluate()
                    saved, stopped = self.save_if_due(stop.name)
                    self.freed_memory.after_step()
                    if stopped and self.step < self.config.max_steps:
                        self.saver.wait()
                        succeeded = True
                        raise Stopped(
                            f"{stop.name or 'another rank received a signal'}: "
                            f"stopped after step {self.step}, whose checkpoint is {saved}"
                        )
                self.saver.wait()
                swap_ema(self.optimizers)
                succeeded = True
        finally:
            self.log.stop(succeeded)
            for callback in self.callbacks:
                callback.end(succeeded)
            self.batches.close()

    def _begin(self, checkpoint: Path | None) -> None:
        """Load `checkpoint`, drop what the run wrote after it, and open log and trackers."""
        log, config = self.log, self.config
        logged = self.load_checkpoint(checkpoint) if checkpoint is not None else 0
        # Nothing is retained if the run was killed before its first checkpoint.
        retained = log.read_until(self.step, logged)
        if self.world.is_rank0:
            # First of all: from now on `--resume auto` continues from this step.
            abandoned = abandon_later(self.folder / "checkpoints", self.step)
            for path in abandoned:
                log.say(
                    f"{path.name} is of a later step, or damaged: it is now {path}; delete it when you like"
                )
            begin_run(config, self.folder, rewound=bool(abandoned))
        for callback in self.callbacks:
            callback.begin(self)
        log.truncate(retained)
        log.start(self.step, config.max_steps)
        log.track(config.log, to_dict(config), self.step if checkpoint is not None else None)
        if config.train.ema:
            log.say(
                f"validated and exported: a moving average of the weights (train.ema = {config.train.ema:g})"
            )

    # One optimizer step.

    def train_step(self) -> dict[str, Any]:
        """Take the next step; return its values for the log.

        The loss is cross-entropy summed over all micro-batches of all ranks ÷ their supervised tokens. If
        loss or gradient are not finite, or no token is supervised, nothing is updated. The values then hold
        "skipped", the reason, and "samples", those of this rank. If fp16's scaler scaled too far, they hold
        "overflow", its scale, instead.
        """
        c, started = self.config.train, time.perf_counter()
        self.step += 1
        data = self._load_step()
        supervised = data.counts["supervised"]
        losses = self._backward(data)
        self.world.sum(losses)
        rates = set_learning_rates(self.optimizers, self.step - 1, self.config.max_steps, c)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norms = clip_gradients(self.optimizers, c.clip)
        norm, (loss, *more) = math.hypot(*norms.values()), losses.tolist()
        is_finite = all(map(math.isfinite, (loss, *more)))
        updates = bool(supervised) and is_finite and math.isfinite(norm)
        self.saver.copied()
        for callback in self.callbacks:
            callback.before_update(self)
        self._update(updates)
        scale = self.scaler.get_scale() * self.world.size
        self.scaler.update()
        speed = self._speed(data, time.perf_counter() - started)
        if supervised and is_finite and not updates and self.scaler.is_enabled():
            return {"loss": loss, "grad_norm": None, "overflow": scale} | speed
        if not updates:
            reason = f"loss {loss}, gradient norm {norm}" if supervised else "no token to learn"
            samples = [sample for batch_samples in data.samples for sample in batch_samples]
            return {"loss": None, "grad_norm": None, "skipped": reason, "samples": samples} | speed
        values = {"loss": loss, "grad_norm": norm, "grad_norms": norms, "lr": rates}
        if heads := len(data.head_targets):
            values["head_losses"] = more[:heads]
        if names := data.sources:
            sums, tokens = more[heads : heads + len(names)], more[heads + len(names) :]
            values["source_losses"] = {
                name: total / n for name, total, n in zip(names, sums, tokens, strict=True) if n
            }
        if self.scaler.is_enabled():
            values["loss_scale"] = scale
        length = self.config.data.right_length
        length += self.config.data.left_length if self.config.model.left_context != "none" else 0
        return (
            values
            | {
                "supervised_tokens": supervised,
                "fill": (data.counts["left"] + data.counts["right"]) / (c.global_batch_size * length),
                "memory_gb": memory(self.device),
            }
            | speed
        )

    def _load_step(self) -> StepData:
        """Take this rank's micro-batches of a step, for a GPU in pinned memory; count those of all ranks."""
        started = time.perf_counter()
        micro_batches, samples = [], []
        for _ in range(self.config.train.micro_batches // self.world.size):
            batch = next(self.batches)
            if self.device.type == "cuda":  # which reads them while it computes
                batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
            micro_batches.append(batch)
            samples.append(self.batches.samples())
        waited = time.perf_counter() - started
        names = self.batches.sources()
        counts, head_targets = self._count(micro_batches)
        return StepData(micro_batches, samples, names if len(names) > 1 else [], counts, head_targets, waited)

    def _count(self, micro_batches: list[Batch]) -> tuple[dict[str, int], Tensor]:
        """Add up `batch_counts`, and each multi-token head's targets (K,), over all ranks."""
        heads = self.config.model.multi_token.heads
        totals: Counter[str] = Counter()
        for batch in micro_batches:
            totals.update(batch_counts(batch))
        counts = torch.tensor([*totals.values(), *[0] * heads])
        if heads:
            counts[len(totals) :] = sum(
                (chains(b["labels"], b["right_documents"], heads)[:, 1:] >= 0).sum(0) for b in micro_batches
            )
        self.world.sum(counts)
        return dict(zip(totals, counts.tolist(), strict=False)), counts[len(totals) :]

    def _backward(self, data: StepData) -> Tensor:
        """Accumulate the gradients of all micro-batches.

        → this rank's share of the losses, (1 + K + 2 × sources,): the loss, the mean loss of each head, the
        summed loss of each source, the tokens of each source.
        """
        c, heads, names = self.config.train, len(data.head_targets), data.sources
        weights = torch.tensor(head_weights(self.step - 1, heads, c) if heads else [], device=self.device)
        losses = torch.zeros(1 + heads + 2 * len(names), device=self.device)
        by_source = losses[1 + heads :].view(2, len(names))
        for number, (batch, samples) in enumerate(zip(data.micro_batches, data.samples, strict=True), 1):
            is_last = number == len(data.micro_batches)
            with gradient_sync(self.parallel_model, is_last) if self.world.size > 1 else nullcontext():
                with autocast(c.dtype, self.device):
                    output = self.parallel_model(
                        **{name: x.to(self.device, non_blocking=True) for name, x in batch.items()}
                    )
                loss = output.loss_sum / max(1, data.counts["supervised"])
                losses[0] += loss.detach()
                if heads:
                    means = output.head_loss_sums / data.head_targets.clamp(min=1).to(self.device)
                    losses[1 : 1 + heads] += means.detach()
                    loss = loss + (weights * means).sum()
                if names:
                    # On the CPU, while a GPU computes.
                    source = sources_of(batch, samples, names).to(self.device)
                    ones = torch.ones_like(output.losses)
                    by_source.index_add_(1, source, torch.stack((output.losses, ones)))
                # The ranks' gradients are averaged, not summed.
                self.scaler.scale(loss * self.world.size).backward()
        return losses

    def _update(self, updates: bool) -> None:
        """Update the weights and their moving average if `updates`; drop the gradients."""
        for optimizer in self.optimizers:
            if updates:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if updates and self.config.train.ema:
            update_ema(self.optimizers, self.step, self.config.train.ema)

    def _speed(self, data: StepData, seconds: float) -> dict[str, float]:
        """Tokens, tiles, FLOPs per second of all ranks; share of the step that this rank waited for data."""
        return {
            "tokens_per_s": (data.counts["left"] + data.counts["right"]) / seconds,
            "supervised_tokens_per_s": data.counts["supervised"] / seconds,
            "tiles_per_s": data.counts["tiles"] / seconds,
            "data_wait": data.seconds_waited / seconds,
        } | self.flops_meter.of(data.counts, seconds)

    # After a step.

    def check(self, values: dict[str, Any]) -> None:
        """Log a step that failed or spiked. Too many failed steps in a row raise `UserError`."""
        failed = "skipped" in values or "overflow" in values
        self.failed = self.failed + 1 if failed else 0
        if "overflow" in values:
            self.log.say(
                f"step {self.step} skipped: its gradients overflow fp16 at a loss scale of "
                f"{values['overflow']:g}, which is halved"
            )
        elif failed:
            self._log_skipped(values)
        else:
            self._log_spike(values)
        if self.failed == self.config.train.skips:
            self._give_up("overflow" in values)

    def _log_skipped(self, values: dict[str, Any]) -> None:
        """Write the samples of a skipped step, of all ranks, to `skipped.jsonl`."""
        reason = values.pop("skipped")
        samples = [sample for rank in self.world.gather(values.pop("samples")) for sample in rank]
        path = self.folder / "skipped.jsonl"
        if self.world.is_rank0:
            append_text(path, json.dumps({"skipped": reason, "samples": samples, "step": self.step}) + "\n")
        self.log.say(f"warning: step {self.step} skipped ({reason}): the batch's samples are in {path}")

    def _log_spike(self, values: dict[str, Any]) -> None:
        """Add "spike" to the values if the gradient norm is far above the last ones.

        A warning is printed only without clipping, which keeps a spike from doing harm: a healthy run has
        dozens of them.
        """
        norm = values["grad_norm"]
        median = statistics.median(self.norms) if len(self.norms) >= NORMS // 5 else 0.0
        if norm > SPIKE * median > 0:
            values["spike"] = norm / median
            if not self.config.train.clip:
                self.log.say(
                    f"warning: step {self.step}: the gradient norm {norm:.3g} is {norm / median:.0f} times "
                    f"the median of the last {len(self.norms)} steps ({median:.3g})"
                )
        self.norms.append(norm)

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
            dropped: Counter[Drop] = sum(self.world.gather(self.batches.dropped()), Counter())
            examples = dict(ChainMap(*self.world.gather(self.batches.examples())))
            self.dropped = {f"{source}: {reason}": n for (source, reason), n in sorted(dropped.items())}
            new = Counter({drop: n for drop, n in dropped.items() if ": ".join(drop) not in before})
            if new:
                self.log.say(f"training records dropped: {drop_report(new, examples)}")
        changed = {"dropped": self.dropped} if self.dropped != before and self.dropped else {}
        self.log.metrics({"step": self.step} | values | changed)

    # Evaluation.

    @property
    def is_evaluation_due(self) -> bool:
        """Whether a validation or a task follows this step."""
        c, e = self.config.train, self.config.eval
        return self.step == self.config.max_steps or any(
            every and self.step % every == 0 for every in (c.eval_every, e.tasks_every if e.tasks else 0)
        )

    def evaluate(self) -> None:
        """Evaluate after this step, in evaluation mode, without gradients; log the metrics.

        Random states are restored: training continues as if there had been no evaluation. If it fails in a
        single process, a checkpoint is saved, and a resumed run repeats the evaluation. Several ranks do not
        fail together: they resume from the last checkpoint.
        """
        self.saver.copied()  # because the moving average changes places with the weights
        states = random.getstate(), np.random.get_state()  # noqa: NPY002 (other libraries use it)
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        self.model.eval()
        values: dict[str, Any] = {"step": self.step}
        try:
            with torch.no_grad(), torch.random.fork_rng(devices), ema_weights(self.optimizers):
                for callback in self.callbacks:
                    values |= callback.evaluate(self)
        except Exception:
            if self.world.size == 1:
                self.pending_evaluation = True
                self.save()
                self.saver.wait()
            raise
        self.pending_evaluation = False
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        self.model.train()
        self.log.metrics(values)

    # Checkpoints.

    def save_if_due(self, signal: str) -> tuple[Path | None, bool]:
        """Save if due, or if any rank received a signal. → the checkpoint, and whether one did."""
        c = self.config.train
        late = self.world.is_rank0 and (
            0 < c.checkpoint_minutes * 60 <= time.monotonic() - self.saved_at
            or self.saver.protected_step == self.step
        )
        due = torch.tensor([bool(signal), late], dtype=torch.int64)
        self.world.sum(due)
        if (
            due.any()
            or self.step == self.config.max_steps
            or (c.checkpoint_every and self.step % c.checkpoint_every == 0)
        ):
            return self.save(), bool(due[0])
        return None, False

    def save(self) -> Path:
        """Start to write a checkpoint of this step; return its folder."""
        self.saved_at = time.monotonic()
        return self.saver.save(self.step, self.model, self.optimizers, self._state, self._before_checkpoint)

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds besides tensors and random states."""
        return {
            "skipped": self.failed,
            "norms": list(self.norms),
            "logged": self.log.logged,
            "dropped": self.dropped,
            "pending_evaluation": self.pending_evaluation,
            "data": merged(self.world.gather(self.batches.state())),
            "scaler": scale_state(self.scaler, self.world.size),
        } | self.data_identity

    def load_checkpoint(self, checkpoint: Path) -> int:
        """Load a checkpoint; return the last step that metrics.jsonl had lines of at that time."""
        state = load_checkpoint(checkpoint, self.model, self.optimizers, self.world)
        self.step, self.failed = state["step"], state["skipped"]
        self.norms.extend(state.get("norms", []))
        self.dropped = state.get("dropped", {})
        self.pending_evaluation = state.get("pending_evaluation", False)
        load_scale(self.scaler, state.get("scaler", {}), self.world.size)
        try:
            self.batches.load_state(state["data"])
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(
                f"checkpoint {checkpoint}: its data position does not fit this data set ({error!r})"
            ) from error
        self.log.say(f"resumed from {checkpoint} after step {self.step}")
        return int(state.get("logged", 0))

    # Called in the saver's thread.

    def _before_checkpoint(self) -> None:
        self.log.sync()  # after a crash, too, metrics.jsonl holds a checkpoint's steps
        for callback in self.callbacks:
            callback.before_checkpoint()

    def _saved(self, checkpoint: Path) -> None:
        for callback in self.callbacks:
            callback.saved(checkpoint)

    def _in_use(self) -> list[Path]:
        return [path for callback in self.callbacks for path in callback.in_use()]


def batch_counts(batch: Batch) -> dict[str, int]:
    """Tokens (supervised, left, right), tiles, and pairs of a query and a key that it sees; no padding."""
    left, right = batch["left_groups"] >= 0, batch["right_documents"] >= 0
    return {
        "supervised": int((batch["labels"] != -100).sum()),
        "left": int(left.sum()),
        "right": int(right.sum()),
        "tiles": len(batch["tiles"]),
        "left_pairs": int((batch["left_positions"] + 1)[left].sum()),
        "right_pairs": int((batch["right_positions"] + 1)[right].sum()),
    }


def memory(device: torch.device) -> float:
    """Peak memory so far in GB: of the GPU, or else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
