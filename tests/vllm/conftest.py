"""Scenarios on a real engine, each in a process of its own (drive.py)."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import icecache.models
import models
import pytest

pytest.importorskip("vllm", reason="make test-vllm makes an environment with vLLM")

# One process with its engine, little memory, no word beside errors, no question to a hub.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
}
DRIVE = Path(__file__).with_name("drive.py")

Run = Callable[..., dict[str, Any]]


class EngineFailed(AssertionError):
    """A scenario that did not come to its end; the text is what it said."""


class Driver:
    """A process that runs scenarios, with the environment that it began with."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(DRIVE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ENVIRONMENT, **environment},
        )

    def run(self, scenario: str, spec: dict[str, Any], output: Path) -> str:
        """What the scenario said."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(
            json.dumps([scenario, spec, output], default=str), file=self.process.stdin, flush=True
        )
        for line in self.process.stdout:
            if line == "over\n":
                return output.read_text()
        raise EngineFailed(f"the process that runs scenarios ended: {self.process.wait()}")


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """run(scenario, environment={...}, model=..., icecache={...} or None, llm={...}, ...)."""
    drivers: dict[str, Driver] = {}
    folder = tmp_path_factory.mktemp("scenarios")

    def run(
        scenario: str, environment: dict[str, str] | None = None, **spec: Any
    ) -> dict[str, Any]:
        spec.setdefault("icecache", None)
        key = json.dumps(environment)
        if key not in drivers:
            drivers[key] = Driver(environment or {})
        said = drivers[key].run(scenario, spec, folder / f"{next(numbers)}.txt")
        for line in said.splitlines():
            if line.startswith("RESULT "):
                return dict(json.loads(line.removeprefix("RESULT ")))
        raise EngineFailed(said[-8000:])

    numbers = itertools.count()
    yield run
    for driver in drivers.values():
        driver.process.communicate()


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
