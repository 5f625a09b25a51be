"""Checkpoints: everything a run needs to go on exactly. A folder is complete or it does not exist.

Weights and optimizer state are written by torch.distributed.checkpoint as safetensors, every rank its share, while
training goes on; another number of ranks may read them. Beside them `state.json`: where the data stands, random states, checksums.
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
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import (
    CheckpointException,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from utils.errors import UserError
from utils.files import sync
from utils.ranks import SINGLE_PROCESS, DistributedContext

FORMAT = 2  # of the folder
FILE_BYTES = 1 << 30  # of tensors in a file, about: a file is put together in memory
warnings.filterwarnings(
    "ignore", "torch.distributed is disabled"
)  # one process alone is what is meant; once, for filters are no thread's own
ABANDONED = "abandoned"  # folder of checkpoints that a run went back before
MARGIN = 1.05  # free disk space ÷ what a checkpoint takes, at least


class Saver:
    """Writes checkpoints into `folder`, one at a time, in a thread of its own.

    The thread first copies what is saved, into memory that it keeps for the next time, for new pages take longer than copies: `copied()` waits for that, and is called before anything changes. `wait()` waits
    until the checkpoint has its name. What goes wrong is raised by the next of these calls. `saved` hears of each complete one, on the first rank, in the thread.
    The last `keep` stay, and beside them that of step `spared`.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        world: DistributedContext,
        saved: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        self.folder, self.keep, self.world, self.saved = folder, keep, world, saved
        self.group = dist.new_group(backend="gloo") if world.size > 1 else None
        self.mesh = init_device_mesh("cpu", (world.size,)) if world.size > 1 else None
        self.thread: threading.Thread | None = None
        self.copies = threading.Event()
        self.copies.set()
        self.protected_step = -1
        self.memory: dict[str, Tensor] = {}  # of the copies
        self.failure: BaseException | None = None
        self.deleted: list[str] = []  # to make room for the last one
        self.final = folder

    def prepare(self, model: Any, optimizers: list[torch.optim.Optimizer]) -> None:
        """Begin to make the copies' memory, beside the first steps, where there is none: its pages take longer than the copies, and the first save would wait for them."""
        if self.memory or self.thread is not None:
            return
        tensors = tensors_of(model, optimizers)

        def make() -> None:
            try:
                _low_priority()
                for name, tensor in tensors.items():
                    self._memory(name, tensor.to_local() if isinstance(tensor, DTensor) else tensor).fill_(0)
            except Exception as error:  # no such memory: raised by `wait`
                self.failure = error

        self.thread = threading.Thread(target=make, name="checkpoint")
        self.thread.start()

    def save(
        self,
        step: int,
        model: Any,
        optimizers: list[torch.optim.Optimizer],
        state: Callable[[], dict[str, Any]],
        before: Callable[[], None],
    ) -> Path:
        """Begin `folder/step_000100`; `state()` is plain JSON. `before` runs in the thread, behind the copies. Errors: `UserError`, also of the checkpoint before this one."""
        self.wait()
        self.final = self.folder / f"step_{step:06d}"
        tensors = tensors_of(model, optimizers)
        rng = {
            "cpu": torch.get_rng_state().numpy().tobytes().hex(),
            "cuda": torch.cuda.get_rng_state().numpy().tobytes().hex() if torch.cuda.is_available() else "",
        }
        kept = {
            "step": step,
            "format": FORMAT,
            "ranks": self.world.size,
            "rng": self.world.gather(rng),
        } | state()
        beside = self.folder / f".{self.final.name}.new"
        problem, self.deleted = None, []
        if self.world.is_rank0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                for stale in self.folder.glob(
                    ".step_*"
                ):  # what a killed run left, half-written or half-deleted
                    shutil.rmtree(stale)
                self._make_room(sum(t.numel() * t.element_size() for t in tensors.values()))
                beside.mkdir()
            except OSError as error:
                problem = f"checkpoint {self.final} could not be written: {error.strerror or error} ({self._others})"
        if problem := self.world.broadcast(problem):
            raise UserError(problem)
        self.copies.clear()
        self.thread = threading.Thread(
            target=self._run, args=(tensors, kept, beside, before), name="checkpoint"
        )
        self.thread.start()
        return self.final

    def copied(self) -> None:
        """Wait until the state is copied: it may change then."""
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
            raise UserError(
                f"checkpoint {self.final} could not be written: {_first_line(failure)} ({self._others})"
            ) from failure

    def _make_room(self, size: int) -> None:
        """Where the disk is nearly full abandoned and older checkpoints go now, but for the newest; none, where all of them would not do. Errors: `OSError`."""
        old = [
            *_abandoned(self.folder),
            *sorted(checkpoints(self.folder)[:-1], key=lambda path: step_of(path) == self.protected_step),
        ]
        while (free := shutil.disk_usage(self.folder).free) < MARGIN * size:
            if free + sum(map(_size, old)) < MARGIN * size:
                raise OSError(f"it takes {size / 2**20:,.1f} MiB, and {free / 2**20:,.1f} MiB are free")
            self.deleted.append(old[0].name)
            shutil.rmtree(old.pop(0))

    @property
    def _others(self) -> str:
        """What became of earlier checkpoints where one could not be written."""
        return (
            f"{', '.join(self.deleted)} had been deleted to make room, others are untouched"
            if self.deleted
            else "earlier checkpoints are untouched"
        )

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        if isinstance(tensor, DTensor):
            return DTensor.from_local(
                self._copy(name, tensor.to_local()),
                self.mesh,
                tensor.placements,
                run_check=False,
                shape=tensor.shape,
                stride=tensor.stride(),
            )
        return self._memory(name, tensor).copy_(tensor)

    def _memory(self, name: str, tensor: Tensor) -> Tensor:
        kept = self.memory.get(name)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = self.memory[name] = torch.empty(
                tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda
            )
        return kept

    def _run(
        self, tensors: dict[str, Tensor], state: dict[str, Any], beside: Path, before: Callable[[], None]
    ) -> None:
        try:
            try:
                copies = {name: self._copy(name, t) for name, t in tensors.items()}
            finally:
                self.copies.set()
            _low_priority()
            before()
            writer = HuggingFaceStorageWriter(
                str(beside), fqn_to_index_mapping=_files(copies), save_distributed=True
            )
            dcp.save(copies, storage_writer=writer, process_group=self.group)
            if self.world.is_rank0:
                state |= {"checksums": _checksums(beside, state)}
                (beside / "state.json").write_text(json.dumps(state))
                for file in (*beside.iterdir(), beside):
                    sync(file)
                if self.final.exists():  # a damaged one that was passed over
                    self.final.rename(self.folder / f".{self.final.name}.old")
                beside.rename(self.final)
                sync(self.folder)
                shutil.rmtree(self.folder / f".{self.final.name}.old", ignore_errors=True)
                for old in checkpoints(self.folder)[: -self.keep]:
                    if step_of(old) != self.protected_step:
                        shutil.rmtree(old)
                self.saved(self.final)
        except (
            Exception,
            CheckpointException,
        ) as error:  # OSError, safetensors' and torch's own: raised by `wait`
            self.failure = error
            shutil.rmtree(beside, ignore_errors=True)


