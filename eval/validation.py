"""Validation inside training, on held-out images.

Loss and exact-match accuracy, CIDEr of captions, lmms-eval's tasks, and a sample of predictions.
"""

import json
import math
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from configs.model import GenerationConfig
from configs.train import EvalConfig
from data.collators import collate
from data.conversations import Conversation, exchanges_of, images_of, text_of
from data.datasets import Drops, Sample, SampleDataset, drop_report
from data.images import open_image
from data.packing import Budget, pack
from data.parquet import UnreadableBlock
from data.render import Renderer
from eval.captions import Cider, cider
from eval.predictor import Predictor
from eval.token_agreement import Agreement
from utils.errors import ImageError, UsageError, UserError, nearest
from utils.files import read_json, replacing, write_text
from utils.ranks import SINGLE_PROCESS, DistributedContext


class Validation:
    """A fixed set of packed rows, and a few questions with decoded answers.

    A question counts as right where the likeliest token at every supervised position is the true one. Exactly
    then greedy decoding gives the reference answer, so that no decoding is needed.
    """

    def __init__(self, dataset: SampleDataset, budget: Budget, rows: int, padding_id: int) -> None:
        self.dataset, self.padding_id = dataset, padding_id
        records = [
            (number, index)
            for number, source in enumerate(dataset.sources)
            for index in range(source.start, source.stop)
        ]
        # (images, conversation that ends with a question, answer) of each record
        self.questions: list[tuple[list[Any], Conversation, str]] = []
        # (images, conversation that ends with a question, references) of records with references
        self.captions: list[tuple[list[Any], Conversation, list[str]]] = []
        samples = [sample for source, index in records for sample in self._usable(source, index)]
        if not samples:
            raise UserError(
                f"none of the {len(records)} validation records can be used: "
                f"{drop_report(dataset.dropped, dataset.examples)}"
            )
        packed = pack(samples, budget)
        self.chunks = [packed[i : i + rows] for i in range(0, len(packed), rows)]
        self.sources = list(dict.fromkeys(sample.source for sample in samples))

    def _usable(self, source: int, index: int) -> list[Sample]:
        """Return a record's samples, decoded once as a check; note one of its questions.

        Successive records give different questions: the n-th conversation's first one.
        """
        dataset = self.dataset
        samples = dataset.samples(source, index, first=True)
        if not samples:
            return []
        try:
            for sample in samples:
                dataset.decoded(sample)
            record = dataset.record(source, index)  # still cached here; later it might be unreadable
        except ImageError as error:
            dataset.drop(source, index, f"image_{error.reason}", error)
            return []
        except UnreadableBlock as error:
            dataset.drop(source, index, "unreadable", error)
            return []
        asked = [
            (messages[:end], messages[end])
            for messages in dataset.conversations(record, Drops())
            for end in (exchanges_of(messages)[0][1] - 1,)
        ]
        for messages, answer in asked:
            if references := answer.get("references"):
                self.captions.append((images_of_record(record, messages), messages, references))
                break
        if asked:  # else an interleaved page
            messages, answer = asked[index % len(asked)]
            self.questions.append((images_of_record(record, messages), messages, text_of(answer)))
        return samples

    def score(self, model: Any, world: DistributedContext = SINGLE_PROCESS) -> dict[str, Any]:
        """Return the mean loss per supervised token, and the share of documents answered exactly.

        The share is over all documents, and over each source where there are several. `agreement` has the
        details.
        """
        self.agreement = Agreement(model.config.multi_token.heads)
        total = torch.zeros(2, dtype=torch.float64)  # loss, supervised tokens
        right, documents = torch.zeros(2, len(self.sources), dtype=torch.float64)
        for chunk in self.chunks[world.rank :: world.size]:
            batch = collate(
                [[self.dataset.decoded(sample) for sample in row] for row in chunk], self.padding_id
            )
            batch = {k: v.to(model.device) for k, v in batch.items()}
            source_of = torch.tensor(
                [
                    self.sources.index(sample.source)
                    for row in chunk
                    for sample in row
                    for _ in sample.documents
                ]
            )
            supervised = batch["labels"] != -100
            output = model(**batch)
            predicted = model.logits(output.hidden[supervised]).argmax(-1)
            tokenizer = self.dataset.renderer.tokenizer if world.is_rank0 else None
            self.agreement.add(model, batch, output.hidden, predicted, tokenizer)
            exact = _exact_documents(batch, predicted)
            total += torch.tensor([output.loss_sum.item(), int(supervised.sum())])
            right.index_add_(0, source_of, exact.double())
            documents.index_add_(0, source_of, torch.ones_like(exact, dtype=torch.float64))
        world.sum(total, right, documents)
        self.agreement.share(world)
        scores = {
            "loss": (total[0] / total[1]).item(),
            "accuracy": (right.sum() / documents.sum()).item(),
        } | self.agreement.scores()
        return scores | {
            f"accuracy_{name}": (r / n).item()
            for name, r, n in zip(self.sources, right, documents, strict=True)
            if len(self.sources) > 1
        }

    def metrics(self, captions: int) -> dict[str, bool]:
        """Return the metrics to be logged, and whether higher is better; CIDEr only with `captions`."""
        names = [
            "accuracy",
            *(f"accuracy_{name}" for name in self.sources if len(self.sources) > 1),
            *(["cider"] if captions and self.captions else []),
        ]
        return {"validation_loss": False} | {f"validation_{name}": True for name in names}

    def cider(
        self, model: Any, count: int, tokens: int, world: DistributedContext = SINGLE_PROCESS, rows: int = 32
    ) -> Cider | None:
        """Score greedy captions of the first `count` captioned images.

        None where the records are no captions, or `count` is 0. `rows`: captions per batch of all ranks.
        """
        asked = self.captions[:count]
        if not asked:
            return None
        predictor, settings = Predictor(model, self.dataset.renderer), GenerationConfig(max_new_tokens=tokens)
        captions: list[tuple[int, str]] = []
        for start in range(0, len(asked), rows):
            part = list(enumerate(asked[start : start + rows], start))[world.rank :: world.size]
            answers = predictor.answer(
                [([predictor.tiles(i) for i in images], messages) for _, (images, messages, _) in part],
                settings,
            )
            captions += [(number, answer.text) for (number, _), answer in zip(part, answers, strict=True)]
        texts = [text for _, text in sorted(pair for rank in world.gather(captions) for pair in rank)]
        return cider(texts, [references for _, _, references in asked])

    def predictions(
        self, model: Any, count: int, world: DistributedContext = SINGLE_PROCESS
    ) -> list[dict[str, Any]]:
        """Answer the first `count` questions greedily, each about another image."""
        predictor = Predictor(model, self.dataset.renderer)
        asked = self.questions[:count]
        mine = [
            ([predictor.tiles(i) for i in images], messages)
            for images, messages, _ in asked[world.rank :: world.size]
        ]
        answers = predictor.answer(mine, GenerationConfig(max_new_tokens=16)) if mine else []
        texts = world.gather([answer.text for answer in answers])
        return [
            {
                "image": images[0] if images else None,
                "question": text_of(messages[-1]),
                "answer": answer,
                "prediction": texts[n % world.size][n // world.size],
            }
            for n, (images, messages, answer) in enumerate(asked)
        ]


def images_of_record(record: dict[str, Any], messages: Conversation) -> list[Any]:
    """The images of a record that a conversation shows, in its order."""
    return [record["images"][part["index"]] for part in images_of(messages)]


def _exact_documents(batch: dict[str, Tensor], predicted: Tensor) -> Tensor:
    """Return for each document whether all its supervised tokens are predicted, (documents,), on the CPU.

    `predicted` (S,): the tokens predicted at the batch's supervised positions.
    """
    labels = batch["labels"]
    supervised = labels != -100
    wrong = (predicted != labels[supervised]).long()
    row = torch.arange(len(labels), device=labels.device)[:, None] * labels.shape[1]
    document = (batch["right_documents"] + row)[supervised]  # a number of its own for each document
    mistakes = torch.zeros(labels.numel(), dtype=torch.int64, device=labels.device)
    mistakes.index_add_(0, document, wrong)
    return (mistakes[document.unique()] == 0).cpu()


class TrainingTasks:
    """lmms-eval's tasks on the model in training: in this process, without another copy.

    Raises `UserError` at once for tasks that would fail later.
    """

    def __init__(self, config: EvalConfig) -> None:
        self.metrics: dict[str, bool] = {}  # the metrics of `score`, and whether higher is better
        self.config = config
        self.names = list(dict.fromkeys(name.strip() for name in config.tasks.split(",") if name.strip()))
        if not self.names:
            return
        try:
            from eval.tasks import Tasks
        except ModuleNotFoundError as error:
            raise UserError(
                f"eval.tasks: the package {error.name} is not installed: "
                "tasks need the group eval (pip install -e '.[eval]')"
            ) from None
        self.tasks = Tasks(Path(config.data_root) if config.data_root else None)
        for name in self.names:
            self.metrics |= dict(self.tasks.load(name))

    def score(
        self, model: Any, renderer: Renderer, world: DistributedContext = SINGLE_PROCESS
    ) -> dict[str, float]:
        """Return `<task>_<metric>` of every task."""
        if not self.names:
            return {}
        from eval.lmms_eval_wrapper import DualTower
        from eval.tasks import run_tasks, scores_of

        adapter = DualTower(predictor=Predictor(model, renderer))
        outcome = run_tasks(adapter, self.tasks, self.names, self.config.limit)
        scores = scores_of(outcome) if outcome else []
        return world.broadcast({f"{task}_{metric}": value for task, metric, value in scores})


class BestCheckpoint:
    """The best model so far by one metric; `best.json` holds its step and value.

    `known`: the metrics, and whether higher is better; an unknown metric raises `UsageError`.
    """

    def __init__(self, folder: Path, metric: str, known: dict[str, bool]) -> None:
        if metric and metric not in known:
            raise UsageError(
                f"eval.best: this run logs no metric '{metric}'{nearest(metric, list(known), 3)}"
            )
        self.path, self.metric, self.sign = folder / "best.json", metric, 1 if known.get(metric, True) else -1

    @property
    def step(self) -> int:
        """Step of the best model; −1: none so far."""
        best = read_json(self.path) if self.metric and self.path.is_file() else {}
        return int(best["step"]) if best.get("metric") == self.metric else -1

    def go_back(self, step: int, move_to_abandoned: Callable[[Path], Any]) -> None:
        """Move away a best model of a later step than `step`, where the run resumes."""
        if self.path.is_file() and read_json(self.path)["step"] > step:
            for path in (self.path.parent / "best", self.path):
                if path.exists():
                    move_to_abandoned(path)

    @property
    def warning(self) -> str:
        """At the end of a run: why there is no best model; "" if there is one, or none was asked for."""
        if not self.metric or (self.path.is_file() and read_json(self.path)["metric"] == self.metric):
            return ""
        return f"eval.best: {self.metric} never came with a number, so no best model was kept"

    def is_beaten(self, step: int, scores: dict[str, Any]) -> bool:
        """Whether these scores are the best up to `step`; later ones, from before a resume, do not count."""
        value = scores.get(self.metric)
        if not self.metric or value is None or not math.isfinite(value):
            return False
        before = read_json(self.path) if self.path.is_file() else None
        return (
            before is None
            or before["metric"] != self.metric
            or before["step"] >= step
            or self.sign * value > self.sign * before["value"]
        )

    def note(self, step: int, scores: dict[str, Any]) -> None:
        """Write `best.json`."""
        entry = {"step": step, "metric": self.metric, "value": scores[self.metric]}
        write_text(self.path, json.dumps(entry) + "\n")


def save_samples(folder: Path, step: int, predictions: list[dict[str, Any]]) -> None:
    """Write predictions as JSON lines, and as a picture.

    The picture shows each image with question, prediction and, where it is wrong, the reference. An image
    that is not a file is written to `folder`, and its path is noted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for i, p in enumerate(predictions):
        if p["image"] is not None and not isinstance(p["image"], str | Path):
            path = folder / f"image_{i}.png"
            with replacing(path) as temp_path:
                open_image(p["image"]).save(temp_path, format="png")
            p["image"] = path
        p["image"] = str(p["image"] or "")
    write_text(folder / f"step_{step:06d}.jsonl", "".join(json.dumps(p) + "\n" for p in predictions))
    side, text, columns = 128, 64, 4
    rows = -(-len(predictions) // columns)
    sheet = Image.new("RGB", (columns * (side + 16), rows * (side + text + 8)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, p in enumerate(predictions):
        x, y = i % columns * (side + 16) + 8, i // columns * (side + text + 8) + 8
        if p["image"]:
            sheet.paste(open_image(p["image"]).resize((side, side)), (x, y))
        good = p["prediction"] == p["answer"]
        answer = p["prediction"] if good else f"{p['prediction']} (not {p['answer']})"
        draw.multiline_text((x, y + side + 2), textwrap.fill(p["question"], 24), fill="black", font_size=11)
        draw.text((x, y + side + 34), answer, fill="darkgreen" if good else "firebrick", font_size=13)
    save_picture(sheet, folder / f"step_{step:06d}.png")


def forget_samples(folder: Path, step: int) -> None:
    """Delete samples of later steps than `step`, which the run repeats."""
    for path in folder.glob("step_*"):
        if (match := re.match(r"step_(\d+)", path.name)) and int(match[1]) > step:
            path.unlink()


def save_picture(sheet: Image.Image, path: Path) -> Path:
    """Write a picture as PNG; return its path."""
    with replacing(path) as temp_path:
        sheet.save(temp_path, format="png")
    return path
