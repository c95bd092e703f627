"""What a long first use shows on stderr."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class ModelProgress:
    """A line per stage; on a terminal a bar of the download and a spinner. Silent if not `shown`.

    A context manager.
    """

    def __init__(self, shown: bool) -> None:
        terminal = sys.stderr.isatty()
        self._log = shown and not terminal
        self._progress = Progress(
            SpinnerColumn(),
            "[progress.description]{task.description}",
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            disable=not (shown and terminal),
        )
        self._task = self._progress.add_task("", total=None, visible=False)

    def stage(self, text: str) -> None:
        """Names what is being done from now on."""
        if self._log:
            print(text, file=sys.stderr, flush=True)
        self._progress.update(self._task, description=text, visible=True)

    def bytes(self, have: int, total: int | None) -> None:
        """Bytes that are there, of how many."""
        self._progress.update(self._task, completed=have, total=total)

    def __enter__(self) -> ModelProgress:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()
