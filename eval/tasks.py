"""The known tasks, their data, and a run of some of them through lmms-eval."""

import hashlib
import logging
import os
import shutil
import traceback
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

import datasets
import lmms_eval.api.task
import lmms_eval.evaluator
import yaml
from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from huggingface_hub import get_token
from huggingface_hub.constants import HF_HOME
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from loguru import logger
from PIL import ImageFile
from tenacity import RetryError

from data.sources import parse_sources
from eval.captions import JAVA_METRICS, caption_scores, check_metrics
from eval.lmms_eval_wrapper import DualTower
from utils.errors import UsageError, UserError, nearest

# Importing lmms-eval sets it for the whole process; a truncated image is an error.
ImageFile.LOAD_TRUNCATED_IMAGES = False
OURS = Path(__file__).parent / "tasks"
# lmms-eval's caption metrics are named PREFIX_NAME and all start Java. NAME → our metric, equal to 1e-4.
STOCK_CAPTIONS = {"CIDEr": "CIDEr", "ROUGE_L": "ROUGE-L", "METEOR": "METEOR", "SPICE": "SPICE"} | {
    f"Bleu_{n}": f"BLEU-{n}" for n in range(1, 5)
}
COPY_HINT = "; a copy of a data set is all of its repository: README.md says which files are which split"
CAPTION_METRICS = ("CIDEr", "BLEU-4", "ROUGE-L")


class Outline(getattr(yaml, "CFullLoader", yaml.FullLoader)):  # type: ignore[misc]
    """A YAML loader that skips `!function`."""


Outline.add_constructor("!function", lambda loader, node: None)


@contextmanager
def read_by_libyaml() -> Iterator[None]:
    """Make lmms-eval read its 1,900 YAML files with libyaml: one second instead of PyYAML's eight."""
    full_load, yaml.full_load = yaml.full_load, lambda text: yaml.load(text, Loader=Outline)
    try:
        yield
    finally:
        yaml.full_load = full_load


