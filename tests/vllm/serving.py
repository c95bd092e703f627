"""`icecache serve` in a process of its own."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

MAX_MODEL_LEN = 2048


@dataclass(frozen=True)
class Server:
    """A running server."""

    host: str
    port: int
    model: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=120)

    def metrics(self) -> dict[str, float]:
        """Sums over labels of every metric of ours and vLLM's."""
        sums: dict[str, float] = {}
        text = urllib.request.urlopen(f"{self.url}/metrics", timeout=30).read().decode()
        for name, value in re.findall(
            r"^((?:icecache|vllm):\w+)\{[^}]*\} (\S+)$", text, re.MULTILINE
        ):
            sums[name] = sums.get(name, 0.0) + float(value)
        return sums


@contextmanager
def serving(model: Path, log: Path, *options: str) -> Iterator[Server]:
    host = "127.0.0.1"
    with socket.socket() as one:
        one.bind((host, 0))
        port = one.getsockname()[1]
    command = [sys.executable, "-m", "icecache", "serve", str(model), *options]
    command += ["--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN)]
    command += ["--host", host, "--port", str(port)]
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO"}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    server = Server(host, port, str(model), process, log)
    try:
        for _ in range(420):  # a start takes half a minute, on a busy machine many times that
            assert process.poll() is None, log.read_text()[-6000:]
            try:
                urllib.request.urlopen(f"{server.url}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        else:
            pytest.fail(log.read_text()[-6000:])
        yield server
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
