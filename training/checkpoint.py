"""Checkpoints: everything a run needs to go on exactly. A folder is complete or it does not exist."""

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
            (beside / "state.json").write_text(json.dumps({"step": step} | state))
    except Exception as error:  # OSError, safetensors' and torch's own for a full disk
        raise UserError(f"checkpoint {final} could not be written: {error} (earlier checkpoints are untouched)") from error
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints under `folder`, oldest first."""
    found = [p for p in folder.glob("step_*") if re.fullmatch(r"step_\d+", p.name) and all((p / f).is_file() for f in FILES)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def load_checkpoint(folder: Path, model: Any, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """Put weights, optimizers and RNG back; → the saved state with its `step`."""
    load_weights(model, folder / "model.safetensors")
    try:
        saved = torch.load(folder / "training.pt", map_location="cpu", weights_only=True)
        for optimizer, values in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        state: dict[str, Any] = json.loads((folder / "state.json").read_text())
        if not isinstance(state, dict) or not isinstance(state.get("step"), int) or not isinstance(state.get("data"), dict):
            raise ValueError("state.json lacks 'step' or 'data'")
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise UserError(f"checkpoint {folder} cannot be read ({' '.join(str(error).split())[:120]}); --resume an earlier one by its folder") from error
    torch.set_rng_state(saved["rng"]["torch"])
    if saved["rng"]["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(saved["rng"]["cuda"])
    return state
