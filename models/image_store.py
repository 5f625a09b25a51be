"""Image KVs by content, in memory and on disk: an image that was asked about before is not encoded again, by whichever process."""

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
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.kv_cache import ImageKV
from utils.errors import UserError
from utils.files import replacing

FORMAT = 3  # of an image KV's file
DTYPES = torch.float32, torch.bfloat16, torch.float16
HEADER = 1024  # bytes of a file beside its tensor, at most
STALE_S = 3600  # age at which a temporary file is a killed run's
SHARE = 64  # after a 64th of the cap has been written the folder is looked through again, for what other processes did
KEY = re.compile(r"[0-9a-f]+")
FILE = re.compile(rf"{KEY.pattern}\.safetensors")
TEMPORARY = re.compile(rf"\.{FILE.pattern}\.\d+|\.tmp\w{{6}}")  # utils/files.py's, and safetensors' own


def save_image_kv(kv: ImageKV, path: str | Path, fingerprint: str, key: str = "") -> None:
    """Write a safetensors file, beside and renamed. `fingerprint` says what made the image KV: `DualTowerVLM.fingerprint`; `key` of what image. A disk that refuses raises `UserError`."""
    data = kv.data.detach().cpu().contiguous()
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


def load_image_kv(
    path: str | Path, fingerprint: str, key: str = "", shape: tuple[int, ...] | None = None
) -> ImageKV:
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
    return ImageKV(data)


def _checksum(data: Tensor, fingerprint: str, key: str) -> str:
    """Of a tensor's bytes, of the type and shape without which they say something else, and of what made it of which image."""
    digest = hashlib.blake2b(
        repr((str(data.dtype), tuple(data.shape), fingerprint, key)).encode(), digest_size=16
    )
    digest.update(data.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _to_stderr(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)


class ImageStore:
    """Hex key → image KV. Where room is short, the least recently used goes first.

    Memory holds `memory_bytes` of tensors. With a `folder`, files `folder/<fingerprint>/<key>.safetensors` hold `disk_bytes`,
    all models together; several processes may share it, and a file's time of change says when it was last used.
    The disk never raises: a file that is damaged or of another model is deleted and is a miss, a disk that refuses is
    left alone from then on. `say` takes one line about each. `fingerprint` is `DualTowerVLM.fingerprint` of the model, whose weights do
    not change any more; a store without one belongs to the model that first asks.
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
        self.memory_bytes, self.folder, self.disk_bytes, self.fingerprint, self.say = (
            memory_bytes,
            folder,
            disk_bytes,
            fingerprint,
            say or _to_stderr,
        )
        self.memory: OrderedDict[str, ImageKV] = OrderedDict()
        self.bytes = 0  # of `memory`
        self.told: set[Path] = set()
        self.model: weakref.ref[Any] | None = None  # the last one that asked
        self.used = self.written = (
            0  # bytes in the folder, as far as is known; of them, written here since it was looked through
        )
        self.oldest: list[
            tuple[int, int, Path]
        ] = []  # (last use in ns, bytes, file), the least recently used at the end
        if folder is not None:
            try:
                (folder / fingerprint).mkdir(parents=True, exist_ok=True)
                self._look_through(folder)
            except OSError as error:
                self._leave_disk(error)

    def serve(self, model: Any, fingerprint: str = "") -> None:
        """`model` is about to ask; `fingerprint`, where it is known already. Another model than the store's raises `ValueError`, for the same image gives another image KV there."""
        if self.model is not None and self.model() is model:
            return
        if (self.model is not None and not self.fingerprint) or (
            self.fingerprint and self.fingerprint != (fingerprint or model.fingerprint())
        ):
            raise ValueError(
                "this image store holds image KVs of another model: give each model a store of its own, with its fingerprint"
            )
        self.model = weakref.ref(model)

    def __len__(self) -> int:
        """Image KVs in memory."""
        return len(self.memory)

    def get(self, key: str, shape: tuple[int, ...] | None = None) -> ImageKV | None:
        """The image KV, or None where it is not known; one that comes from the disk is on the CPU, and where it has another `shape` it is none."""
        path = self._path(key)
        there = path is not None and _touch(path)
        if key in self.memory:
            self.memory.move_to_end(key)
            return self.memory[key]
        kv = self._read(path, key, shape) if path is not None and there else None
        if kv is not None:
            self._keep(key, kv)
        return kv

    def put(self, key: str, kv: ImageKV) -> None:
        """Keep an image KV. One that is larger than a cap is not kept there."""
        self._keep(key, kv)
        path = self._path(key)
        if path is not None:
            self._write(path, key, kv)

    def _path(self, key: str) -> Path | None:
        if self.folder is None:
            return None
        if not KEY.fullmatch(key):
            raise ValueError(f"key {key!r} is not in hex")
        return self.folder / self.fingerprint / f"{key}.safetensors"

    def _keep(self, key: str, kv: ImageKV) -> None:
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
            return None  # another process needed the room
        except OSError as error:  # the file may be whole
            self._leave_disk(error)
            return None
        try:
            return load_image_kv(path, self.fingerprint, key, shape)
        except UserError as error:
            try:
                path.unlink()
            except FileNotFoundError:
                return None  # another process needed the room
            except OSError as refusal:
                self._leave_disk(refusal)
                return None
            if path not in self.told:
                self.told.add(path)
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
        """Delete the least recently used files until `size` more bytes fit. False where they cannot."""
        if self.written + size > self.disk_bytes // SHARE:
            self._look_through(folder)
        while self.used + size > self.disk_bytes:
            if not self.oldest:
                self._look_through(folder)
                if not self.oldest:
                    return self.used + size <= self.disk_bytes
            last_use, held, path = self.oldest.pop()
            try:
                if path.stat().st_mtime_ns != last_use:
                    continue  # used since: looking through the folder again finds it in its new place
                path.unlink()
            except FileNotFoundError:
                pass  # another process needed the room, too
            self.used -= held
        return True

    def _look_through(self, folder: Path) -> None:
        """Count the folder's bytes, order its files by last use, and delete temporary files that killed runs left."""
        self.used = self.written = 0
        self.oldest = []
        for path in (
            path
            for part in folder.iterdir()
            if KEY.fullmatch(part.name) and part.is_dir()
            for path in part.iterdir()
        ):
            temporary = TEMPORARY.fullmatch(path.name) is not None
            if not temporary and not FILE.fullmatch(path.name):
                continue  # nobody's business
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
        where, self.folder = self.folder, None
        self.say(f"the image store goes on without {where}: {' '.join(str(error).split())}")


def _touch(path: Path) -> bool:
    """Note a use; False where the file is gone. The clock's own nanoseconds: a file system's are those of its last tick."""
    now = time.time_ns()
    try:
        os.utime(path, ns=(now, now))
    except FileNotFoundError:
        return False
    except OSError:
        pass  # not ours to change, but perhaps to read
    return True
