"""Folders of the user's cache: each made once, whole or not at all, and verified when used."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import platformdirs

from icecache.errors import Error

MANIFEST = "manifest.json"


def cache_root() -> Path:
    """The user's cache folder of icecache; ICECACHE_CACHE names another one."""
    chosen = os.environ.get("ICECACHE_CACHE")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("icecache"))


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def make_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Lets `fill` write a new folder, notes its checksums, and moves it to `folder` when done.

    One process at a time: what is found half made is of a process that was ended, and is deleted.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        fill(partial)
        _write_manifest(partial)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
    except (OSError, ValueError, AttributeError, TypeError) as error:
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