class Tasks(TaskManager):
    """lmms-eval's tasks and ours, by name; a copy of a task's data under `data_root` goes before the Hub.

    `caption_metrics`: metrics of our caption tasks. `tokenizer`: "python" or "java", for all captions.
    `left_out` collects the metrics of lmms-eval's tasks that need Java, where there is none.
    """

    def __init__(
        self,
        data_root: Path | None = None,
        caption_metrics: Sequence[str] = CAPTION_METRICS,
        tokenizer: str = "python",
        matcher: str = "normalised",
        shots: int = 0,
    ) -> None:
        check_metrics(caption_metrics)
        os.environ.setdefault("HF_HOME", HF_HOME)  # some tasks read it
        with read_by_libyaml():
            super().__init__(verbosity="ERROR", include_path=str(OURS), model_name="dualtower")
        self.data_root, self.caption_metrics = data_root, caption_metrics
        self.tokenizer, self.matcher, self.shots = tokenizer, matcher, shots
        self.left_out: list[str] = []
        self.sources: dict[str, str] = {}  # of the tasks `captions:SOURCE` and `questions:SOURCE`
        self.captions: dict[str, str] = {}  # a task's name of a caption metric computed here → our name

    def _get_config(self, name: str) -> dict[str, Any]:
        config = super()._get_config(name)
        if name in self.sources:
            matcher = {"matcher": self.matcher} if name.startswith("questions:") else {}
            config |= {
                "task": name,
                "metadata": config["metadata"] | matcher | {"source": self.sources[name]},
            }
        if self.shots and "source" not in (config.get("metadata") or {}):
            raise UsageError(f"--shots is for tasks of our own; {name} is lmms-eval's")
        if self.shots:
            config["metadata"] = config["metadata"] | {"shots": self.shots}
        if (copy := self._local_copy(config, name)) is not None:
            config["dataset_path"] = str(copy)
            config["dataset_kwargs"] = {"cache_dir": cache_folder(copy)}
        elif (config.get("dataset_kwargs") or {}).get("token") is True and get_token() is None:
            # Most data sets are public; a private one raises its own error.
            config["dataset_kwargs"] = {
                key: value for key, value in config["dataset_kwargs"].items() if key != "token"
            }
        if name.partition(":")[0] in ("captions", "openmoji_captions"):
            config["metric_list"] = [
                {"metric": m, "aggregation": self._scorer(m), "higher_is_better": True}
                for m in self.caption_metrics
            ]
            self.captions |= {m: m for m in self.caption_metrics}
        elif config.get("metric_list"):
            config["metric_list"] = [
                metric for metric in map(self._without_java, config["metric_list"]) if metric is not None
            ]
        return config

    def _without_java(self, metric: dict[str, Any]) -> dict[str, Any] | None:
        """Replace a metric that starts Java by our own.

        None where it needs Java and there is none; any other metric is returned unchanged.
        """
        if "PTBTokenizer" not in getattr(metric.get("aggregation"), "__globals__", {}):
            return metric
        _, _, theirs = metric["metric"].partition("_")
        if theirs == "passthrough":
            return metric
        ours = STOCK_CAPTIONS.get(theirs)
        if (ours is None or ours in JAVA_METRICS) and shutil.which("java") is None:
            self.left_out.append(metric["metric"])
            return None
        if ours is None:
            return metric
        self.captions[metric["metric"]] = ours
        return metric | {"aggregation": self._scorer(ours)}

    def _scorer(self, name: str) -> Callable[..., float]:
        """Return an aggregation for lmms-eval: one of our caption metrics over all rows."""

        # lmms-eval passes `args` to functions that accept it.
        def aggregate(rows: list[dict[str, Any]], args: Any = None) -> float:
            answers, references = zip(*map(caption_pair, rows), strict=True)
            return caption_scores(answers, references, [name], self.tokenizer)[name]

        return aggregate

    def _local_copy(self, config: dict[str, Any], name: str) -> Path | None:
        """Return the first folder of DATA_ROOT/OWNER/NAME as on the Hub, DATA_ROOT/NAME, DATA_ROOT/TASK."""
        path = config.get("dataset_path")
        if self.data_root is None or not isinstance(path, str):
            return None
        candidates = (
            self.data_root / path,
            self.data_root / path.split("/")[-1],
            self.data_root / name,
        )
        return next((folder for folder in candidates if folder.is_dir()), None)

    def add(self, name: str) -> None:
        """Check that a task exists. `captions:SOURCE` and `questions:SOURCE` become tasks.

        SOURCE is written as in `data.sources`.
        """
        kind, colon, source = name.partition(":")
        if kind in ("captions", "questions") and name not in self.sources:
            if not colon:
                raise UsageError(f"--tasks {name} needs a source: {name}:NAME=PATH, as in --data.sources")
            parse_sources(source, f"--tasks {kind}")
            self.sources[name] = source
            self._task_index[name] = {"type": "python_task", "yaml_path": str(OURS / f"{kind}.yaml")}
            self._all_tasks.append(name)
        if name not in self.all_tasks:
            raise UsageError(f"--tasks: no task named '{name}'{nearest(name, self.all_tasks, 3)}")

    def load(self, name: str) -> list[tuple[str, bool]]:
        """Add a task and load its data now, so that errors come early.

        Returns (`<task>_<metric>`, whether higher is better) of each metric.
        """
        self.add(name)
        with plain_errors(name):
            try:
                loaded = self.load_task_or_group([name])
            except (RetryError, UserError, OSError):
                raise
            except ModuleNotFoundError as error:
                raise UserError(
                    f"task {name} needs the package {error.name}: pip install {error.name}"
                ) from error
            except Exception as error:  # a task's own code may raise anything on data of another form
                hint = "" if self.data_root is None else COPY_HINT
                cause = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                raise UserError(f"task {name} cannot be loaded ({cause}){hint}") from error
        return [
            (f"{leaf}_{metric_label(metric, reading.name)}", better)
            for leaf, task in leaf_tasks(loaded)
            for metric, better in task.higher_is_better().items()
            for reading in task._filters
        ]


def cache_folder(copy: Path) -> str:
    """Return the folder where `datasets` caches a copy: one for each state of the copy's files.

    By itself `datasets` confuses two folders with the same README.md, and does not notice changed files.
    """
    files = [
        (path.relative_to(copy).as_posix(), path.stat()) for path in sorted(copy.rglob("*")) if path.is_file()
    ]
    lines = [str(copy.resolve()), *(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in files)]
    digest = hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()
    return str(Path(datasets.config.HF_DATASETS_CACHE) / "copies" / digest)


