"""Experiment trackers: W&B, TensorBoard. If one fails, the run and the other trackers continue.

Trackers are selected by name, `"wandb,tensorboard"`; only their packages are imported. They write into the
run folder.
"""

import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from secrets import token_hex
from shlex import quote
from typing import Any

import numpy as np

from data.images import open_image
from utils.errors import UsageError, UserError, nearest
from utils.files import write_text

PROJECT = "dualtowervlm"
ROOT = Path(__file__).parent.parent
# Folders whose code is stored with a W&B run; the second ones exist only in a repository.
PACKAGES = ("configs", "data", "eval", "hf", "models", "tools", "training", "utils")
REPOSITORY_FOLDERS = ("benchmarks", "scripts", "tests")
WANDB_DEFAULTS = {  # of environment variables that W&B reads
    "WANDB_CONSOLE": "off",
    "WANDB_SILENT": "true",
    "WANDB_ERROR_REPORTING": "false",  # it calls the server in offline runs too, and waits for it at the end
    "WANDB_HTTP_TIMEOUT": "5",  # seconds, of the requests in this thread before a table is sent
    "WANDB_INIT_TIMEOUT": "10",  # seconds for an answer at the start
    "WANDB_FINISH_TIMEOUT": "10",  # seconds for the upload of the rest at the end
}
SIDE = 512  # pixels: maximum side of an image in a table
TEXTS = ("question", "answer", "prediction")

Histogram = tuple[np.ndarray, np.ndarray]  # counts (N,), edges (N + 1,)
Say = Callable[[str], None]


class Trackers:
    """The trackers in `names` (comma-separated; "" for none). One that fails is dropped with a warning.

    Steps may come in any order, and repeatedly: after a resume or a slow evaluation.
    """

    def __init__(
        self, names: str, folder: Path, config: dict[str, Any], say: Say, resumed_from: int | None
    ) -> None:
        self.say = say
        self.open = {name: TRACKERS[name](folder, say) for name in self.check(names)}
        self._each("start", config, resumed_from)

    @staticmethod
    def check(names: str) -> list[str]:
        """Split `names`. Unknown names raise `UsageError`; missing or old packages raise `UserError`."""
        selected = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
        for name in selected:
            if name not in TRACKERS:
                raise UsageError(f"there is no tracker '{name}'{nearest(name, list(TRACKERS))}")
            try:
                installed = version(name)  # not find_spec, which takes a folder of that name for the package
            except PackageNotFoundError:
                raise UserError(
                    f"the package {name} is not installed: that tracker needs the group {name} "
                    f"(pip install -e '.[{name}]')"
                ) from None
            oldest = [int(n) for n in OLDEST[name].split(".")]
            if [int(n) for n in re.findall(r"\d+", installed)[:2]] < oldest:
                raise UserError(
                    f"{name} {installed} is too old, {OLDEST[name]} is needed (pip install -e '.[{name}]')"
                )
        return selected

    def metrics(self, values: dict[str, Any]) -> None:
        """Send a line of metrics.jsonl. A line without a training loss comes from an evaluation."""
        self._each("metrics", values["step"], flatten(values), "loss" not in values)

    def histograms(self, step: int, histograms: dict[str, Histogram]) -> None:
        self._each("histograms", step, histograms)

    def predictions(self, step: int, rows: list[dict[str, str]], sheet: Path | None) -> None:
        """`rows`: image (a path, or ""), question, answer, prediction; `sheet`: one image of them all."""
        self._each("predictions", step, rows, sheet)

    def picture(self, step: int, name: str, path: Path) -> None:
        """Send an image of an evaluation in full size."""
        self._each("picture", step, name, path)

    def close(self, exit_ok: bool) -> None:
        self._each("close", exit_ok)
        self.open = {}

    def _each(self, method: str, *arguments: Any) -> None:
        for name, tracker in list(self.open.items()):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:
                del self.open[name]
                with suppress(Exception):  # the warning below gives the first error
                    tracker.close(False)
                self.say(f"warning: {name}: {one_line(error)} — logging to it stops, metrics.jsonl goes on")


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:240] or type(error).__name__


def flatten(values: dict[str, Any]) -> dict[str, float]:
    """The numbers in a line of metrics.jsonl, without its step.

    `{"lr": {"left": 0.1}, "head_losses": [3.0]}` → `{"lr/left": 0.1, "head_losses/1": 3.0}`.
    """
    flat = {}
    for key, value in values.items():
        if isinstance(value, list):
            value = dict(enumerate(value, 1))
        for part, number in value.items() if isinstance(value, dict) else [("", value)]:
            if isinstance(number, int | float) and not isinstance(number, bool):
                flat[f"{key}/{part}".removesuffix("/")] = number
    flat.pop("step", None)
    return flat


