"""Records → samples. A sample is one group: images, and the documents (conversations) that see them.

A sample is planned first: text becomes tokens, and each image's header gives the number of its tiles.
Its images are decoded when its row is due.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from configs.model import VisionConfig
from configs.train import RATINGS, DataConfig, FilterConfig
from data.conversations import (
    Conversation,
    ConversationError,
    Part,
    exchanges_of,
    images_of,
    parts_of,
    placed_conversations,
    placed_page,
    text_of,
    without,
)
from data.curation import Marks
from data.images import Grid, grid_of, image_size, open_pixels, tile_count, to_tiles
from data.mixture import Mixture, Source
from data.parquet import UnreadableBlock
from data.render import IGNORE, Document, Renderer
from utils.errors import ImageError, UsageError, UserError

Key = tuple[int, int, int]  # source, record, part: identifies a sample
Rendered = tuple[list[int], Document]  # a document, and the indices of the images that it shows
AHEAD = 64  # draws that are announced to the tables before they are due
CACHE_BYTES = 1 << 29
SAMPLE_BYTES = 4096  # estimated size of a cached sample, without its images


Drop = tuple[str, str]  # source, reason


class Drops(Counter[str]):
    """Reasons for which parts of a record are dropped; a message for some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: dict[str, str] = {}

    def add(self, reason: str, message: object = "") -> None:
        self[reason] += 1
        self.messages.setdefault(reason, str(message))


@dataclass(frozen=True)
class Sample:
    """Images and the documents that share them."""

    key: Key
    tiles: Tensor | None  # (N, 3, h, w) uint8 of all images; None until the sample is decoded
    documents: list[Document]  # with equal left streams
    images: list[Any] = field(default_factory=list)  # path or encoded bytes of each; empty once decoded
    grids: list[Grid] = field(default_factory=list)
    source: str = ""
    first: bool = False  # drawn for the first time: damaged images are counted only then

    @property
    def left_length(self) -> int:
        return len(self.documents[0].left_ids)

    @property
    def right_length(self) -> int:
        return sum(len(d.right_ids) for d in self.documents)

    @property
    def tile_total(self) -> int:
        return sum(map(tile_count, self.grids)) if self.tiles is None else len(self.tiles)

    def require_tiles(self) -> Tensor:
        """Return the tiles. Errors: `ValueError` before the sample is decoded."""
        if self.tiles is None:
            raise ValueError(f"sample {self.key} is not decoded")
        return self.tiles


def decode(sample: Sample, config: VisionConfig) -> Sample:
    """Return the sample with its images decoded into tiles. Errors: `ImageError`."""
    if sample.tiles is not None:
        return sample
    tiles = []
    for image, grid in zip(sample.images, sample.grids, strict=True):
        decoded = to_tiles(open_pixels(image), config)
        if decoded.grid != grid:  # the size in the header is wrong
            raise ImageError(
                "damaged", f"an image of {sample.source} is not of the size that its header says"
            )
        tiles.append(decoded.pixels)
    empty = torch.empty(0, 3, config.image_size, config.image_size, dtype=torch.uint8)
    return replace(sample, tiles=tiles[0] if len(tiles) == 1 else torch.cat([empty, *tiles]), images=[])


def sample_bytes(sample: Sample) -> int:
    """Approximate memory of a sample."""
    tiles = sample.tiles.nbytes if sample.tiles is not None else 0
    return SAMPLE_BYTES + tiles + sum(len(image) for image in sample.images if isinstance(image, bytes))


