"""Processes that do nothing but compute, as other users of the same cores would."""

from __future__ import annotations

import signal
import subprocess
import sys
from types import TracebackType

# Ends by itself where the process that started it is gone.
_PROGRAM = """
import os
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""


class BusyProcesses:
    """`count` processes, stopped until they are to run; a context manager that ends them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> BusyProcesses:
        try:
            for _ in range(self.count):
                command = [sys.executable, "-I", "-S", "-c", _PROGRAM]
                self._processes.append(subprocess.Popen(command))
            self.run(False)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def run(self, wanted: bool) -> None:
        """Lets them run, or stops them."""
        for process in self._processes:
            process.send_signal(signal.SIGCONT if wanted else signal.SIGSTOP)

    def _end(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
