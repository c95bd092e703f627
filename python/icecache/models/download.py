"""Downloads that go on after an interruption and are verified."""

from __future__ import annotations

import errno
import os
import stat
import time
import urllib.error
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from icecache.errors import Error
from icecache.models.cache import sha256_of
from icecache.models.network import (
    NETWORK_ERRORS,
    Network,
    Pace,
    TooSlowError,
    reason,
    without_credentials,
)

# Called with the bytes that are there and the bytes of the whole file (None where unknown).
Progress = Callable[[int, int | None], None]


def fetch(
    network: Network,
    url: str,
    target: Path,
    digest: str,
    progress: Progress,
    *,
    size: int,
    retry_after: float = 2.0,
) -> None:
    """Downloads `url` to `target`, which must have `size` bytes and the sha256 `digest`.

    Goes on from what an interrupted download left in `target`.part. A connection that breaks after
    some bytes is taken up again after `retry_after` seconds, unless the server is too slow. Raises
    Error where that does not help (the part is kept) and where size or checksum differ (the part is
    deleted). Never writes through a link, nor into another user's file, nor more than `size` bytes.
    """
    part = target.with_name(target.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    with _open_own(part) as file:
        wanted = _Wanted(network, url, size, progress)
        if not 0 <= _end(file) <= size:
            file.truncate(0)
        resumed = _end(file) > 0
        try:
            _fetch_part(wanted, file, retry_after, part)
            got = sha256_of(file)
            if got != digest and resumed:  # what was there before may have been of another file
                file.truncate(0)
                _fetch_part(wanted, file, retry_after, part)
                got = sha256_of(file)
        except _OtherFileError as error:
            part.unlink()
            raise Error(f"{without_credentials(url)} is another file: {error}") from error
        if got != digest:
            part.unlink()
            raise Error(
                f"{without_credentials(url)} is truncated or altered: expected sha256 {digest}, "
                f"got {got} ({_end(file)} bytes); it was deleted, call again to fetch it anew"
            )
        here, ours = part.lstat(), os.fstat(file.fileno())
        if (here.st_dev, here.st_ino) != (ours.st_dev, ours.st_ino):
            raise Error(f"{part} was replaced by another process while it was written; call again")
        part.replace(target)


class _OtherFileError(Exception):
    """What the server has is not the file that is wanted."""


@dataclass
class _Wanted:
    network: Network
    url: str
    size: int
    progress: Progress


def _open_own(part: Path) -> BinaryIO:
    """`part`, read and written; what is there under its name and not a file of ours is deleted."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        found = os.open(part, flags, 0o600)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
    else:
        state = os.fstat(found)
        alone = stat.S_ISREG(state.st_mode) and state.st_nlink == 1
        if alone and state.st_uid == os.geteuid():
            return os.fdopen(found, "r+b")
        os.close(found)
    part.unlink()
    return os.fdopen(os.open(part, flags | os.O_EXCL, 0o600), "r+b")


def _fetch_part(wanted: _Wanted, file: BinaryIO, retry_after: float, part: Path) -> None:
    pace = wanted.network.pace()
    while (before := _end(file)) < wanted.size:
        try:
            if _append(wanted, file, pace):
                return
        except NETWORK_ERRORS as error:
            have = _end(file)
            final = isinstance(error, (urllib.error.HTTPError, TooSlowError))
            if have <= before or final:
                raise Error(
                    f"the download of {without_credentials(wanted.url)} failed: {reason(error)}; "
                    f"{have} bytes are kept in {part}, call again to go on"
                ) from error
            time.sleep(retry_after)


def _append(wanted: _Wanted, file: BinaryIO, pace: Pace) -> bool:
    """Goes on with the file. True where the server says that there is no more of it."""
    have = _end(file)
    try:
        response = wanted.network.open(wanted.url, {"Range": f"bytes={have}-"} if have else {})
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # its file is no longer than the part
            error.close()
            return True
        raise
    with response:
        if response.status != 206:
            have = 0  # the server sends the whole file
            file.truncate(0)
        length = response.headers.get("Content-Length")
        if length is not None and have + int(length) != wanted.size:
            kind = response.headers.get("Content-Type") or "no content type"
            raise _OtherFileError(
                f"expected {wanted.size} bytes, got {have + int(length)} ({kind})"
            )
        file.seek(have)
        wanted.progress(have, wanted.size)
        for block in pace.blocks(response):
            if have + len(block) > wanted.size:
                raise _OtherFileError(f"expected {wanted.size} bytes, got more")
            file.write(block)
            file.flush()
            have += len(block)
            wanted.progress(have, wanted.size)
    if have < wanted.size:
        raise ConnectionError(f"the connection ended at {have} of {wanted.size} bytes")
    return True


def _end(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size