class SampleDataset:
    """Maps a record to its samples.

    A record gives one sample, several if its conversations fill more than one row, or none if it is unusable.
    `dropped` counts unusable records and turns by (source, reason); `examples` describes the first of each.
    With `keep`, samples are cached up to `CACHE_BYTES`: a small set is tokenised and decoded only once.
    """

    def __init__(
        self,
        sources: list[Source],
        renderer: Renderer,
        vision: VisionConfig,
        config: DataConfig,
        max_positions: int,
        keep: bool = True,
    ) -> None:
        self.sources, self.renderer, self.vision = sources, renderer, vision
        self.config, self.max_positions = config, max_positions
        self.dropped: Counter[Drop] = Counter()
        self.examples: dict[Drop, str] = {}
        self.marks = Marks(config.curation, sources) if config.curation else None
        self.cache: dict[tuple[int, int], list[Sample]] = {}
        self.capacity = CACHE_BYTES if keep else 0  # bytes left in the cache

    def record(self, source: int, index: int) -> dict[str, Any]:
        return self.sources[source].records[index]

    def samples(self, source: int, index: int, first: bool) -> list[Sample]:
        """Plan a record's samples; an unreadable one gives none. With `first`, drops are counted."""
        try:
            return self.plan(source, index, first)
        except UnreadableBlock as error:  # counted every time and not cached: a later read may succeed
            self.drop(source, index, "unreadable", error)
            return []

    def plan(self, source: int, index: int, first: bool) -> list[Sample]:
        """Plan a record's samples. With `first`, drops are counted. Errors: `UnreadableBlock`."""
        if (cached := self.cache.get((source, index))) is not None:
            return [s if s.first == first else replace(s, first=first) for s in cached]
        drops = Drops()
        samples = self._plan(source, index, first, drops)
        if first:
            for reason, n in (+drops).items():
                self.drop(source, index, reason, drops.messages.get(reason, ""), n)
        self.keep((source, index), samples)
        return samples

    def drop(self, source: int, index: int, reason: str, message: object = "", count: int = 1) -> None:
        """Count drops of a record; `message`: what is wrong, if the reason does not say it."""
        name = self.sources[source].name
        self.dropped[name, reason] += count
        self.examples.setdefault((name, reason), f"record {index}" + (f": {message}" if str(message) else ""))

    def keep(self, record: tuple[int, int], samples: list[Sample]) -> None:
        """Cache the samples of `record` = (source, index) while the capacity lasts."""
        free = (
            self.capacity
            + sum(map(sample_bytes, self.cache.get(record, [])))
            - sum(map(sample_bytes, samples))
        )
        if free >= 0:
            self.cache[record], self.capacity = samples, free

    def decoded(self, sample: Sample) -> Sample:
        """Return the sample with its tiles, and update the cache. Errors: `ImageError`."""
        decoded = decode(sample, self.vision)
        record = sample.key[:2]
        samples = self.cache.get(record)
        if samples is not None and decoded is not sample:
            self.keep(record, [decoded if s.key == sample.key else s for s in samples])
        return decoded

    def _plan(self, source: int, index: int, first: bool, drops: Drops) -> list[Sample]:
        """Plan a record without the cache; the reasons of its drops are added to `drops`."""
        record, name = self.record(source, index), self.sources[source].name
        if self.marks is not None:
            if self.marks.is_duplicate(name, index):
                drops.add("duplicate")
                return []
            if (score := self.marks.score(name, index)) is not None:
                record = {**record, "clip_score": score}
        if problem := record.get("problem"):  # the reader of the source refused it
            drops.add(problem)
            return []
        conversations = [] if "interleaved" in record else self.conversations(record, drops)
        if not conversations and "interleaved" not in record:
            return []
        grids = self._usable_grids(record, drops)
        if grids is None:
            return []
        rendered = (
            self._page(record, grids, drops)
            if "interleaved" in record
            else [r for messages in conversations for r in self._documents(messages, grids, drops)]
        )
        drops["too_many_images"] = min(drops["too_many_images"], 1)  # a record counts once
        images = record["images"]
        return [
            Sample(
                (source, index, part),
                None,
                documents,
                [images[i] for i in indices],
                [grids[i] for i in indices],
                name,
                first,
            )
            for part, (indices, documents) in enumerate(self._parts(rendered))
        ]

    def conversations(self, record: dict[str, Any], drops: Drops) -> list[Conversation]:
        """Return a record's conversations, each image at its place, without exchanges that are dropped.

        The images of a dropped exchange move to the next message of the user. Reasons are added to `drops`.
        """
        try:
            conversations = placed_conversations(record, self.config.turns)
        except ConversationError as error:
            drops.add(error.reason, error)
            return []
        result = []
        for messages in conversations or [[]]:
            exchanges = exchanges_of(messages)
            if not exchanges:
                drops.add("empty_text")
            for start, end in reversed(exchanges):
                if reason := exchange_problem(messages[start:end], self.config.filters):
                    drops.add(reason)
                    messages = without(messages, start, end)
            if exchanges := exchanges_of(messages):
                result.append(messages[: exchanges[-1][1]])  # nothing behind the last answer is trained on
        return result

    def _usable_grids(self, record: dict[str, Any], drops: Drops) -> list[Grid] | None:
        """Return the tile grid of every image; None, with the reason counted, if the record is dropped."""
        images, minimum = record["images"], self.config.filters.min_clip_score
        try:
            if images is None:
                raise ImageError("missing", f"{record.get('id', 'a record')} has no list of images")
            score = record.get("clip_score")
            if minimum and isinstance(score, int | float) and score < minimum:
                drops.add("clip_score")
                return None
            return [self._grid(image) for image in images]
        except ImageError as error:
            drops.add(f"image_{error.reason}", error)
            return None

    def _parts(self, rendered: list[Rendered]) -> list[tuple[list[int], list[Document]]]:
        """Gather documents that can share their images, as far as their right streams fit a row.

        They can where their left streams are equal: the same images at the same positions. Without a left
        stream every document holds its images itself.
        """
        parts: list[tuple[list[int], list[Document]]] = []
        capacity = 0
        for images, document in rendered:
            last = parts[-1] if parts else None
            if (
                last is None
                or len(document.right_ids) > capacity
                or not document.left_ids
                or last[0] != images
                or last[1][0].left_ids != document.left_ids
                or last[1][0].left_positions != document.left_positions
            ):
                parts.append((images, []))
                capacity = self.config.right_length
            parts[-1][1].append(document)
            capacity -= len(document.right_ids)
        return parts

    def _grid(self, image: Any) -> Grid:
        if image is None:
            raise ImageError("missing", "an image is None")
        if not self.vision.max_side and not self.config.filters.min_side:
            return (1, 1)
        width, height = image_size(image)
        if min(width, height) < self.config.filters.min_side:
            raise ImageError("small", f"an image of {width}×{height} pixels")
        return grid_of(width, height, self.vision)

    def _documents(self, messages: Conversation, grids: list[Grid], drops: Drops) -> list[Rendered]:
        """Render a conversation; one that is too long is split between exchanges.

        Every part begins with the system message and the images so far.
        """
        try:
            rendered = []
            system = sum(message["role"] == "system" for message in messages[:1])
            while exchanges := exchanges_of(messages):
                ends = [end for _, end in exchanges]
                end, part, problem = self._longest(ends, messages, self._chat, grids)
                if part:
                    rendered.append(part)
                else:
                    drops.add(problem)
                if problem == "too_many_images":  # the next part would begin with them
                    break
                messages = without(messages, system, end)
            return rendered
        except UsageError as error:  # of the template: roles that do not alternate, a system message, …
            drops.add("chat_template", error)
            return []

    def _chat(self, messages: Conversation, grids: list[Grid]) -> Rendered:
        indices = [part["index"] for part in images_of(messages)]
        return indices, self.renderer.conversation(messages, [grids[i] for i in indices])

    def _page(self, record: dict[str, Any], grids: list[Grid], drops: Drops) -> list[Rendered]:
        """Render an interleaved page; one that is too long is split between its parts."""
        try:
            parts = placed_page(record)
        except ConversationError as error:
            drops.add(error.reason, error)
            return []

        rendered = []
        while parts:
            ends = range(1, len(parts) + 1)
            end, part, problem = self._longest(ends, parts, self._page_part, grids)
            if not part:
                drops.add(problem)
            elif any(label != IGNORE for label in part[1].labels):
                rendered.append(part)
            parts = parts[end:]
        if not rendered and not +drops:
            drops.add("empty_text")
        return rendered

    def _page_part(self, parts: list[Part], grids: list[Grid]) -> Rendered:
        indices = [part["index"] for part in parts if part["type"] == "image"]
        return indices, self.renderer.page(parts, [grids[i] for i in indices])

    def _longest(
        self,
        ends: Sequence[int],
        content: list[Any],
        render: Callable[[list[Any], list[Grid]], Rendered],
        grids: list[Grid],
    ) -> tuple[int, Rendered | None, str]:
        """Render `content` up to the last of `ends` with which it fits a row; return that end, too.

        Where not even the first does: that end, None and the reason.
        """
        rendered = render(content[: ends[-1]], grids)
        reason = self._problem(rendered, grids)
        if not reason:
            return ends[-1], rendered, ""
        low, high, longest = 0, len(ends) - 1, None  # ends[high] is too far
        while low < high:
            middle = (low + high) // 2
            rendered = render(content[: ends[middle]], grids)
            if problem := self._problem(rendered, grids):
                high, reason = middle, problem
            else:
                low, longest = middle + 1, rendered
        return ends[max(0, low - 1)], longest, "" if longest else reason

    def _problem(self, rendered: Rendered, grids: list[Grid]) -> str:
        """Return why a document does not fit a row, or ""."""
        indices, document = rendered
        unit, max_tiles = self.renderer.left_unit, self.config.max_tiles
        if -(-len(document.left_ids) // unit) > self.config.left_length // unit or (
            max_tiles and sum(tile_count(grids[i]) for i in indices) > max_tiles
        ):
            return "too_many_images"
        if len(document.right_ids) > self.config.right_length or document.length > self.max_positions:
            return "too_long"
        return ""


