"""JSON records of data files, read with errors that name the file, the line and the field."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icecache.errors import InvalidArgument


@dataclass(frozen=True)
class Record:
    """A JSON object and where it stands. Its readers raise InvalidArgument, naming the field."""

    where: str  # e.g. "data/qasper.jsonl: line 3"
    values: dict[str, Any]

    def field(self, name: str) -> Any:
        if name not in self.values:
            raise InvalidArgument(f"{self.where}: field {name!r} is missing")
        return self.values[name]

    def text(self, name: str) -> str:
        value = self.field(name)
        if not isinstance(value, str):
            raise self.error(name, "a string", value)
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        value = self.field(name)
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise self.error(name, "a list of strings", value)
        return tuple(value)

    def integer(self, name: str) -> int:
        value = self.field(name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(name, "an integer", value)
        return value

    def error(self, name: str, expected: str, value: object) -> InvalidArgument:
        given = repr(value)
        given = given if len(given) <= 60 else f"{given[:60]}..."
        return InvalidArgument(f"{self.where}: field {name!r}: expected {expected}, got {given}")


def record(value: object, where: str) -> Record:
    """`value` as a Record. Raises InvalidArgument where it is not a JSON object."""
    if not isinstance(value, dict):
        raise InvalidArgument(f"{where}: expected a JSON object, got {type(value).__name__}")
    return Record(where, value)


def read_lines(lines: Iterable[str], name: str | Path) -> Iterator[Record]:
    """The records of JSON Lines; blank lines are passed over."""
    for number, line in enumerate(lines, 1):
        where = f"{name}: line {number}"
        if line.strip():
            yield record(_parse(line, where), where)


def read_json(path: Path) -> Any:
    """A whole JSON file. Raises InvalidArgument naming it where it is absent or broken."""
    return _parse(read_text(path), str(path))


def read_jsonl(path: Path) -> Iterator[Record]:
    """The records of a file of JSON Lines."""
    return read_lines(read_text(path).split("\n"), path)


def read_text(path: Path) -> str:
    """A file's text. Raises InvalidArgument naming it where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{path} is not UTF-8 text: {error}") from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{where}: not JSON: {error}") from error
