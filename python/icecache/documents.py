"""Documents that a user names."""

from __future__ import annotations

from pathlib import Path

from icecache.errors import Error


def read_document(path: Path) -> str:
    """The text of a UTF-8 file. Raises Error where it cannot be read, is not text, or is empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Error(
            f"{path} is not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x})"
        ) from error
    except OSError as error:
        raise Error(f"{path} cannot be read: {error.strerror or error}") from error
    if not text.strip():
        raise Error(f"{path} is empty")
    return text
