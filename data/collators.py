"""Rows → a batch with the model's forward arguments as keys; prompts → the arguments of `generate`."""

import numpy as np
import torch
from torch import Tensor

from data.packing import Row
from data.render import IGNORE, Document

Batch = dict[str, Tensor]


def collate(rows: list[Row], padding_id: int, tiles: Tensor | None = None) -> Batch:
    """Collate packed rows into one batch, padded to its longest left and right stream.

    Groups, images and documents count from 0 in each row. `tiles` (N, 3, h, w) holds the tiles of all samples
    in their order; without it, each sample must hold its own.
    """
    left: dict[str, list[list[int]]] = {
        name: [] for name in ("left_ids", "left_positions", "left_groups", "left_images")
    }
    right: dict[str, list[list[int]]] = {
        name: [] for name in ("right_ids", "right_positions", "right_documents", "right_groups", "labels")
    }
    for row in rows:
        for streams in (left, right):
            for column in streams.values():
                column.append([])
        images = documents = 0
        for group, sample in enumerate(row):
            first = sample.documents[0]
            left["left_ids"][-1] += first.left_ids
            left["left_positions"][-1] += first.left_positions
            left["left_groups"][-1] += [group] * len(first.left_ids)
            left["left_images"][-1] += [images + i if i >= 0 else -1 for i in first.left_images]
            images += 1 + max(first.left_images, default=-1)
            for document in sample.documents:
                n = len(document.right_ids)
                right["right_ids"][-1] += document.right_ids
                right["right_positions"][-1] += document.right_positions
                right["labels"][-1] += document.labels
                right["right_documents"][-1] += [documents] * n
                right["right_groups"][-1] += [group] * n
                documents += 1
    padding = {
        "left_ids": padding_id,
        "right_ids": 0,
        "left_positions": 0,
        "right_positions": 0,
        "labels": IGNORE,
    }
    batch = {name: _pad(column, padding.get(name, -1)) for name, column in left.items()}
    # A row can be empty when all its images were damaged: the right stream keeps one padding token.
    batch |= {name: _pad(column, padding.get(name, -1), min_length=1) for name, column in right.items()}
    if tiles is None:
        tiles = torch.cat([sample.require_tiles() for row in rows for sample in row])
    return {"tiles": tiles} | batch


def _pad(lists: list[list[int]], value: int, min_length: int = 0) -> Tensor:
    """Pad ragged lists with `value`: (B, longest) int64."""
    out = np.full((len(lists), max(min_length, *map(len, lists))), value, np.int64)
    for row, numbers in zip(out, lists, strict=True):
        row[: len(numbers)] = numbers
    return torch.from_numpy(out)


def collate_prompts(prompts: list[Document]) -> Batch:
    """Collate prompts into `ids` and `positions` (B, R), padded on the right with position −1."""
    return {
        "ids": _pad([p.right_ids for p in prompts], 0),
        "positions": _pad([p.right_positions for p in prompts], -1),
    }
