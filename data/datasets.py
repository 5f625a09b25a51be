"""Records → samples. A sample is one group: images, and the documents (conversations) that see them.

A sample is planned first (text to tokens, images to the number of their tiles) and decoded when its row is due.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from configs.model import VisionConfig
from configs.train import DataConfig
from data.filters import DuplicateImages, turn_problem
from data.images import Grid, ImageError, grid_of, image_size, open_pixels, tile_count, to_tiles
from data.mixture import Mixture, Source
from data.parquet import UnreadableBlock
from data.render import Document, Renderer, turns_of
from utils.errors import UserError

Key = tuple[int, int, int]  # source, record, part: finds a sample again
AHEAD = 64  # picks that tables are told of before they are due
KEPT_BYTES = 1 << 29


@dataclass(frozen=True)
class Sample:
    """Images and the documents that share them."""

    key: Key
    tiles: Tensor | None  # (tiles, 3, h, w) uint8 of all images; None until it is decoded
    documents: list[Document]  # their left streams are the same
    images: list[Any] = field(default_factory=list)  # path or encoded bytes of each
    grids: list[Grid] = field(default_factory=list)
    source: str = ""
    first: bool = (
        False  # seen for the first time: only then is it counted, should its images turn out damaged
    )

    @property
    def left_length(self) -> int:
        return len(self.documents[0].left_ids)

    @property
    def right_length(self) -> int:
        return sum(len(d.right_ids) for d in self.documents)

    @property
    def tile_total(self) -> int:
        return sum(map(tile_count, self.grids)) if self.tiles is None else len(self.tiles)


def decode(sample: Sample, config: VisionConfig) -> Sample:
    """The sample with its tiles. Errors: `ImageError`."""
    if sample.tiles is not None:
        return sample
    tiles = []
    for image, grid in zip(sample.images, sample.grids, strict=True):
        made = to_tiles(open_pixels(image), config)
        if made.grid != grid:  # a header that promises another size
            raise ImageError(
                "damaged", f"an image of {sample.source} is not of the size that its header says"
            )
        tiles.append(made.pixels)
    none = torch.empty(0, 3, config.image_size, config.image_size, dtype=torch.uint8)
    return replace(sample, tiles=tiles[0] if len(tiles) == 1 else torch.cat([none, *tiles]), images=[])


class SampleDataset:
    """A record → its samples: one, several where its conversations fill more than a row, none where it cannot be used.

    `dropped` counts what could not be used by (source, reason). With `keep`, samples that are asked for again are kept
    in memory, up to half a gigabyte: an epoch over a small set is not tokenised and decoded twice.
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
        self.sources, self.renderer, self.vision, self.config, self.max_positions = (
            sources,
            renderer,
            vision,
            config,
            max_positions,
        )
        self.dropped: Counter[tuple[str, str]] = Counter()
        self.duplicates = DuplicateImages() if config.filters.duplicates else None
        self.cache: dict[tuple[int, int], list[Sample]] = {}
        self.capacity = KEPT_BYTES if keep else 0

    def record(self, source: int, index: int) -> dict[str, Any]:
        return self.sources[source].records[index]

    def samples(self, source: int, index: int, first: bool) -> list[Sample]:
        """`first`: what is dropped is counted."""
        try:
            return self.plan(source, index, first)
        except UnreadableBlock:  # another time it may be read: counted every time, and not kept
            self.dropped[self.sources[source].name, "unreadable"] += 1
            return []

    def plan(self, source: int, index: int, first: bool) -> list[Sample]:
        """The same. Errors: `UnreadableBlock`."""
        if (found := self.cache.get((source, index))) is not None:
            return [s if s.first == first else replace(s, first=first) for s in found]
        counts: Counter[str] = Counter()
        samples = self._plan(source, index, first, counts)
        if first:
            self.count(self.sources[source].name, counts)
        self.keep((source, index), samples)
        return samples

    def count(self, source: str, reasons: Counter[str]) -> None:
        for reason, n in reasons.items():
            self.dropped[source, reason] += n

    def keep(self, place: tuple[int, int], samples: list[Sample]) -> None:
        self.capacity -= sum(
            4096
            + (s.tiles.nbytes if s.tiles is not None else 0)
            + sum(len(i) for i in s.images if isinstance(i, bytes))
            for s in samples
        )
        if self.capacity > 0:
            self.cache[place] = samples

    def decoded(self, sample: Sample) -> Sample:
        """The sample with its tiles, kept as such. Errors: `ImageError`."""
        made = decode(sample, self.vision)
        place, samples = sample.key[:2], self.cache.get(sample.key[:2])
        if samples is not None and made is not sample:
            self.keep(place, [made if s.key == sample.key else s for s in samples])
        return made

    def _plan(self, source: int, index: int, first: bool, counts: Counter[str]) -> list[Sample]:
        record, filters = self.record(source, index), self.config.filters
        if problem := record.get("problem"):  # the source's own verdict
            counts[problem] += 1
            return []
        turns = []
        for turn in record["texts"] or [{}]:
            if reason := turn_problem(turn, filters):
                counts[reason] += 1
            else:
                turns.append(turn)
        if not turns:
            return []
        try:
            if record["images"] is None:
                raise ImageError("missing", f"{record['id']} has no list of images")
            if (
                filters.min_clip_score
                and isinstance(score := record.get("clip_score"), int | float)
                and score < filters.min_clip_score
            ):
                counts["clip_score"] += 1
                return []
            grids = [self._grid(image) for image in record["images"]]
            if (
                self.duplicates is not None
                and record["images"]
                and self.duplicates.seen(record["images"], (source, index))
            ):
                counts["duplicate"] += 1
                return []
        except ImageError as error:
            counts[f"image_{error.reason}"] += 1
            return []
        documents = self._documents(grids, turns_of(turns, record.get("turns") or self.config.turns), counts)
        parts: list[list[Document]] = []
        capacity = 0
        for document in documents:
            # The images are repeated in the next part; where nothing goes left, in every document: so each is a sample of its own.
            if len(document.right_ids) > capacity or not document.left_ids:
                parts.append([])
                capacity = self.config.right_length
            parts[-1].append(document)
            capacity -= len(document.right_ids)
        name = self.sources[source].name
        return [
            Sample((source, index, part), None, documents, list(record["images"]), grids, name, first)
            for part, documents in enumerate(parts)
        ]

    def _grid(self, image: Any) -> Grid:
        if image is None:
            raise ImageError("missing", "an image is None")
        if not self.vision.max_side and not self.config.filters.min_side:
            return (1, 1)
        width, height = image_size(image)
        if min(width, height) < self.config.filters.min_side:
            raise ImageError("small", f"an image of {width}×{height} pixels")
        return grid_of(width, height, self.vision)

    def _documents(
        self, grids: list[Grid], conversations: list[list[dict[str, Any]]], counts: Counter[str]
    ) -> list[Document]:
        """Rendered conversations, those that are too long split between two turns. What does not fit even so is counted."""
        made: list[Document] = []
        for turns in conversations:
            document = self.renderer.conversation(grids, turns)
            unit = self.renderer.left_unit
            if -(-len(document.left_ids) // unit) > self.config.left_length // unit or (
                self.config.max_tiles and sum(map(tile_count, grids)) > self.config.max_tiles
            ):
                counts["too_many_images"] += 1
                return []
            if self._fits(document):
                made.append(document)
                continue
            so_far: list[dict[str, Any]] = []
            fitting: Document | None = None
            for turn in turns:
                longer = self.renderer.conversation(grids, [*so_far, turn])
                if not self._fits(longer) and fitting is not None:
                    made.append(fitting)
                    so_far, longer = [], self.renderer.conversation(grids, [turn])
                fits = self._fits(longer)
                so_far, fitting = ([*so_far, turn], longer) if fits else ([], None)
                if not fits:
                    counts["too_long"] += 1
            if fitting is not None:
                made.append(fitting)
        return made

    def _fits(self, document: Document) -> bool:
        return len(document.right_ids) <= self.config.right_length and document.length <= self.max_positions


