"""Downloads that go on after an interruption and are verified."""

from __future__ import annotations

import time
import urllib.error
from collections.abc import Callable
from pathlib import Path

from icecache.errors import Error
from icecache.models.cache import sha256
from icecache.models.network import NETWORK_ERRORS, Network, reason, without_credentials

# Called with the bytes that are there and the bytes of the whole file (None where unknown).
Progress = Callable[[int, int | None], None]


def fetch(
    network: Network,
    url: str,
    target: Path,
    digest: str,
    progress: Progress,
    *,
    retry_after: float = 2.0,
) -> None:
    """Downloads `url` to `target`, whose sha256 must be `digest`.

    Goes on from what an interrupted download left in `target`.part. A connection that breaks after
    some bytes is taken up again after `retry_after` seconds. Raises Error where that does not help
    (the part is kept) and where the checksum differs (the part is deleted).
    """
    part = target.with_name(target.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    resumed = _size(part) > 0
    _fetch_part(network, url, part, progress, retry_after)
    got = sha256(part)
    if got != digest and resumed:  # what was there before may have been of another file
        part.unlink()
        _fetch_part(network, url, part, progress, retry_after)
        got = sha256(part)
    if got != digest:
        size = _size(part)
        part.unlink()
        raise Error(
            f"{without_credentials(url)} is truncated or altered: expected sha256 {digest}, got "
            f"{got} ({size} bytes); it was deleted, call again to fetch it anew"
        )
    part.replace(target)


def _fetch_part(
    network: Network, url: str, part: Path, progress: Progress, retry_after: float
) -> None:
    while True:
        before = _size(part)
        try:
            return _append(network, url, part, progress)
        except NETWORK_ERRORS as error:
            have = _size(part)
            if have <= before or isinstance(error, urllib.error.HTTPError):
                raise Error(
                    f"the download of {without_credentials(url)} failed: {reason(error)}; "
                    f"{have} bytes are kept in {part}, call again to go on"
                ) from error
        time.sleep(retry_after)


def _append(network: Network, url: str, part: Path, progress: Progress) -> None:
    have = _size(part)
    try:
        response = network.open(url, {"Range": f"bytes={have}-"} if have else {})
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing is left, or the part is longer than the file
            error.close()
            return
        raise
    with response:
        if response.status != 206:
            have = 0  # the server sends the whole file
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        with part.open("ab" if have else "wb") as file:
            progress(have, total)
            while block := response.read(1 << 18):
                file.write(block)
                have += len(block)
                progress(have, total)
    if total is not None and have < total:
        raise ConnectionError(f"the connection ended at {have} of {total} bytes")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
