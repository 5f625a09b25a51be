"""What a run tells of itself in the model card: data, settings, the curve of its loss, scores."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image

from configs.train import Config
from data.sources import parse_sources
from models.weights.model_card import RunFacts
from utils.errors import UserError
from utils.files import read_json, replacing, write_text
from utils.hub import is_hub_id
from utils.plotting import curves

PICTURE = "training.png"
POINTS = 400  # of a curve: each the mean of as many steps


def write_card(
    model: Any,
    config: Config,
    run: Path,
    folder: Path,
    evaluated: dict[str, Any] | None = None,
    evaluation: Path | None = None,
) -> None:
    """README.md and its picture into model folder `folder`. `evaluated`: the metrics of its step, else the run's last; `evaluation`: what evaluation.py wrote of it."""
    lines = list(_metrics(run / "metrics.jsonl"))
    losses = [(line["step"], line["loss"]) for line in lines if _finite(line.get("loss"))]
    validations = [line for line in lines if _finite(line.get("validation_loss"))]
    drawn = len(losses) > 1
    if drawn:
        with replacing(folder / PICTURE) as beside:
            draw(losses, [(line["step"], line["validation_loss"]) for line in validations]).save(
                beside, format="png", optimize=True
            )
    scores = evaluated if evaluated is not None else validations[-1] if validations else {}
    specs = parse_sources(config.data.sources)
    facts = RunFacts(
        name=config.hub.repo.rpartition("/")[2] or run.resolve().name,
        licence=config.hub.licence,
        base_models=(config.init_left_from.partition("@")[0],) if is_hub_id(config.init_left_from) else (),
        datasets=tuple(dict.fromkeys(spec.path.partition("@")[0] for spec in specs if is_hub_id(spec.path))),
        data=(
            ("sources", ", ".join(spec.full_name for spec in specs)),
            ("held out for validation", f"{config.data.validation_images:,} records"),
        ),
        training=tuple(_training(config, lines)),
        scores=(*_validation(scores), *(_evaluation(evaluation) if evaluation is not None else ())),
        picture=PICTURE if drawn else "",
        code=True,
    )
    write_text(folder / "README.md", str(model.generate_model_card(facts)))


def _metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a metrics.jsonl that are of a step; half a last one is being written. Errors: `UserError` where it is damaged."""
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged ({error}): mend or delete it") from None
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if line.endswith("\n"):
            try:
                metrics = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number} is damaged ({error}): mend or delete it") from None
            if isinstance(metrics, dict) and type(step := metrics.get("step")) is int and step >= 0:
                yield metrics


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _training(config: Config, lines: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    c, steps = config.train, [line for line in lines if "loss" in line]
    if steps:
        yield "optimizer steps", f"{steps[-1]['step']:,} of {config.max_steps:,}"
    if steps and len(steps) == steps[-1]["step"]:  # every one is known
        counts = [line.get("supervised_tokens") for line in steps]
        if all(type(count) is int and count >= 0 for count in counts):
            yield "tokens learnt from", f"{sum(counts):,}"
    length = config.data.right_length + (
        config.data.left_length if config.model.left_context != "none" else 0
    )
    yield "a step's batch", f"{c.global_batch_size} packed rows of {length:,} tokens"
    rates = {"vision": c.lr_vision, "projector": c.lr_projector} | {
        tower: getattr(c, f"lr_{tower}") for tower in config.model.towers
    }
    yield (
        "optimizer",
        f"{c.optimizer}; learning rates: {', '.join(f'{name} {rate:g}' if rate else f'{name} frozen' for name, rate in rates.items())}",
    )
    if c.ema:
        yield "weights", f"a moving average, decay {c.ema:g}"
    if adapted := [
        f"{tower} of rank {getattr(config.lora, tower).r}"
        for tower in config.model.towers
        if getattr(config.lora, tower).r
    ]:
        yield "adapters, merged", ", ".join(adapted)


def _validation(scores: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    for name, value in scores.items():
        if name not in ("step", "seconds") and _finite(value):
            yield name.replace("_", " "), f"{value:.4f}", "", ""


def _evaluation(path: Path) -> Iterator[tuple[str, str, str, str]]:
    for task, told in _part(read_json(path), "tasks").items():
        samples = told.get("samples") if isinstance(told, dict) else None
        counted = f" ({samples:,} samples)" if type(samples) is int else ""
        for metric, value in _part(told, "scores").items():
            if _finite(value):
                shown = (
                    f"{n:.4f}" if _finite(n := _part(told, name).get(metric)) else ""
                    for name in ("standard_errors", "random_baseline")
                )
                yield (f"{task}{counted}: {metric}", f"{value:.4f}", *shown)  # type: ignore[misc]


def _part(told: Any, name: str) -> dict[str, Any]:
    """An object in an object; where there is none, an empty one."""
    part = told.get(name) if isinstance(told, dict) else None
    return part if isinstance(part, dict) else {}


def draw(losses: list[tuple[int, float]], validations: list[tuple[int, float]]) -> Image.Image:
    """Training loss, each point the mean of some steps, and validation loss over the steps."""
    size = -(-len(losses) // POINTS)
    groups = [list(zip(*losses[i : i + size], strict=True)) for i in range(0, len(losses), size)]
    lines = {"training loss": [tuple(map(fmean, group)) for group in groups], "validation loss": validations}
    return curves(
        "by optimizer step",
        {name: list(zip(*points, strict=True)) for name, points in lines.items() if points},
        960,
        400,
    )
