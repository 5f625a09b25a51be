"""LoRA adapters (arXiv 2106.09685) on either tower, by peft; with CUDA also QLoRA (arXiv 2305.14314)."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from configs.train import LoraConfig, LoraTower
from utils.errors import UsageError, UserError
from utils.files import replacing, replacing_folder

# of a decoder's layers in peft's adapters of transformers' causal language models
PREFIX = "base_model.model.model."
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _targets(config: LoraTower) -> list[str]:
    return [name.strip() for name in config.targets.split(",")]


def decoder_of(model: Any, tower: str) -> Any:
    """Return a tower's decoder: an `nn.Module`, with peft's own attributes once it has adapters."""
    return model.right if tower == "right" else model.left.decoder


def check_lora(config: LoraConfig, towers: tuple[str, ...]) -> None:
    """Raise `UsageError` for settings that this model or machine cannot have."""
    for tower in ("left", "right"):
        t: LoraTower = getattr(config, tower)
        if not t.r:
            if t != LoraTower():
                raise UsageError(f"--lora.{tower}.*: without --lora.{tower}.r there are no adapters")
            continue
        if unknown := set(_targets(t)) - set(LINEAR):
            raise UsageError(
                f"--lora.{tower}.targets: the decoder has no linear layer called "
                f"{', '.join(sorted(unknown))} (it has {', '.join(LINEAR)})"
            )
        if tower not in towers:
            raise UsageError(f"--lora.{tower}.r {t.r}: this model has no {tower} tower")
        if t.nf4 and not torch.cuda.is_available():
            raise UsageError(
                f"--lora.{tower}.nf4: QLoRA needs CUDA, which is not available on this machine; "
                "LoRA without nf4 runs anywhere"
            )
        _packages(t)


def _packages(config: LoraTower) -> tuple[Any, Any]:
    """Import peft and, for nf4, bitsandbytes; a package that is not installed raises `UserError`."""
    try:
        import peft

        if not config.nf4:
            return peft, None
        import bitsandbytes
    except ModuleNotFoundError as error:
        raise UserError(f"adapters need the package {error.name} (pip install {error.name})") from None
    return peft, bitsandbytes


def add_adapters(model: Any, config: LoraConfig) -> None:
    """Add adapters, which start as zero, to the decoders that `config` names: only they are trained then."""
    for tower in model.config.towers:
        t: LoraTower = getattr(config, tower)
        if not t.r:
            continue
        peft, bitsandbytes = _packages(t)
        decoder, targets = decoder_of(model, tower), _targets(t)
        if bitsandbytes is not None:
            _quantise(decoder, targets, bitsandbytes)
        settings = peft.LoraConfig(r=t.r, lora_alpha=t.alpha, lora_dropout=t.dropout, target_modules=targets)
        peft.inject_adapter_in_model(settings, decoder)


def _quantise(decoder: nn.Module, targets: list[str], bitsandbytes: Any) -> None:
    """Replace linear layers by 4-bit NormalFloat ones, which are quantised when they move to the GPU."""
    for parent in list(decoder.modules()):
        for name, layer in list(parent.named_children()):
            if name in targets and isinstance(layer, nn.Linear):
                new = bitsandbytes.nn.Linear4bit(
                    layer.in_features,
                    layer.out_features,
                    layer.bias is not None,
                    torch.bfloat16,
                    quant_type="nf4",
                )
                new.load_state_dict(layer.state_dict())
                setattr(parent, name, new)


def base_parameters(model: Any) -> set[int]:
    """Return the ids of the frozen parameters: those of decoders that have adapters."""
    decoders = [decoder_of(model, tower) for tower in model.config.towers]
    return {
        id(p)
        for d in decoders
        if hasattr(d, "peft_config")
        for name, p in d.named_parameters()
        if "lora_" not in name
    }


def save_adapters(model: Any, folder: Path) -> list[Path]:
    """Write each tower's adapter to `folder/<tower>/`, in peft's format.

    `peft.PeftModel.from_pretrained` reads it over the same language model in transformers. Not that of a left
    tower with fewer layers than its language model: there the layers have other numbers.
    """
    written = []
    for tower in model.config.towers:
        decoder = decoder_of(model, tower)
        if not hasattr(decoder, "peft_config"):
            continue
        tensors = {
            PREFIX + name.replace(".default", ""): p.detach().cpu().contiguous()
            for name, p in decoder.named_parameters()
            if "lora_" in name
        }
        with replacing_folder(folder / tower) as temp_path:
            with replacing(temp_path / "adapter_model.safetensors") as file:
                save_file(tensors, file)
            settings = decoder.peft_config["default"]
            settings.base_model_name_or_path = getattr(model.config, tower).weights
            settings.save_pretrained(str(temp_path))
        written.append(folder / tower)
    return written


def load_adapter(model: Any, tower: str, folder: Path) -> None:
    """Add a saved adapter to a tower, trainable again. A file that does not fit raises `UserError`."""
    try:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
        config = LoraTower(
            settings["r"],
            settings["lora_alpha"],
            settings["lora_dropout"],
            ",".join(sorted(settings["target_modules"])),
        )
    except (OSError, ValueError, LookupError) as error:
        raise UserError(f"{folder} cannot be read as an adapter: {' '.join(str(error).split())}") from None
    add_adapters(model, LoraConfig(**{tower: config}))
    own = {
        PREFIX + name.replace(".default", ""): p
        for name, p in decoder_of(model, tower).named_parameters()
        if "lora_" in name
    }
    wrong = sorted(own.keys() ^ tensors.keys()) or [
        name for name in own if own[name].shape != tensors[name].shape
    ]
    if wrong:
        raise UserError(f"{folder} does not fit this model's {tower} tower: {', '.join(wrong[:3])}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


def merge_adapters(model: Any) -> None:
    """Merge every adapter into its weights and remove it: an ordinary model again, with the same outputs."""
    for tower in model.config.towers:
        decoder = decoder_of(model, tower)
        for parent in list(decoder.modules()):
            for name, layer in list(parent.named_children()):
                if hasattr(layer, "base_layer"):
                    layer.merge(safe_merge=True)
                    setattr(parent, name, _dequantised(layer.base_layer))
        if hasattr(decoder, "peft_config"):
            del decoder.peft_config


def _dequantised(layer: Any) -> nn.Module:
    """Return a linear layer in place of a bitsandbytes one; any other is returned itself."""
    if type(layer) is nn.Linear:
        return layer
    import bitsandbytes

    plain = nn.Linear(
        layer.in_features, layer.out_features, layer.bias is not None, device=layer.weight.device
    )
    with torch.no_grad():
        plain.weight.copy_(
            bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        )
        if layer.bias is not None:
            plain.bias.copy_(layer.bias)
    return plain
