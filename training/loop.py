"""The training loop: one for every model."""

import ctypes
import faulthandler
import json
import math
import random
import resource
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
from torch import Tensor

from configs.command_line import to_dict
from configs.errors import UserError
from configs.files import append_text
from configs.ranks import ALONE, World
from configs.schema import Config, TrainConfig
from data.loader import merged
from models.language_model import Block
from models.layers import pick_device
from models.multi_token import chains
from training.checkpoint import Saver, load_checkpoint
from training.details import Achieved, Details
from training.distributed import accumulating, gathered, parallel
from training.logging import RunLog
from training.optim import freeze, head_weights, make_optimizers, schedule, set_learning_rates
from training.precision import autocast, computes_in_bf16

Batch = dict[str, Tensor]
SPIKE, NORMS = 5.0, 100  # a gradient norm so many times the median of the last so many is told


class Batches(Protocol):
    """Batches without end, which say where they are."""

    def __next__(self) -> Batch: ...
    def state(self) -> dict[int, Any]: ...
    def load_state(self, states: list[Any]) -> None: ...
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
    """Train `model` for `config.max_steps` optimizer steps, from `checkpoint` where there is one. A signal raises `Stopped`, once the step is saved."""
    c, device = config.train, pick_device(config.train.device)
    if device.type == "cpu":
        keep_freed_memory()
    model.to(device).train()
    freeze(model, c)
    set_blocks(model, c)
    achieved = Achieved(model, device, world.size)
    run = parallel(model, config.parallel, device, computes_in_bf16(c, device), world)  # what is called
    optimizers = make_optimizers(model, c)
    details = Details(model, optimizers)
    norms: deque[float] = deque(maxlen=NORMS)
    done = skipped = 0  # steps; those before this one, in a row, that were skipped
    if checkpoint is not None:
        state = load_checkpoint(checkpoint, model, optimizers, world)
        done, skipped = state["step"], state["skipped"]
        norms.extend(state.get("norms", []))
        try:
            task.batches.load_state(state["data"])
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(f"checkpoint {checkpoint}: its data position does not fit this data set ({error!r})") from error
        log.say(f"resumed from {checkpoint} after step {done}")

    log.rewind(done)  # to nothing, where a run was killed before its first checkpoint
    saver = Saver(folder / "checkpoints", c.keep_checkpoints, world, task.saved)

    def save(step: int) -> Path:
        return saver.save(
            step,
            model,
            optimizers,
            lambda: {"data": merged(world.gather(task.batches.state())), "skipped": skipped, "norms": list(norms), "tokenizer": task.tokenizer},
            task.before_checkpoint,
        )

    log.start(done, config.max_steps)
    log.track(config.log, to_dict(config), done if checkpoint is not None else None)
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

                values = train_step(config, run, optimizers, task.batches, step, device, world, before_update, achieved)
                if looked and not values.get("skipped"):
                    values["update_ratios"], histograms = details.found()
                    log.histograms(step, histograms)
                skipped = skipped + 1 if values.get("skipped") else 0
                if skipped:
                    _note_skipped(values, step, folder, log, world)
                else:
                    _tell_spike(values, norms, step, log)
                if skipped == c.skips:
                    saver.wait()
                    at = f"the last checkpoint stands in {folder / 'checkpoints'}"
                    raise UserError(f"no finite loss and gradient in {skipped} steps, up to {step}: lower the learning rates, or look at skipped.jsonl ({at})")
                log.step(step, math.nan if skipped else values["loss"], values["tokens_per_s"])
                last = step == config.max_steps
                evaluated = last or any(every and step % every == 0 for every in (c.eval_every, config.eval.tasks_every if config.eval.tasks else 0))
                if step % c.log_every == 0 or last:
                    before = dropped
                    if world.size == 1 or evaluated:
                        dropped = {"dropped": {f"{source}: {reason}": n for (source, reason), n in sorted(sum(world.gather(task.batches.dropped()), Counter()).items())}}
                    log.metrics({"step": step} | values | (dropped if dropped != before and any(dropped.values()) else {}))
                if evaluated:
                    try:
                        evaluate(model, task, step, log)
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


