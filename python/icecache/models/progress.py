"""What a long first use shows on stderr: a line, and on a terminal a bar or a spinner."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

from icecache.models.download import Progress


@contextmanager
def download_bar(text: str, shown: bool) -> Iterator[Progress]:
    """Yields what a download calls with its progress."""
    bar = Bar(
        "[progress.description]{task.description}",
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        disable=not (shown and sys.stderr.isatty()),
    )
    _line(text, shown)
    with bar:
        task = bar.add_task(text, total=None)
        yield lambda have, total: bar.update(task, completed=have, total=total)


@contextmanager
def spinner(text: str, shown: bool) -> Iterator[None]:
    """Something that takes its time without steps to count."""
    _line(text, shown)
    if not (shown and sys.stderr.isatty()):
        yield
        return
    with Console(file=sys.stderr).status(text):
        yield


def _line(text: str, shown: bool) -> None:
    if shown and not sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)
