"""The machine that the process runs on."""

from __future__ import annotations

import platform
from pathlib import Path

from icecache._core import usable_cores, usable_memory

__all__ = ["cpu_name", "usable_cores", "usable_memory"]


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()
