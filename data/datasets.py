"""Records → samples. A sample is one group: images, and the documents (conversations) that see them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs.errors import UserError
from data.images import ImageError, open_image, to_tiles
from data.render import Document, Renderer, turns_of
from data.sources import Record


@dataclass(frozen=True)
class Sample:
    """Images and the documents that share them. `key` = (record index, part) finds it again."""

    key: tuple[int, int]
    tiles: Tensor  # (images, 3, h, w) uint8
    documents: list[Document]  # their left streams are the same

    @property
    def left_length(self) -> int:
        return len(self.documents[0].left_ids)

    @property
    def right_length(self) -> int:
        return sum(len(d.right_ids) for d in self.documents)


def complete(turn: dict[str, Any]) -> bool:
    """Has a turn both a question and an answer?"""
    return all(isinstance(turn.get(k), str) and turn[k].strip() for k in ("user", "assistant"))


class SampleDataset:
    """Record i → its samples: one, several where its conversations fill more than a row, none where it cannot be used.

    `dropped` names every unusable record (or conversation) with the reason. Samples are kept in memory up to
    `memory_bytes`: an epoch over a small set is not decoded and tokenised twice.
    """

    def __init__(
        self,
        records: Sequence[Record],
        renderer: Renderer,
        image_size: int,
        turns: str,
        left_length: int,
        right_length: int,
        max_positions: int,
        memory_bytes: int = 1 << 29,
    ) -> None:
        self.records, self.renderer, self.image_size, self.turns = records, renderer, image_size, turns
        self.left_length, self.right_length, self.max_positions = left_length, right_length, max_positions
        self.dropped: dict[str, str] = {}
        self.memory: dict[int, list[Sample]] = {}
        self.memory_left = memory_bytes

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> list[Sample]:
        if index in self.memory:
            return self.memory[index]
        try:
            samples = self._samples(index)
        except ImageError as error:
            self.dropped[self.records[index]["id"]] = f"image_{error.reason}"
            samples = []
        self.memory_left -= sum(s.tiles.nbytes for s in samples)
        if self.memory_left > 0:
            self.memory[index] = samples
        return samples

    def counts(self) -> dict[str, int]:
        """How many records or conversations were dropped, by reason."""
        return dict(Counter(self.dropped.values()))

    def _samples(self, index: int) -> list[Sample]:
        record = self.records[index]
        images = [open_image(image) for image in record["images"]]
        tiles = torch.cat([to_tiles(image, self.image_size) for image in images])  # (images, 3, h, w)
        conversations = enumerate(turns_of(record["texts"], self.turns))
        documents = [d for number, turns in conversations if (d := self._document(f"{record['id']}#{number}", len(images), turns))]
        if documents and len(documents[0].left_ids) > self.left_length:
            self.dropped[record["id"]] = "too_many_images"
            return []
        parts: list[list[Document]] = []
        room = 0
        for document in documents:
            if len(document.right_ids) > room:  # the images are repeated in the next part
                parts.append([])
                room = self.right_length
            parts[-1].append(document)
            room -= len(document.right_ids)
        return [Sample((index, part), tiles, documents) for part, documents in enumerate(parts)]

    def _document(self, name: str, images: int, turns: list[dict[str, Any]]) -> Document | None:
        if not turns or not all(map(complete, turns)):
            self.dropped[name] = "empty_text"
            return None
        document = self.renderer.conversation(images, turns)
        if len(document.right_ids) > self.right_length or document.length > self.max_positions:
            self.dropped[name] = "too_long"
            return None
        return document


class SampleStream:
    """Samples without end, each epoch in an order of its own, drawn from seed and epoch.

    The next sample is number `part` of record number `cursor` of epoch `epoch`: three integers are its whole state.
    """

    def __init__(self, dataset: SampleDataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        self.epoch = self.cursor = self.part = 0

    def __iter__(self) -> Iterator[Sample]:
        while True:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.dataset))
            usable = self.cursor > 0
            while self.cursor < len(order):
                samples = self.dataset[int(order[self.cursor])]
                while self.part < len(samples):
                    usable = True
                    self.part += 1
                    yield samples[self.part - 1]
                self.cursor, self.part = self.cursor + 1, 0
            if not usable:
                raise UserError(f"none of the {len(self.dataset)} training records can be used: {self.dataset.counts()}")
            self.epoch, self.cursor = self.epoch + 1, 0
