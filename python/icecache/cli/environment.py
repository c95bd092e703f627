"""The environment that torch's threads start with.

OpenMP's threads wait for one another in loops that burn their cores: for milliseconds after each
parallel region, as GNU's library has it. Where other work wants the same cores, the thread that is
waited for gets none, and a step takes many times as long. A short wait loses nothing on idle cores,
and then gives the core away. The libraries read these variables when they are loaded, so that they
are set before torch is imported.

Nothing that a user has set is changed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from icecache.machine import usable_cores

# Turns of GNU's waiting loop: a tenth of a millisecond or so, more than what lies between operators
# of a small model. As fast as its own 300,000 on idle cores; none at all take a third longer there.
SPIN_COUNT = 3000
# Variables by which a user tells OpenMP how to wait; where one is set, none is added.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_LIBRARIES = ("libgomp", "libiomp", "libomp")


def additions(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that `environment` lacks."""
    added = {}
    if not any(environment.get(name) for name in WAITING):
        added["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
        added["KMP_BLOCKTIME"] = "1"  # milliseconds; Intel's library has 200
    cores = usable_cores()
    if not environment.get("OMP_NUM_THREADS") and cores < len(os.sched_getaffinity(0)):
        # OpenMP knows which cores it may run on, but not how much time a control group grants.
        added["OMP_NUM_THREADS"] = str(cores)
    return added


def prepare() -> None:
    """Completes this process' environment; starts the command anew where OpenMP is loaded already.

    Nothing else of the process may have begun: its image is replaced.
    """
    added = additions(os.environ)
    os.environ.update(added)
    if added and has_openmp():
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def has_openmp() -> bool:
    """Whether an OpenMP library is loaded, which has read its variables then."""
    try:
        mapped = Path("/proc/self/maps").read_text()
    except OSError:
        return False
    return any(f"/{name}" in mapped for name in _LIBRARIES)
