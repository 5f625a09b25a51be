"""Features of a frozen vision encoder, computed once per tile: kept in memory, then on disk, found by content."""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from utils.errors import UserError
from utils.files import replacing

CHUNK = 16  # tiles encoded at a time, always this many; on two AVX-512 cores faster than 1 and than 64


class FeatureCache:
    """Tile → features (C, h, w). The key is the tile's preprocessed bytes; `folder` is one for each encoder's weights.

    Tiles are encoded `CHUNK` at a time, the last chunk filled up with black ones: kernels are chosen by batch size, so a
    feature has the same last bits whatever it is encoded with, and a run the same losses whatever the cache holds.
    Beyond `limit_bytes` nothing more is kept.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        self.memory: dict[str, Tensor] = {}
        self.unsaved: list[str] = []
        self.bytes = 0
        self.refused = False  # by the disk
        for shard in sorted(folder.glob("*.safetensors")):
            self._load(shard)

    def _load(self, shard: Path) -> None:
        try:
            with safe_open(shard, framework="pt") as file:
                keys, features = file.metadata()["keys"].split(","), file.get_tensor("features")
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            print(
                f"warning: feature cache {shard} cannot be read ({error}); deleted, its features are computed again",
                file=sys.stderr,
            )
            shard.unlink(missing_ok=True)
            return
        for key, feature in zip(keys, features, strict=True):
            self._keep(key, feature)

    def _keep(self, key: str, feature: Tensor) -> bool:
        size = feature.numel() * feature.element_size()
        if key in self.memory or self.bytes + size > self.limit_bytes:
            return False
        self.memory[key] = feature
        self.bytes += size
        return True

    def __call__(self, tiles: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """Features (N, C, h, w) of `tiles` (N, 3, h, w) uint8, through `encode` where they are not known."""
        device = tiles.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        salt = f"{tuple(tiles.shape[1:])}{dtype}".encode()
        keys = [
            hashlib.blake2b(salt + tile.tobytes(), digest_size=16).hexdigest() for tile in tiles.cpu().numpy()
        ]
        missing = list({key: i for i, key in enumerate(keys) if key not in self.memory}.items())
        fresh: dict[str, Tensor] = {}
        for start in range(0, len(missing), CHUNK):
            part = missing[start : start + CHUNK]
            chunk = tiles.new_zeros(CHUNK, *tiles.shape[1:])
            chunk[: len(part)] = tiles[[i for _, i in part]]
            for (key, _), feature in zip(part, encode(chunk).cpu(), strict=False):
                fresh[key] = feature.clone(
                    memory_format=torch.contiguous_format
                )  # as it comes back from the disk
                if self._keep(key, fresh[key]):
                    self.unsaved.append(key)
        return torch.stack([fresh[key] if key in fresh else self.memory[key] for key in keys]).to(
            tiles.device
        )

    def save(self) -> None:
        """Write what is new, beside and renamed: one more shard for each type of number, so that all come back as they were. More may come meanwhile, for the next time.

        A disk that refuses is left alone from then on, and that is said: training does not need it.
        """
        unsaved, self.unsaved = self.unsaved, []
        try:
            if unsaved and not self.refused:
                self._write(unsaved)
        except (SafetensorError, UserError, OSError) as error:
            self.refused = True
            print(
                f"warning: feature cache {self.folder} could not be written: {' '.join(str(error).split())}; training goes on without (--cache_dir DIR puts it elsewhere, --train.feature_cache_gb 0 does without)",
                file=sys.stderr,
            )

    def _write(self, unsaved: list[str]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for dtype in {self.memory[key].dtype for key in unsaved}:
            keys = [key for key in unsaved if self.memory[key].dtype == dtype]
            shard = (
                self.folder
                / f"{hashlib.blake2b(''.join(keys).encode(), digest_size=8).hexdigest()}.safetensors"
            )
            with replacing(shard) as beside:
                save_file(
                    {"features": torch.stack([self.memory[key] for key in keys])},
                    beside,
                    metadata={"keys": ",".join(keys)},
                )
