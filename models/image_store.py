"""Image KVs by content, in memory and on disk: no image is encoded twice, even by several processes.

`encode_rows` makes the image KVs of prompts by way of an `ImageStore`.
"""

import hashlib
import os
import re
import sys
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.kv_cache import ImageKV
from models.weights.tensors import module_fingerprint
from utils.errors import UserError
from utils.files import replacing

FORMAT = 3  # of an image KV's file
# Version of the code that turns an image into its image KV, data/images.py included. Raise it when the result
# changes, so that stored image KVs are not reused.
IMAGE_KV_VERSION = 1
DTYPES = torch.float32, torch.bfloat16, torch.float16
HEADER = 1024  # bytes of a file besides its tensor, at most
STALE_S = 3600  # age from which a temporary file counts as left by a killed run
SHARE = 64  # the folder is scanned again, for other processes' files, after writing a 64th of the cap
KEY = re.compile(r"[0-9a-f]+")
FILE = re.compile(rf"{KEY.pattern}\.safetensors")
TEMPORARY = re.compile(rf"\.{FILE.pattern}\.\d+|\.tmp\w{{6}}")  # utils/files.py's, and safetensors' own


def image_kv_fingerprint(model: Any) -> str:
    """Hash of what an image KV depends on besides its image: a dual tower's left weights and settings.

    Computed anew at each call.
    """
    c = model.config
    settings = (
        IMAGE_KV_VERSION,
        c.vision,
        c.projector,
        c.left,
        c.left_context,
        c.image_isolation,
        c.left_attention,
        model.vocabulary,
    )
    return module_fingerprint(model.left, repr(settings))


def save_image_kv(kv: ImageKV, path: str | Path, fingerprint: str, key: str = "") -> None:
    """Write a safetensors file, atomically. `UserError` where it cannot be written.

    `fingerprint`: the model's (`image_kv_fingerprint`). `key`: a name of the image.
    """
    data = kv.data.detach().cpu().contiguous()
    metadata = {
        "format": str(FORMAT),
        "fingerprint": fingerprint,
        "key": key,
        "checksum": _checksum(data, fingerprint, key),
    }
    try:
        with replacing(Path(path)) as temp_path:
            save_file({"data": data}, temp_path, metadata=metadata)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} could not be written: {' '.join(str(error).split())}") from error


def load_image_kv(
    path: str | Path, fingerprint: str, key: str = "", shape: tuple[int, ...] | None = None
) -> ImageKV:
    """Read what `save_image_kv` wrote, bit for bit, on the CPU.

    `UserError` where the file is missing, damaged, foreign, or of another `fingerprint`, `key` or `shape`
    (None: any).
    """
    again = "encode the image again"
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != str(FORMAT):
                raise UserError(
                    f"{path} has image KV format {metadata.get('format')!r}; "
                    f"this version reads {FORMAT}: {again}"
                )
            if metadata.get("fingerprint") != fingerprint:
                raise UserError(f"{path} was made by other weights or another preprocessing: {again}")
            if metadata.get("key") != key:
                raise UserError(f"{path} holds another image than its name says: {again}")
            data = file.get_tensor("data").clone()  # the file is mapped: later changes on disk would show
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
        expected = f"the keys and values of an image {shape or '(layers, 2, heads, tokens, head size)'}"
        raise UserError(f"{path} holds {tuple(data.shape)} of {data.dtype}, not {expected}: {again}")
    if not torch.isfinite(torch.stack(data.aminmax())).all():
        raise UserError(f"{path} holds values that are not finite: {again}")
    return ImageKV(data)


