"""Pushes a run's model to the Hub while it trains. Errors of the Hub are warnings; training goes on."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub.utils.tqdm import disable_progress_bars

from configs.train import HubConfig
from models.weights.tensors import check_weights
from training.callbacks import Callback
from training.checkpoint import step_of
from utils.errors import UserError
from utils.hub import HubUnavailable, open_repo, push


class Pusher(Callback):
    """Pushes checkpoints' models in a thread; on rank 0.

    While a push is under way only the newest checkpoint waits. `export(checkpoint, folder)` writes a model
    folder of a checkpoint, in that thread.
    """

    def __init__(
        self,
        config: HubConfig,
        model_type: str,
        folder: Path,
        export: Callable[[Path, Path], None],
        say: Callable[[str], None],
    ) -> None:
        """Open the repository. A refusal raises `UserError`; an unreachable Hub is tried again later."""
        self.config, self.model_type, self.folder = config, model_type, folder / "hub"
        self.export, self.say = export, say
        self.lock = threading.Lock()
        self.thread: threading.Thread | None = None
        self.newest: Path | None = None  # waits for its push
        self.pushing: Path | None = None
        self.repo = ""
        self.last_step = -1
        self.warnings: set[str] = set()
        disable_progress_bars()  # the run has its own
        try:
            self.repo = self._open_repo()
            say(f"hub: the model will be pushed to {self.repo}")
        except HubUnavailable as error:
            self._warn(str(error))

    def _open_repo(self) -> str:
        return self.repo or open_repo(self.config.repo, self.model_type, self.config.private or None)

    def _warn(self, problem: str) -> None:
        if problem not in self.warnings:
            self.warnings.add(problem)
            self.say(f"warning: hub: {problem}; training goes on, and the next checkpoint is tried again")

    def _push(self, folder: Path, message: str) -> str:
        check_weights(folder)
        self.repo = self._open_repo()
        return push(folder, self.repo, message)

    def begin(self, trainer: Any) -> None:
        self.last_step = trainer.config.max_steps

    def saved(self, checkpoint: Path) -> None:
        """Push a checkpoint's model, now or after the push that is under way.

        Not the last step's: it is pushed when it is exported.
        """
        if step_of(checkpoint) == self.last_step:
            return
        with self.lock:
            self.newest = checkpoint
            if self.thread is None:
                self.thread = threading.Thread(target=self._run, name="hub", daemon=True)
                self.thread.start()

    def in_use(self) -> list[Path]:
        """The checkpoints that are read, or will be: they must stay."""
        with self.lock:
            return [path for path in (self.pushing, self.newest) if path is not None]

    def _run(self) -> None:
        while True:
            with self.lock:
                checkpoint = self.pushing = self.newest
                self.newest = None
                if checkpoint is None:
                    self.thread = None
                    return
            try:
                self.export(checkpoint, self.folder)
                self._push(self.folder, checkpoint.name.replace("_", " "))
            except Exception as error:  # the Hub, a full disk: training goes on
                self._warn(str(error) or type(error).__name__)
            finally:
                shutil.rmtree(self.folder, ignore_errors=True)

    def finish(self, model: Path) -> None:
        """Wait for the push under way, then push the finished model's folder."""
        with self.lock:
            self.newest, thread = None, self.thread
        if thread is not None:
            thread.join()
        try:
            self.say(f"hub: pushed: {self._push(model, 'final model')}")
        except UserError as error:
            self.say(
                f"warning: hub: {error}; the model is in {model}, to be pushed later: "
                f"python -m tools.hub push {model} {self.config.repo}"
            )
