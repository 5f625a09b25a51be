"""Cache of a frozen vision encoder's features: in memory and on disk, keyed by the content of each tile."""

import hashlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from training.callbacks import Callback
from utils.errors import UserError
from utils.files import replacing

CHUNK = 16  # tiles per encoder call; on two AVX-512 cores faster than 1 and than 64
REPEATS, MAX_SECONDS = 5, 2.0  # of a measurement: a slow encoder is timed less often


class FeatureCache(Callback):
    """Tile → features (C, h, w), keyed by the tile's preprocessed bytes. Each encoder needs its own `folder`.

    Every encoder call has exactly `CHUNK` tiles; black tiles fill the last one. Kernels are chosen by batch
    size, so the last bits of a feature do not depend on its neighbours, nor a run's losses on the contents of
    the cache. Features beyond `limit_bytes` are not cached.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        self.memory: dict[str, Tensor] = {}
        self.unsaved: list[str] = []
        self.bytes = 0
        self.computed = 0  # tiles that training needed and the cache did not hold
        self.disk_failed = False
        for shard in sorted(folder.glob("*.safetensors")):
            self._load(shard)

    def _load(self, shard: Path) -> None:
        try:
            with safe_open(shard, framework="pt") as file:
                keys, features = file.metadata()["keys"].split(","), file.get_tensor("features")
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            print(
                f"warning: feature cache {shard} cannot be read ({error}); deleted, "
                "its features are computed again",
                file=sys.stderr,
            )
            shard.unlink(missing_ok=True)
            return
        for key, feature in zip(keys, features, strict=True):
            self._add(key, feature)

    def _add(self, key: str, feature: Tensor) -> bool:
        """Cache a feature in memory; false if it is there already or does not fit."""
        size = feature.numel() * feature.element_size()
        if key in self.memory or self.bytes + size > self.limit_bytes:
            return False
        self.memory[key] = feature
        self.bytes += size
        return True

    def __call__(self, tiles: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """Features (N, C, h, w) of `tiles` (N, 3, h, w) uint8; `encode` computes missing ones."""
        device = tiles.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        salt = f"{tuple(tiles.shape[1:])}{dtype}".encode()
        keys = [
            hashlib.blake2b(salt + tile.tobytes(), digest_size=16).hexdigest() for tile in tiles.cpu().numpy()
        ]
        missing = list({key: i for i, key in enumerate(keys) if key not in self.memory}.items())
        self.computed += len(missing) * torch.is_grad_enabled()  # not validation
        computed: dict[str, Tensor] = {}
        for start in range(0, len(missing), CHUNK):
            part = missing[start : start + CHUNK]
            chunk = tiles.new_zeros(CHUNK, *tiles.shape[1:])
            chunk[: len(part)] = tiles[[i for _, i in part]]
            for (key, _), feature in zip(part, encode(chunk).cpu(), strict=False):
                # Contiguous, like a feature that is read from the disk.
                computed[key] = feature.clone(memory_format=torch.contiguous_format)
                if self._add(key, computed[key]):
                    self.unsaved.append(key)
        features = [computed[key] if key in computed else self.memory[key] for key in keys]
        return torch.stack(features).to(tiles.device)

    def before_checkpoint(self) -> None:
        """Write new features to one more shard per dtype; those added meanwhile are for the next call.

        If the disk fails, prints a warning and writes nothing from then on: training does not need it.
        """
        unsaved, self.unsaved = self.unsaved, []
        try:
            if unsaved and not self.disk_failed:
                self._write(unsaved)
        except (SafetensorError, UserError, OSError) as error:
            self.disk_failed = True
            print(
                f"warning: feature cache {self.folder} could not be written: {' '.join(str(error).split())}; "
                "training goes on without (--cache_dir DIR puts it elsewhere, "
                "--train.feature_cache off does without)",
                file=sys.stderr,
            )

    def _write(self, unsaved: list[str]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for dtype in {self.memory[key].dtype for key in unsaved}:
            keys = [key for key in unsaved if self.memory[key].dtype == dtype]
            digest = hashlib.blake2b("".join(keys).encode(), digest_size=8).hexdigest()
            with replacing(self.folder / f"{digest}.safetensors") as temp_path:
                save_file(
                    {"features": torch.stack([self.memory[key] for key in keys])},
                    temp_path,
                    metadata={"keys": ",".join(keys)},
                )


def cache_seconds(encode: Callable[[Tensor], Tensor], tiles: Tensor, limit_bytes: int) -> tuple[float, float]:
    """Median seconds of encoding `tiles` (N, 3, h, w), and of looking up their features in a cache."""
    with TemporaryDirectory() as folder, torch.no_grad():
        cache = FeatureCache(Path(folder), limit_bytes)
        return _median_seconds(lambda: encode(tiles)), _median_seconds(lambda: cache(tiles, encode))


def _median_seconds(run: Callable[[], Tensor]) -> float:
    """Median seconds of `run` after a warm-up, which also fills a cache."""

    def once() -> float:
        started = time.perf_counter()
        run().flatten()[-1].item()  # waits for the device
        return time.perf_counter() - started

    once()
    seconds = [once()]
    while len(seconds) < REPEATS and sum(seconds) < MAX_SECONDS:
        seconds.append(once())
    return statistics.median(seconds)
