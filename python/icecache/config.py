"""Parameters of the engine. They are declared once, in include/icecache/config.h."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from icecache import _core
from icecache.errors import InvalidArgument

Value = int | float | str | bool

_FIELDS = {field.name: field for field in _core.config_fields()}
_LEAST_HEAD_DIM = 8  # of any cache
# With prefill_budget so many tokens of a prompt choose together. Results do not depend on how a
# prompt is cut into calls as long as the cuts are at multiples of it.
PREFILL_BLOCK = 64


def config_fields() -> list[_core.ConfigField]:
    """Name, type, default, unit and meaning of every parameter, in order."""
    return list(_FIELDS.values())


class Config:
    """Values of all parameters; what is not given has its default.

    `Config(token_budget=128, index="tree")`. Fields are read and written as attributes. Text is
    accepted for every field ("8G" for host_memory). Raises InvalidArgument for a name that does
    not exist and for a value of the wrong form; values that contradict each other are found when
    an Engine is made.
    """

    __slots__ = ("_values",)
    _values: _core.Config

    def __init__(self, **fields: Value) -> None:
        object.__setattr__(self, "_values", _core.Config())
        for name, value in fields.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Value) -> None:
        self._values.set(name, _to_text(name, value))

    def __getattr__(self, name: str) -> Any:
        if name not in _FIELDS:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        text = self._values.get(name)
        kind = _FIELDS[name].type
        if kind == "int":
            return int(text)
        if kind == "real":
            return float(text)
        return text == "true" if kind == "flag" else text

    def to_dict(self) -> dict[str, Value]:
        """All values by name; `Config(**config.to_dict())` equals config."""
        return {name: getattr(self, name) for name in _FIELDS}

    def check(self) -> None:
        """Raises InvalidArgument for values that contradict each other, whatever the model is."""
        layers = [int(word) for word in re.findall(r"[0-9]{1,4}", self.dense_layers)]
        # The smallest cache: what it does not allow, none does.
        self._values.resolved(max(layers, default=0) + 1, 1, 1, _LEAST_HEAD_DIM)

    @property
    def prompt_block(self) -> int:
        """PREFILL_BLOCK with a prefill_budget; 1 where prompts attend to all of themselves."""
        return PREFILL_BLOCK if self.prefill_budget and not self.exact else 1

    def most_slots(self, tokens: int) -> int:
        """Slots that the pages of an index of so many tokens have at most; of values in use."""
        return self._values.most_slots(tokens)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *_FIELDS]

    def __iter__(self) -> Iterator[tuple[str, Value]]:
        return iter(self.to_dict().items())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        default = Config()
        changed = [f"{name}={value!r}" for name, value in self if value != getattr(default, name)]
        return f"Config({', '.join(changed)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_dict, (self.to_dict(),)

    def __copy__(self) -> Config:
        return _from_dict(self.to_dict())

    def __deepcopy__(self, memo: dict[int, Any]) -> Config:
        return _from_dict(self.to_dict())


def check_budgets(budgets: Iterable[int], fields: Mapping[str, Any]) -> None:
    """Raises InvalidArgument where one of the token budgets contradicts the other `fields`."""
    for budget in budgets:
        Config(**{**fields, "token_budget": budget}).check()


def wrap(values: _core.Config) -> Config:
    """The engine's values as a Config."""
    config = Config()
    object.__setattr__(config, "_values", values)
    return config


def _from_dict(values: dict[str, Value]) -> Config:
    return Config(**values)


def _to_text(name: str, value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float | str):
        return str(value)
    raise InvalidArgument(f"{name} must be a number, a text or a bool, got {value!r}")


def _table() -> str:
    lines = ["", "    Fields:"]
    for field in config_fields():
        unit = f" {field.unit}" if field.unit else ""
        default = field.default or '""'
        lines.append(f"        {field.name}: {field.meaning} (default {default}{unit})")
    return "\n".join(lines)


Config.__doc__ = (Config.__doc__ or "").rstrip() + "\n" + _table() + "\n    "