def _low_priority() -> None:
    """Of this thread: training goes first."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _first_line(error: BaseException) -> str:
    """What torch.distributed.checkpoint wraps in a traceback of every rank, in one line."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    found = [line for line in lines if re.match(r"(?:[\w.]*)(?:Error|Exception)\b", line)]
    return (found or lines or [type(error).__name__])[-1][:200]


def _files(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Name → number of the file, 1 and so on: a gigabyte each."""
    out, size = {}, 0
    for name, tensor in tensors.items():
        out[name] = 1 + size // FILE_BYTES
        size += tensor.numel() * tensor.element_size()
    return out


def tensors_of(model: Any, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """What is saved: `model.NAME`, `optimizer.NAME.KEY` of a parameter's state; scalars have one element, as files want it."""
    out = {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    states = {id(p): values for o in optimizers for p, values in o.state.items()}
    for name, parameter in model.named_parameters():
        for key, value in states.get(id(parameter), {}).items():
            out[f"optimizer.{name}.{key}"] = value.detach().reshape(1) if value.dim() == 0 else value.detach()
    return out


def abandon_later(folder: Path, step: int) -> list[Path]:
    """Checkpoints under `folder` of steps after `step`, from where a run goes on, are no longer its own: they go to `folder/abandoned`. → where they are now."""
    return [move_to_abandoned(later, folder) for later in checkpoints(folder) if step_of(later) > step]


def move_to_abandoned(path: Path, folder: Path) -> Path:
    """A file or folder of a run goes to `folder/abandoned`, under a name that is free there. → where it is now."""
    aside = folder / ABANDONED
    aside.mkdir(exist_ok=True, parents=True)
    new = next(
        new for number in count(1) if not (new := aside / (path.name + f"-{number}" * (number > 1))).exists()
    )
    path.rename(new)
    return new


def _abandoned(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / ABANDONED).glob("*") if path.is_dir())


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints under `folder`, oldest first: each was complete when it got its name."""
    found = [p for p in folder.glob("step_*") if re.fullmatch(r"step_\d+", p.name) and p.is_dir()]
    return sorted(found, key=step_of)


def _checksums(folder: Path, state: dict[str, Any]) -> dict[str, str]:
    """Of the tensors' files, and of the state without this."""
    sums = {"state": hashlib.blake2b(json.dumps(state, sort_keys=True).encode(), digest_size=16).hexdigest()}
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            sums[path.name] = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    return sums


def read_state(folder: Path, verify: bool = True) -> dict[str, Any]:
    """A checkpoint's state; with `verify` all its files' checksums are compared. Errors: `UserError` where it is damaged, or of another version."""
    try:
        state: dict[str, Any] = json.loads((folder / "state.json").read_text())
        if state.get("format") != FORMAT:
            raise UserError(
                f"checkpoint {folder} has format {state.get('format')}; this version reads {FORMAT}"
            )
        sums = state.pop("checksums")
        found = _checksums(folder, state) if verify else sums
        wrong = [name for name in sums if sums[name] != found.get(name)]
        if wrong:
            raise ValueError(f"{wrong[0]} is missing or its checksum is another")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"checkpoint {folder} is damaged ({' '.join(str(error).split())[:120]})") from None
    return state