def caption_pair(row: dict[str, Any]) -> tuple[str, list[str]]:
    """Return the answer and its references from what a caption task passes to its metrics.

    Our own form, and the forms of lmms-eval's tasks.
    """
    if "references" in row:
        return row["answer"], row["references"]
    references = row["answer"] if row.get("answer") is not None else row["instruction"]
    return row["pred"], [references] if isinstance(references, str) else list(references)


def metric_label(metric: str, filter_name: str) -> str:
    """Return a metric's name for people, with the filter where a task reads an answer in several ways."""
    return metric if filter_name == "none" else f"{metric} ({filter_name})"


def leaf_tasks(loaded: dict[Any, Any]) -> list[tuple[str, Any]]:
    """List the tasks of nested groups."""
    tasks = []
    for name, task in loaded.items():
        tasks += leaf_tasks(task) if isinstance(task, dict) else [(str(name), task)]
    return tasks


def silent(bar: Any) -> Callable[..., Any]:
    """Disable a progress bar of lmms-eval, which would stay on the screen beside ours."""
    return lambda *args, **settings: bar(*args, **settings | {"disable": True})


@contextmanager
def plain_errors(name: str) -> Iterator[None]:
    """Run a block without lmms-eval's log lines and bars, and with plain errors.

    What fails after lmms-eval's five tries raises `UserError`: data that is unavailable, or an answer that a
    task cannot score.
    """
    log, had_bars = logging.getLogger("datasets"), not are_progress_bars_disabled()
    level = log.level
    logger.disable("lmms_eval")
    log.setLevel(logging.ERROR)
    disable_progress_bars()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries that tasks import
        bars = [(module, module.tqdm) for module in (lmms_eval.evaluator, lmms_eval.api.task)]
        for module, bar in bars:
            module.tqdm = silent(bar)
        try:
            yield
        except RetryError as error:
            cause = error.last_attempt.exception()
            if isinstance(cause, UserError):
                raise cause from None
            text = f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
            frames = traceback.extract_tb(cause.__traceback__ if cause else None)
            if "download" in (frame.name for frame in frames):
                text = (
                    f"the data cannot be had ({text}): put a copy of the data set where --data-root finds it "
                    "(DIR/OWNER/NAME), or go online"
                )
            else:
                text = (
                    f"an answer could not be scored ({text}): "
                    "does the copy of the data have the form that the task expects?"
                )
            raise UserError(f"{name}: {text}") from cause
        finally:
            for module, bar in bars:
                module.tqdm = bar
            logger.enable("lmms_eval")
            log.setLevel(level)
            if had_bars:
                enable_progress_bars()
            ImageFile.LOAD_TRUNCATED_IMAGES = False  # lmms-eval sets it, for the whole process


def scores_of(outcome: dict[str, Any]) -> list[tuple[str, str, float]]:
    """List (task, metric, value) of lmms-eval's results, without its own standard errors."""
    scores = []
    for task, values in outcome["results"].items():
        for key, value in sorted(values.items()):
            metric, _, filter_name = key.partition(",")
            if filter_name and "_stderr" not in metric and isinstance(value, Real):
                scores.append((task, metric_label(metric, filter_name), float(value)))
    return scores


def unscored(outcome: dict[str, Any]) -> list[str]:
    """List metrics without a number: for one, those that a server computes."""
    return [
        f"{task}: {key.split(',')[0]}"
        for task, values in outcome["results"].items()
        for key, value in values.items()
        if "," in key and "_stderr" not in key and not isinstance(value, Real)
    ]


def run_tasks(
    model: DualTower,
    tasks: Tasks,
    names: list[str],
    limit: int = 0,
    process_with_media: bool = False,
    output: Path | None = None,
) -> dict[str, Any]:
    """Return lmms-eval's results of all `names`; an empty dict on all ranks but the first.

    Random states do not change.
    """
    for name in names:
        tasks.add(name)
    settings = Namespace(
        process_with_media=process_with_media,
        output_path=str(output) if output is not None else None,
        reasoning_tags=None,
    )
    with plain_errors(", ".join(names)):
        results = simple_evaluate(
            model=model,
            tasks=list(names),
            limit=limit or None,
            task_manager=tasks,
            bootstrap_iters=0,
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
            distributed_executor_backend="torchrun",
            cli_args=settings,
            process_docs_parallel=1,
            verbosity="ERROR",
        )
    return results or {}
