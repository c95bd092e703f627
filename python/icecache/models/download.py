"""Files of Python packages from the package index that the user's pip is configured for."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

from icecache.errors import Error
from icecache.models.cache import sha256

# Called with the bytes that are there and the bytes of the whole file (None where unknown).
Progress = Callable[[int, int | None], None]

_TIMEOUT = 60  # seconds without a byte


def wheel_url(requirement: str) -> str:
    """Where pip would fetch the wheel of `requirement` ("name==version") from.

    pip decides, so that indexes, mirrors, credentials, proxies and certificates are the user's.
    Raises Error with what pip said, for example when the machine is offline.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
        command += ["--no-deps", "--only-binary", ":all:", "--quiet", "--retries", "1"]
        command += ["--disable-pip-version-check", "--report", str(report), requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not report.is_file():
            lines = [line for line in done.stderr.strip().splitlines() if "ERROR" in line]
            said = lines[0] if lines else done.stderr.strip() or f"pip ended with {done.returncode}"
            raise Error(f"pip finds no {requirement}: {said}")
        install = json.loads(report.read_text())["install"]
        return str(install[0]["download_info"]["url"])


def fetch(url: str, target: Path, digest: str, progress: Progress) -> None:
    """Downloads `url` to `target`, whose sha256 must be `digest`.

    What an interrupted download left in `target`.part is gone on from. Raises Error where the
    network fails (the part is kept) and where the checksum differs (the part is deleted).
    """
    part = target.with_name(target.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        _append(url, part, progress)
    except (OSError, HTTPException) as error:
        have = part.stat().st_size if part.exists() else 0
        http_error = isinstance(error, urllib.error.HTTPError)
        reason = error if http_error else getattr(error, "reason", error)
        raise Error(
            f"the download of {target.name} failed ({reason}); {have} bytes are kept in {part}, "
            "call again to go on"
        ) from error
    got = sha256(part)
    if got != digest:
        size = part.stat().st_size
        part.unlink()
        raise Error(
            f"{target.name} is not the file that was published: expected sha256 {digest}, got "
            f"{got} ({size} bytes); it was deleted, call again to fetch it anew"
        )
    part.replace(target)


def _append(url: str, part: Path, progress: Progress) -> None:
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left to fetch, or the part is longer than the file
            error.close()
            return
        raise
    with response:
        if getattr(response, "status", None) != 206:
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
