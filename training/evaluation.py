"""Evaluation of the model in training: validation, captions, tasks, sample predictions, the best model."""

from pathlib import Path
from typing import Any

from configs.train import Config
from eval.validation import (
    BestCheckpoint,
    TrainingTasks,
    Validation,
    forget_samples,
    save_picture,
    save_samples,
)
from training.callbacks import Callback
from training.checkpoint import move_to_abandoned
from training.export import export, unsharded
from utils.device import autocast


class Evaluation(Callback):
    """Evaluates the model between two steps, logs the results, and exports the best model so far.

    `predictions`: the last ones, each with image, question, answer and prediction.
    """

    def __init__(self, config: Config, folder: Path, validation: Validation, tasks: TrainingTasks) -> None:
        self.config, self.folder, self.validation, self.tasks = config, folder, validation, tasks
        metrics = validation.metrics(config.eval.captions) | tasks.metrics
        self.best = BestCheckpoint(folder, config.eval.best, metrics)
        self.predictions: list[dict[str, Any]] = []
        self.warnings: list[str] = []

    def begin(self, trainer: Any) -> None:
        """Later steps' samples are deleted, and their best model is moved to `checkpoints/abandoned`."""
        if trainer.world.is_rank0:
            self.best.go_back(trainer.step, lambda path: move_to_abandoned(path, self.folder / "checkpoints"))
            forget_samples(self.folder / "samples", trainer.step)
            trainer.saver.protected_step = self.best.step

    def evaluate(self, trainer: Any) -> dict[str, Any]:
        model, e, step = unsharded(trainer.model, self.config), self.config.eval, trainer.step
        with autocast(self.config.train.dtype, trainer.device):
            scores = self.validation.score(model, trainer.world)
        self._predict(trainer, model)
        self._score_captions(trainer, model, scores)
        self._log_scores(trainer, scores)
        metrics = {f"validation_{name}": value for name, value in scores.items()}
        dropped = sorted(self.validation.dataset.dropped.items())
        if dropped:
            metrics["validation_dropped"] = {f"{source}: {reason}": n for (source, reason), n in dropped}
        if step == self.config.max_steps or (e.tasks_every and step % e.tasks_every == 0):
            task_scores = self.tasks.score(model, self.validation.dataset.renderer, trainer.world)
            for name, value in task_scores.items():
                trainer.log.say(f"    {name} {value:.4f}")
            metrics |= task_scores
        if trainer.world.is_rank0 and self.best.is_beaten(step, metrics):
            tokenizer = self.validation.dataset.renderer.tokenizer
            export(model, self.folder / "best", tokenizer, self.config, self.folder, metrics)
            self.best.note(step, metrics)
            trainer.saver.protected_step = step
        return metrics

    def _predict(self, trainer: Any, model: Any) -> None:
        """Answer a few validation questions; save and log the answers, and the pictures of them."""
        self.predictions, step = self.validation.predictions(model, 8, trainer.world), trainer.step
        if trainer.world.is_rank0:
            samples = self.folder / "samples"
            save_samples(samples, step, self.predictions)
            trainer.log.trackers.predictions(step, self.predictions, samples / f"step_{step:06d}.png")
            tokens = save_picture(
                self.validation.agreement.picture(), samples / f"step_{step:06d}_tokens.png"
            )
            trainer.log.trackers.picture(step, "tokens", tokens)

    def _score_captions(self, trainer: Any, model: Any, scores: dict[str, Any]) -> None:
        """Add CIDEr to `scores` if the validation records are captions; warn once of what lowers it."""
        e = self.config.eval
        captions = self.validation.cider(model, e.captions, e.caption_tokens, trainer.world)
        if captions is None:
            return
        scores["cider"] = captions.score
        if captions.warning and captions.warning not in self.warnings:
            self.warnings.append(captions.warning)
            trainer.log.say(f"warning: {captions.warning}")

    def _log_scores(self, trainer: Any, scores: dict[str, Any]) -> None:
        """Print the scores, and the first predictions."""
        more = "".join(
            f", {name.removeprefix('accuracy_')} {value:.2%}"
            for name, value in scores.items()
            if name.startswith("accuracy_")
        )
        if "cider" in scores:
            more += f", CIDEr {scores['cider']:.3f}"
        trainer.log.say(
            f"step {trainer.step}: validation loss {scores['loss']:.4f}, "
            f"accuracy {scores['accuracy']:.2%}{more}"
        )
        for p in self.predictions[:4]:
            answer = " ".join(p["prediction"].split())  # on one line
            truth = "" if p["prediction"] == p["answer"] else f"   (truth: {p['answer']})"
            trainer.log.say(f"    {p['question']}  →  {answer}{truth}")
