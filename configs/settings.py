"""Settings: dataclass fields with a help text. Their types carry the bounds, which `check_bounds` checks."""

import math
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from utils.errors import UsageError


@dataclass(frozen=True)
class Bounds:
    """The finite values that a number may have: ≥ `ge`, > `gt`, ≤ `le`, < `lt`."""

    ge: float = -math.inf
    gt: float = -math.inf
    le: float = math.inf
    lt: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.ge <= value <= self.le and self.gt < value < self.lt

    def __str__(self) -> str:
        words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
        limits = {word: getattr(self, name) for name, word in words.items()}
        return ", and ".join(f"{word} {limit:,}" for word, limit in limits.items() if abs(limit) != math.inf)


Count = Annotated[int, Bounds(ge=0)]
PositiveInt = Annotated[int, Bounds(ge=1)]
Seed = Annotated[int, Bounds(ge=0, lt=2**63)]
Amount = Annotated[float, Bounds(ge=0, lt=1_000_000)]
PositiveFloat = Annotated[float, Bounds(gt=0)]
Fraction = Annotated[float, Bounds(ge=0, le=1)]
PositiveFraction = Annotated[float, Bounds(gt=0, le=1)]
Decay = Annotated[float, Bounds(ge=0, lt=1)]


def setting(default: Any, help: str, *, bare: Any = None, path: bool = False) -> Any:
    """A dataclass field with a default and a help text. `bare`: the value of its flag given without one.

    `path`: its value may hold paths, in which the flag expands `~`.
    """
    return field(default=default, metadata={"help": help, "bare": bare, "path": path})


def check_bounds(config: Any, prefix: str = "") -> None:
    """Raise `UsageError` if a setting of `config`, or of a dataclass in it, is out of bounds or no choice.

    `prefix` begins the setting's name in the error.
    """
    types = get_type_hints(type(config), include_extras=True)
    for f in fields(config):
        name, value, kind = prefix + f.name, getattr(config, f.name), types[f.name]
        if is_dataclass(value):
            check_bounds(value, f"{name}.")
        elif get_origin(kind) is Literal and value not in get_args(kind):
            raise UsageError(f"{name} = {value!r} must be one of {', '.join(get_args(kind))}")
        elif get_origin(kind) is Annotated and value not in (bounds := kind.__metadata__[0]):
            raise UsageError(f"{name} = {value} must be {bounds}: {f.metadata['help']}")
