r"""The one renderer, for training and prompting: a conversation → token ids, image blocks and the loss mask.

The model's chat template writes the text. With ChatML:

    <|im_start|>user\n[image block]question<|im_end|>\n
    <|im_start|>assistant\nanswer<|im_end|>\n
              supervised: ^^^^^^^^^^^^^^^^
    <|im_start|>user\n…

An image block is the tokens of one image: a global-image marker and P image tokens for the whole image. If
the image is split into tiles, each tile follows with its `row r, column c` marker and P image tokens.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

from configs.model import Vocabulary
from data.conversations import Conversation, Part
from data.images import Grid
from data.tokenizer import IMAGE, TEXT_MARK, Tokenizer
from utils.errors import UsageError

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
        """Number of positions of both streams."""
        return 1 + max(self.right_positions[-1:] + self.left_positions[-1:], default=-1)

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

    @property
    def left_unit(self) -> int:
        """Unit of left lengths in packing. With "image" they are multiples of one tile's tokens."""
        return {"image": 1 + self.tokens_per_tile, "prefix": 16, "none": 1}[self.left_context]

    def image_block(self, grid: Grid = (1, 1)) -> list[int]:
        """Return the token ids of one image, split into `grid` = (rows, columns) tiles."""
        return self.tokenizer.image_block(grid, self.tokens_per_tile)

    def conversation(self, messages: Conversation, grids: Sequence[Grid] = ()) -> Document:
        """Render a whole conversation, for training: what the assistant says is supervised.

        It ends with the assistant's last turn. `grids`: those of its image parts, in order; `ValueError`
        where the numbers differ. Errors: `UsageError` where the chat template refuses the conversation.
        """
        text = self._text(messages)
        ids = self.tokenizer.encode_rendered(text)
        turns = self._assistant_turns(messages, text, ids)
        if not turns:
            raise UsageError("the conversation has no answer of the assistant")
        # The last token is a label, never an input.
        return self._document(ids[: turns[-1][1]], turns, grids, drop_last=True)

    def prompt(
        self, messages: Conversation, grids: Sequence[Grid] = (), add_generation_prompt: bool = True
    ) -> Document:
        """Render a conversation up to the start of the assistant's next message.

        A last message that is the assistant's is to be continued. Without `add_generation_prompt` the
        document is the conversation as it is.
        """
        text = self._text(messages, add_generation_prompt and messages[-1]["role"] != "assistant")
        ids = self.tokenizer.encode_rendered(text)
        if add_generation_prompt and messages[-1]["role"] == "assistant":
            ids = ids[: self._assistant_turns(messages, text, ids)[-1][1] - 1]
        return self._document(ids, [], grids)

    def trusted(self, text: str, grids: Sequence[Grid]) -> Document:
        """Render text that a chat template wrote: special tokens in it are special."""
        return self._document(self.tokenizer.encode_rendered(text), [], grids)

    def follow_up(
        self, messages: Conversation, grids: Sequence[Grid], last: list[int], position: int
    ) -> Document:
        """Render what follows the assistant's message, the last but one of `messages`; `prompt` otherwise.

        `grids`: of the images in the last message. `last`: tokens of the answer that are not in the cache
        yet; `position`: that of the first of them.
        """
        if self.left_context == "prefix":
            raise ValueError(
                "with left_context = prefix the text before an image goes left: "
                "a conversation cannot go on from its cache"
            )
        before, text = self._text(messages[:-2], True), self._text(messages, True)
        answer = self.tokenizer.special_pattern.search(text, self._checked_length(before, text))
        assert answer is not None  # the template ends every turn with a special token
        ids = [*last, *self.tokenizer.encode_rendered(text[answer.start() :])]
        return self._document(ids, [], grids, first_position=position)

    def page(self, parts: Sequence[Part], grids: Sequence[Grid] = ()) -> Document:
        """Render an interleaved page, supervised everywhere; no chat template is involved.

        A token behind an image is supervised in a vanilla model only: elsewhere no right token precedes it.
        """
        ids = self.tokenizer.encode_rendered(self._flat(parts) + self.tokenizer.template.turn_end)
        return self._document(ids, [(1, len(ids))], grids, drop_last=True)

    def user_start(self) -> list[int]:
        """The tokens with which a conversation begins, up to the user's first text."""
        before, _, _ = self._text([{"role": "user", "content": "alpha"}]).partition("alpha")
        return self.tokenizer.encode_rendered(before)

    def text(self, messages: Conversation, add_generation_prompt: bool = False) -> str:
        """The chat template's text, with a placeholder per image; special tokens in it are special."""
        return self._text(messages, add_generation_prompt).replace(TEXT_MARK, "")

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

    def _flat(self, content: str | Sequence[Part]) -> str:
        """A content as text: placeholders for its images; names of special tokens are marked as text."""
        if isinstance(content, str):
            return self.tokenizer.as_text(content)
        runs = groupby(content, key=lambda part: part["type"] == "image")  # a name may span parts
        return "".join(
            IMAGE * len(list(run))
            if is_image
            else self.tokenizer.as_text("".join(part["text"] for part in run))
            for is_image, run in runs
        )

    def _text(self, messages: Conversation, add_generation_prompt: bool = False) -> str:
        """The chat template's text of messages, whose contents become `_flat`."""
        flat = [{"role": m["role"], "content": self._flat(m["content"])} for m in messages]
        return self.tokenizer.template.render(flat, add_generation_prompt)

    @staticmethod
    def _checked_length(before: str, text: str) -> int:
        if not text.startswith(before):
            raise UsageError(
                "the model's chat template changes what has been said when this message is added: "
                f"{before[-40:]!r} is no longer there"
            )
        return len(before)

    def _assistant_turns(self, messages: Conversation, text: str, ids: list[int]) -> list[tuple[int, int]]:
        """Start and end, in `ids`, of each of the assistant's turns: content and the token that ends it.

        A turn begins behind the header that asks for it. Errors: `UsageError` for an answer to no message.
        """
        template = self.tokenizer.template
        if self.tokenizer.special_pattern.search(template.header):  # no content holds it
            starts = [match.end() for match in re.finditer(re.escape(template.header), text)]
        else:
            answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
            starts = [self._checked_length(self._text(messages[:n], True), text) for n in answers]
        turns = self.tokenizer.turn_tokens(text, ids, starts)
        if len(turns) != sum(message["role"] == "assistant" for message in messages):
            raise UsageError("an answer of the assistant does not follow a message of the user")
        return turns

    def _document(
        self,
        ids: list[int],
        supervised: list[tuple[int, int]],
        grids: Sequence[Grid],
        drop_last: bool = False,
        first_position: int = 0,
    ) -> Document:
        """Replace each placeholder in `ids` by its image's block, and route the tokens.

        `supervised`: start and end in `ids`. `drop_last`: the last token is a label only.
        """
        if ids.count(self.tokenizer.image) != len(grids):
            raise ValueError(f"{ids.count(self.tokenizer.image)} image parts, {len(grids)} images")
        following = [IGNORE] * len(ids)  # the next token, if it is supervised
        for start, end in supervised:
            following[start - 1 : end - 1] = ids[start:end]
        whole: list[int] = []
        labels: list[int] = []
        segments: list[tuple[int, int, int]] = []  # start, end, image or −1
        start = 0
        image_indices = [i for i, token in enumerate(ids) if token == self.tokenizer.image]
        for image, (index, grid) in enumerate(zip(image_indices, grids, strict=True)):
            block = self.image_block(grid)
            for part, part_labels, number in (
                (ids[start:index], following[start:index], -1),
                (block, [IGNORE] * (len(block) - 1) + [following[index]], image),
            ):
                segments.append((len(whole), len(whole) + len(part), number))
                whole += part
                labels += part_labels
            start = index + 1
        end = len(ids) - drop_last
        segments.append((len(whole), len(whole) + end - start, -1))
        # Before an image there is no next token to learn: its block begins with a marker.
        labels = [
            IGNORE if label == self.tokenizer.image else label for label in labels + following[start:end]
        ]
        return route(whole + ids[start:end], labels, segments, self.left_context, first_position)


def route(
    ids: list[int],
    labels: list[int],
    segments: list[tuple[int, int, int]],
    left_context: str,
    first_position: int = 0,
) -> Document:
    """Route a conversation's tokens and labels to the streams of a document.

    `segments`: start, end and image (−1: none) of the parts that go left or right as a whole.
    """
    document = Document([], [], [], [], [], [])
    last_image = max((i for i, (_, _, image) in enumerate(segments) if image >= 0), default=-1)
    for number, (start, end, image) in enumerate(segments):
        if (left_context == "image" and image >= 0) or (left_context == "prefix" and number <= last_image):
            document.left_ids.extend(ids[start:end])
            document.left_positions.extend(range(first_position + start, first_position + end))
            document.left_images.extend([image] * (end - start))
        else:
            document.right_ids.extend(ids[start:end])
            document.right_positions.extend(range(first_position + start, first_position + end))
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
