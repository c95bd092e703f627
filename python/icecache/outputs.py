"""Files and folders that a user names for results, checked before the work that makes them."""

from __future__ import annotations

import os
from pathlib import Path

from icecache.errors import InvalidArgument


def check_output_file(name: str, path: Path, *, make_folders: bool = True) -> None:
    """Raises InvalidArgument where no file can be written at `path`.

    `name` is the parameter's, for the message. `make_folders`: the folders that `path` is in will
    be made. Nothing is written here.
    """
    wanted = f"{name} must be a file that can be written, got {path}"
    try:
        if not make_folders and not path.parent.is_dir():
            raise InvalidArgument(f"{name} must be a file in an existing folder, got {path}")
        if path.is_dir():
            raise InvalidArgument(f"{wanted}, which is a folder")
        if path.exists():
            if not os.access(path, os.W_OK):
                raise InvalidArgument(f"{wanted}, which cannot")
            return
        _check_can_be_made(wanted, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: symbolic links in a circle
        raise _unusable(wanted, error) from error


def check_output_folder(name: str, path: Path) -> None:
    """Raises InvalidArgument where `path` is no folder to write in and none can be made there."""
    wanted = f"{name} must be a folder that can be written, got {path}"
    try:
        if path.is_dir():
            if not os.access(path, os.W_OK | os.X_OK):
                raise InvalidArgument(f"{wanted}, which cannot")
        elif path.exists():
            raise InvalidArgument(f"{wanted}, which is a file")
        else:
            _check_can_be_made(wanted, path)
    except (OSError, RuntimeError) as error:
        raise _unusable(wanted, error) from error


def _check_can_be_made(wanted: str, path: Path) -> None:
    folder = path.resolve().parent  # where a symbolic link leads
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise InvalidArgument(f"{wanted}: {folder} is a file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InvalidArgument(f"{wanted}: {folder} cannot be written")


def _unusable(wanted: str, error: Exception) -> InvalidArgument:
    if isinstance(error, InvalidArgument):
        return error
    return InvalidArgument(f"{wanted}: {getattr(error, 'strerror', None) or error}")
