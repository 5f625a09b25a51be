"""Checkpoints: all state that an exact resume needs. A folder is complete or does not exist.

`torch.distributed.checkpoint` writes weights and optimizer state as safetensors, each rank its share, while
training continues; any number of ranks reads them. `state.json` has data position, random states, checksums.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from training.distributed import local_tensor
from utils.errors import UserError
from utils.files import sync
from utils.ranks import SINGLE_PROCESS, DistributedContext

FORMAT = 2  # of the folder
FILE_BYTES = 1 << 28  # approximate size of a tensor file, which is assembled in memory, twice
ABANDONED = "abandoned"  # folder of the checkpoints after the step from which a run was resumed
MARGIN = 1.05  # minimum of free disk space ÷ size of a checkpoint
# A single process is intended. Set at import, because warning filters are shared by all threads.
warnings.filterwarnings("ignore", "torch.distributed is disabled")


class Saver:
    """Write checkpoints into `folder`, one at a time, in a background thread.

    The thread first copies all tensors into memory, which it reuses for the next save: new pages cost more
    than copies. Call `copied()` before anything changes: it waits for the copies. `wait()` waits for the
    complete checkpoint. Both raise an error of the thread. On the first rank the thread calls `saved` with
    each complete checkpoint. The last `keep` checkpoints, that of `protected_step` and those that `in_use`
    returns are retained.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        world: DistributedContext,
        saved: Callable[[Path], None] = lambda folder: None,
        in_use: Callable[[], list[Path]] = list,
    ) -> None:
        self.folder, self.keep, self.world, self.saved, self.in_use = folder, keep, world, saved, in_use
        self.group = dist.new_group(backend="gloo") if world.size > 1 else None
        self.mesh = init_device_mesh("cpu", (world.size,)) if world.size > 1 else None
        self.thread: threading.Thread | None = None
        self.copies = threading.Event()
        self.copies.set()
        self.protected_step = -1
        self.memory: dict[str, Tensor] = {}  # of the copies
        self.failure: BaseException | None = None
        self.deleted: list[str] = []  # old checkpoints, deleted to free space for the last one
        self.final = folder

    def prepare(self, model: Any, optimizers: list[Optimizer]) -> None:
        """Allocate the copies' memory in the background, once: the first save would wait for its pages."""
        if self.memory or self.thread is not None:
            return
        tensors = tensors_of(model, optimizers)

        def allocate() -> None:
            try:
                _low_priority()
                for name, tensor in tensors.items():
                    self._memory(name, local_tensor(tensor)).fill_(0)
            except Exception as error:  # out of memory: raised by `wait`
                self.failure = error

        self.thread = threading.Thread(target=allocate, name="checkpoint")
        self.thread.start()

    def save(
        self,
        step: int,
        model: Any,
        optimizers: list[Optimizer],
        state: Callable[[], dict[str, Any]],
        before: Callable[[], None],
    ) -> Path:
        """Start to write `folder/step_000100` and return its path; `state()` gives plain JSON.

        The thread calls `before()` after the copies. Raises `UserError`, also of the previous save.
        """
        self.wait()
        self.final = self.folder / f"step_{step:06d}"
        tensors = tensors_of(model, optimizers)
        rng = {
            "cpu": torch.get_rng_state().numpy().tobytes().hex(),
            "cuda": torch.cuda.get_rng_state().numpy().tobytes().hex() if torch.cuda.is_available() else "",
        }
        numbers = {"step": step, "format": FORMAT, "ranks": self.world.size}
        saved_state = numbers | {"rng": self.world.gather(rng)} | state()
        temp_path = self.folder / f".{self.final.name}.new"
        problem, self.deleted = None, []
        if self.world.is_rank0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                for stale in self.folder.glob(".step_*"):  # half-written or half-deleted by a killed run
                    shutil.rmtree(stale)
                self._free_space(sum(t.numel() * t.element_size() for t in tensors.values()))
                temp_path.mkdir()
            except OSError as error:
                problem = self._write_error(error.strerror or str(error))
        if problem := self.world.broadcast(problem):
            raise UserError(problem)
        self.copies.clear()
        self.thread = threading.Thread(
            target=self._run, args=(tensors, saved_state, temp_path, before), name="checkpoint"
        )
        self.thread.start()
        return self.final

    def copied(self) -> None:
        """Wait until the state is copied; it may change afterwards."""
        if self.thread is not None:
            self.copies.wait()
            if not self.thread.is_alive():
                self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is complete."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.failure is not None:
            failure, self.failure = self.failure, None
            if isinstance(failure, UserError):
                raise failure
            raise UserError(self._write_error(_first_line(failure))) from failure

    def _free_space(self, size: int) -> None:
        """Delete abandoned and older checkpoints, but never the newest, until `size` bytes fit on the disk.

        Deletes none if all of them would not suffice, and raises `OSError`.
        """
        old = [
            *sorted(path for path in (self.folder / ABANDONED).glob("*") if path.is_dir()),
            *sorted(checkpoints(self.folder)[:-1], key=lambda path: step_of(path) == self.protected_step),
        ]
        in_use = self.in_use()
        old = [path for path in old if path not in in_use]
        while (free := shutil.disk_usage(self.folder).free) < MARGIN * size:
            if free + sum(map(_size, old)) < MARGIN * size:
                raise OSError(f"it takes {size / 2**20:,.1f} MiB, and {free / 2**20:,.1f} MiB are free")
            self.deleted.append(old[0].name)
            shutil.rmtree(old.pop(0))

    def _write_error(self, reason: str) -> str:
        others = "earlier checkpoints are untouched"
        if self.deleted:
            others = f"{', '.join(self.deleted)} had been deleted to make room, others are untouched"
        return f"checkpoint {self.final} could not be written: {reason} ({others})"

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        if isinstance(tensor, DTensor):
            local = self._copy(name, tensor.to_local())
            return DTensor.from_local(
                local,
                self.mesh,
                tensor.placements,
                run_check=False,
                shape=tensor.shape,
                stride=tensor.stride(),
            )
        return self._memory(name, tensor).copy_(tensor)

    def _memory(self, name: str, tensor: Tensor) -> Tensor:
        """Return the buffer for a copy of `tensor`; allocated if there is none of its shape and type."""
        buffer = self.memory.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self.memory[name] = buffer
        return buffer

    def _run(
        self, tensors: dict[str, Tensor], state: dict[str, Any], temp_path: Path, before: Callable[[], None]
    ) -> None:
        try:
            try:
                copies = {name: self._copy(name, t) for name, t in tensors.items()}
            finally:
                self.copies.set()
            _low_priority()
            before()
            writer = HuggingFaceStorageWriter(
                str(temp_path), fqn_to_index_mapping=_files(copies), save_distributed=True
            )
            state_dict_saver.save(copies, storage_writer=writer, process_group=self.group)
            if self.world.is_rank0:
                self._finish(state, temp_path)
        except (Exception, CheckpointException) as error:  # OSError, safetensors' and torch's
            self.failure = error  # raised by `wait`
            shutil.rmtree(temp_path, ignore_errors=True)

    def _finish(self, state: dict[str, Any], temp_path: Path) -> None:
        """Write `state.json`, rename the folder to its final name and delete old checkpoints."""
        state |= {"checksums": _checksums(temp_path, state)}
        (temp_path / "state.json").write_text(json.dumps(state))
        for file in (*temp_path.iterdir(), temp_path):
            sync(file)
        old_path = self.folder / f".{self.final.name}.old"
        if self.final.exists():  # a damaged one that the resume skipped
            self.final.rename(old_path)
        temp_path.rename(self.final)
        sync(self.folder)
        shutil.rmtree(old_path, ignore_errors=True)
        in_use = self.in_use()
        for old in checkpoints(self.folder)[: -self.keep]:
            if step_of(old) != self.protected_step and old not in in_use:
                shutil.rmtree(old)
        self.saved(self.final)


