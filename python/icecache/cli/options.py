"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Annotated, Any, TypeAlias

import typer

from icecache.config import Config
from icecache.errors import InvalidArgument

MOST_TOKENS = 1 << 30  # of a sequence: positions are 32-bit
MOST_THREADS = 1024  # of the engine

Settings: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="A parameter of the engine, see `icecache config`; may be repeated.",
    ),
]


class NumberFormat(str, Enum):
    """Of weights and cache."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def parse_settings(settings: Sequence[str] | None, **fields: int | str | None) -> dict[str, Any]:
    """["name=value", ...] and those `fields` that are not None, as arguments of Config.

    Raises InvalidArgument for another form, an unknown name, a bad value, a name given twice, and
    values that contradict each other.
    """
    values = {name: str(value) for name, value in fields.items() if value is not None}
    for setting in settings or ():
        name, equals, value = (part.strip() for part in setting.partition("="))
        if not equals or not name:
            raise InvalidArgument(f"--set must be NAME=VALUE, got {setting!r}")
        if name in values:
            raise InvalidArgument(f"{name} is given twice: {values[name]} and {value}")
        values[name] = value
    Config(**values).check()
    return values
