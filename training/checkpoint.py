"""Checkpoints: everything a run needs to go on exactly. A folder is complete or it does not exist."""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from configs.errors import UserError
from configs.files import replacing_folder
from models.pretrained import load_weights

FILES = ("model.safetensors", "training.pt", "state.json")


def save_checkpoint(folder: Path, step: int, model: Any, optimizers: list[torch.optim.Optimizer], state: dict[str, Any], keep: int) -> Path:
    """Write `folder/step_000100` beside, sync it, rename it; then delete all but the newest `keep`.

    `state` is plain JSON (data position and whatever else the loop wants back). Errors: `UserError` where the disk
    refuses; what was there before is untouched.
    """
    final = folder / f"step_{step:06d}"
    try:
        for stale in folder.glob(".step_*"):  # what a killed run left, half-written or half-deleted
            shutil.rmtree(stale)
        with replacing_folder(final) as beside:
            save_file({n: t.detach().contiguous().cpu() for n, t in model.state_dict().items()}, beside / "model.safetensors")
            rng = {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}
            torch.save({"optimizers": [o.state_dict() for o in optimizers], "rng": rng}, beside / "training.pt")
            state = {"step": step} | state
            (beside / "state.json").write_text(json.dumps(state | {"checksums": _checksums(beside, state)}))
    except Exception as error:  # OSError, safetensors' and torch's own for a full disk
        raise UserError(f"checkpoint {final} could not be written: {error} (earlier checkpoints are untouched)") from error
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints under `folder`, oldest first."""
    found = [p for p in folder.glob("step_*") if re.fullmatch(r"step_\d+", p.name) and all((p / f).is_file() for f in FILES)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def _checksums(folder: Path, state: dict[str, Any]) -> dict[str, str]:
    """Of the large files, and of the state without this."""
    sums = {"state": hashlib.blake2b(json.dumps(state, sort_keys=True).encode(), digest_size=16).hexdigest()}
    for name in ("model.safetensors", "training.pt"):
        with open(folder / name, "rb") as file:
            sums[name] = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    return sums


def read_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's state, all its files' checksums compared. Errors: `UserError` where it is damaged."""
    try:
        state: dict[str, Any] = json.loads((folder / "state.json").read_text())
        sums = state.pop("checksums")
        found = _checksums(folder, state)
        wrong = [name for name in found if sums[name] != found[name]]
        if wrong:
            raise ValueError(f"the checksum of {wrong[0]} is another")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"checkpoint {folder} is damaged ({' '.join(str(error).split())[:120]})") from None
    return state


def load_checkpoint(folder: Path, model: Any, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """Put weights, optimizers and RNG back; → the saved state with its `step`."""
    state = read_state(folder)
    load_weights(model, folder / "model.safetensors")
    try:
        saved = torch.load(folder / "training.pt", map_location="cpu", weights_only=True)
        for optimizer, values in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(values)
    except Exception as error:  # torch.load raises many kinds, for a file of another version
        raise UserError(f"checkpoint {folder} cannot be read ({' '.join(str(error).split())[:120]}); --resume an earlier one by its folder") from error
    torch.set_rng_state(saved["rng"]["torch"])
    if saved["rng"]["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(saved["rng"]["cuda"])
    return state