class Wandb:
    """Weights & Biases; online if WANDB_MODE allows it, an API key exists and the server answers in 10 s.

    W&B's own steps must not decrease, so they are not used. Instead the metrics `step` and, for evaluations,
    `validation_step` are the axes of all others. A resumed run keeps its id, in `wandb_id`; its repeated
    steps then appear twice.
    """

    def __init__(self, folder: Path, say: Say) -> None:
        self.folder, self.say = folder, say
        self.known: set[str] = set()  # evaluation metrics whose axis is defined

    def start(self, config: dict[str, Any], resumed_from: int | None) -> None:
        os.environ.update(WANDB_DEFAULTS | os.environ)
        os.environ["WANDB_DATA_DIR"] = str((self.folder / "wandb").absolute())  # images of tables
        import wandb

        self.wandb = wandb
        settings = wandb.setup().settings  # the environment's and W&B's own files'
        path = self.folder / "wandb_id"
        run_id = path.read_text(encoding="utf-8").strip() if path.is_file() else token_hex(4)
        mode, why = {"dryrun": "offline", "run": "online"}.get(settings.mode, settings.mode), ""
        if mode in ("online", "shared"):
            try:
                if not wandb.login(prompt=False):
                    raise UserError("no API key (WANDB_API_KEY, or `wandb login`)")
                self._init(config, run_id, mode)
            except Exception as error:
                wandb.teardown()  # else the id is still in use
                mode, why = "offline", f"{one_line(error)}: "
        if mode in ("offline", "disabled"):
            self._init(config, run_id, mode)
        if mode == "disabled":
            return self.say("wandb: disabled")
        write_text(path, run_id + "\n")
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("validation_step", hidden=True)
        self.run.define_metric("*", step_metric="step")
        if not settings.disable_code:
            self.run.log_code(str(ROOT), f"source-{run_id}", include_fn=is_code)
        if mode == "offline":  # the pattern includes the parts before a resume
            sync_command = f"wandb sync {quote(str(self.folder))}/wandb/offline-run-*"
            return self.say(f"wandb: {why}kept offline; send it with: {sync_command}")
        return self.say(f"wandb: {self.run.url}")

    def _init(self, config: dict[str, Any], run_id: str, mode: Any) -> None:
        settings = self.wandb.setup().settings
        self.run = self.wandb.init(
            project=settings.project or PROJECT,
            name=settings.run_name or self.folder.name,
            id=run_id,
            resume="allow",
            dir=self.folder,
            config=config,
            mode=mode,
            settings=self.wandb.Settings(finish_timeout_raises=True, save_code=False),
        )

    def metrics(self, step: int, numbers: dict[str, Any], evaluation: bool) -> None:
        if evaluation:
            for name in numbers.keys() - self.known:
                self.run.define_metric(name, step_metric="validation_step")
            self.known |= numbers.keys()
        self.run.log({"step": step} | ({"validation_step": step} if evaluation else {}) | numbers)

    def histograms(self, step: int, histograms: dict[str, Histogram]) -> None:
        drawn = {name: self.wandb.Histogram(np_histogram=pair) for name, pair in histograms.items()}
        self.run.log({"step": step} | drawn)

    def predictions(self, step: int, rows: list[dict[str, str]], sheet: Path | None) -> None:
        table = self.wandb.Table(columns=["step", "image", *TEXTS])
        for row in rows:
            image = None
            if row["image"]:
                thumbnail = open_image(row["image"])
                thumbnail.thumbnail((SIDE, SIDE))
                image = self.wandb.Image(thumbnail)
            table.add_data(step, image, *(row[name] for name in TEXTS))
        self.metrics(step, {"predictions": table}, True)

    def picture(self, step: int, name: str, path: Path) -> None:
        self.metrics(step, {name: self.wandb.Image(open_image(path))}, True)

    def close(self, exit_ok: bool) -> None:
        try:
            self.run.finish(exit_code=0 if exit_ok else 1)
        except TimeoutError:
            sync_command = f"wandb sync {quote(str(self.run.settings.sync_dir))}"
            self.say(f"warning: wandb: not everything was sent; send it with: {sync_command}")
        finally:
            self.wandb.teardown()


def is_code(path: str, root: str) -> bool:
    """Whether a file below `root` is the project's *.py or *.sh: of no environment, run or package."""
    folder, *inner = Path(path).relative_to(root).parts
    if not path.endswith((".py", ".sh")) or (inner and folder not in PACKAGES + REPOSITORY_FOLDERS):
        return False
    # Installed, `root` is site-packages, with other projects' files besides.
    return (bool(inner) and folder in PACKAGES) or (Path(root) / "pyproject.toml").is_file()


class TensorBoard:
    """Event files in `tensorboard/`. After a resume TensorBoard hides the events that the run repeats."""

    def __init__(self, folder: Path, say: Say) -> None:
        self.folder, self.say = folder / "tensorboard", say

    def start(self, config: dict[str, Any], resumed_from: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.folder), purge_step=(resumed_from or 0) + 1, flush_secs=10)
        code = "    " + json.dumps(config, indent=2).replace("\n", "\n    ")  # indented: code in Markdown
        self.writer.add_text("config", code, resumed_from or 0)
        self.say(f"tensorboard: tensorboard --logdir {self.folder}")

    def metrics(self, step: int, numbers: dict[str, float], evaluation: bool) -> None:
        for name, number in numbers.items():
            self.writer.add_scalar(name, number, step)

    def histograms(self, step: int, histograms: dict[str, Histogram]) -> None:
        for name, (counts, edges) in histograms.items():
            middles = (edges[1:] + edges[:-1]) / 2
            count, total, squares = (float((counts * middles**power).sum()) for power in range(3))
            buckets = edges[1:].tolist(), counts.tolist()
            self.writer.add_histogram_raw(name, edges[0], edges[-1], count, total, squares, *buckets, step)

    def predictions(self, step: int, rows: list[dict[str, str]], sheet: Path | None) -> None:
        if sheet is not None:
            self.picture(step, "predictions", sheet)
        cells = [[" ".join(row[name].split()).replace("|", "\\|") for name in TEXTS] for row in rows]
        lines = [" | ".join(line) for line in (TEXTS, ["---"] * len(TEXTS), *cells)]
        self.writer.add_text("predictions", "\n".join(lines), step)

    def picture(self, step: int, name: str, path: Path) -> None:
        self.writer.add_image(name, np.asarray(open_image(path)), step, dataformats="HWC")

    def close(self, exit_ok: bool) -> None:
        self.writer.close()


TRACKERS: dict[str, Any] = {"wandb": Wandb, "tensorboard": TensorBoard}
OLDEST = {"wandb": "0.31", "tensorboard": "2.18"}  # as in pyproject.toml
