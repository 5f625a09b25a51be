"""The training loop: one for every model."""

import json
import math
import random
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from configs.errors import UserError
from configs.files import append_text
from configs.schema import Config, TrainConfig
from models.layers import computes_bf16, pick_device
from models.multi_token import chains
from training.checkpoint import load_checkpoint, save_checkpoint
from training.logging import RunLog
from training.optim import head_weights, make_optimizers, schedule, set_learning_rates

Batch = dict[str, Tensor]


class Batches(Protocol):
    """Batches without end, which say where they are."""

    def __next__(self) -> Batch: ...
    def state(self) -> dict[str, Any]: ...
    def load_state(self, state: dict[str, Any]) -> None: ...
    def dropped(self) -> Mapping[tuple[str, str], int]: ...
    def samples(self) -> list[str]: ...
    def close(self) -> None: ...


class Stopped(Exception):
    """A signal ended training early; the message names the checkpoint."""


class StopSignals:
    """SIGINT, SIGTERM and SIGUSR1 become a `name` that the loop reads after each step. A second SIGINT interrupts at once."""

    def __enter__(self) -> "StopSignals":
        self.name = ""
        main = threading.current_thread() is threading.main_thread()  # Python takes signals nowhere else
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1) if main}
        return self

    def _note(self, number: int, frame: Any) -> None:
        if self.name and number == signal.SIGINT:
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


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[None]:
    """The autocast context of `train.dtype`; "auto" is bf16 where the machine multiplies in it, else fp32."""
    bf16 = config.dtype == "bf16" or (config.dtype == "auto" and computes_bf16(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def train(config: Config, model: Any, task: Task, folder: Path, log: RunLog, checkpoint: Path | None) -> None:
    """Train `model` for `config.max_steps` optimizer steps, from `checkpoint` where there is one. A signal raises `Stopped`, once the step is saved."""
    c, device = config.train, pick_device(config.train.device)
    model.to(device).train()
    optimizers = make_optimizers(model, c)
    done = skipped = 0  # steps; those before this one, in a row, that were skipped
    if checkpoint is not None:
        state = load_checkpoint(checkpoint, model, optimizers)
        done, skipped = state["step"], state["skipped"]
        try:
            task.batches.load_state(state["data"])
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(f"checkpoint {checkpoint}: its data position does not fit this data set ({error!r})") from error
        log.say(f"resumed from {checkpoint} after step {done}")

    log.rewind(done)  # to nothing, where a run was killed before its first checkpoint

    def save(step: int) -> Path:
        task.before_checkpoint()
        return save_checkpoint(folder / "checkpoints", step, model, optimizers, {"data": task.batches.state(), "skipped": skipped}, c.keep_checkpoints)

    log.start(done, config.max_steps)
    dropped: dict[str, Any] = {}
    try:
        with StopSignals() as stop:
            for step in range(done + 1, config.max_steps + 1):
                started = time.perf_counter()
                values = train_step(config, model, optimizers, task.batches, step, device)
                values["tokens_per_s"] = values.pop("tokens") / (time.perf_counter() - started)
                skipped = skipped + 1 if values.get("skipped") else 0
                if skipped:
                    append_text(folder / "skipped.jsonl", json.dumps({key: values.pop(key) for key in ("skipped", "samples")} | {"step": step}) + "\n")
                    log.say(f"warning: step {step} skipped, its loss or gradient is not finite: the batch's samples stand in {folder / 'skipped.jsonl'}")
                if skipped == c.skips:
                    at = f"the last checkpoint stands in {folder / 'checkpoints'}"
                    raise UserError(f"no finite loss and gradient in {skipped} steps, up to {step}: lower the learning rates, or look at skipped.jsonl ({at})")
                log.step(step, math.nan if skipped else values["loss"], values["tokens_per_s"])
                last = step == config.max_steps
                if step % c.log_every == 0 or last:
                    before, dropped = dropped, {"dropped": {f"{source}: {reason}": n for (source, reason), n in sorted(task.batches.dropped().items())}}
                    log.metrics({"step": step} | values | (dropped if dropped != before and any(dropped.values()) else {}))
                if last or any(every and step % every == 0 for every in (c.eval_every, config.eval.tasks_every if config.eval.tasks else 0)):
                    try:
                        evaluate(model, task, step, log)
                    except Exception:
                        save(step)  # what was learnt is not lost to a task that fails
                        raise
                if last or stop.name or (c.checkpoint_every and step % c.checkpoint_every == 0):
                    saved = save(step)
                if stop.name and not last:
                    raise Stopped(f"{stop.name}: stopped after step {step}, whose checkpoint is {saved}")
    finally:
        log.stop()
        task.batches.close()


def train_step(config: Config, model: Any, optimizers: list[torch.optim.Optimizer], batches: Any, step: int, device: torch.device) -> dict[str, Any]:
    """One optimizer step. The loss is cross-entropy summed over all micro-batches ÷ their supervised tokens.

    Where loss or gradient are not finite nothing is changed, and the values say so: "skipped", and the batch's "samples".
    """
    c = config.train
    micro, samples = [], []
    for _ in range(c.accumulation):
        micro.append(next(batches))
        samples += batches.samples()
    supervised = sum(int((b["labels"] != -100).sum()) for b in micro)
    heads = model.config.multi_token.heads
    chained = sum((chains(b["labels"], b["right_documents"], heads)[:, 1:] >= 0).sum(0) for b in micro).clamp(min=1).to(device)  # each head's targets (K,)
    weights = torch.tensor(head_weights(step - 1, heads, c), device=device)
    total, of_heads = torch.zeros((), device=device), torch.zeros(heads, device=device)
    for batch in micro:
        with autocast(c, device):
            output = model(**{k: v.to(device, non_blocking=True) for k, v in batch.items()})
        loss = output.loss_sum / max(1, supervised)
        total += loss.detach()
        if heads:
            means = output.head_loss_sums / chained
            of_heads += means.detach()
            loss = loss + (weights * means).sum()
        loss.backward()
    rates = set_learning_rates(optimizers, schedule(step - 1, config.max_steps, c))
    parameters = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, c.clip or math.inf).item()
    loss, finite = total.item(), math.isfinite(norm) and bool(torch.isfinite(total)) and bool(torch.isfinite(of_heads).all())
    for optimizer in optimizers:
        if finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    tokens = sum(int((b["left_groups"] >= 0).sum()) + int((b["right_documents"] >= 0).sum()) for b in micro)
    values = {"loss": loss, "grad_norm": norm, "lr": rates, "supervised_tokens": supervised, "tokens": tokens} | ({"head_losses": of_heads.tolist()} if heads else {})
    if not finite:
        values = {"loss": None, "grad_norm": None, "tokens": tokens, "skipped": f"loss {loss}, gradient norm {norm}", "samples": samples}
    return values


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
