"""Which tasks there are, where their data lie, and a run of some of them through lmms-eval."""

import logging
import shutil
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from loguru import logger
from tenacity import RetryError

from configs.errors import UsageError, UserError, nearest
from data.sources import parse_sources
from eval.cider import caption_scores, check_metrics
from eval.lmms_eval_wrapper import DualTower

OURS = Path(__file__).parent / "tasks"
STOCK_CAPTIONS = ("coco", "flickr", "nocaps")  # tasks of lmms-eval whose metrics, all of them, start Java: PREFIX_METRIC over {"answer": references, "pred": answer}
IN_PYTHON = {"CIDEr": "CIDEr", "Bleu_4": "BLEU-4", "ROUGE_L": "ROUGE-L"}  # theirs → ours, equal to 1e-4
CAPTION_METRICS = ("CIDEr", "BLEU-4", "ROUGE-L")


class Tasks(TaskManager):
    """lmms-eval's tasks and ours, by name; a copy of a task's data under `data_root` goes before the Hub.

    `caption_metrics` are those of our caption tasks. `tokenizer` is the one for all captions, "python" or "java"; `left_out`
    collects what stock tasks would need Java for where there is none.
    """

    def __init__(self, data_root: Path | None = None, caption_metrics: Sequence[str] = CAPTION_METRICS, tokenizer: str = "python") -> None:

        check_metrics(caption_metrics)
        super().__init__(verbosity="ERROR", include_path=str(OURS), model_name="dualtower")
        self.data_root, self.caption_metrics, self.tokenizer = data_root, caption_metrics, tokenizer
        self.left_out: list[str] = []
        self.sources: dict[str, str] = {}  # of tasks that the caller named by theirs

    def _get_config(self, name: str) -> dict[str, Any]:
        config = super()._get_config(name)
        if name in self.sources:
            config |= {"task": name, "metadata": config["metadata"] | {"source": self.sources[name]}}
        if (copy := self._local_copy(config, name)) is not None:
            config["dataset_path"], config["dataset_kwargs"] = str(copy), {}
        elif (config.get("dataset_kwargs") or {}).get("token") is True and get_token() is None:  # most sets are public: one that is not will say so
            config["dataset_kwargs"] = {key: value for key, value in config["dataset_kwargs"].items() if key != "token"}
        if name.partition(":")[0] in ("captions", "openmoji_captions"):
            config["metric_list"] = [{"metric": m, "aggregation": self._scorer(m, "answer", "references"), "higher_is_better": True} for m in self.caption_metrics]
        elif name.startswith(STOCK_CAPTIONS) and config.get("metric_list"):
            config["metric_list"] = [metric for metric in map(self._without_java, config["metric_list"]) if metric is not None]
        return config

    def _without_java(self, metric: dict[str, Any]) -> dict[str, Any] | None:
        """A stock caption metric computed here, or as it is where Java can compute it, or nothing."""
        _, _, theirs = metric["metric"].partition("_")
        if theirs in IN_PYTHON:
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

    def load(self, name: str) -> None:
        """`add`, and load its data now: what fails then would fail later."""
        self.add(name)
        with told_plainly([name]):
            self.load_task_or_group([name])


@contextmanager
def told_plainly(names: list[str]) -> Iterator[None]:
    """Without lmms-eval's lines of progress; data that cannot be had raise `UserError`, after lmms-eval has tried five times."""
    logger.remove()
    logging.getLogger("datasets").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries that tasks import
        try:
            yield
        except RetryError as error:
            cause = error.last_attempt.exception()
            if isinstance(cause, UserError):
                raise cause from None
            text = " ".join(str(cause).split())[:300]
            raise UserError(
                f"{', '.join(names)}: the data cannot be had ({type(cause).__name__}: {text}): put a copy of the data set where --data-root finds it (DIR/OWNER/NAME), or go online"
            ) from cause


def scores_of(found: dict[str, Any]) -> list[tuple[str, str, float]]:
    """(task, metric, value) of all that lmms-eval found, its own standard errors left out."""
    return [
        (task, key.split(",")[0], float(value))
        for task, values in found["results"].items()
        for key, value in sorted(values.items())
        if "," in key and "_stderr" not in key and isinstance(value, int | float)
    ]


def run_tasks(model: DualTower, tasks: Tasks, names: list[str], limit: int = 0, process_with_media: bool = False, output: Path | None = None) -> dict[str, Any]:
    """lmms-eval's results of all `names`; on all ranks but the first, nothing. Random states stay as they are."""
    for name in names:
        tasks.add(name)
    settings = Namespace(process_with_media=process_with_media, output_path=str(output) if output is not None else None, reasoning_tags=None)
    with told_plainly(names):
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
