"""Image KV, and the pasts that attention reads: image KV in training, a static cache in decoding.

Keys of images are kept before rotary embedding, so that one image KV serves at any position of any document.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.layers import Rotary, turn
from models.masks import NEVER


@dataclass(frozen=True)
class ImageKV:
    """What the left tower makes of one image: `data` (layers, 2, G, T, E), unrotated keys at index 0, values at 1."""

    data: Tensor

    @property
    def tokens(self) -> int:
        return self.data.shape[3]


@dataclass
class KeyValueRecorder:
    """The left tower's past: attends to nothing but itself, and keeps every layer's unrotated keys and values (B, G, L, E)."""

    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def extend(self, layer: int, keys: Tensor, values: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        assert layer == len(self.layers), f"layer {layer} recorded after {len(self.layers)} layers"
        self.layers.append((keys, values))
        return turn(rotary, keys), values


@dataclass(frozen=True)
class ImageContext:
    """The right tower's past in training: the left stream's keys and values, before the right stream's own."""

    layers: list[tuple[Tensor, Tensor]]
    rotary: Rotary

    def extend(self, layer: int, keys: Tensor, values: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        image_keys, image_values = self.layers[layer]
        image_keys = turn(self.rotary if rotary is not None else None, image_keys)
        keys = torch.cat((image_keys, turn(rotary, keys)), dim=2)  # (B, G, L + R, E)
        return keys, torch.cat((image_values.to(values.dtype), values), dim=2)


class DecodingCache:
    """Static, preallocated cache: rotated keys and values (layers, B, G, S, E) and the position that each slot holds (B, S).

    Every call of the model fills the next slots of all rows; a row's padding has position `NEVER`, which no query reaches.
    """

    def __init__(self, layers: int, rows: int, kv_heads: int, slots: int, head_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.keys = torch.zeros(layers, rows, kv_heads, slots, head_size, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.positions = torch.full((rows, slots), NEVER, dtype=torch.int64, device=device)
        self.used = 0

    def reserve(self, positions: Tensor) -> None:
        """Open the next slots for tokens at `positions` (B, T); every layer's `extend` then fills them."""
        end = self.used + positions.shape[1]
        if end > self.positions.shape[1]:
            raise ValueError(f"the cache has {self.positions.shape[1]} slots, {end} are needed")
        self.positions[:, self.used : end] = positions
        self.used = end

    def extend(self, layer: int, keys: Tensor, values: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        start = self.used - keys.shape[2]
        self.keys[layer, :, :, start : self.used] = turn(rotary, keys)
        self.values[layer, :, :, start : self.used] = values
        return self.keys[layer, :, :, : self.used], self.values[layer, :, :, : self.used]
