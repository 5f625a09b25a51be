"""Configurations from presets and flags. An unknown flag is an error that names the nearest known one.

`resolve(argv)` merges, in this order: dataclass defaults, a preset (`configs/config_<name>.py`), the flags.
"""

import argparse
import dataclasses
import importlib
import re
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from configs.train import DEFAULT_PRESET, Config
from utils.errors import UsageError, nearest

T = TypeVar("T")
EARLIER_NAMES = {  # of flags in the first edition → their names now
    "rows": "local_batch_size",
    "accumulation": "global_batch_size",
    "detail_every": "diagnostics_every",
    "floor": "random_baseline",
    "generation_config": "sampling_defaults",
}

REMOVED = {  # flags of the first edition without a successor → what to do instead
    "duplicates": "python -m tools.duplicates marks near duplicates, and --data.curation reads that",
    "draft_width": "drafts are a chain; --draft_tokens sets its length",
}


def preset(name: str) -> Config:
    """Load `CONFIG` of `configs/config_<name>.py`; dashes and underscores are equal."""
    name = name.replace("-", "_").removeprefix("config_").removesuffix(".py")
    known = sorted(p.stem.removeprefix("config_") for p in Path(__file__).parent.glob("config_*.py"))
    if name not in known:
        raise UsageError(
            f"no config named '{name}'{nearest(name, known)}; "
            f"configs are the files configs/config_NAME.py: {', '.join(known)}"
        )
    return dataclasses.replace(importlib.import_module(f"configs.config_{name}").CONFIG, config=name)


def expand_home(text: str) -> str:
    """Expand `~/` at the start of paths. The shell does so for whole words, not in `jsonl=~/my.jsonl`."""
    return re.sub(r"(^|[=,])~(?=/|$)", lambda match: match[1] + str(Path.home()), text)


class FlagParser(argparse.ArgumentParser):
    """argparse with dashes and underscores equal in flags. Errors are one line and name the nearest flag.

    `~` is expanded in arguments whose metavar names a path.
    """

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        if options.get("metavar") in ("FILE", "DIR", "PATH_OR_HUB_ID", "REPO_OR_DIR"):
            options.setdefault("type", expand_home)
        return super().add_argument(*names, **options)

    def parse(self, argv: list[str]) -> argparse.Namespace:
        args, unknown = self.parse_known(argv)
        if unknown:
            flag = unknown[0].split("=")[0]
            raise UsageError(f"unknown argument {flag!r}{self._hint(flag)}; see --help")
        return args

    def _hint(self, flag: str) -> str:
        """`nearest` of an unknown flag: its name now, what to do instead, or a near one."""
        if not flag.startswith("--"):
            return ""
        flag = flag.replace("-", "_").replace("__", "--", 1)
        leaf = re.split("[-.]", flag)[-1]
        if leaf in REMOVED:
            return f" (removed: {REMOVED[leaf]})"
        renamed = [known for known in self._flags() if known.endswith(EARLIER_NAMES.get(leaf, "\n"))]
        return nearest(renamed[0] if renamed else flag, self._flags())

    def parse_known(self, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
        return self.parse_known_args([self._as_known(a) for a in argv])

    def _flags(self) -> list[str]:
        return [s for a in self._actions for s in a.option_strings if s.startswith("--")]

    def _as_known(self, arg: str) -> str:
        """`--max-steps=7` → `--max_steps=7` if that is a flag; other arguments are returned unchanged."""
        name, sep, value = arg.partition("=")
        spelled = "--" + name[2:].replace("-", "_")
        return spelled + sep + value if name.startswith("--") and spelled in self._flags() else arg

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "yes", "no", "on", "off"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1", "yes", "on")


def add_flags(
    parser: argparse.ArgumentParser, cls: type, base: Any, prefix: str = "", group: str = "run"
) -> None:
    """Add a flag per field of dataclass `cls` (nested: `--section.field`); the help shows `base`'s values."""
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
            options |= {"type": expand_home if f.metadata["path"] else kind, "metavar": kind.__name__.upper()}
            if f.metadata["bare"] is not None:
                options |= {"nargs": "?", "const": f.metadata["bare"]}
        section.add_argument(f"--{prefix}{f.name}", **options)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which model a program takes, and with which kernels it computes."""
    parser.add_argument(
        "--checkpoint",
        "--model",
        required=True,
        metavar="PATH_OR_HUB_ID",
        help="model folder (runs/NAME/model), Hub id, or weights file (model.safetensors)",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="config.json of a weights file [the one in its folder]"
    )
    parser.add_argument(
        "--kernels",
        choices=("auto", "plain"),
        default="auto",
        help="auto: faster forms of the model's operations where they apply; plain: PyTorch's alone [auto]",
    )


def add_device_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where a program computes, and in which dtype."""
    parser.add_argument(
        "--dtype",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="of the weights; auto: bf16 where the device computes in it, else fp32 [auto]",
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, mps, or auto: the first of cuda, mps, cpu [auto]"
    )


def override(config: T, flags: dict[str, Any], prefix: str = "") -> T:
    """Replace fields of `config` by dotted flags such as `{"train.lr_left": 1e-3}`."""
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


def resolve(
    argv: list[str], description: str, default: str = DEFAULT_PRESET
) -> tuple[Config, dict[str, Any]]:
    """Command line → (the whole configuration, the given flags with dotted names)."""
    early = FlagParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", default=default)
    base = preset(early.parse_known(argv)[0].config)
    parser = FlagParser(
        description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser, Config, base)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    flags = vars(parser.parse(argv))
    flags |= {"config": base.config} if "config" in flags else {}  # the file's spelling
    flags.pop("debug", None)
    config = override(base, flags)
    if "train.decay_share" in flags and config.train.schedule == "cosine":
        raise UsageError(
            "--train.decay_share is of the schedule wsd, and train.schedule is cosine: "
            "give --train.schedule wsd, or leave it out"
        )
    return config, flags