class SampleStream:
    """Endless samples in the mixture's order.

    The state is three numbers: the next sample is part `part` of draw `cursor` of epoch `epoch`.
    """

    def __init__(self, dataset: SampleDataset, mixture: Mixture) -> None:
        self.dataset, self.mixture = dataset, mixture
        self.epoch = self.cursor = self.part = 0

    def __iter__(self) -> Iterator[Sample]:
        consecutive_empty = 0
        while True:
            which, record, first = self.mixture.epoch(self.epoch)
            usable, announced = self.cursor > 0, self.cursor
            while self.cursor < len(which):
                while announced < min(self.cursor + AHEAD, len(which)):
                    self.dataset.sources[which[announced]].records.prefetch(int(record[announced]))
                    announced += 1
                # After a resume within a record, its drops were already counted with its first part.
                samples = self.dataset.samples(
                    int(which[self.cursor]),
                    int(record[self.cursor]),
                    bool(first[self.cursor]) and self.part == 0,
                )
                while self.part < len(samples):
                    usable = True
                    self.part += 1
                    yield samples[self.part - 1]
                self.cursor, self.part = self.cursor + 1, 0
            if not len(which) and self.mixture.is_empty():
                raise UserError(
                    f"rank {self.mixture.rank} of {self.mixture.ranks} has no record: "
                    "there are fewer than ranks"
                )
            consecutive_empty = 0 if usable else consecutive_empty + len(which)
            # As many as there are records: with small weights, one epoch draws only a few of them.
            if consecutive_empty >= sum(map(len, self.dataset.sources)):
                raise UserError(
                    f"none of the {consecutive_empty} training records can be used: "
                    f"{drop_report(self.dataset.dropped, self.dataset.examples)}"
                )
            self.epoch, self.cursor = self.epoch + 1, 0

    def sample(self, key: Key, first: bool) -> Sample | None:
        """Plan the sample of that key again, without counting its drops a second time.

        None, counted as "gone", if its files are missing or unreadable.
        """
        try:
            samples = self.dataset.plan(key[0], key[1], False)
        except UnreadableBlock:
            samples = []
        if key[2] < len(samples):
            return replace(samples[key[2]], first=first)
        self.dataset.drop(key[0], key[1], "gone")
        return None

    def state(self) -> dict[str, Any]:
        """Return the position as plain JSON."""
        dropped = [[*k, n] for k, n in self.dataset.dropped.items()]
        return {"epoch": self.epoch, "cursor": self.cursor, "part": self.part, "dropped": dropped}

    def load_state(self, state: dict[str, Any]) -> None:
        self.epoch, self.cursor, self.part = state["epoch"], state["cursor"], state["part"]
        self.dataset.dropped = Counter({(source, reason): n for source, reason, n in state["dropped"]})


