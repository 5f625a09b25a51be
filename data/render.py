"""The one renderer: a conversation → token ids, image blocks and the loss mask, for training and for prompting alike.

    <|im_start|>user\\n[image blocks]question<|im_end|>\\n<|im_start|>assistant\\nanswer<|im_end|>\\n<|im_start|>user\\n…
                                                                          learnt: ^^^^^^^^^^^^^^^^^

An image block is the tokens of one image: global-image marker and P image tokens for the view of the whole; then, where
the image is cut into tiles, each tile's `row r, column c` marker and its P image tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import Any

from configs.model import MAX_GRID, Vocabulary
from data.images import Grid
from data.tokenizer import Tokenizer

IGNORE = -100


@dataclass(frozen=True)
class Document:
    """One conversation, its tokens already routed to the left or the right stream.

    Positions count over both. `labels[i]` is the token after right token i where that one is learnt, else −100; so the
    last end-of-turn token of a training document is a label only.
    """

    left_ids: list[int]
    left_positions: list[int]
    left_images: list[int]  # which image a left token belongs to; −1: none
    right_ids: list[int]
    right_positions: list[int]
    labels: list[int]

    @property
    def length(self) -> int:
        """Tokens of both streams, as far as the document reaches."""
        return self.right_positions[-1] + 1

    def blocks(self, isolated: bool) -> list[slice]:
        """The parts of the left stream that are encoded each by itself: every image's block, or all of it where images see one another."""
        starts = [
            i
            for i, image in enumerate(self.left_images)
            if i == 0 or (isolated and image != self.left_images[i - 1])
        ]
        return [slice(a, b) for a, b in pairwise([*starts, len(self.left_ids)])]