def load_checkpoint(
    folder: Path,
    model: Any,
    optimizers: list[torch.optim.Optimizer],
    world: DistributedContext = SINGLE_PROCESS,
) -> dict[str, Any]:
    """Put weights, optimizers and this rank's random state back; → the saved state with its `step`. A model of another shape raises `UserError`; checksums were compared when the run was opened."""
    state = read_state(folder, verify=False)
    _load(folder, model, optimizers)
    rng = state["rng"][world.rank % len(state["rng"])]
    torch.set_rng_state(_bytes(rng["cpu"]))
    if rng["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(rng["cuda"]))
    return state


def load_weights_of(folder: Path, model: Any) -> None:
    """The weights of a checkpoint alone, into a model that this rank has for itself."""
    _load(folder, model, [], no_dist=True)


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _load(folder: Path, model: Any, optimizers: list[torch.optim.Optimizer], no_dist: bool = False) -> None:
    reader = HuggingFaceStorageReader(str(folder))
    found = {name: tuple(entry.size) for name, entry in reader.read_metadata().state_dict_metadata.items()}
    wanted = {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    for name in sorted(wanted.keys() | {name for name in found if name.startswith("model.")}):
        if name not in found or name not in wanted or found[name] != tuple(wanted[name].shape):
            raise UserError(
                f"checkpoint {folder} does not fit this model: {name.removeprefix('model.')} is {found.get(name, 'missing')} there, {tuple(wanted[name].shape) if name in wanted else 'unknown'} here"
            )
    fresh: dict[tuple[int, str], dict[str, Any]] = {}
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for number, optimizer in enumerate(optimizers):
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in parameters.items():
            if id(parameter) not in own:
                continue
            prefix = f"optimizer.{name}."
            for full in [n for n in found if n.startswith(prefix)]:
                key = full.removeprefix(prefix)
                value = (
                    torch.zeros_like(parameter, memory_format=torch.preserve_format)
                    if found[full] == tuple(parameter.shape) and key != "step"
                    else torch.zeros(found[full])
                )
                wanted[full] = value.detach()
                fresh.setdefault((number, name), {})[key] = wanted[full]
    try:
        dcp.load(wanted, storage_reader=reader, no_dist=no_dist)
    except (
        Exception,
        CheckpointException,
    ) as error:  # torch's own, which is no Exception, wraps what safetensors says
        raise UserError(
            f"checkpoint {folder} cannot be read ({_first_line(error)}); --resume an earlier one by its folder"
        ) from error
    for (number, name), values in fresh.items():
        parameter, group = parameters[name], optimizers[number].param_groups[0]
        if "step" in values:
            step = values["step"].reshape(())
            values["step"] = (
                step.to(parameter.device) if group.get("fused") or group.get("capturable") else step
            )
        optimizers[number].state[parameter] = values
