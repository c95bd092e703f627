"""Scenarios on a real engine, each in a process of its own (drive.py).

All tests run in one pytest process: an engine uses the cores anyway, and each further process of
pytest would spend fifteen seconds of CPU time on importing vLLM.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import drive
import icecache.models
import models
import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "python"))
from absence import absent

pytest.importorskip("vllm", reason="make test-vllm makes an environment with vLLM")

# One process with its engine, no word beside errors, no question to a hub.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}

Run = Callable[..., dict[str, Any]]


class EngineFailed(AssertionError):
    """A scenario that did not come to its end; the text is what it said."""


class Driver:
    """A process that runs scenarios (drive.py)."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.process = os.fork()
        if self.process == 0:
            ours.close()
            status = 1
            try:
                os.environ.update(ENVIRONMENT)
                with theirs.makefile("rw") as lines:
                    drive.attend(lines)
                status = 0
            finally:
                os._exit(status)  # the rest of pytest is the parent's
        theirs.close()
        self.lines = ours.makefile("rw")
        ours.close()  # once the lines are closed, too

    def run(
        self, scenario: str, spec: dict[str, Any], environment: dict[str, str], output: Path
    ) -> str:
        """What the scenario said."""
        given = json.dumps([scenario, spec, environment, output], default=str)
        print(given, file=self.lines, flush=True)
        if self.lines.readline() != "over\n":
            raise EngineFailed(f"the process that runs scenarios ended: {self.end()}")
        return output.read_text()

    def end(self) -> int:
        """The status of the process, which ends for want of lines."""
        self.lines.close()
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


# vLLM takes many seconds to import: once for the tests in this process and for the scenarios, whose
# process is made while no test has loaded a plugin. Some variables are read at the import.
with pytest.MonkeyPatch.context() as _patch:
    for _name, _value in ENVIRONMENT.items():
        _patch.setenv(_name, _value)
    for _name in drive.MODULES:
        with contextlib.suppress(ModuleNotFoundError):  # other versions have other modules
            importlib.import_module(_name)
DRIVER = Driver()


def runner(folder: Path) -> Run:
    """run(scenario, environment={...}, model=..., icecache={...} or None, llm={...}, ...).

    What scenarios say goes to `folder`.
    """
    numbers = itertools.count()

    def run(
        scenario: str, environment: dict[str, str] | None = None, **spec: Any
    ) -> dict[str, Any]:
        spec.setdefault("icecache", None)
        output = folder / f"{next(numbers)}.txt"
        said = DRIVER.run(scenario, spec, environment or {}, output)
        for line in said.splitlines():
            if line.startswith("RESULT "):
                return dict(json.loads(line.removeprefix("RESULT ")))
        raise EngineFailed(said[-8000:])

    return run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """As runner()."""
    yield runner(tmp_path_factory.mktemp("scenarios"))
    assert DRIVER.end() == 0


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama."""
    return models.tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Gemma 3."""
    return models.tiny_gemma3(tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """A small real model."""
    return Path(icecache.models.smollm2())


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Test data beside the checkout: `../shared`, or the folder that ICECACHE_SHARED names."""
    beside = Path(__file__).resolve().parents[3] / "shared"
    folder = Path(os.environ.get("ICECACHE_SHARED", beside))
    if not folder.is_dir():
        reason = f"{folder} is absent: test data that is not part of the repository"
        absent(reason, "ICECACHE_SHARED names another folder")
    return folder
