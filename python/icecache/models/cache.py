"""Folders of the user's cache: each made once, whole or not at all, and verified when used."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import platformdirs

from icecache.errors import Error

MANIFEST = "manifest.json"


def cache_root() -> Path:
    """The user's cache folder of icecache; ICECACHE_CACHE names another one."""
    chosen = os.environ.get("ICECACHE_CACHE")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("icecache"))


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return sha256_of(file)


def sha256_of(file: BinaryIO) -> str:
    """Hex digest of all that an open file holds."""
    digest = hashlib.sha256()
    file.seek(0)
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def check_owner(path: Path) -> None:
    """Raises Error where `path` was put there by somebody else.

    It may belong to this user, to root, or to whom the folder belongs that it is in. In a folder
    that everybody may write, anybody could have made it.
    """
    with suppress(FileNotFoundError, NotADirectoryError):
        owner = path.lstat().st_uid
        if owner not in (os.geteuid(), 0, path.parent.stat().st_uid):
            raise Error(
                f"{path} belongs to another user ({owner}), who may not be trusted; delete it, or "
                "let ICECACHE_CACHE name another folder"
            )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process, and one thread, at a time. The file stays; a symbolic link is refused."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def make_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Lets `fill` write a new folder, notes its checksums, and moves it to `folder` when done.

    One process at a time: what is found half made is of a process that was ended, and is deleted.
    Raises Error where `folder` is something that was not made here.
    """
    require_free(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        fill(partial)
        _write_manifest(partial)
        if is_made(folder):
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_free(folder: Path) -> None:
    """Raises Error where `folder` is something that make_folder() has not made."""
    if not is_made(folder) and (folder.is_symlink() or folder.exists()):
        raise Error(
            f"{folder} is there, but was not made here: it has no {MANIFEST}; move it away, or let "
            "ICECACHE_CACHE name another folder"
        )


def is_made(folder: Path) -> bool:
    """True where make_folder() has ended; files may have changed since."""
    return (folder / MANIFEST).is_file()


def verify_folder(folder: Path) -> None:
    """Raises Error naming the first file that is missing, truncated or altered.

    A file whose size and time of change are as they were when it was last verified is not read
    again.
    """
    advice = f"delete {folder} and call again to make it anew"
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        entries = {str(name): dict(entry) for name, entry in manifest.items()}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise Error(f"{folder / MANIFEST} cannot be read ({error}); {advice}") from error
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            raise Error(f"{path} is missing; {advice}")
        stat = path.stat()
        if stat.st_size != entry["size"]:
            raise Error(
                f"{path} is truncated or altered: expected {entry['size']} bytes, "
                f"got {stat.st_size}; {advice}"
            )
        if stat.st_mtime_ns == entry["mtime_ns"]:
            continue
        digest = sha256(path)
        if digest != entry["sha256"]:
            raise Error(
                f"{path} was altered: expected sha256 {entry['sha256']}, got {digest}; {advice}"
            )


def _write_manifest(folder: Path) -> None:
    entries = {}
    for path in sorted(folder.iterdir()):
        stat = path.stat()
        entries[path.name] = {
            "size": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
            "sha256": sha256(path),
        }
    (folder / MANIFEST).write_text(json.dumps(entries, indent=2))