def _checksum(data: Tensor, fingerprint: str, key: str) -> str:
    """Checksum of a tensor's bytes, dtype and shape, its model's fingerprint and its image's key."""
    digest = hashlib.blake2b(
        repr((str(data.dtype), tuple(data.shape), fingerprint, key)).encode(), digest_size=16
    )
    digest.update(data.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _to_stderr(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)


class ImageStore:
    """A cache from hex key to image KV that evicts the least recently used first.

    Memory holds up to `memory_bytes` of tensors. With a `folder`, the files
    `folder/<fingerprint>/<key>.safetensors` hold up to `disk_bytes`, all models together. Several processes
    may share it; a file's modification time is its last use. Disk errors never raise: a damaged or foreign
    file is deleted and counts as a miss, and after an `OSError` the disk is no longer used. `say` takes one
    line about each.

    `fingerprint`: of the model (`image_kv_fingerprint`), whose weights must not change any more. A store
    without one belongs to the model that asks first.
    """

    def __init__(
        self,
        memory_bytes: int = 1 << 30,
        folder: Path | None = None,
        disk_bytes: int = 10 << 30,
        fingerprint: str = "",
        say: Callable[[str], None] | None = None,
    ) -> None:
        if folder is not None and not KEY.fullmatch(fingerprint):
            raise ValueError(
                f"fingerprint {fingerprint!r} is not in hex: image KVs on disk need their model's"
            )
        self.memory_bytes, self.folder, self.disk_bytes = memory_bytes, folder, disk_bytes
        self.fingerprint, self.say = fingerprint, say or _to_stderr
        self.memory: OrderedDict[str, ImageKV] = OrderedDict()
        self.bytes = 0  # of `memory`
        self.reported: set[Path] = set()  # deleted files
        self.model: weakref.ref[Any] | None = None  # the last one that asked
        self.used = 0  # bytes in the folder, as far as is known
        self.written = 0  # of them, by this process since the last scan
        self.oldest: list[tuple[int, int, Path]] = []  # (last use in ns, bytes, file), the oldest at the end
        if folder is not None:
            try:
                (folder / fingerprint).mkdir(parents=True, exist_ok=True)
                self._scan(folder)
            except OSError as error:
                self._leave_disk(error)

    def serve(self, model: Any, fingerprint: str = "") -> None:
        """Check that the store is `model`'s, else raise `ValueError`: its image KVs would be wrong.

        `fingerprint`: the model's, where already known.
        """
        if self.model is not None and self.model() is model:
            return
        if (self.model is not None and not self.fingerprint) or (
            self.fingerprint and self.fingerprint != (fingerprint or image_kv_fingerprint(model))
        ):
            raise ValueError(
                "this image store holds image KVs of another model: "
                "give each model a store of its own, with its fingerprint"
            )
        self.model = weakref.ref(model)

    def __len__(self) -> int:
        """Number of image KVs in memory."""
        return len(self.memory)

    def get(self, key: str, shape: tuple[int, ...] | None = None) -> ImageKV | None:
        """The image KV of `key`, or None. Files are read onto the CPU; one of another `shape` is a miss."""
        path = self._path(key)
        on_disk = path is not None and _touch(path)
        if key in self.memory:
            self.memory.move_to_end(key)
            return self.memory[key]
        kv = self._read(path, key, shape) if path is not None and on_disk else None
        if kv is not None:
            self._cache(key, kv)
        return kv

    def put(self, key: str, kv: ImageKV) -> None:
        """Store an image KV in memory and on disk, except where it alone is larger than the cap."""
        self._cache(key, kv)
        path = self._path(key)
        if path is not None:
            self._write(path, key, kv)

    def _path(self, key: str) -> Path | None:
        if self.folder is None:
            return None
        if not KEY.fullmatch(key):
            raise ValueError(f"key {key!r} is not in hex")
        return self.folder / self.fingerprint / f"{key}.safetensors"

    def _cache(self, key: str, kv: ImageKV) -> None:
        if key in self.memory:
            self.bytes -= self.memory.pop(key).data.nbytes
        if kv.data.nbytes > self.memory_bytes:
            return
        self.memory[key] = kv
        self.bytes += kv.data.nbytes
        while self.bytes > self.memory_bytes:
            _, old = self.memory.popitem(last=False)
            self.bytes -= old.data.nbytes

    def _read(self, path: Path, key: str, shape: tuple[int, ...] | None) -> ImageKV | None:
        try:
            path.open("rb").close()
        except FileNotFoundError:
            return None  # evicted by another process
        except OSError as error:  # the file may be intact
            self._leave_disk(error)
            return None
        try:
            return load_image_kv(path, self.fingerprint, key, shape)
        except UserError as error:
            try:
                path.unlink()
            except FileNotFoundError:
                return None  # evicted by another process
            except OSError as unlink_error:
                self._leave_disk(unlink_error)
                return None
            if path not in self.reported:
                self.reported.add(path)
                self.say(f"{error} (the image store has deleted the file, and does so)")
            return None

    def _write(self, path: Path, key: str, kv: ImageKV) -> None:
        assert self.folder is not None
        size = kv.data.nbytes + HEADER
        if size > self.disk_bytes:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if self._make_room(self.folder, size):
                save_image_kv(kv, path, self.fingerprint, key)
                _touch(path)
                self.used, self.written = self.used + size, self.written + size
        except (UserError, OSError) as error:
            self._leave_disk(error)

    def _make_room(self, folder: Path, size: int) -> bool:
        """Delete the least recently used files until `size` more bytes fit; False where they cannot."""
        if self.written + size > self.disk_bytes // SHARE:
            self._scan(folder)
        while self.used + size > self.disk_bytes:
            if not self.oldest:
                self._scan(folder)
                if not self.oldest:
                    return self.used + size <= self.disk_bytes
            last_use, file_bytes, path = self.oldest.pop()
            try:
                if path.stat().st_mtime_ns != last_use:
                    continue  # used since the scan: the next one sorts it anew
                path.unlink()
            except FileNotFoundError:
                pass  # evicted by another process
            self.used -= file_bytes
        return True

    def _scan(self, folder: Path) -> None:
        """Count the folder's bytes, sort its files by last use, and delete killed runs' temporary files."""
        self.used = self.written = 0
        self.oldest = []
        model_folders = (f for f in folder.iterdir() if KEY.fullmatch(f.name) and f.is_dir())
        for path in (path for model_folder in model_folders for path in model_folder.iterdir()):
            temporary = TEMPORARY.fullmatch(path.name) is not None
            if not temporary and not FILE.fullmatch(path.name):
                continue  # not the store's
            with suppress(FileNotFoundError):
                status = path.stat()
                if temporary and time.time() - status.st_mtime > STALE_S:
                    path.unlink()
                    continue
                self.used += status.st_size
                if not temporary:
                    self.oldest.append((status.st_mtime_ns, status.st_size, path))
        self.oldest.sort(key=lambda file: file[0], reverse=True)

    def _leave_disk(self, error: Exception) -> None:
        folder, self.folder = self.folder, None
        self.say(f"the image store goes on without {folder}: {' '.join(str(error).split())}")


def _touch(path: Path) -> bool:
    """Record a use; False where the file does not exist."""
    now = time.time_ns()  # a file system's own clock is coarser
    try:
        os.utime(path, ns=(now, now))
    except FileNotFoundError:
        return False
    except OSError:
        pass  # a file of another user: perhaps still readable
    return True


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
    c, keys = model.config.left, [block_key(model, block) for block in blocks]
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


def block_key(model: Any, block: ImageBlock) -> str:
    """Hash of all that a block's image KV depends on besides the model: tokens, tiles, autocast's dtype."""
    device = model.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    digest = hashlib.blake2b(
        repr((tuple(block.tiles.shape), block.ids, block.images, dtype)).encode(), digest_size=16
    )
    digest.update(block.tiles.contiguous().numpy().data)
    return digest.hexdigest()
