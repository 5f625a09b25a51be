"""Which tasks there are, where their data lie, and a run of some of them through lmms-eval."""

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
from datasets import disable_progress_bars
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

ImageFile.LOAD_TRUNCATED_IMAGES = (
    False  # importing lmms-eval sets it for the whole process: half an image is none
)
OURS = Path(__file__).parent / "tasks"
# Metrics of lmms-eval's own caption tasks, all of which start Java, are PREFIX_NAME: this name → ours, equal to 1e-4.
STOCK_CAPTIONS = {"CIDEr": "CIDEr", "ROUGE_L": "ROUGE-L", "METEOR": "METEOR", "SPICE": "SPICE"} | {
    f"Bleu_{n}": f"BLEU-{n}" for n in range(1, 5)
}
CAPTION_METRICS = ("CIDEr", "BLEU-4", "ROUGE-L")


class Outline(getattr(yaml, "CFullLoader", yaml.FullLoader)):  # type: ignore[misc]
    """YAML without the functions that it names."""


Outline.add_constructor("!function", lambda loader, node: None)


@contextmanager
def read_by_libyaml() -> Iterator[None]:
    """To find its tasks lmms-eval reads 1,900 YAML files, by PyYAML's own parser: eight seconds instead of one."""
    full_load, yaml.full_load = yaml.full_load, lambda text: yaml.load(text, Loader=Outline)
    try:
        yield
    finally:
        yaml.full_load = full_load


class Tasks(TaskManager):
    """lmms-eval's tasks and ours, by name; a copy of a task's data under `data_root` goes before the Hub.

    `caption_metrics` are those of our caption tasks. `tokenizer` is the one for all captions, "python" or "java"; `left_out`
    collects what stock tasks would need Java for where there is none.
    """

    def __init__(
        self,
        data_root: Path | None = None,
        caption_metrics: Sequence[str] = CAPTION_METRICS,
        tokenizer: str = "python",
        matcher: str = "normalised",
    ) -> None:
        check_metrics(caption_metrics)
        os.environ.setdefault("HF_HOME", HF_HOME)  # some tasks read it
        with read_by_libyaml():
            super().__init__(verbosity="ERROR", include_path=str(OURS), model_name="dualtower")
        self.data_root, self.caption_metrics, self.tokenizer, self.matcher = (
            data_root,
            caption_metrics,
            tokenizer,
            matcher,
        )
        self.left_out: list[str] = []
        self.sources: dict[str, str] = {}  # of tasks that the caller named by theirs
        self.captions: dict[str, str] = {}  # metrics that are computed here, of captions, → our name of each

    def _get_config(self, name: str) -> dict[str, Any]:
        config = super()._get_config(name)
        if name in self.sources:
            matcher = {"matcher": self.matcher} if name.startswith("questions:") else {}
            config |= {
                "task": name,
                "metadata": config["metadata"] | matcher | {"source": self.sources[name]},
            }
        if (copy := self._local_copy(config, name)) is not None:
            config["dataset_path"], config["dataset_kwargs"] = str(copy), {"cache_dir": cache_of(copy)}
        elif (config.get("dataset_kwargs") or {}).get(
            "token"
        ) is True and get_token() is None:  # most sets are public: one that is not will say so
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
        """A stock caption metric computed here; nothing where it needs Java and there is none; any other metric as it is."""
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
        def aggregate(
            rows: list[dict[str, Any]], args: Any = None
        ) -> float:  # lmms-eval hands `args` to functions that take it
            answers, references = zip(*map(captioned, rows), strict=True)
            return caption_scores(answers, references, [name], self.tokenizer)[name]

        return aggregate

    def _local_copy(self, config: dict[str, Any], name: str) -> Path | None:
        """DATA_ROOT/OWNER/NAME as on the Hub, DATA_ROOT/NAME, or DATA_ROOT/TASK: the first that is a folder."""
        path = config.get("dataset_path")
        if self.data_root is None or not isinstance(path, str):
            return None
        return next(
            (
                folder
                for folder in (
                    self.data_root / path,
                    self.data_root / path.split("/")[-1],
                    self.data_root / name,
                )
                if folder.is_dir()
            ),
            None,
        )

    def add(self, name: str) -> None:
        """Check that there is such a task; `captions:SOURCE` and `questions:SOURCE`, a source as in `data.sources`, become ones."""
        kind, colon, source = name.partition(":")
        if kind in ("captions", "questions") and name not in self.sources:
            if not colon:
                raise UsageError(f"--tasks {name} needs a source: {name}:NAME=PATH, as in --data.sources")
            parse_sources(source)
            self.sources[name] = source
            self._task_index[name] = {"type": "python_task", "yaml_path": str(OURS / f"{kind}.yaml")}
            self._all_tasks.append(name)
        if name not in self.all_tasks:
            raise UsageError(f"--tasks: no task named '{name}'{nearest(name, self.all_tasks, 3)}")

    def load(self, name: str) -> list[tuple[str, bool]]:
        """`add`, and load its data now: what fails then would fail later. → (`<task>_<metric>`, whether higher is better) of all it will tell."""
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
            except Exception as error:  # whatever a task's own code does with data of another form
                copied = (
                    "; a copy of a data set is all of its repository: README.md says which files are which split"
                    if self.data_root is not None
                    else ""
                )
                raise UserError(
                    f"task {name} cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:300]}){copied}"
                ) from error
        told = [
            (task, made, metric, better)
            for task, made in leaves(loaded)
            for metric, better in made.higher_is_better().items()
        ]
        return [
            (f"{task}_{named(metric, chosen.name)}", better)
            for task, made, metric, better in told
            for chosen in made._filters
        ]


