"""A server whose engine dies."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import openai
import pytest
from models import manual
from serving import serving


def test_a_killed_engine_leaves_nothing_behind(smollm2: Path, tmp_path: Path) -> None:
    options = ("--token-budget", "128", "--host-memory", "1G")
    shared = set(Path("/dev/shm").iterdir())
    with serving(smollm2, tmp_path / "first", *options) as server:
        client = server.client()
        stream = client.completions.create(
            model=server.model, prompt=manual(4000), max_tokens=500, stream=True
        )
        next(iter(stream))
        os.kill(engine_core(server.process.pid), signal.SIGKILL)
        with pytest.raises(openai.APIError):
            for _part in stream:
                pass
        server.process.wait(60)
    for _ in range(30):  # Python's resource tracker takes a moment
        if set(Path("/dev/shm").iterdir()) <= shared:
            break
        time.sleep(1)
    assert set(Path("/dev/shm").iterdir()) <= shared
    with serving(smollm2, tmp_path / "second", *options) as server:
        given: Any = {"model": server.model, "prompt": "Hi", "max_tokens": 3}
        assert server.client().completions.create(**given).usage.completion_tokens == 3


def engine_core(server: int) -> int:
    """The process in which the engine of a server runs, below `icecache serve`."""
    below = [int(pid) for pid in children(server)]
    below += [int(pid) for process in below for pid in children(process)]
    (found,) = (pid for pid in below if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes())
    return found


def children(process: int) -> list[str]:
    return Path(f"/proc/{process}/task/{process}/children").read_text().split()
