"""Image KV, and the pasts that attention reads: image KV in training, a static cache in decoding.

Keys of images are kept before rotary embedding, so that one image KV serves at any position of any document.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.layers import Rotary, rotate
from models.masks import NEVER


@dataclass(frozen=True)
class ImageKV:
    """What the left tower makes of one image: `data` (layers, 2, G, T, E), unrotated keys at index 0, values at 1."""

    data: Tensor

    @property
    def tokens(self) -> int:
        return self.data.shape[3]


class KeyValueRecorder:
    """The left tower's past: attends to nothing but itself, and keeps every layer's unrotated keys and values (B, G, L, E)."""

    def __init__(
        self,
    ) -> None:  # no dataclass: FSDP hands a block a copy of one, and what it records would be lost
        self.layers: list[tuple[Tensor, Tensor]] = []

    def extend(
        self, layer: int, keys: Tensor, values: Tensor, rotary: Rotary | None
    ) -> tuple[Tensor, Tensor]:
        assert layer <= len(self.layers), f"layer {layer} recorded after {len(self.layers)} layers"
        if layer == len(self.layers):  # else computed again, in the backward pass
            self.layers.append((keys, values))
        return rotate(rotary, keys), values


@dataclass(frozen=True)
class ImageContext:
    """The right tower's past in training: the left stream's keys and values, before the right stream's own."""

    layers: list[tuple[Tensor, Tensor]]
    rotary: Rotary

    def extend(
        self, layer: int, keys: Tensor, values: Tensor, rotary: Rotary | None
    ) -> tuple[Tensor, Tensor]:
        image_keys, image_values = self.layers[layer]
        image_keys = rotate(self.rotary if rotary is not None else None, image_keys)
        keys = torch.cat((image_keys, rotate(rotary, keys)), dim=2)  # (B, G, L + R, E)
        return keys, torch.cat((image_values.to(values.dtype), values), dim=2)


class DecodingCache:
    """Static, preallocated cache: rotated keys and values (layers, B, G, S, E) and the position that each slot holds (B, S).

    Every row has a length of its own. Slots that hold padding, a draft that fell, or nothing have a position later than every
    query's; but for padding they are written anew.
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        kv_heads: int,
        slots: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.keys = torch.zeros(layers, rows, kv_heads, slots, head_size, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.positions = torch.full((rows, slots), NEVER, dtype=torch.int64, device=device)
        self.lengths = [0] * rows
        self.used = 0  # slots that attention looks at
        self.slots: slice | tuple[Tensor, slice, Tensor] = slice(0)  # where `extend` writes

    def reserve(self, positions: Tensor) -> None:
        """Open each row's next slots for tokens at `positions` (B, T), NEVER at padding; every layer's `extend` then fills them."""
        T = positions.shape[1]
        self.used = max(self.lengths) + T
        if self.used > self.positions.shape[1]:
            raise ValueError(f"the cache has {self.positions.shape[1]} slots, {self.used} are needed")
        if min(self.lengths) == max(self.lengths):
            self.slots = slice(self.lengths[0], self.used)
            self.positions[:, self.slots] = positions
        else:
            rows = torch.arange(len(self.lengths), device=positions.device)[:, None]
            slots = torch.tensor(self.lengths, device=positions.device)[:, None] + torch.arange(
                T, device=positions.device
            )  # (B, T)
            self.slots = (rows, slice(None), slots)
            self.positions[rows, slots] = positions
        self.lengths = [length + T for length in self.lengths]

    def extend(
        self, layer: int, keys: Tensor, values: Tensor, rotary: Rotary | None
    ) -> tuple[Tensor, Tensor]:
        for cached, new in ((self.keys[layer], rotate(rotary, keys)), (self.values[layer], values)):
            if isinstance(self.slots, slice):
                cached[:, :, self.slots] = new
            else:
                cached[self.slots] = new.transpose(
                    1, 2
                )  # (B, T, G, E), as indices with a slice between them want it
        return self.keys[layer, :, :, : self.used], self.values[layer, :, :, : self.used]

    def commit(self, start: list[int], paths: list[list[int]]) -> None:
        """Of the slots that a pass opened, in each row from `start` on, keep those that `paths` name, in ascending order and without gaps; the others hold nothing."""
        for row, (at, path) in enumerate(zip(start, paths, strict=True)):
            end = at + len(path)
            if path[-1] >= len(path):  # something between them fell
                slots = at + torch.tensor(path, device=self.positions.device)
                for cached in (self.keys, self.values):
                    cached[:, row, :, at:end] = cached[:, row, :, slots]
                self.positions[row, at:end] = self.positions[row, slots]
            if end < self.lengths[row]:
                self.positions[row, end : self.lengths[row]] = NEVER
        self.lengths = [at + len(path) for at, path in zip(start, paths, strict=True)]

    def resize(self, slots: int) -> None:
        """Make room for `slots` more in every row."""
        more = max(self.lengths) + slots - self.positions.shape[1]
        if more > 0:
            self.keys, self.values = (F.pad(t, (0, 0, 0, more)) for t in (self.keys, self.values))
            self.positions = torch.cat(
                (self.positions, self.positions.new_full((len(self.positions), more), NEVER)), 1
            )

    def select_rows(self, rows: list[int]) -> None:
        """Leave only `rows`, in this order, none of them before its new place: those that are done cost nothing any more."""
        for new, old in enumerate(rows):
            if new != old:
                for cached in (self.keys, self.values):
                    cached[:, new, :, : self.lengths[old]] = cached[:, old, :, : self.lengths[old]]
                self.positions[new] = self.positions[old]
        self.keys, self.values, self.positions = (
            self.keys[:, : len(rows)],
            self.values[:, : len(rows)],
            self.positions[: len(rows)],
        )
        self.lengths = [self.lengths[row] for row in rows]