def _low_priority() -> None:
    """Lower the priority of this thread below training."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _first_line(error: BaseException) -> str:
    """The cause of an error in one line, without the tracebacks that `torch.distributed.checkpoint` adds."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    causes = [line for line in lines if re.match(r"(?:[\w.]*)(?:Error|Exception)\b", line)]
    return (causes or lines or [type(error).__name__])[-1][:200]


def _files(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Name → number of its file, from 1; each file holds about `FILE_BYTES`."""
    numbers, size = {}, 0
    for name, tensor in tensors.items():
        numbers[name] = 1 + size // FILE_BYTES
        size += tensor.numel() * tensor.element_size()
    return numbers


def tensors_of(model: Any, optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """The tensors of a checkpoint: `model.NAME`, and `optimizer.NAME.KEY` of a parameter's state.

    Scalars become one-element tensors, as the file format requires.
    """
    tensors = {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    states = {id(p): values for o in optimizers for p, values in o.state.items()}
    for name, parameter in model.named_parameters():
        for key, value in states.get(id(parameter), {}).items():
            value = value.detach()
            tensors[f"optimizer.{name}.{key}"] = value.reshape(1) if value.dim() == 0 else value
    return tensors


def abandon_later(folder: Path, step: int) -> list[Path]:
    """Move checkpoints after `step`, where a run resumes, to `folder/abandoned`; return their new paths."""
    return [move_to_abandoned(later, folder) for later in checkpoints(folder) if step_of(later) > step]


def move_to_abandoned(path: Path, folder: Path) -> Path:
    """Move a file or folder of a run to `folder/abandoned`, under an unused name; return its new path."""
    abandoned = folder / ABANDONED
    abandoned.mkdir(exist_ok=True, parents=True)
    candidates = (abandoned / (path.name + f"-{number}" * (number > 1)) for number in count(1))
    new_path = next(candidate for candidate in candidates if not candidate.exists())
    path.rename(new_path)
    return new_path


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first. A checkpoint gets its name when it is complete."""
    paths = [p for p in folder.glob("step_*") if re.fullmatch(r"step_\d+", p.name) and p.is_dir()]
    return sorted(paths, key=step_of)


def _checksums(folder: Path, state: dict[str, Any]) -> dict[str, str]:
    """Checksums of the tensor files and of `state`, which does not contain them yet."""
    sums = {"state": hashlib.blake2b(json.dumps(state, sort_keys=True).encode(), digest_size=16).hexdigest()}
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            sums[path.name] = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    return sums


def read_state(folder: Path, verify: bool = True) -> dict[str, Any]:
    """Read a checkpoint's state; `verify` compares the checksums of all its files.

    Raises `UserError` for a damaged checkpoint or one of another format.
    """
    try:
        state: dict[str, Any] = json.loads((folder / "state.json").read_text())
        if state.get("format") != FORMAT:
            raise UserError(
                f"checkpoint {folder} has format {state.get('format')}; this version reads {FORMAT}"
            )
        sums = state.pop("checksums")
        actual = _checksums(folder, state) if verify else sums
        wrong = [name for name in sums if sums[name] != actual.get(name)]
        if wrong:
            raise ValueError(f"{wrong[0]} is missing or its checksum is another")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"checkpoint {folder} is damaged ({' '.join(str(error).split())[:120]})") from None
    return state


