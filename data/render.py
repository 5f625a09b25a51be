"""The one renderer, for training and prompting: a conversation → token ids, image blocks and the loss mask.

    <|im_start|>user\\n[image blocks]question<|im_end|>\\n
    <|im_start|>assistant\\nanswer<|im_end|>\\n
                supervised: ^^^^^^^^^^^^^^^^^
    <|im_start|>user\\n…

An image block is the tokens of one image: a global-image marker and P image tokens for the whole image. If
the image is split into tiles, each tile follows with its `row r, column c` marker and P image tokens.
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
    """One conversation with its tokens routed to the left or the right stream.

    Positions count over both streams. `labels[i]` is the token after right token i if that token is
    supervised, else −100. So the last end-of-turn token of a training document is a label only.
    """

    left_ids: list[int]
    left_positions: list[int]
    left_images: list[int]  # index of the image of a left token; −1: none
    right_ids: list[int]
    right_positions: list[int]
    labels: list[int]

    @property
    def length(self) -> int:
        """Number of positions of both streams, up to the last right token."""
        return self.right_positions[-1] + 1

    def blocks(self, isolated: bool) -> list[slice]:
        """Return the parts of the left stream that are encoded separately.

        With `isolated` images these are the image blocks; otherwise the whole stream is one part.
        """
        starts = [
            i
            for i, image in enumerate(self.left_images)
            if i == 0 or (isolated and image != self.left_images[i - 1])
        ]
        return [slice(a, b) for a, b in pairwise([*starts, len(self.left_ids)])]


class Renderer:
    """Renders conversations for one tokenizer and one number of image tokens per tile.

    `left_context` selects the tokens that go left: "image", those of image blocks; "prefix", all up to the
    last image token; "none", no token (vanilla).
    """

    def __init__(self, tokenizer: Tokenizer, tokens_per_tile: int, left_context: str = "image") -> None:
        self.tokenizer, self.tokens_per_tile, self.left_context = tokenizer, tokens_per_tile, left_context
        self.newline = tokenizer.encode("\n")
        self.user, self.assistant = (
            [tokenizer.turn_start, *tokenizer.encode(f"{role}\n")] for role in ("user", "assistant")
        )

    @property
    def left_unit(self) -> int:
        """Unit of left lengths in packing. With "image" they are multiples of one tile's tokens."""
        return {"image": 1 + self.tokens_per_tile, "prefix": 16, "none": 1}[self.left_context]

    def image_block(self, grid: Grid = (1, 1)) -> list[int]:
        """Return the token ids of one image, split into `grid` = (rows, columns) tiles."""
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
        """Render a whole conversation of `turns` {"user", "assistant"}, for training.

        A block for each image of `grids` precedes the text of the first turn.
        """
        return self._render(grids, turns, open_turn=False)

    def prompt(self, grids: Sequence[Grid], turns: list[dict[str, str]]) -> Document:
        """Render a conversation up to the start of the last answer; the last turn has no "assistant"."""
        return self._render(grids, turns, open_turn=True)

    def follow_up(self, grids: Sequence[Grid], text: str, last: list[int], position: int) -> Document:
        """Render what follows an answer: its end of turn, the next user turn, the start of the next answer.

        `last`: the answer's tokens that are not in the cache yet; `position`: that of the first of them.
        """
        document = self._render(grids, [{"user": text}], open_turn=True)
        before = [*last, self.tokenizer.turn_end, *self.newline]
        if self.left_context == "prefix":
            raise ValueError(
                "with left_context = prefix the text before an image goes left: "
                "a conversation cannot go on from its cache"
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

    def preview(self, document: Document) -> str:
        """Return a document's text for people: with special tokens, and runs of image tokens as a count."""
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
        labels: list[int] = []  # the next token if it is supervised, else IGNORE
        segments: list[tuple[int, int, int]] = []  # start, end, image or −1

        def add(tokens: list[int], supervised: bool = False, image: int = -1) -> None:
            start = len(ids)
            ids.extend(tokens)
            labels.extend([IGNORE] * len(tokens))
            if supervised:
                labels[start - 1 : -1] = tokens
            segments.append((start, len(ids), image))

        for number, turn in enumerate(turns):
            if number:
                add(self.newline)
            add(self.user)
            for image, grid in enumerate(grids if number == 0 else ()):
                add(self.image_block(grid), image=image)
            add([*tok.encode(turn["user"]), tok.turn_end, *self.newline, *self.assistant])
            if number + 1 < len(turns) or not open_turn:
                add([*tok.encode(turn["assistant"]), tok.turn_end], supervised=not open_turn)
        if not open_turn:  # the last token of a training document is a label, never an input
            segments[-1] = (segments[-1][0], segments[-1][1] - 1, -1)
        return route(ids, labels, segments, self.left_context)


def route(
    ids: list[int], labels: list[int], segments: list[tuple[int, int, int]], left_context: str
) -> Document:
    """Route a conversation's tokens and labels to the streams of a document.

    `segments`: start, end and image (−1: none) of the parts that go left or right as a whole.
    """
    document = Document([], [], [], [], [], [])
    last_image = max((i for i, (_, _, image) in enumerate(segments) if image >= 0), default=-1)
    for number, (start, end, image) in enumerate(segments):
        if (left_context == "image" and image >= 0) or (left_context == "prefix" and number <= last_image):
            document.left_ids.extend(ids[start:end])
            document.left_positions.extend(range(start, end))
            document.left_images.extend([image] * (end - start))
        else:
            document.right_ids.extend(ids[start:end])
            document.right_positions.extend(range(start, end))
            document.labels.extend(labels[start:end])
    return document


def segments_of(ids: list[int], vocabulary: Vocabulary) -> list[tuple[int, int, int]]:
    """Split `ids` at image blocks into the segments of `route`.

    A block begins with the global-image marker, the first of the markers.
    """
    started = list(accumulate(token == vocabulary.first_marker_id for token in ids))
    images = [
        count - 1 if token >= vocabulary.image_token_id else -1
        for token, count in zip(ids, started, strict=True)
    ]
    segments, start = [], 0
    for image, run in groupby(images):
        segments.append((start, start := start + len(list(run)), image))
    return segments


def turns_of(texts: list[dict[str, Any]], mode: str) -> list[list[dict[str, Any]]]:
    """Group a record's texts into conversations: one of all ("chain") or one of each ("branch")."""
    return [texts] if mode == "chain" else [[turn] for turn in texts]
