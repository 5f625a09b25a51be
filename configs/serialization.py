"""Configurations as JSON. An unknown key is an error that names the nearest known one."""

import dataclasses
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from utils.errors import UsageError, nearest
from utils.files import read_json

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)


def from_dict(cls: type[T], values: Any, context: str) -> T:
    """Build dataclass `cls` from parsed JSON.

    An unknown key, a missing required key or a wrong type raises `UsageError`, which begins with `context`.
    """
    if not isinstance(values, dict):
        raise UsageError(f"{context}: expected an object, found {type(values).__name__}")
    types = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    out: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise UsageError(f"{context}: unknown key '{key}'{nearest(key, list(known))}")
        out[key] = (
            from_dict(types[key], value, f"{context}: {key}")
            if is_dataclass(types[key])
            else _check(types[key], value, f"{context}: {key}")
        )
    for name, f in known.items():
        if name not in out and f.default is dataclasses.MISSING:
            raise UsageError(f"{context}: '{name}' is missing")
    return cls(**out)


def _check(kind: Any, value: Any, context: str) -> Any:
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise UsageError(f"{context} = {value!r} is none of {', '.join(map(str, typing.get_args(kind)))}")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UsageError(f"{context} = {value!r} is not of type {kind.__name__}")
    return value


def load_json(cls: type[T], path: Path) -> T:
    """Read dataclass `cls` from a JSON file."""
    return from_dict(cls, read_json(path, UsageError), str(path))
