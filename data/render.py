"""The one renderer: a conversation → token ids, image blocks and the loss mask, for training and for prompting alike.

    <|im_start|>user\\n[image blocks]question<|im_end|>\\n<|im_start|>assistant\\nanswer<|im_end|>\\n<|im_start|>user\\n…
                                                                          learnt: ^^^^^^^^^^^^^^^^^

An image block is the tokens of one image: global-image marker, then P image tokens for its tile.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from data.tokens import Tokenizer

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
        starts = [i for i, image in enumerate(self.left_images) if i == 0 or (isolated and image != self.left_images[i - 1])]
        return [slice(a, b) for a, b in pairwise([*starts, len(self.left_ids)])]


class Renderer:
    """Renders conversations for one tokenizer and one number of image tokens a tile.

    `left_context` says which tokens go left: "image", those of image blocks; "prefix", all up to the last image
    token; "none", none (vanilla).
    """

    def __init__(self, tokenizer: Tokenizer, tokens_per_tile: int, left_context: str = "image") -> None:
        self.tokenizer, self.tokens_per_tile, self.left_context = tokenizer, tokens_per_tile, left_context
        self.newline = tokenizer.encode("\n")
        self.user, self.assistant = ([tokenizer.turn_start, *tokenizer.encode(f"{role}\n")] for role in ("user", "assistant"))

    def image_block(self) -> list[int]:
        """Ids of the tokens that stand for one image."""
        return [self.tokenizer.global_image] + [self.tokenizer.image] * self.tokens_per_tile

    def conversation(self, images: int, turns: list[dict[str, str]]) -> Document:
        """A whole conversation, for training: `turns` of {"user", "assistant"}; `images` blocks stand at the head of the first."""
        return self._render(images, turns, open_turn=False)

    def prompt(self, images: int, turns: list[dict[str, str]]) -> Document:
        """The same conversation up to where the last answer begins; the last turn has no "assistant"."""
        return self._render(images, turns, open_turn=True)

    def _render(self, images: int, turns: list[dict[str, str]], open_turn: bool) -> Document:
        tok = self.tokenizer
        ids: list[int] = []
        learnt: list[bool] = []
        image_of: list[int] = []

        def add(tokens: list[int], learn: bool = False, image: int = -1) -> None:
            ids.extend(tokens)
            learnt.extend([learn] * len(tokens))
            image_of.extend([image] * len(tokens))

        for number, turn in enumerate(turns):
            if number:
                add(self.newline)
            add(self.user)
            for image in range(images if number == 0 else 0):
                add(self.image_block(), image=image)
            add([*tok.encode(turn["user"]), tok.turn_end, *self.newline, *self.assistant])
            if number + 1 < len(turns) or not open_turn:
                add([*tok.encode(turn["assistant"]), tok.turn_end], learn=True)
        labels = [following if learn else IGNORE for following, learn in zip(ids[1:], learnt[1:], strict=True)]
        if open_turn:
            labels = [IGNORE] * len(ids)
        left = self._left(image_of)
        right = sorted(set(range(len(labels))) - set(left))  # the last token of a training document is learnt, never read
        return Document([ids[i] for i in left], left, [image_of[i] for i in left], [ids[i] for i in right], right, [labels[i] for i in right])

    def _left(self, image_of: list[int]) -> list[int]:
        """Positions of the tokens that go left."""
        of_images = [i for i, image in enumerate(image_of) if image >= 0]
        if self.left_context == "none" or not of_images:
            return []
        return of_images if self.left_context == "image" else list(range(of_images[-1] + 1))


def turns_of(texts: list[dict[str, Any]], mode: str) -> list[list[dict[str, Any]]]:
    """A record's texts → conversations: "chain" makes one of them all, "branch" one of each."""
    return [texts] if mode == "chain" else [[turn] for turn in texts]