class SampleStream:
    """Samples without end, in the mixture's order. The next is part `part` of pick `cursor` of epoch `epoch`: that is its whole state."""

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
                # A record that is in part behind us was counted when its first part came.
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
                    f"rank {self.mixture.rank} of {self.mixture.ranks} has no record: there are fewer than ranks"
                )
            consecutive_empty = 0 if usable else consecutive_empty + len(which)
            if consecutive_empty >= sum(
                map(len, self.dataset.sources)
            ):  # a lap, of which an epoch may be a small part
                raise UserError(
                    f"none of the {consecutive_empty} training records can be used: {by_source(self.dataset.dropped)}"
                )
            self.epoch, self.cursor = self.epoch + 1, 0

    def sample(self, key: Key, first: bool) -> Sample | None:
        """The sample of that key, planned again; what was dropped with it is not counted again. None, which is counted, where its files are gone or unreadable."""
        try:
            samples = self.dataset.plan(key[0], key[1], False)
        except UnreadableBlock:
            samples = []
        if key[2] < len(samples):
            return replace(samples[key[2]], first=first)
        self.dataset.dropped[self.dataset.sources[key[0]].name, "gone"] += 1
        return None

    def state(self) -> dict[str, Any]:
        """The images that were seen are given as their number only: they are many."""
        images = len(self.dataset.duplicates.owners) if self.dataset.duplicates is not None else 0
        dropped = [[*k, n] for k, n in self.dataset.dropped.items()]
        return {
            "epoch": self.epoch,
            "cursor": self.cursor,
            "part": self.part,
            "dropped": dropped,
            "images": images,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.epoch, self.cursor, self.part = state["epoch"], state["cursor"], state["part"]
        self.dataset.dropped = Counter({(source, reason): n for source, reason, n in state["dropped"]})
        if self.dataset.duplicates is not None:
            self.dataset.duplicates.load(state["images"])


def by_source(dropped: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """How much was dropped: source → reason → count."""
    out: dict[str, dict[str, int]] = {}
    for (source, reason), n in sorted(dropped.items()):
        out.setdefault(source, {})[reason] = n
    return out
