"""Predicted against true tokens under teacher forcing: accuracy by place in the answer and by multi-token head, and a picture of some answers, token by token."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data.tokenizer import Tokenizer
from utils.plotting import agreement, curves, stacked
from utils.ranks import DistributedContext

PLACES = 8  # tokens of an answer whose places are told apart
SHOWN, LONGEST = 8, 32  # answers in the picture, and tokens of each


def places(labels: Tensor, documents: Tensor) -> Tensor:
    """Each supervised token's place in its answer, from 0: (S,); `labels`, `documents` (B, R).

    labels     . a b c . d e | f g        documents  0 0 0 0 0 0 0 | 1 1        → 0 1 2 0 1 0 1
    """
    supervised, index = labels != -100, torch.arange(labels.shape[1], device=labels.device)
    goes_on = F.pad(supervised[:, :-1], (1, 0)) & (F.pad(documents[:, :-1], (1, 0), value=-1) == documents)
    start = torch.where(supervised & ~goes_on, index, 0).cummax(1).values
    return (index - start)[supervised]


@dataclass
class TokenComparison:
    """One answer's tokens as text; `said[0]` is what was predicted for each as the next token, `said[k]` by head k, None where that had nothing to say."""

    question: str
    truth: list[str]
    said: list[list[str | None]]


@dataclass
class Agreement:
    """Sums over batches, and the first answers that were added."""

    heads: int
    places: Tensor = field(default_factory=lambda: torch.zeros(2, PLACES, dtype=torch.float64))  # right, all
    by_head: Tensor = field(init=False)  # (2, K)
    answers: list[TokenComparison] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.by_head = torch.zeros(2, self.heads, dtype=torch.float64)

    def add(
        self,
        model: Any,
        batch: dict[str, Tensor],
        hidden: Tensor,
        predicted: Tensor,
        tokenizer: Tokenizer | None,
    ) -> None:
        """`hidden` (B, R, D); `predicted` (S,) at its supervised tokens. With a tokenizer answers are kept, while there is room."""
        labels, documents = batch["labels"], batch["right_documents"]
        truth, place = labels[labels != -100], places(labels, documents)
        near = place < PLACES
        for row, of in zip(self.places, (near & (predicted == truth), near), strict=True):
            row += place[of].bincount(minlength=PLACES).cpu()
        columns = [predicted[:, None]]
        if self.heads:
            right = model.right
            drafted, targets = model.heads.predictions(
                hidden, labels, documents, right.embed_tokens, right.unembedding
            )  # (S, K) both
            self.by_head += torch.stack(((drafted == targets) & (targets >= 0), targets >= 0)).sum(1).cpu()
            columns.append(drafted)
        if tokenizer is not None and len(self.answers) < SHOWN:
            self._keep(batch, truth.tolist(), place.tolist(), torch.cat(columns, 1).tolist(), tokenizer)

    def _keep(
        self,
        batch: dict[str, Tensor],
        truth: list[int],
        place: list[int],
        said: list[list[int]],
        tokenizer: Tokenizer,
    ) -> None:
        rows, at = (batch["labels"] != -100).nonzero(as_tuple=True)
        starts = [i for i, p in enumerate(place) if p == 0]
        for start, end in zip(starts, [*starts[1:], len(place)], strict=True):
            row, first = int(rows[start]), int(at[start])
            document = batch["right_documents"][row] == batch["right_documents"][row, first]
            asked = tokenizer.decode(batch["right_ids"][row, : first + 1][document[: first + 1]].tolist())
            question = " ".join(asked.strip().removeprefix("user").removesuffix("assistant").split())
            tokens = range(start, min(end, start + LONGEST))
            by_row = [
                [said[i - k][k] if i - k >= start else -1 for i in tokens] for k in range(1 + self.heads)
            ]
            self.answers.append(
                TokenComparison(
                    question,
                    [tokenizer.show(truth[i]) for i in tokens],
                    [[tokenizer.show(t) if t >= 0 else None for t in one] for one in by_row],
                )
            )
            if len(self.answers) == SHOWN:
                return

    def share(self, world: DistributedContext) -> None:
        """The sums of all ranks."""
        world.sum(self.places, self.by_head)

    def scores(self) -> dict[str, list[float]]:
        """Share of right tokens at each place that occurs, the first 8 at most; of each head, where its target exists."""
        right, every = (row[self.places[1] > 0] for row in self.places)
        out = {"position_accuracy": (right / every).tolist()}
        return out | (
            {"head_accuracy": (self.by_head[0] / self.by_head[1].clamp(min=1)).tolist()} if self.heads else {}
        )

    def picture(self) -> Image.Image:
        """The answers that were kept, and below them the accuracy over the places."""
        found = self.scores()
        sheets = [
            agreement(
                [(a.question, a.truth, a.said) for a in self.answers],
                ["next", *(f"head {k}" for k in range(1, self.heads + 1))],
            )
        ]
        accuracy = found["position_accuracy"]
        heads = "".join(
            f", head {k} {share:.0%}" for k, share in enumerate(found.get("head_accuracy", []), 1)
        )
        title = f"accuracy by place in the answer, from 1 on (teacher-forced, all validation records){heads}"
        return stacked(
            [*sheets, curves(title, {"next token": (range(1, len(accuracy) + 1), accuracy)}, height=180)]
        )
