"""Experiment trackers: W&B, TensorBoard. If one fails, the run and the other trackers continue.

Trackers are selected by name, `"wandb,tensorboard"`; only their packages are imported. They write into the
run folder.
"""

import json
import os
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from netrc import NetrcParseError, netrc
from pathlib import Path
from secrets import token_hex
from shlex import quote
from shutil import copyfile
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from data.images import open_image
from utils.errors import UsageError, UserError, nearest
from utils.files import write_text

PROJECT = "dualtowervlm"
# Folders whose code is stored with a W&B run; the second ones exist only in a repository.
PACKAGES = ("configs", "data", "eval", "hf", "models", "tools", "training", "utils")
REPOSITORY_FOLDERS = ("benchmarks", "scripts", "tests")
WAIT = 10.0  # seconds: W&B's limit for an answer at the start, and for the upload of the rest at the end
SIDE = 512  # pixels: maximum side of an image that is sent

Histogram = tuple[np.ndarray, np.ndarray]  # counts (N,), edges (N + 1,)
Say = Callable[[str], None]


class Tracker(Protocol):
    """A tracker must accept steps in any order and repeated: after a resume or a slow evaluation."""

    def __init__(self, folder: Path, say: Say) -> None: ...
    def start(self, config: dict[str, Any], resumed_from: int | None) -> None: ...
    def metrics(self, step: int, numbers: dict[str, float], evaluation: bool) -> None: ...
    def histograms(self, step: int, histograms: dict[str, Histogram]) -> None: ...
    def predictions(self, step: int, rows: list[dict[str, str]], sheet: Path | None) -> None: ...
    def picture(self, step: int, name: str, path: Path) -> None: ...
    def close(self, exit_ok: bool) -> None: ...


class Trackers:
    """The trackers in `names` (comma-separated; "" for none). One that fails is dropped with a warning."""

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
    flat: dict[str, float] = {}
    for key, value in values.items():
        parts: dict[Any, Any] = {"": value}
        if isinstance(value, dict):
            parts = value
        elif isinstance(value, list):
            parts = dict(enumerate(value, 1))
        flat |= {
            f"{key}/{part}".removesuffix("/"): number
            for part, number in parts.items()
            if isinstance(number, int | float) and not isinstance(number, bool)
        }
    flat.pop("step", None)
    return flat


def thumbnail(path: str) -> Image.Image | None:
    if not path:
        return None
    image = open_image(path)
    image.thumbnail((SIDE, SIDE))
    return image


class Wandb:
    """Weights & Biases; online if WANDB_MODE allows it, an API key exists and the server answers in `WAIT` s.

    W&B's own steps must not decrease, so they are not used. Instead the metrics `step` and, for evaluations,
    `validation_step` are the axes of all others. A resumed run keeps its id, in `wandb_id`; its repeated
    steps then appear twice.
    """

    def __init__(self, folder: Path, say: Say) -> None:
        self.folder, self.say = folder, say
        self.known: set[str] = set()  # evaluation metrics whose axis is defined

    def start(self, config: dict[str, Any], resumed_from: int | None) -> None:
        # W&B's telemetry calls its server in offline runs too, and waits for it at the end.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        # Images of tables, until they are sent.
        os.environ["WANDB_DATA_DIR"] = str((self.folder / "wandb").absolute())
        # Seconds, of the requests in this thread before a table is sent.
        os.environ.setdefault("WANDB_HTTP_TIMEOUT", "5")
        import wandb

        self.wandb = wandb
        # Merged with the environment and W&B's settings files.
        settings = wandb.setup(wandb.Settings(show_info=False)).settings
        key = settings.api_key or netrc_key(settings.base_url)
        path = self.folder / "wandb_id"
        run_id = path.read_text(encoding="utf-8").strip() if path.is_file() else token_hex(4)
        mode, why = {"dryrun": "offline", "run": "online"}.get(settings.mode, settings.mode), ""
        if mode in ("online", "shared") and not key and not settings.identity_token_file:
            mode, why = "offline", "no API key (WANDB_API_KEY, or `wandb login`): "
        if mode in ("online", "shared"):
            try:
                self.run = self._init(config, run_id, mode, key)
            except Exception as error:
                wandb.teardown()  # else the id is still in use
                mode, why = "offline", f"{one_line(error)}: "
        if mode in ("offline", "disabled"):
            self.run = self._init(config, run_id, mode, None)
        if mode == "disabled":
            return self.say("wandb: disabled")
        write_text(path, run_id + "\n")
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("validation_step", hidden=True)
        self.run.define_metric("*", step_metric="step")
        if not settings.disable_code:
            with tempfile.TemporaryDirectory() as folder:
                self.run.log_code(copy_code(Path(folder)), f"source-{run_id}", include_fn=lambda path: True)
        if mode == "offline":  # the pattern includes the parts before a resume
            sync_command = f"wandb sync {quote(str(self.folder))}/wandb/offline-run-*"
            return self.say(f"wandb: {why}kept offline; send it with: {sync_command}")
        return self.say(f"wandb: {self.run.url}")

    def _init(self, config: dict[str, Any], run_id: str, mode: str, key: str | None) -> Any:
        seen, wandb = self.wandb.setup().settings, self.wandb
        settings = wandb.Settings(
            api_key=key,  # passed explicitly, so that W&B neither asks for it nor stores it
            init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", WAIT)),
            finish_timeout=float(os.environ.get("WANDB_FINISH_TIMEOUT", WAIT)),
            finish_timeout_raises=True,
            console="off",
            silent=True,
            save_code=False,
        )
        return wandb.init(
            project=seen.project or PROJECT,
            name=seen.run_name or self.folder.name,
            id=run_id,
            resume="allow",
            dir=self.folder,
            config=config,
            mode=mode,
            settings=settings,
        )

    def metrics(self, step: int, numbers: dict[str, Any], evaluation: bool) -> None:
        if evaluation:
            for name in numbers.keys() - self.known:
                self.run.define_metric(name, step_metric="validation_step")
            self.known |= numbers.keys()
        self.run.log({"step": step} | ({"validation_step": step} if evaluation else {}) | numbers)

    def histograms(self, step: int, histograms: dict[str, Histogram]) -> None:
        self.run.log(
            {"step": step}
            | {name: self.wandb.Histogram(np_histogram=pair) for name, pair in histograms.items()}
        )

    def predictions(self, step: int, rows: list[dict[str, str]], sheet: Path | None) -> None:
        table = self.wandb.Table(columns=["step", "image", "question", "answer", "prediction"])
        for row in rows:
            image = thumbnail(row["image"])
            table.add_data(
                step, image and self.wandb.Image(image), row["question"], row["answer"], row["prediction"]
            )
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


