"""Which tasks there are, where their data lie, and a run of some of them through lmms-eval."""

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

from datasets import disable_progress_bars
from huggingface_hub import get_token
from huggingface_hub.constants import HF_HOME
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from loguru import logger
from PIL import ImageFile
from tenacity import RetryError

from configs.errors import UsageError, UserError, nearest
from data.sources import parse_sources
from eval.cider import caption_scores, check_metrics
from eval.lmms_eval_wrapper import DualTower

ImageFile.LOAD_TRUNCATED_IMAGES = False  # importing lmms-eval sets it for the whole process: half an image is none
OURS = Path(__file__).parent / "tasks"
STOCK_CAPTIONS = ("coco", "flickr", "nocaps")  # tasks of lmms-eval whose metrics, all of them, start Java: PREFIX_METRIC over {"answer": references, "pred": answer}
IN_PYTHON = {"CIDEr": "CIDEr", "Bleu_4": "BLEU-4", "ROUGE_L": "ROUGE-L"}  # theirs → ours, equal to 1e-4
CAPTION_METRICS = ("CIDEr", "BLEU-4", "ROUGE-L")


class Tasks(TaskManager):
    """lmms-eval's tasks and ours, by name; a copy of a task's data under `data_root` goes before the Hub.

    `caption_metrics` are those of our caption tasks. `tokenizer` is the one for all captions, "python" or "java"; `left_out`
    collects what stock tasks would need Java for where there is none.
    """

    def __init__(self, data_root: Path | None = None, caption_metrics: Sequence[str] = CAPTION_METRICS, tokenizer: str = "python", matcher: str = "normalised") -> None:
        check_metrics(caption_metrics)
        os.environ.setdefault("HF_HOME", HF_HOME)  # some tasks read it
        super().__init__(verbosity="ERROR", include_path=str(OURS), model_name="dualtower")
        self.data_root, self.caption_metrics, self.tokenizer, self.matcher = data_root, caption_metrics, tokenizer, matcher
        self.left_out: list[str] = []
        self.sources: dict[str, str] = {}  # of tasks that the caller named by theirs
        self.captions: set[str] = set()  # metrics that are computed here, of captions

    def _get_config(self, name: str) -> dict[str, Any]:
        config = super()._get_config(name)
        if name in self.sources:
            matcher = {"matcher": self.matcher} if name.startswith("questions:") else {}
            config |= {"task": name, "metadata": config["metadata"] | matcher | {"source": self.sources[name]}}
        if (copy := self._local_copy(config, name)) is not None:
            config["dataset_path"], config["dataset_kwargs"] = str(copy), {}
        elif (config.get("dataset_kwargs") or {}).get("token") is True and get_token() is None:  # most sets are public: one that is not will say so
            config["dataset_kwargs"] = {key: value for key, value in config["dataset_kwargs"].items() if key != "token"}
        if name.partition(":")[0] in ("captions", "openmoji_captions"):
            config["metric_list"] = [{"metric": m, "aggregation": self._scorer(m, "answer", "references"), "higher_is_better": True} for m in self.caption_metrics]
            self.captions |= set(self.caption_metrics)
        elif name.startswith(STOCK_CAPTIONS) and config.get("metric_list"):
            config["metric_list"] = [metric for metric in map(self._without_java, config["metric_list"]) if metric is not None]
        return config

    def _without_java(self, metric: dict[str, Any]) -> dict[str, Any] | None:
        """A stock caption metric computed here, or as it is where Java can compute it, or nothing."""
        _, _, theirs = metric["metric"].partition("_")
        if theirs in IN_PYTHON:
            self.captions.add(metric["metric"])
            return metric | {"aggregation": self._scorer(IN_PYTHON[theirs], "pred", "answer")}
        if theirs != "passthrough" and shutil.which("java") is None:
            self.left_out.append(metric["metric"])
            return None
        return metric

    def _scorer(self, name: str, answer: str, references: str) -> Callable[..., float]:
        def aggregate(rows: list[dict[str, Any]], args: Any = None) -> float:  # lmms-eval hands `args` to functions that take it
            return caption_scores([row[answer] for row in rows], [row[references] for row in rows], [name], self.tokenizer)[name]

        return aggregate

    def _local_copy(self, config: dict[str, Any], name: str) -> Path | None:
        """DATA_ROOT/OWNER/NAME as on the Hub, DATA_ROOT/NAME, or DATA_ROOT/TASK: the first that is a folder."""
        path = config.get("dataset_path")
        if self.data_root is None or not isinstance(path, str):
            return None
        return next((folder for folder in (self.data_root / path, self.data_root / path.split("/")[-1], self.data_root / name) if folder.is_dir()), None)

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
        with told_plainly(name):
            try:
                loaded = self.load_task_or_group([name])
            except (RetryError, UserError, OSError):
                raise
            except ModuleNotFoundError as error:
                raise UserError(f"task {name} needs the package {error.name}: pip install {error.name}") from error
            except Exception as error:  # whatever a task's own code does with data of another form
                raise UserError(f"task {name} cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:300]})") from error
        return [(f"{task}_{metric}", better) for task, made in leaves(loaded) for metric, better in made.higher_is_better().items()]


def leaves(loaded: dict[Any, Any]) -> list[tuple[str, Any]]:
    """The tasks of groups within groups."""
    return [leaf for name, made in loaded.items() for leaf in (leaves(made) if isinstance(made, dict) else [(str(name), made)])]


@contextmanager
def told_plainly(name: str) -> Iterator[None]:
    """Without lmms-eval's log lines. What it has tried five times raises `UserError`: data that cannot be had, or an answer that a task cannot score."""
    logger.remove()
    logging.getLogger("datasets").setLevel(logging.ERROR)
    disable_progress_bars()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries that tasks import
        try:
            yield
        except RetryError as error:
            cause = error.last_attempt.exception()
            if isinstance(cause, UserError):
                raise cause from None
            text = f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
            if "download" in (frame.name for frame in traceback.extract_tb(cause.__traceback__ if cause else None)):
                text = f"the data cannot be had ({text}): put a copy of the data set where --data-root finds it (DIR/OWNER/NAME), or go online"
            else:
                text = f"an answer could not be scored ({text}): does the copy of the data have the form that the task expects?"
            raise UserError(f"{name}: {text}") from cause
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = False  # lmms-eval sets it, for the whole process


def scores_of(found: dict[str, Any]) -> list[tuple[str, str, float]]:
    """(task, metric, value) of all that lmms-eval found, its own standard errors left out; a filter's name stands behind its metric."""
    out = []
    for task, values in found["results"].items():
        for key, value in sorted(values.items()):
            metric, _, kind = key.partition(",")
            if kind and "_stderr" not in metric and isinstance(value, Real):
                out.append((task, metric if kind == "none" else f"{metric} ({kind})", float(value)))
    return out


def unscored(found: dict[str, Any]) -> list[str]:
    """Metrics that came back without a number: those of a server that scores, for one."""
    return [
        f"{task}: {key.split(',')[0]}"
        for task, values in found["results"].items()
        for key, value in values.items()
        if "," in key and "_stderr" not in key and not isinstance(value, Real)
    ]


def run_tasks(model: DualTower, tasks: Tasks, names: list[str], limit: int = 0, process_with_media: bool = False, output: Path | None = None) -> dict[str, Any]:
    """lmms-eval's results of all `names`; on all ranks but the first, nothing. Random states stay as they are."""
    for name in names:
        tasks.add(name)
    settings = Namespace(process_with_media=process_with_media, output_path=str(output) if output is not None else None, reasoning_tags=None)
    with told_plainly(", ".join(names)):
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