def train_step(
    config: Config,
    model: Any,
    optimizers: list[torch.optim.Optimizer],
    batches: Any,
    step: int,
    device: torch.device,
    world: World = ALONE,
    before_update: Callable[[], None] = lambda: None,
    achieved: Achieved | None = None,
) -> dict[str, Any]:
    """One optimizer step. The loss is cross-entropy summed over all micro-batches of all ranks ÷ their supervised tokens.

    `model` is what `parallel` gave. Where loss or gradient are not finite, or nothing is to be learnt, nothing is changed, and the
    values say so: "skipped", and the "samples" of this rank's batches.
    """
    c, started = config.train, time.perf_counter()
    micro, samples = [], []
    for _ in range(c.accumulation // world.size):
        micro.append(next(batches))
        samples += batches.samples()
    waited = time.perf_counter() - started
    heads = config.model.multi_token.heads
    supervised = sum(int((b["labels"] != -100).sum()) for b in micro)
    left, right = (sum(int((b[name] >= 0).sum()) for b in micro) for name in ("left_groups", "right_documents"))
    pairs = [
        sum(int((b[f"{side}_positions"] + 1)[b[name] >= 0].sum()) for b in micro) for side, name in (("left", "left_groups"), ("right", "right_documents"))
    ]  # keys that tokens see
    counts = torch.tensor([supervised, left, right, sum(len(b["tiles"]) for b in micro), *pairs, *[0] * heads])
    if heads:
        counts[6:] = sum((chains(b["labels"], b["right_documents"], heads)[:, 1:] >= 0).sum(0) for b in micro)
    world.sum(counts)
    count = dict(zip(("supervised", "left", "right", "tiles", "left_pairs", "right_pairs"), counts.tolist(), strict=False))
    supervised, tokens, tiles = count["supervised"], count["left"] + count["right"], count["tiles"]
    chained = counts[6:].clamp(min=1).to(device)  # each head's targets (K,)
    weights = torch.tensor(head_weights(step - 1, heads, c), device=device)
    losses = torch.zeros(1 + heads, device=device)
    for number, batch in enumerate(micro, 1):
        with accumulating(model, number == len(micro)):
            with autocast(c, device):
                output = model(**{k: v.to(device, non_blocking=True) for k, v in batch.items()})
            loss = output.loss_sum / max(1, supervised)
            losses[0] += loss.detach()
            if heads:
                means = output.head_loss_sums / chained
                losses[1:] += means.detach()
                loss = loss + (weights * means).sum()
            (loss * world.size).backward()  # the ranks' gradients are averaged
    world.sum(losses)
    rates = set_learning_rates(optimizers, schedule(step - 1, config.max_steps, c))
    norms = _clip(optimizers, c.clip)
    loss, norm = losses[0].item(), math.hypot(*norms.values())
    finite = math.isfinite(norm) and bool(torch.isfinite(losses).all())
    before_update()
    for optimizer in optimizers:
        if finite and supervised:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - started
    speed = {"tokens_per_s": tokens / seconds, "supervised_tokens_per_s": supervised / seconds, "tiles_per_s": tiles / seconds, "data_wait": waited / seconds}
    speed |= achieved.of(count, seconds) if achieved is not None else {}
    full = c.rows * c.accumulation * (config.data.right_length + (config.data.left_length if config.model.left_context != "none" else 0))
    if not finite or not supervised:
        reason = f"loss {loss}, gradient norm {norm}" if supervised else "no token to learn"
        return {"loss": None, "grad_norm": None, "skipped": reason, "samples": samples} | speed
    learnt = {"loss": loss, "grad_norm": norm, "grad_norms": norms, "lr": rates} | ({"head_losses": losses[1:].tolist()} if heads else {})
    return learnt | {"supervised_tokens": supervised, "fill": tokens / full, "memory_gb": memory(device)} | speed


def _clip(optimizers: list[torch.optim.Optimizer], most: float) -> dict[str, float]:
    """Gradient norm of each part, as it was before all gradients were scaled to a norm of `most` (0: they are not)."""
    parts: dict[str, list[Tensor]] = {}
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        parts.setdefault(group["part"], []).extend(p for p in group["params"] if p.grad is not None)
    norms = torch.stack([gathered(torch.nn.utils.get_total_norm([p.grad for p in members])) for members in parts.values()])  # type: ignore[misc]
    total = torch.linalg.vector_norm(norms)
    if most and total > most:
        for members in parts.values():
            torch.nn.utils.clip_grads_with_norm_(members, most, total)
    return dict(zip(parts, norms.tolist(), strict=True))


def keep_freed_memory() -> None:
    """Linux's glibc gives large tensors back to the system at once, and gets them again page by page: a fifth of a step on a CPU (docs/experiments.md). Elsewhere nothing."""
    with suppress(OSError, AttributeError):  # a C library without it
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for option, value in ((-4, 0), (-1, -1), (-2, 1 << 26)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h
            mallopt(option, value)


def memory(device: torch.device) -> float:
    """The most that was in use so far, in GB: of the device's memory, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def evaluate(model: Any, task: Task, step: int, log: RunLog) -> None:
    """Validation between two steps, in evaluation mode and without gradients; the metrics are logged. Training goes on as if there had been none."""
    model.eval()
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 (other libraries use it)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        values = task.evaluate(step)
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    model.train()
    log.metrics({"step": step} | values)
