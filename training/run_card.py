"""The model card of a run: data, settings, the loss curve, scores."""

import json
import math
from collections.abc import Iterator, Sequence
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
POINTS = 400  # of a curve at most; each is the mean of as many steps


def write_card(
    model: Any,
    config: Config,
    run: Path,
    folder: Path,
    evaluated: dict[str, Any] | None = None,
    evaluation: Path | None = None,
) -> None:
    """Write README.md and its picture into model folder `folder`.

    `evaluated`: metrics of the model's step, by default the run's last validation. `evaluation`: a file of
    results that evaluation.py wrote for this model.
    """
    lines = list(_metrics(run / "metrics.jsonl"))
    losses = [(line["step"], line["loss"]) for line in lines if _finite(line.get("loss"))]
    validations = [line for line in lines if _finite(line.get("validation_loss"))]
    drawn = len(losses) > 1
    if drawn:
        picture = draw(losses, [(line["step"], line["validation_loss"]) for line in validations])
        with replacing(folder / PICTURE) as temp_path:
            picture.save(temp_path, format="png", optimize=True)
    scores = evaluated if evaluated is not None else validations[-1] if validations else {}
    specs = parse_sources(config.data.sources)
    facts = RunFacts(
        name=config.hub.repo.rpartition("/")[2] or run.resolve().name,
        licence=config.hub.licence,
        base_models=tuple(
            source.partition("@")[0]
            for source in (config.init_from, config.init_left_from)
            if is_hub_id(source)
        ),
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
    """Yield the lines of a metrics.jsonl that belong to a step.

    A last line without its end is still being written, and left out. A damaged file raises `UserError`.
    """
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
    """Yield name and value of the training settings, and of what metrics.jsonl says about the steps."""
    c, steps = config.train, [line for line in lines if "loss" in line]
    if steps:
        yield "optimizer steps", f"{steps[-1]['step']:,} of {config.max_steps:,}"
    if steps and len(steps) == steps[-1]["step"]:  # every step has its line
        counts = [n for line in steps if type(n := line.get("supervised_tokens")) is int and n >= 0]
        if len(counts) == len(steps):
            yield "supervised tokens", f"{sum(counts):,}"
    length = config.data.right_length + (
        config.data.left_length if config.model.left_context != "none" else 0
    )
    yield "a step's batch", f"{c.global_batch_size} packed rows of {length:,} tokens"
    rates = {"vision": c.lr_vision, "projector": c.lr_projector} | {
        tower: getattr(c, f"lr_{tower}") for tower in config.model.towers
    }
    listed = ", ".join(f"{name} {rate:g}" if rate else f"{name} frozen" for name, rate in rates.items())
    yield "optimizer", f"{c.optimizer}; learning rates: {listed}"
    if c.ema:
        yield "weights", f"a moving average, decay {c.ema:g}"
    if adapted := [
        f"{tower} of rank {getattr(config.lora, tower).r}"
        for tower in config.model.towers
        if getattr(config.lora, tower).r
    ]:
        yield "adapters, merged", ", ".join(adapted)


def _validation(scores: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yield name and value of validation metrics, as rows of four columns."""
    for name, value in scores.items():
        if name not in ("step", "seconds") and _finite(value):
            yield name.replace("_", " "), f"{value:.4f}", "", ""


def _evaluation(path: Path) -> Iterator[tuple[str, str, str, str]]:
    """Yield task and metric, score, standard error and random-weights baseline of evaluation.py's results."""
    for task, results in _part(read_json(path), "tasks").items():
        samples = results.get("samples") if isinstance(results, dict) else None
        counted = f" ({samples:,} samples)" if type(samples) is int else ""
        for metric, value in _part(results, "scores").items():
            if _finite(value):
                error, baseline = (
                    f"{n:.4f}" if _finite(n := _part(results, name).get(metric)) else ""
                    for name in ("standard_errors", "random_baseline")
                )
                yield f"{task}{counted}: {metric}", f"{value:.4f}", error, baseline


def _part(value: Any, name: str) -> dict[str, Any]:
    """The JSON object `name` inside `value`; an empty one if there is none."""
    part = value.get(name) if isinstance(value, dict) else None
    return part if isinstance(part, dict) else {}


def draw(losses: list[tuple[int, float]], validations: list[tuple[int, float]]) -> Image.Image:
    """Draw training loss (each point the mean of some steps) and validation loss over the steps."""
    size = -(-len(losses) // POINTS)
    groups = [losses[i : i + size] for i in range(0, len(losses), size)]
    training = [(fmean(step for step, _ in group), fmean(loss for _, loss in group)) for group in groups]
    lines: dict[str, Sequence[tuple[float, float]]] = {
        "training loss": training,
        "validation loss": validations,
    }
    return curves(
        "by optimizer step",
        {name: ([x for x, _ in points], [y for _, y in points]) for name, points in lines.items() if points},
        960,
        400,
    )
