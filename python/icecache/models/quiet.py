"""transformers without its progress bars."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from typing import Any


@contextmanager
def quiet(*, warnings: bool) -> Iterator[None]:
    """No progress bars of transformers inside; without `warnings`, nothing on stderr at all."""
    from transformers.utils import logging

    log: Any = logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.disable_progress_bar()
    if not warnings:
        log.set_verbosity_error()
    try:
        # Some of its bars are tqdm's own and know of no switch; they write to sys.stderr.
        with nullcontext() if warnings else redirect_stderr(io.StringIO()):
            yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
