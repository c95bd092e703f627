"""Documents that a user names."""

from __future__ import annotations

from pathlib import Path

from icecache.errors import Error

_MOST_BYTES = 64 << 20  # many times the longest context


def read_document(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises Error where it cannot be read, is not text, is empty, or is larger than any context.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise Error(f"{path} cannot be read: {error.strerror or error}") from error
    if len(content) > _MOST_BYTES:
        raise Error(f"{path} is too large: expected at most {_MOST_BYTES >> 20} MiB of text")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Error(
            f"{path} is not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x})"
        ) from error
    if not text.strip():
        raise Error(f"{path} is empty")
    return text.replace("\r\n", "\n").replace("\r", "\n")
