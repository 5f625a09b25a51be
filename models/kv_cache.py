"""Image KV, and the pasts that attention reads: image KV in training, a static cache in decoding.

Keys of images are kept before rotary embedding, so that one image KV serves at any position of any document.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.layers import Rotary, rotate
from models.masks import NEVER
from utils.errors import UserError
from utils.files import replacing

FORMAT = 3  # of an image KV's file
DTYPES = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class ImageKV:
    """What the left tower makes of one image: `data` (layers, 2, G, T, E), unrotated keys at index 0, values at 1."""

    data: Tensor

    @property
    def tokens(self) -> int:
        return self.data.shape[3]

    def save(self, path: str | Path, fingerprint: str, key: str = "") -> None:
        """Write a safetensors file, beside and renamed. `fingerprint` says what made the image KV: `DualTowerVLM.fingerprint`; `key` of what image. A disk that refuses raises `UserError`."""
        data = self.data.detach().cpu().contiguous()
        metadata = {
            "format": str(FORMAT),
            "fingerprint": fingerprint,
            "key": key,
            "checksum": _checksum(data, fingerprint, key),
        }
        try:
            with replacing(Path(path)) as beside:
                save_file({"data": data}, beside, metadata=metadata)
        except (
            SafetensorError,
            OSError,
        ) as error:  # a full disk; a read-only one, where not even clearing up is allowed
            raise UserError(f"{path} could not be written: {' '.join(str(error).split())}") from error

    @classmethod
    def load(
        cls, path: str | Path, fingerprint: str, key: str = "", shape: tuple[int, ...] | None = None
    ) -> "ImageKV":
        """What `save` wrote, bit for bit, on the CPU. A missing, damaged or foreign file, and one of another `fingerprint`, `key` or `shape` (None: any), raises `UserError`."""
        again = "encode the image again"
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != str(FORMAT):
                    raise UserError(
                        f"{path} has image KV format {metadata.get('format')!r}; this version reads {FORMAT}: {again}"
                    )
                if metadata.get("fingerprint") != fingerprint:
                    raise UserError(f"{path} was made by other weights or another preprocessing: {again}")
                if metadata.get("key") != key:
                    raise UserError(f"{path} holds another image than its name says: {again}")
                data = file.get_tensor(
                    "data"
                ).clone()  # the file is mapped: what changes on the disk later would change here
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path} cannot be read as an image KV ({' '.join(str(error).split())}): {again}"
            ) from None
        if metadata.get("checksum") != _checksum(data, fingerprint, key):
            raise UserError(f"{path} is damaged, its checksum is another: {again}")
        if (
            data.dim() != 5
            or data.shape[1] != 2
            or not data.numel()
            or data.dtype not in DTYPES
            or shape not in (None, tuple(data.shape))
        ):
            wanted = f"the keys and values of an image {shape or '(layers, 2, heads, tokens, head size)'}"
            raise UserError(f"{path} holds {tuple(data.shape)} of {data.dtype}, not {wanted}: {again}")
        if not torch.isfinite(torch.stack(data.aminmax())).all():
            raise UserError(f"{path} holds values that are not finite: {again}")
        return cls(data)


def _checksum(data: Tensor, fingerprint: str, key: str) -> str:
    """Of a tensor's bytes, of the type and shape without which they say something else, and of what made it of which image."""
    digest = hashlib.blake2b(
        repr((str(data.dtype), tuple(data.shape), fingerprint, key)).encode(), digest_size=16
    )
    digest.update(data.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
