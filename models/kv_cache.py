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
    """Static cache: each layer's rotated keys and values (B, G, S, E), and the position of each slot (B, S).

    Every row has its own length. Slots that hold padding, a rejected draft, or nothing have a position later
    than every query's. All of them but padding are overwritten. With `fixed` shapes, for a compiled decode
    step, attention reads the empty slots too.
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
        fixed: bool = False,
    ) -> None:
        def empty() -> Tensor:
            return torch.zeros(rows, kv_heads, slots, head_size, dtype=dtype, device=device)

        self.keys, self.values = ([empty() for _ in range(layers)] for _ in range(2))
        self.positions = torch.full((rows, slots), NEVER, dtype=torch.int64, device=device)
        self.lengths = [0] * rows
        self.used = 0  # slots that attention reads
        self.slots: slice | tuple[Tensor, slice, Tensor] = slice(0)  # where `update` writes
        self.fixed = fixed

    def reserve(self, positions: Tensor) -> None:
        """Reserve each row's next slots for tokens at `positions` (B, T), NEVER at padding.

        Every layer's `update` then fills them.
        """
        T, S, longest = positions.shape[1], self.positions.shape[1], max(self.lengths)
        if longest + T > S:
            raise ValueError(f"the cache has {S} slots, {longest + T} are needed")
        self.used = S if self.fixed else longest + T
        if min(self.lengths) == longest and not self.fixed:
            self.slots = slice(longest, longest + T)
            self.positions[:, self.slots] = positions
        else:
            rows = torch.arange(len(self.lengths), device=positions.device)[:, None]
            offsets = torch.arange(T, device=positions.device)
            slots = to_device(self.lengths, positions.device)[:, None] + offsets  # (B, T)
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
        return self.keys[layer][:, :, : self.used], self.values[layer][:, :, : self.used]

    @torch.inference_mode()  # a chat calls it between answers, when the tensors are inference tensors
    def truncate(self, lengths: list[int]) -> None:
        """Keep each row's first slots, `lengths` of them; the others become free."""
        if lengths != self.lengths:
            slots, device = (
                torch.arange(self.positions.shape[1], device=self.positions.device),
                self.positions.device,
            )
            self.positions.masked_fill_(slots >= to_device(lengths, device)[:, None], NEVER)
            self.lengths = lengths

    def resize(self, slots: int) -> None:
        """Grow, where needed, so that every row has `slots` free ones."""
        missing = max(self.lengths) + slots - self.positions.shape[1]
        if missing > 0:
            for layers in (self.keys, self.values):
                layers[:] = [F.pad(cached, (0, 0, 0, missing)) for cached in layers]
            empty = self.positions.new_full((len(self.positions), missing), NEVER)
            self.positions = torch.cat((self.positions, empty), 1)

    def select_rows(self, rows: list[int]) -> None:
        """Select `rows`, in this order, as `compact_rows` gives them: no row moves to a later index."""
        for new, old in enumerate(rows):
            if new != old:
                for cached in (*self.keys, *self.values):
                    cached[new, :, : self.lengths[old]] = cached[old, :, : self.lengths[old]]
                self.positions[new] = self.positions[old]
        for layers in (self.keys, self.values):
            layers[:] = [cached[: len(rows)] for cached in layers]
        self.positions = self.positions[: len(rows)]
        self.lengths = [self.lengths[row] for row in rows]


def to_device(values: list[int], device: torch.device) -> Tensor:
    """A tensor of `values` on `device`; the host does not wait for the copy."""
    return torch.tensor(values, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def compact_rows(done: list[bool]) -> list[int]:
    """The rows that are not done; the last ones replace those that are, so that few move."""
    active = [i for i, row_done in enumerate(done) if not row_done]
    movable = [i for i in active if i >= len(active)]
    return [movable.pop() if done[i] else i for i in range(len(active))]