def netrc_key(url: str) -> str | None:
    """The API key that `wandb login` stored for the server at `url`; W&B's own server has several names."""
    host = urlsplit(url).netloc
    hosts = [host, *(["api.wandb.ai"] if host.endswith((".wandb.ai", ".coreweave.com")) else [])]
    for path in [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]:
        try:
            entries = netrc(Path(path).expanduser())
        except (OSError, NetrcParseError):
            continue
        for entry in filter(None, map(entries.authenticators, hosts)):
            return entry[2]
    return None


def copy_code(folder: Path) -> str:
    """Copy the repository's *.py and *.sh to `folder`: no virtual environment, run or other package."""
    root = Path(__file__).parent.parent
    repository = (root / "pyproject.toml").is_file()  # else installed into site-packages
    folders = PACKAGES + REPOSITORY_FOLDERS if repository else PACKAGES
    files = [file for name in folders for file in (root / name).rglob("*")]
    for file in files + (list(root.glob("*")) if repository else []):
        if file.suffix in (".py", ".sh") and file.is_file():
            target = folder / file.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            copyfile(file, target)
    return str(folder)


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
            counts, edges = np.asarray(counts, float), np.asarray(edges, float)
            middles = (edges[1:] + edges[:-1]) / 2
            total, squares = (counts * middles).sum(), (counts * middles**2).sum()
            self.writer.add_histogram_raw(
                name,
                edges[0],
                edges[-1],
                counts.sum(),
                total,
                squares,
                edges[1:].tolist(),
                counts.tolist(),
                step,
            )

    def predictions(self, step: int, rows: list[dict[str, str]], sheet: Path | None) -> None:
        if sheet is not None:
            self.writer.add_image("predictions", np.asarray(open_image(sheet)), step, dataformats="HWC")
        cells = [
            [" ".join(row[key].split()).replace("|", "\\|") for key in ("question", "answer", "prediction")]
            for row in rows
        ]
        lines = ["question | answer | prediction", "--- | --- | ---", *(" | ".join(line) for line in cells)]
        self.writer.add_text("predictions", "\n".join(lines), step)

    def picture(self, step: int, name: str, path: Path) -> None:
        self.writer.add_image(name, np.asarray(open_image(path)), step, dataformats="HWC")

    def close(self, exit_ok: bool) -> None:
        self.writer.close()


TRACKERS: dict[str, type[Tracker]] = {"wandb": Wandb, "tensorboard": TensorBoard}
OLDEST = {"wandb": "0.31", "tensorboard": "2.18"}  # as in pyproject.toml