def load_checkpoint(
    folder: Path, model: Any, optimizers: list[Optimizer], world: DistributedContext = SINGLE_PROCESS
) -> dict[str, Any]:
    """Restore weights, optimizers and this rank's random state; return the saved state with its `step`.

    Raises `UserError` for a model of another shape. Compares no checksums: opening the run did.
    """
    state = read_state(folder, verify=False)
    _load(folder, model, optimizers)
    rng = state["rng"][world.rank % len(state["rng"])]
    torch.set_rng_state(_bytes(rng["cpu"]))
    if rng["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(rng["cuda"]))
    return state


def load_weights_of(folder: Path, model: Any) -> None:
    """Load only the weights of a checkpoint, into a model that is not shared among ranks."""
    _load(folder, model, [], no_dist=True)


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name → shape of a checkpoint's tensors; names as in `tensors_of`."""
    entries = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {n: tuple(entry.size) for n, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def load_tensors(folder: Path, targets: dict[str, Tensor], no_dist: bool = False) -> None:
    """Read tensors of a checkpoint into `targets`; with `no_dist` in this process alone."""
    try:
        reader = HuggingFaceStorageReader(str(folder))
        state_dict_loader.load(targets, storage_reader=reader, no_dist=no_dist)
    except (Exception, CheckpointException) as error:  # torch's is no Exception; it wraps safetensors' errors
        raise UserError(
            f"checkpoint {folder} cannot be read ({_first_line(error)}); "
            "--resume an earlier one by its folder"
        ) from error


def _load(folder: Path, model: Any, optimizers: list[Optimizer], no_dist: bool = False) -> None:
    saved, targets = saved_shapes(folder), tensors_of(model, [])
    _check_shapes(folder, saved, targets)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [(optimizer, group) for optimizer in optimizers for group in optimizer.param_groups]
    states = []
    for optimizer, group, parameter in ((o, g, p) for o, g in groups for p in g["params"]):
        prefix, state = f"optimizer.{names[id(parameter)]}.", {}
        for name in (name for name in saved if name.startswith(prefix)):
            key = name.removeprefix(prefix)
            if saved[name] == tuple(parameter.shape) and key != "step":
                value = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            else:
                value = torch.zeros(saved[name])
            targets[name] = state[key] = value
        states.append((optimizer, group, parameter, state))
    load_tensors(folder, targets, no_dist)
    for optimizer, group, parameter, state in states:
        if "step" in state:
            step, on_device = state["step"].reshape(()), group.get("fused") or group.get("capturable")
            state["step"] = step.to(parameter.device) if on_device else step
        if state:
            optimizer.state[parameter] = state


def _check_shapes(folder: Path, saved: dict[str, tuple[int, ...]], targets: dict[str, Tensor]) -> None:
    """Raise `UserError` if the saved weights and the model's differ in names or shapes."""
    expected = {name: tuple(tensor.shape) for name, tensor in targets.items()}
    for name in sorted(expected.keys() | {name for name in saved if name.startswith("model.")}):
        if saved.get(name) != expected.get(name):
            raise UserError(
                f"checkpoint {folder} does not fit this model: {name.removeprefix('model.')} is "
                f"{saved.get(name, 'missing')} in it, {expected.get(name, 'unknown')} in the model"
            )