def cache_of(copy: Path) -> str:
    """Where `datasets` keeps what it makes of a copy: another place for other files, for it takes two folders with the same README.md for one, and does not see a file change."""
    files = [
        (path.relative_to(copy).as_posix(), path.stat()) for path in sorted(copy.rglob("*")) if path.is_file()
    ]
    told = [str(copy.resolve()), *(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in files)]
    return str(
        Path(datasets.config.HF_DATASETS_CACHE)
        / "copies"
        / hashlib.blake2b("\n".join(told).encode(), digest_size=8).hexdigest()
    )


def captioned(row: dict[str, Any]) -> tuple[str, list[str]]:
    """What a caption task hands to its metrics → the answer and its references: ours, and the forms of lmms-eval's."""
    if "references" in row:
        return row["answer"], row["references"]
    references = row["answer"] if row.get("answer") is not None else row["instruction"]
    return row["pred"], [references] if isinstance(references, str) else list(references)


def named(metric: str, chosen: str) -> str:
    """A metric as it is told: the name of the filter behind it, where a task has several readings of an answer."""
    return metric if chosen == "none" else f"{metric} ({chosen})"


def leaves(loaded: dict[Any, Any]) -> list[tuple[str, Any]]:
    """The tasks of groups within groups."""
    return [
        leaf
        for name, made in loaded.items()
        for leaf in (leaves(made) if isinstance(made, dict) else [(str(name), made)])
    ]


def silent(bar: Any) -> Callable[..., Any]:
    """lmms-eval's progress bars, which would stay on the screen: ours shows the answers."""
    return lambda *of, **settings: bar(*of, **settings | {"disable": True})


@contextmanager
def plain_errors(name: str) -> Iterator[None]:
    """Without lmms-eval's log lines and bars. What it has tried five times raises `UserError`: data that cannot be had, or an answer that a task cannot score."""
    logger.remove()
    logging.getLogger("datasets").setLevel(logging.ERROR)
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
            if "download" in (
                frame.name for frame in traceback.extract_tb(cause.__traceback__ if cause else None)
            ):
                text = f"the data cannot be had ({text}): put a copy of the data set where --data-root finds it (DIR/OWNER/NAME), or go online"
            else:
                text = f"an answer could not be scored ({text}): does the copy of the data have the form that the task expects?"
            raise UserError(f"{name}: {text}") from cause
        finally:
            for module, bar in bars:
                module.tqdm = bar
            ImageFile.LOAD_TRUNCATED_IMAGES = False  # lmms-eval sets it, for the whole process


def scores_of(found: dict[str, Any]) -> list[tuple[str, str, float]]:
    """(task, metric, value) of all that lmms-eval found, its own standard errors left out; a filter's name stands behind its metric."""
    out = []
    for task, values in found["results"].items():
        for key, value in sorted(values.items()):
            metric, _, kind = key.partition(",")
            if kind and "_stderr" not in metric and isinstance(value, Real):
                out.append((task, named(metric, kind), float(value)))
    return out


def unscored(found: dict[str, Any]) -> list[str]:
    """Metrics that came back without a number: those of a server that scores, for one."""
    return [
        f"{task}: {key.split(',')[0]}"
        for task, values in found["results"].items()
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
    """lmms-eval's results of all `names`; on all ranks but the first, nothing. Random states stay as they are."""
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
