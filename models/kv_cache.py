"""Image KV, and the `KVSource`s that attention reads: image KV in training, a static cache in decoding.

Image keys are stored before rotary embedding, so that one image KV serves any position of any document.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.layers import Rotary, rotate
from models.masks import NEVER


@dataclass(frozen=True)
class ImageKV:
    """The left tower's product for one image block: unrotated keys and values of each of its layers."""

    data: Tensor  # (left layers, 2, G, T, E), keys at index 0, values at 1

    @property
    def tokens(self) -> int:
        return self.data.shape[3]


class KeyValueRecorder:
    """The left tower's `KVSource`: adds nothing, and records every layer's unrotated keys and values."""

    # Not a dataclass: FSDP gives a block a copy of one, and its records would be lost.
    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []  # (B, G, L, E) each

    def update(
        self, layer: int, keys: Tensor, values: Tensor, rotary: Rotary | None
    ) -> tuple[Tensor, Tensor]:
        assert layer <= len(self.layers), f"layer {layer} recorded after {len(self.layers)} layers"
        if layer == len(self.layers):  # else recomputed in the backward pass
            self.layers.append((keys, values))
        return rotate(rotary, keys), values


@dataclass(frozen=True)
class ImageContext:
    """The right tower's `KVSource` in training: the left stream's keys and values come first."""

    layers: list[tuple[Tensor, Tensor]]  # what each right layer reads: unrotated, (B, G, L, E) each
    rotary: Rotary  # of the left stream's positions

    def update(
        self, layer: int, keys: Tensor, values: Tensor, rotary: Rotary | None
    ) -> tuple[Tensor, Tensor]:
        image_keys, image_values = self.layers[layer]
        image_keys = rotate(self.rotary if rotary is not None else None, image_keys)
        keys = torch.cat((image_keys, rotate(rotary, keys)), dim=2)  # (B, G, L + R, E)
        return keys, torch.cat((image_values.to(values.dtype), values), dim=2)


class DecodingCache:
    """Static cache: rotated keys and values (layers, B, G, S, E), and the position of each slot (B, S).

    Every row has its own length. Slots that hold padding, a rejected draft, or nothing have a position later
    than every query's. All of them but padding are overwritten.
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
        self.used = 0  # slots that attention reads
        self.slots: slice | tuple[Tensor, slice, Tensor] = slice(0)  # where `update` writes

    def reserve(self, positions: Tensor) -> None:
        """Reserve each row's next slots for tokens at `positions` (B, T), NEVER at padding.

        Every layer's `update` then fills them.
        """
        T = positions.shape[1]
        self.used = max(self.lengths) + T
        if self.used > self.positions.shape[1]:
            raise ValueError(f"the cache has {self.positions.shape[1]} slots, {self.used} are needed")
        if min(self.lengths) == max(self.lengths):
            self.slots = slice(self.lengths[0], self.used)
            self.positions[:, self.slots] = positions
        else:
            rows = torch.arange(len(self.lengths), device=positions.device)[:, None]
            offsets = torch.arange(T, device=positions.device)
            slots = torch.tensor(self.lengths, device=positions.device)[:, None] + offsets  # (B, T)
            self.slots = (rows, slice(None), slots)
            self.positions[rows, slots] = positions
        self.lengths = [length + T for length in self.lengths]

    def update(
        self, layer: int, keys: Tensor, values: Tensor, rotary: Rotary | None
    ) -> tuple[Tensor, Tensor]:
        for cached, new in ((self.keys[layer], rotate(rotary, keys)), (self.values[layer], values)):
            if isinstance(self.slots, slice):
                cached[:, :, self.slots] = new
            else:
                # Indices with a slice between them select (B, T, G, E).
                cached[self.slots] = new.transpose(1, 2)
        return self.keys[layer, :, :, : self.used], self.values[layer, :, :, : self.used]

    @torch.inference_mode()  # a chat calls it between answers, when the tensors are inference tensors
    def truncate(self, lengths: list[int]) -> None:
        """Keep each row's first slots, `lengths` of them; the others become free."""
        for row, (length, end) in enumerate(zip(lengths, self.lengths, strict=True)):
            if length < end:
                self.positions[row, length:end] = NEVER
        self.lengths = lengths

    def resize(self, slots: int) -> None:
        """Grow, where needed, so that every row has `slots` free ones."""
        missing = max(self.lengths) + slots - self.positions.shape[1]
        if missing > 0:
            self.keys = F.pad(self.keys, (0, 0, 0, missing))
            self.values = F.pad(self.values, (0, 0, 0, missing))
            empty = self.positions.new_full((len(self.positions), missing), NEVER)
            self.positions = torch.cat((self.positions, empty), 1)

    def select_rows(self, rows: list[int]) -> None:
        """Select `rows`, in this order, as `compact_rows` gives them: no row moves to a later index."""
        for new, old in enumerate(rows):
            if new != old:
                for cached in (self.keys, self.values):
                    cached[:, new, :, : self.lengths[old]] = cached[:, old, :, : self.lengths[old]]
                self.positions[new] = self.positions[old]
        B = len(rows)
        self.keys, self.values, self.positions = self.keys[:, :B], self.values[:, :B], self.positions[:B]
        self.lengths = [self.lengths[row] for row in rows]


def compact_rows(done: list[bool]) -> list[int]:
    """The rows that are not done; the last ones replace those that are, so that few move."""
    active = [i for i, row_done in enumerate(done) if not row_done]
    movable = [i for i in active if i >= len(active)]
    return [movable.pop() if done[i] else i for i in range(len(active))]
