"""Model folders of a run: of the model in training, of a checkpoint, and of the finished model."""

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
from models.weights.tensors import allocate
from training.checkpoint import load_weights_of
from training.distributed import full_tensor
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
    """Write a complete model folder, with a model card made from the run folder `run`.

    Adapters are merged into a copy; `model` itself does not change. `evaluated`: metrics for the card.
    """
    if any(hasattr(module, "peft_config") for module in model.modules()):
        encoder = model.parts()["vision"]
        cache, encoder.cache = encoder.cache, None  # gigabytes, not to be copied
        try:
            model = copy.deepcopy(model)
        finally:
            encoder.cache = cache
        merge_adapters(model)
    with replacing_folder(folder) as temp_folder:
        write_card(model, config, run, temp_folder, evaluated)
        model.save_pretrained(temp_folder)
        tokenizer.save(temp_folder)
        add_hf_code(temp_folder, tokenizer)


def export_checkpoint(
    checkpoint: Path, folder: Path, model_class: Any, tokenizer: Tokenizer, config: Config, run: Path
) -> None:
    """Write a model folder of a checkpoint's weights, or of their moving average.

    The model in training is not touched.
    """
    with torch.device("meta"):  # so that no random number is drawn: training's order stays
        model = model_class(config.model, tokenizer.vocabulary)
        add_adapters(model, config.lora)
    allocate(model)
    load_weights_of(checkpoint, model)
    if config.train.ema:
        load_ema(checkpoint, model)
    merge_adapters(model)
    export(model, folder, tokenizer, config, run)


def unsharded(model: Any, config: Config) -> Any:
    """Return a model that one process can run alone. Every rank must call this.

    Under FSDP that is a whole copy on each rank, otherwise the model itself.
    """
    is_sharded = isinstance(model, FSDPModule)
    if not is_sharded:
        return model
    model_class = type(model).__bases__[1]  # `fully_shard` made a class of FSDPModule and this one
    with torch.device("meta"):
        whole = model_class(config.model, model.vocabulary)
        add_adapters(whole, config.lora)
    whole.load_state_dict(
        {name: full_tensor(tensor) for name, tensor in model.state_dict().items()}, assign=True
    )
    for name, buffer in model.named_buffers():
        module, _, leaf = name.rpartition(".")
        setattr(whole.get_submodule(module), leaf, buffer)
    encoder, whole_encoder = (m.parts()["vision"] for m in (model, whole))
    whole_encoder.cache = encoder.cache if encoder.frozen else None
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
    """Export the trained model, push it, and print a command that asks it `example`, a prediction."""
    for adapter in save_adapters(model, folder / "adapters"):
        log.say(f"adapter: {adapter} (merged into the model below)")
    merge_adapters(model)  # training is over: no copy is needed
    export(model, folder / "model", tokenizer, config, folder)
    if pusher is not None:
        pusher.finish(folder / "model")
    cwd = Path.cwd()
    python, image = (
        p.relative_to(cwd) if p.is_relative_to(cwd) else p
        for p in (Path(sys.executable), Path(example["image"]))
    )
    with_image = f" --image {shlex.quote(str(image))}" if example["image"] else ""
    log.say(
        f"model: {folder / 'model'}\ntry it:\n  {python} generate.py --checkpoint {folder / 'model'}"
        f"{with_image} --prompt {shlex.quote(example['question'])}"
    )
