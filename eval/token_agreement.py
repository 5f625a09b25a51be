"""Predicted and true tokens under teacher forcing.

Accuracy by a token's index in its answer and by multi-token head, and a picture of some answers.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data.tokenizer import Tokenizer
from models.multi_token import head_predictions
from utils.plotting import agreement, curves, stacked
from utils.ranks import DistributedContext

LEADING_TOKENS = 8  # tokens of an answer whose accuracy is reported by index
MAX_ANSWERS, MAX_TOKENS = 8, 32  # answers in the picture, and tokens of each


def answer_indices(labels: Tensor, documents: Tensor) -> Tensor:
    """Return each supervised token's index in its answer, (S,); `labels`, `documents` (B, R).

    labels     . a b c . d e | f g        documents  0 0 0 0 0 0 0 | 1 1        → 0 1 2 0 1 0 1
    """
    supervised, index = labels != -100, torch.arange(labels.shape[1], device=labels.device)
    goes_on = F.pad(supervised[:, :-1], (1, 0)) & (F.pad(documents[:, :-1], (1, 0), value=-1) == documents)
    start = torch.where(supervised & ~goes_on, index, 0).cummax(1).values
    return (index - start)[supervised]


@dataclass
class TokenComparison:
    """One answer's tokens as text.

    `predicted[0]` holds the next-token predictions, `predicted[k]` those of head k; None where there is none.
    """

    question: str
    truth: list[str]
    predicted: list[list[str | None]]


@dataclass
class Agreement:
    """Counts over batches, and the first answers."""

    heads: int
    by_index: Tensor = field(init=False)  # (2, LEADING_TOKENS): right tokens, all tokens
    by_head: Tensor = field(init=False)  # (2, K)
    answers: list[TokenComparison] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.by_index = torch.zeros(2, LEADING_TOKENS, dtype=torch.float64)
        self.by_head = torch.zeros(2, self.heads, dtype=torch.float64)

    def add(
        self,
        model: Any,
        batch: dict[str, Tensor],
        hidden: Tensor,
        predicted: Tensor,
        tokenizer: Tokenizer | None,
    ) -> None:
        """Add a batch: `hidden` (B, R, D), `predicted` (S,) at its supervised tokens.

        With a tokenizer the first `MAX_ANSWERS` answers are kept as text.
        """
        labels, documents = batch["labels"], batch["right_documents"]
        truth, indices = labels[labels != -100], answer_indices(labels, documents)
        leading = indices < LEADING_TOKENS
        for row, selected in zip(self.by_index, (leading & (predicted == truth), leading), strict=True):
            row += indices[selected].bincount(minlength=LEADING_TOKENS).cpu()
        columns = [predicted[:, None]]
        if self.heads:
            right = model.right
            drafted, targets = head_predictions(  # (S, K) both
                model.heads, hidden, labels, documents, right.embed_tokens, right.unembedding
            )
            self.by_head += torch.stack(((drafted == targets) & (targets >= 0), targets >= 0)).sum(1).cpu()
            columns.append(drafted)
        if tokenizer is not None and len(self.answers) < MAX_ANSWERS:
            predictions = torch.cat(columns, 1).tolist()
            self._add_answers(batch, truth.tolist(), indices.tolist(), predictions, tokenizer)

    def _add_answers(
        self,
        batch: dict[str, Tensor],
        truth: list[int],
        indices: list[int],
        predictions: list[list[int]],  # (S, 1 + K)
        tokenizer: Tokenizer,
    ) -> None:
        rows, columns = (batch["labels"] != -100).nonzero(as_tuple=True)
        starts = [i for i, index in enumerate(indices) if index == 0]
        for start, end in zip(starts, [*starts[1:], len(indices)], strict=True):
            row, first = int(rows[start]), int(columns[start])
            document = batch["right_documents"][row] == batch["right_documents"][row, first]
            prompt = batch["right_ids"][row, : first + 1][document[: first + 1]].tolist()
            question = tokenizer.decode(prompt).strip().removeprefix("user").removesuffix("assistant")
            tokens = range(start, min(end, start + MAX_TOKENS))
            by_head = [
                [predictions[i - k][k] if i - k >= start else -1 for i in tokens]
                for k in range(1 + self.heads)
            ]
            self.answers.append(
                TokenComparison(
                    " ".join(question.split()),
                    [tokenizer.show(truth[i]) for i in tokens],
                    [[tokenizer.show(t) if t >= 0 else None for t in row] for row in by_head],
                )
            )
            if len(self.answers) == MAX_ANSWERS:
                return

    def share(self, world: DistributedContext) -> None:
        """Sum the counts of all ranks."""
        world.sum(self.by_index, self.by_head)

    def scores(self) -> dict[str, list[float]]:
        """Return the accuracy at each index that occurs, and of each head where its target exists."""
        right, total = (row[self.by_index[1] > 0] for row in self.by_index)
        scores = {"position_accuracy": (right / total).tolist()}
        if self.heads:
            scores["head_accuracy"] = (self.by_head[0] / self.by_head[1].clamp(min=1)).tolist()
        return scores

    def picture(self) -> Image.Image:
        """Draw the answers, and below them the accuracy over the index."""
        scores = self.scores()
        answers = agreement(
            [(a.question, a.truth, a.predicted) for a in self.answers],
            ["next", *(f"head {k}" for k in range(1, self.heads + 1))],
        )
        accuracy = scores["position_accuracy"]
        heads = "".join(
            f", head {k} {share:.0%}" for k, share in enumerate(scores.get("head_accuracy", []), 1)
        )
        title = f"accuracy by index in the answer, from 1 on (teacher-forced, all validation records){heads}"
        lines = {"next token": (range(1, len(accuracy) + 1), accuracy)}
        return stacked([answers, curves(title, lines, height=180)])
