"""The log of a run: lines on the terminal and in train.log, a live progress bar, and metrics.jsonl."""

import json
import time
from collections import deque
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from training.trackers import Trackers
from utils.errors import UserError
from utils.files import append_text, sync, write_text

PLAIN_SECONDS = 10.0  # between two progress lines without a terminal


class RunLog:
    """The log of a run, written by the first rank.

    In the run's folder, `say` prints a line and appends it to `train.log`; `metrics` appends a JSON object to
    `metrics.jsonl`.
    """

    def __init__(self, folder: Path, silent: bool = False) -> None:
        self.silent = silent  # on all ranks but the first
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{error.filename} cannot be created: {error.strerror}") from error
        self.console = Console(highlight=False, soft_wrap=True)
        self.log_path = folder / "train.log"
        self.early: str | None = ""  # lines of before `start`, when a start that fails must leave no file
        self.metrics_path = folder / "metrics.jsonl"
        self.progress: Progress | None = None
        self.last_plain = 0.0
        self.logged = 0  # the last step with metrics
        self.folder = folder
        self.trackers = Trackers("", folder, {}, self.say, None)

    def track(self, names: str, config: dict[str, Any], resumed_from: int | None) -> None:
        """Send everything to the experiment trackers `names` (`--log`) too, until `stop`."""
        if not self.silent:
            self.trackers = Trackers(names, self.folder, config, self.say, resumed_from)

    def say(self, text: str = "") -> None:
        if self.silent:
            return
        self.console.print(text, markup=False)
        lines = "".join(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n" for line in text.split("\n"))
        if self.early is None:
            append_text(self.log_path, lines)
        else:
            self.early += lines

    def metrics(self, values: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl. `seconds` counts from the start of training in this process."""
        if self.silent:
            return
        values = values | {"seconds": round(time.perf_counter() - self.started, 2)}
        append_text(self.metrics_path, json.dumps(values) + "\n")
        self.logged = values["step"]
        self.trackers.metrics(values)

    def sync(self) -> None:
        """Wait until the metrics so far are on the disk."""
        if not self.silent and self.metrics_path.is_file():
            sync(self.metrics_path)

    def read_until(self, step: int, logged: int = 0) -> dict[Path, str]:
        """Contents of metrics.jsonl and skipped.jsonl up to `step`: a resumed run repeats the later steps.

        An incomplete last line is dropped. Warns if the metrics end before step `logged`.
        """
        contents = {}
        for path in () if self.silent else (self.metrics_path, self.folder / "skipped.jsonl"):
            if not path.is_file():
                continue
            try:
                lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
                steps = {line: json.loads(line)["step"] for line in lines if line.endswith("\n")}
                contents[path] = "".join(line for line in lines if line in steps and steps[line] <= step)
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{path} is damaged ({error}): mend or delete it, then resume") from None
            if path == self.metrics_path:
                self.logged = max((number for number in steps.values() if number <= step), default=0)
        if not self.silent and self.logged < logged:
            self.say(
                f"warning: {self.metrics_path} ends at step {self.logged}: "
                f"the lines up to step {logged}, where this run goes on, are lost"
            )
        return contents

    def truncate(self, contents: dict[Path, str]) -> None:
        """Reduce the files to the contents that `read_until` returned."""
        for path, text in contents.items():
            write_text(path, text)

    def start(self, step: int, max_steps: int) -> None:
        if self.early:
            append_text(self.log_path, self.early)
        self.early = None
        if self.console.is_terminal and not self.silent:
            columns = (
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[status]}"),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self.progress = Progress(*columns, console=self.console, transient=True, refresh_per_second=4)
            self.progress.add_task("", total=max_steps, completed=step, status="")
            self.progress.start()
        self.max_steps = max_steps
        self.started = self.last_plain = time.perf_counter()
        # The last minute, to estimate the time left: the first steps are slow, because they encode images.
        self.recent = deque([(self.last_plain, step)])

    def step(self, step: int, loss: float, tokens_per_s: float) -> None:
        status = f"loss {loss:.4f}  {tokens_per_s:,.0f} tokens/s"
        now = time.perf_counter()
        self.recent.append((now, step))
        while now - self.recent[0][0] > 60 and len(self.recent) > 2:
            self.recent.popleft()
        if self.progress is not None:
            self.progress.update(self.progress.task_ids[0], completed=step, status=status)
        elif not self.silent and now - self.last_plain >= PLAIN_SECONDS:
            self.last_plain = now
            then, first = self.recent[0]
            left = (now - then) / (step - first) * (self.max_steps - step)
            self.say(f"step {step}/{self.max_steps}  {status}  {left:.0f} s left")

    def stop(self, well: bool = True) -> None:
        """Close trackers and progress bar; `well`: the run ended or was stopped without an error."""
        self.trackers.close(well)
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