class Renderer:
    """Renders conversations for one tokenizer and one number of image tokens a tile.

    `left_context` says which tokens go left: "image", those of image blocks; "prefix", all up to the last image
    token; "none", none (vanilla).
    """

    def __init__(self, tokenizer: Tokenizer, tokens_per_tile: int, left_context: str = "image") -> None:
        self.tokenizer, self.tokens_per_tile, self.left_context = tokenizer, tokens_per_tile, left_context
        self.newline = tokenizer.encode("\n")
        self.user, self.assistant = (
            [tokenizer.turn_start, *tokenizer.encode(f"{role}\n")] for role in ("user", "assistant")
        )

    @property
    def left_unit(self) -> int:
        """What left lengths are counted in when rows are packed. Where only image blocks go left they are multiples of a tile's tokens."""
        return {"image": 1 + self.tokens_per_tile, "prefix": 16, "none": 1}[self.left_context]

    def image_block(self, grid: Grid = (1, 1)) -> list[int]:
        """Ids of the tokens that stand for one image, cut into `grid` = (rows, columns) tiles."""
        markers = [self.tokenizer.global_image]
        if grid != (1, 1):
            markers += [
                self.tokenizer.tile_markers[row * MAX_GRID + column]
                for row in range(grid[0])
                for column in range(grid[1])
            ]
        return [
            token for marker in markers for token in (marker, *[self.tokenizer.image] * self.tokens_per_tile)
        ]

    def conversation(self, grids: Sequence[Grid], turns: list[dict[str, str]]) -> Document:
        """A whole conversation, for training: `turns` of {"user", "assistant"}; a block for each image of `grids` stands at the head of the first."""
        return self._render(grids, turns, open_turn=False)

    def prompt(self, grids: Sequence[Grid], turns: list[dict[str, str]]) -> Document:
        """The same conversation up to where the last answer begins; the last turn has no "assistant"."""
        return self._render(grids, turns, open_turn=True)

    def follow_up(self, grids: Sequence[Grid], text: str, last: list[int], position: int) -> Document:
        """What follows an answer in a conversation that goes on: its end, the next user turn, and where the next answer begins.

        `last`: the answer's tokens that are not behind us yet; `position`: of the first of them.
        """
        document = self._render(grids, [{"user": text}], open_turn=True)
        before = [*last, self.tokenizer.turn_end, *self.newline]
        if self.left_context == "prefix":
            raise ValueError(
                "with left_context = prefix the text before an image goes left: a conversation cannot go on from its cache"
            )
        shift = position + len(before)
        return Document(
            document.left_ids,
            [shift + p for p in document.left_positions],
            document.left_images,
            [*before, *document.right_ids],
            [*range(position, shift), *(shift + p for p in document.right_positions)],
            [IGNORE] * (len(before) + len(document.right_ids)),
        )

    def shown(self, document: Document) -> str:
        """A document's text with its special tokens, for people; a run of image tokens is told by its length."""
        tokens = sorted(
            [
                *zip(document.left_positions, document.left_ids, strict=True),
                *zip(document.right_positions, document.right_ids, strict=True),
            ]
        )
        parts = []
        for is_image, run in groupby(
            (token for _, token in tokens), key=lambda token: token == self.tokenizer.image
        ):
            ids = list(run)
            parts.append(
                f"[{len(ids)} image tokens]"
                if is_image
                else self.tokenizer.backend.decode(ids, skip_special_tokens=False)
            )
        return "".join(parts)

    def _render(self, grids: Sequence[Grid], turns: list[dict[str, str]], open_turn: bool) -> Document:
        tok = self.tokenizer
        ids: list[int] = []
        labels: list[int] = []  # the token after each, where it is learnt
        spans: list[tuple[int, int, int]] = []  # start, end, image or −1

        def add(tokens: list[int], learn: bool = False, image: int = -1) -> None:
            start = len(ids)
            ids.extend(tokens)
            labels.extend([IGNORE] * len(tokens))
            if learn:
                labels[start - 1 : -1] = tokens
            spans.append((start, len(ids), image))

        for number, turn in enumerate(turns):
            if number:
                add(self.newline)
            add(self.user)
            for image, grid in enumerate(grids if number == 0 else ()):
                add(self.image_block(grid), image=image)
            add([*tok.encode(turn["user"]), tok.turn_end, *self.newline, *self.assistant])
            if number + 1 < len(turns) or not open_turn:
                add([*tok.encode(turn["assistant"]), tok.turn_end], learn=not open_turn)
        if not open_turn:  # the last token of a training document is learnt, never read
            spans[-1] = (spans[-1][0], spans[-1][1] - 1, -1)
        return route(ids, labels, spans, self.left_context)


def route(
    ids: list[int], labels: list[int], spans: list[tuple[int, int, int]], left_context: str
) -> Document:
    """A conversation's tokens and labels → its document. `spans`: start, end and image (−1: none) of the parts that go left or right as a whole."""
    document = Document([], [], [], [], [], [])
    last_image = max((i for i, (_, _, image) in enumerate(spans) if image >= 0), default=-1)
    for number, (start, end, image) in enumerate(spans):
        if (left_context == "image" and image >= 0) or (left_context == "prefix" and number <= last_image):
            document.left_ids.extend(ids[start:end])
            document.left_positions.extend(range(start, end))
            document.left_images.extend([image] * (end - start))
        else:
            document.right_ids.extend(ids[start:end])
            document.right_positions.extend(range(start, end))
            document.labels.extend(labels[start:end])
    return document


def spans_of(ids: list[int], vocabulary: Vocabulary) -> list[tuple[int, int, int]]:
    """Where images stand among `ids`: the spans that `route` takes. An image begins with its global-image marker, the first of the markers."""
    started = list(accumulate(token == vocabulary.first_marker_id for token in ids))
    images = [
        count - 1 if token >= vocabulary.image_token_id else -1
        for token, count in zip(ids, started, strict=True)
    ]
    spans, start = [], 0
    for image, run in groupby(images):
        spans.append((start, start := start + len(list(run)), image))
    return spans


def turns_of(texts: list[dict[str, Any]], mode: str) -> list[list[dict[str, Any]]]:
    """A record's texts → conversations: "chain" makes one of them all, "branch" one of each."""
    return [texts] if mode == "chain" else [[turn] for turn in texts]
