"""The one renderer: a conversation → token ids, image blocks and the loss mask, for training and for prompting alike.

    <|im_start|>user\\n[image blocks]question<|im_end|>\\n<|im_start|>assistant\\nanswer<|im_end|>\\n<|im_start|>user\\n…
                                                                          learnt: ^^^^^^^^^^^^^^^^^

An image block is the tokens of one image: global-image marker, then P image tokens for its tile.
"""

from dataclasses import dataclass
from typing import Any

from data.tokens import Tokenizer

IGNORE = -100


@dataclass(frozen=True)
class Document:
    """One conversation, its tokens already routed: those of image blocks to the left stream, all others to the right.

    Positions count over both. `labels[i]` is the token after right token i where that one is learnt, else −100; so the
    last end-of-turn token of a training document is a label only.
    """

    right_ids: list[int]
    right_positions: list[int]
    labels: list[int]
    block_positions: list[int]  # where each image block starts

    @property
    def length(self) -> int:
        """Tokens of both streams, as far as the document reaches."""
        return self.right_positions[-1] + 1


class Renderer:
    """Renders conversations for one tokenizer and one number of image tokens a tile."""

    def __init__(self, tokenizer: Tokenizer, tokens_per_tile: int) -> None:
        self.tokenizer, self.tokens_per_tile = tokenizer, tokens_per_tile
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
        jump_at, block_positions, block = 0, [], len(self.image_block())

        def add(tokens: list[int], learn: bool = False) -> None:
            ids.extend(tokens)
            learnt.extend([learn] * len(tokens))

        for number, turn in enumerate(turns):
            if number:
                add(self.newline)
            add(self.user)
            if number == 0:
                jump_at = len(ids)
                block_positions = [jump_at + i * block for i in range(images)]
            add([*tok.encode(turn["user"]), tok.turn_end, *self.newline, *self.assistant])
            if number + 1 < len(turns) or not open_turn:
                add([*tok.encode(turn["assistant"]), tok.turn_end], learn=True)
        positions = [i if i < jump_at else i + images * block for i in range(len(ids))]
        if open_turn:
            return Document(ids, positions, [IGNORE] * len(ids), block_positions)
        labels = [following if learn else IGNORE for following, learn in zip(ids[1:], learnt[1:], strict=True)]
        return Document(ids[:-1], positions[:-1], labels, block_positions)  # the last token is learnt, never read


def turns_of(texts: list[dict[str, Any]], mode: str) -> list[list[dict[str, Any]]]:
    """A record's texts → conversations: "chain" makes one of them all, "branch" one of each."""
    return [texts] if mode == "chain" else [[turn] for turn in texts]
