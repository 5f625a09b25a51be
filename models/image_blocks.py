"""Blocks of the left stream → image KVs: the same block is encoded once."""

import hashlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.image_store import ImageStore
from models.kv_cache import ImageKV


class ImageBlock(NamedTuple):
    """A part of the left stream that is encoded by itself."""

    tiles: Tensor  # (n, 3, h, w) uint8
    ids: list[int]
    images: list[int]
    start: int  # position of its first token


def image_blocks_of(
    ids: list[int], positions: list[int], images: list[int], parts: list[slice], tiles: list[Tensor]
) -> list[ImageBlock]:
    """A document's left stream, cut into `parts` (`Document.blocks`), with the `tiles` (n, 3, h, w) of each of its images."""
    out, at = [], 0
    for part in parts:
        first = min((n for n in images[part] if n >= 0), default=0)
        numbers = [
            n - first if n >= 0 else n for n in images[part]
        ]  # an isolated image's KV is the same wherever it stands
        count = len(set(numbers) - {-1})
        out.append(ImageBlock(torch.cat(tiles[at : at + count]), ids[part], numbers, positions[part.start]))
        at += count
    return out


def encode_blocks(
    model: Any, blocks: list[ImageBlock], store: ImageStore
) -> tuple[list[ImageKV], list[bool]]:
    """A dual tower's image KVs of `blocks`, and which of them had to be computed; they are kept in `store`."""
    store.serve(model)
    c, keys = model.right.config, [_key(model, block) for block in blocks]
    unique = dict(zip(keys, blocks, strict=True))
    shapes = {key: (c.layers, 2, c.kv_heads, len(block.ids), c.head_size) for key, block in unique.items()}
    found = {
        key: kv for key, shape in shapes.items() if (kv := store.get(key, shape)) is not None
    }  # held here: the store may be too small for all of them
    new = {key: block for key, block in unique.items() if key not in found}
    if new:
        tiles = torch.cat([block.tiles for block in new.values()])
        kvs = model.encode_images(
            tiles, [torch.tensor(b.ids) for b in new.values()], [torch.tensor(b.images) for b in new.values()]
        )
        for key, kv in zip(new, kvs, strict=True):
            found[key] = kv
            store.put(key, kv)
    seen: set[str] = set()
    computed = [key in new and not (key in seen or seen.add(key)) for key in keys]  # type: ignore[func-returns-value]
    return [found[key] for key in keys], computed


def encode_rows(
    model: Any, rows: list[list[ImageBlock]], store: ImageStore
) -> tuple[list[list[tuple[ImageKV, int]]], list[list[bool]]]:
    """Each row's image KVs with the positions where they start, as `generate` takes them, and which of them had to be computed."""
    kvs, computed = encode_blocks(model, [block for row in rows for block in row], store)
    placed, fresh, at = [], [], 0
    for row in rows:
        part = slice(at, at := at + len(row))
        placed.append([(kv, block.start) for kv, block in zip(kvs[part], row, strict=True)])
        fresh.append(computed[part])
    return placed, fresh


def _key(model: Any, block: ImageBlock) -> str:
    """All that a block's image KV depends on beside the model: its tokens, its tiles, and the type of number that autocast computes in."""
    device = model.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    digest = hashlib.blake2b(
        repr((tuple(block.tiles.shape), block.ids, block.images, dtype)).encode(), digest_size=16
    )
    digest.update(block.tiles.contiguous().numpy().data)
    return digest.hexdigest()
