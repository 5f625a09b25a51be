"""A trained model → its model folder, of a checkpoint or at the end of a run."""

import copy
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from configs.train import Config
from data.tokenizer import Tokenizer
from hf.export import add_hf_code
from models.weights.lora import add_adapters, merge_adapters, save_adapters
from training.checkpoint import load_weights_of
from training.distributed import gathered
from training.ema import load_ema
from training.hub_push import Pusher
from training.logging import RunLog
from training.run_card import write_card
from utils.files import replacing_folder


def export(
    model: Any,
    folder: Path,
    tokenizer: Tokenizer,
    config: Config,
    run: Path,
    evaluated: dict[str, Any] | None = None,
) -> None:
    """Write a complete model folder, with a card of what `run` tells; adapters are merged into a copy, the model stays as it is."""
    if any(hasattr(module, "peft_config") for module in model.modules()):
        encoder = model.parts()["vision"]
        cache, encoder.cache = encoder.cache, None  # gigabytes that no export needs
        try:
            model = copy.deepcopy(model)
        finally:
            encoder.cache = cache
        merge_adapters(model)
    with replacing_folder(folder) as beside:
        write_card(model, config, run, beside, evaluated)
        model.save_pretrained(beside)
        tokenizer.save(beside)
        add_hf_code(beside, tokenizer)


def export_checkpoint(
    checkpoint: Path, folder: Path, model_class: Any, tokenizer: Tokenizer, config: Config, run: Path
) -> None:
    """A checkpoint's weights, or their averages, as a model folder, without a look at the model that is being trained."""
    with torch.device("meta"):  # nothing is drawn at random, which training would notice
        model = model_class(config.model, tokenizer.vocabulary)
        add_adapters(model, config.lora)
    model.load_state_dict(
        {name: torch.empty_like(tensor, device="cpu") for name, tensor in model.state_dict().items()},
        assign=True,
    )
    load_weights_of(checkpoint, model)
    if config.train.ema:
        load_ema(checkpoint, model)
    merge_adapters(model)
    export(model, folder, tokenizer, config, run)


def unsharded(model: Any, config: Config, model_class: Any) -> Any:
    """The model as one process has it: itself, or, where FSDP shares it among ranks, a whole copy on each. Every rank calls it."""
    if not isinstance(model, FSDPModule):
        return model
    with torch.device("meta"):
        whole = model_class(config.model, model.vocabulary)
        add_adapters(whole, config.lora)
    whole.load_state_dict(
        {name: gathered(tensor) for name, tensor in model.state_dict().items()}, assign=True
    )
    for name, buffer in model.named_buffers():
        module, _, leaf = name.rpartition(".")
        setattr(whole.get_submodule(module), leaf, buffer)
    shared, own = (m.parts()["vision"] for m in (model, whole))
    own.cache = shared.cache if shared.frozen else None
    return whole.requires_grad_(False).eval()


def export_final(
    model: Any,
    config: Config,
    folder: Path,
    tokenizer: Tokenizer,
    example: dict[str, Any],
    log: RunLog,
    pusher: Pusher | None,
) -> None:
    """Export what was learnt, and say how to ask it; `example` is one of the predictions."""
    for adapter in save_adapters(model, folder / "adapters"):
        log.say(f"adapter: {adapter} (merged into the model below)")
    merge_adapters(model)  # training is over: no copy is needed
    export(model, folder / "model", tokenizer, config, folder)
    if pusher is not None:
        pusher.finish(folder / "model")
    here = Path.cwd()
    python, image = (
        p.relative_to(here) if p.is_relative_to(here) else p
        for p in (Path(sys.executable), Path(example["image"]))
    )
    with_image = f" --image {shlex.quote(str(image))}" if example["image"] else ""
    log.say(
        f"model: {folder / 'model'}\ntry it:\n  {python} generate.py --checkpoint {folder / 'model'}{with_image} --prompt {shlex.quote(example['question'])}"
    )
