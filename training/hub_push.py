"""Pushing a run's model to the Hub while it trains. Whatever goes wrong there is told; the run goes on."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from huggingface_hub.utils import disable_progress_bars

from configs.train import HubConfig
from utils.errors import UserError
from utils.hub import HubUnavailable, open_repo, push


class Pusher:
    """The first rank's. `saved` begins to push a checkpoint's model, in a thread; where one is under way the newest waits, and those between are passed over.

    `export(checkpoint, folder)` makes a model folder of a checkpoint, in that thread.
    """

    def __init__(
        self,
        config: HubConfig,
        model_type: str,
        folder: Path,
        export: Callable[[Path, Path], None],
        say: Callable[[str], None],
    ) -> None:
        """Opens the repository: a refusal raises `UserError`, before anything is trained; a Hub that is out of reach is asked again later."""
        self.config, self.model_type, self.folder, self.export, self.say = (
            config,
            model_type,
            folder / "hub",
            export,
            say,
        )
        self.lock = threading.Lock()
        self.thread: threading.Thread | None = None
        self.newest: Path | None = None
        self.repo = ""
        self.told: set[str] = set()
        disable_progress_bars()  # the terminal has the run's own
        try:
            self.repo = self._opened()
            say(f"hub: the model will be pushed to {self.repo}")
        except HubUnavailable as error:
            self._warn(str(error))

    def _opened(self) -> str:
        return self.repo or open_repo(self.config.repo, self.model_type, self.config.private or None)

    def _warn(self, problem: str) -> None:
        if problem not in self.told:
            self.told.add(problem)
            self.say(f"warning: hub: {problem}; training goes on, and the next checkpoint is tried again")

    def _push(self, folder: Path, message: str) -> str:
        self.repo = self._opened()
        return push(folder, self.repo, message)

    def saved(self, checkpoint: Path) -> None:
        with self.lock:
            self.newest = checkpoint
            if self.thread is None:
                self.thread = threading.Thread(target=self._run, name="hub", daemon=True)
                self.thread.start()

    def _run(self) -> None:
        while True:
            with self.lock:
                checkpoint, self.newest = self.newest, None
                if checkpoint is None:
                    self.thread = None
                    return
            try:
                self.export(checkpoint, self.folder)
                self._push(self.folder, checkpoint.name.replace("_", " "))
            except Exception as error:  # of the Hub, of a full disk, of a checkpoint that is gone by now: the run has its own
                self._warn(str(error) or type(error).__name__)
            finally:
                shutil.rmtree(self.folder, ignore_errors=True)

    def finish(self, model: Path) -> None:
        """Wait for what is under way, then push the finished model's folder."""
        with self.lock:
            self.newest, thread = None, self.thread
        if thread is not None:
            thread.join()
        try:
            self.say(f"hub: pushed: {self._push(model, 'final model')}")
        except UserError as error:
            self.say(
                f"warning: hub: {error}; the model stands in {model}, to be pushed later: python -m tools.hub push {model} {self.config.repo}"
            )
