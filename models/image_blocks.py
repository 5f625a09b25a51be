"""Blocks of the left stream → image KVs; equal blocks are encoded once."""

import hashlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.image_store import ImageStore
from models.kv_cache import ImageKV


class ImageBlock(NamedTuple):
    """A part of the left stream that is encoded on its own."""

    tiles: Tensor  # (N, 3, h, w) uint8
    ids: list[int]
    images: list[int]  # of each token: its image, −1 for none
    start: int  # position of its first token


def image_blocks_of(
    ids: list[int], positions: list[int], images: list[int], parts: list[slice], tiles: list[Tensor]
) -> list[ImageBlock]:
    """Split a document's left stream into `parts` (`Document.blocks`); `tiles` (N, 3, h, w) of each image."""
    out, at = [], 0
    for part in parts:
        # Numbered from 0: an isolated image's KV does not depend on the images before it.
        first = min((n for n in images[part] if n >= 0), default=0)
        numbers = [n - first if n >= 0 else n for n in images[part]]
        count = len(set(numbers) - {-1})
        out.append(ImageBlock(torch.cat(tiles[at : at + count]), ids[part], numbers, positions[part.start]))
        at += count
    return out


def encode_blocks(
    model: Any, blocks: list[ImageBlock], store: ImageStore
) -> tuple[list[ImageKV], list[bool]]:
    """A dual tower's image KVs of `blocks`, by way of `store`, and which of them were computed."""
    store.serve(model)
    c, keys = model.config.left, [_key(model, block) for block in blocks]
    unique = dict(zip(keys, blocks, strict=True))
    shapes = {key: (c.layers, 2, c.kv_heads, len(block.ids), c.head_size) for key, block in unique.items()}
    # Not read from the store again at the end: it may be too small for all of them.
    image_kvs = {key: kv for key, shape in shapes.items() if (kv := store.get(key, shape)) is not None}
    new = {key: block for key, block in unique.items() if key not in image_kvs}
    if new:
        tiles = torch.cat([block.tiles for block in new.values()])
        kvs = model.encode_images(
            tiles, [torch.tensor(b.ids) for b in new.values()], [torch.tensor(b.images) for b in new.values()]
        )
        for key, kv in zip(new, kvs, strict=True):
            image_kvs[key] = kv
            store.put(key, kv)
    computed = [key in new and key not in keys[:i] for i, key in enumerate(keys)]
    return [image_kvs[key] for key in keys], computed


def encode_rows(
    model: Any, rows: list[list[ImageBlock]], store: ImageStore
) -> tuple[list[list[tuple[ImageKV, int]]], list[list[bool]]]:
    """Each row's image KVs with their start positions, as `generate` takes them, and which were computed."""
    kvs, computed = encode_blocks(model, [block for row in rows for block in row], store)
    images, row_computed, at = [], [], 0
    for row in rows:
        part = slice(at, at := at + len(row))
        images.append([(kv, block.start) for kv, block in zip(kvs[part], row, strict=True)])
        row_computed.append(computed[part])
    return images, row_computed


def _key(model: Any, block: ImageBlock) -> str:
    """Hash of all that a block's image KV depends on besides the model: tokens, tiles, autocast's dtype."""
    device = model.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    digest = hashlib.blake2b(
        repr((tuple(block.tiles.shape), block.ids, block.images, dtype)).encode(), digest_size=16
    )
    digest.update(block.tiles.contiguous().numpy().data)
    return digest.hexdigest()
