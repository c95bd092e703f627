"""Scenarios on a real engine, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="session")
def run() -> Run:
    """run(scenario, environment={...}, model=..., icecache={...} or None, llm={...}, ...)."""

    def run(
        scenario: str, environment: dict[str, str] | None = None, **spec: Any
    ) -> dict[str, Any]:
        spec.setdefault("icecache", None)
        done = subprocess.run(
            [sys.executable, str(DRIVE), scenario, json.dumps(spec, default=str)],
            capture_output=True,
            text=True,
            timeout=600,
            env={**os.environ, **ENVIRONMENT, **(environment or {})},
        )
        for line in done.stdout.splitlines():
            if line.startswith("RESULT "):
                return dict(json.loads(line.removeprefix("RESULT ")))
        raise EngineFailed(done.stdout[-2000:] + done.stderr[-6000:])

    return run


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama."""
    return models.tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Gemma 3."""
    return models.tiny_gemma3(tmp_path_factory.mktemp("gemma"))
