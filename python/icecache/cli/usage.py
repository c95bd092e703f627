"""What a wrong command line is told: one line with the option, what was expected, what came."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import Any, get_args, get_type_hints

import typer
from typer.core import TyperCommand

from icecache.errors import InvalidArgument

# By the way of a class that every version of typer has: its others come from click, or from a copy.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

_TEXT = "UTF-8 text"


class Command(TyperCommand):
    """A command whose parse raises InvalidArgument where a value is not what its option takes."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)
        try:
            rest = super().parse_args(ctx, args)
        except typer.BadParameter as error:
            raise self._refused(ctx, given, error) from error
        for param in self.params:
            for value in _texts(ctx.params.get(str(param.name))):
                if _is_no_text(value):
                    raise InvalidArgument(f"{_title(param)} must be {_TEXT}, got {value!r}")
        return rest

    def _refused(self, ctx: Any, given: list[str], error: Any) -> Exception:
        """`error` in our words; in its own where a value is missing, or the option unknown."""
        param = getattr(error, "param", None)
        if param is None or self.callback is None:
            return InvalidArgument(error.format_message())
        values, _, _ = self.make_parser(ctx).parse_args(args=given)
        value = values.get(param.name)
        if value is None:
            command = ctx.command_path
            return InvalidArgument(
                f"{_title(param)} is missing ({command} --help shows what it is)"
            )
        expected = _expected(self.callback, str(param.name))
        if not expected and isinstance(value, str) and _is_no_text(value):
            expected = _TEXT
        if not isinstance(value, str) or not expected:
            return InvalidArgument(error.format_message())
        return InvalidArgument(f"{_title(param)} must be {expected}, got {value!r}")


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, (list, tuple)):
        for one in value:
            yield from _texts(one)
    elif value is not None and not isinstance(value, (bool, int, float)):
        yield str(value)


def _is_no_text(value: str) -> bool:
    """True where a value holds bytes that the terminal's encoding does not know."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return True
    return False


def _title(param: Any) -> str:
    """--max-new-tokens of an option, MODEL of an argument."""
    longest: str = max(param.opts, key=len)
    return longest if longest.startswith("-") else str(param.name).upper()


def _expected(callback: Callable[..., Any], name: str) -> str:
    """What a value of parameter `name` may be, by its annotation; "" where that says nothing."""
    hint = get_type_hints(inspect.unwrap(callback), include_extras=True).get(name)
    kind, *extras = get_args(hint)
    kinds = [one for one in get_args(kind) or (kind,) if one is not type(None)]
    if isinstance(kinds[0], type) and issubclass(kinds[0], Enum):
        return f"one of {', '.join(str(one.value) for one in kinds[0])}"
    words = {int: "a whole number", float: "a number"}.get(kinds[0], "")
    limits = next((extra for extra in extras if hasattr(extra, "min")), None)
    return words + _bounds(limits) if words else ""


def _bounds(limits: Any) -> str:
    least, most = getattr(limits, "min", None), getattr(limits, "max", None)
    if least is not None and most is not None:
        return f" from {least} to {most}"
    return f" of at least {least}" if least is not None else ""


def words(option: str, text: str) -> list[str]:
    """The names in "a, b", each once. Raises InvalidArgument where there is none."""
    found = dict.fromkeys(word.strip() for word in text.split(","))
    if not all(found):
        raise InvalidArgument(f"{option} must be names with commas between them, got {text!r}")
    return list(found)


def numbers(option: str, text: str, least: int, most: int) -> list[int]:
    """The numbers in "1, 2", each once. Raises InvalidArgument for others than least to most."""
    found: Sequence[str] = words(option, text)
    if not all(word.isascii() and word.isdecimal() and len(word) < 20 for word in found) or not all(
        least <= int(word) <= most for word in found
    ):
        raise InvalidArgument(
            f"{option} must be whole numbers from {least} to {most} with commas between them, got "
            f"{text!r}"
        )
    return [int(word) for word in found]