def drop_report(dropped: Counter[Drop], examples: dict[Drop, str]) -> str:
    """Describe drops for people: `llava: image_missing 2 (record 3: /data/cat.png does not exist)`."""
    lines: dict[str, list[str]] = {}
    for (source, reason), n in sorted((+dropped).items()):
        example = f" ({examples[source, reason]})" if (source, reason) in examples else ""
        lines.setdefault(source, []).append(f"{reason} {n:,}{example}")
    return "; ".join(f"{source}: {', '.join(reasons)}" for source, reasons in lines.items())


def questions_of(record: dict[str, Any]) -> list[tuple[Conversation, list[str]]]:
    """Return a record's questions, each after what was said before it, with the right answers to each.

    Questions that training drops are left out; "texts" are independent questions.
    """
    if record.get("problem") or "interleaved" in record:
        return []
    try:
        conversations = placed_conversations(record, "branch")
    except ConversationError:
        return []
    return [
        (messages[: end - 1], messages[end - 1].get("references") or [text_of(messages[end - 1])])
        for messages in conversations
        for start, end in exchanges_of(messages)
        if exchange_problem(messages[start:end], FilterConfig()) is None
    ]


def exchange_problem(messages: Conversation, filters: FilterConfig) -> str | None:
    """Return the reason to drop an exchange, or None; its last message is the assistant's.

    Reasons: a missing half, a rating below its minimum, a length (in characters) out of bounds.
    """
    answer = messages[-1]
    user, assistant = "".join(map(text_of, messages[:-1])), text_of(answer)
    asked = [part for message in messages[:-1] for part in parts_of(message)]
    by_images = bool(asked) and all(part["type"] == "image" for part in asked)  # images without a word
    if not ((user.strip() or by_images) and assistant.strip()):
        return "empty_text"
    for name in RATINGS:
        ratings = answer.get("ratings")
        rating = ratings.get(name) if isinstance(ratings, dict) else None
        minimum = getattr(filters, f"min_{name}")
        if minimum and isinstance(rating, int | float) and rating < minimum:
            return f"rating_{name}"
    for text, name in ((user, "question"), (assistant, "answer")):
        if len(text) < getattr(filters, f"min_{name}"):
            return f"short_{name}"
        if len(text) > (getattr(filters, f"max_{name}") or len(text)):
            return f"long_{name}"
    return None
