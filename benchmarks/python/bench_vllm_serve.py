"""Servers under vLLM's own benchmark client: IceCache's, and vLLM's by itself.

SmolLM2-135M-Instruct in float32; prompts of random tokens and random lengths, which arrive at
random. Both servers are up and take turns, so that drift of the machine meets both. For each number
of requests that may be under way at once:

- failed_*: requests without an answer
- throughput_*: output tokens per second; throughput_ratio_*: IceCache's over vLLM's
- ttft_ms_*, tpot_ms_*: medians of the client

Afterwards each server is idle: `left_requests`, what its metrics say is still running or waiting;
`memory_growth_mib`, what the server's processes have grown by from the first to the last round:
IceCache keeps requests that ended for prompts that begin alike, up to its host memory.

    python benchmarks/python/bench_vllm_serve.py --json benchmarks/results/vllm_serve.json

Needs the environment of `make test-vllm`, and 12 GiB of memory.
"""

from __future__ import annotations

import json as json_lines
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import icecache
import typer
from icecache.bench.report import Result
from icecache.cli.usage import numbers
from rich.console import Console
from rich.progress import Progress
from vllm_results import median_result, show_and_write

OURS, STOCK = "icecache", "stock"
HOST = "127.0.0.1"
MODEL = "smollm2"
START = 300  # seconds that a server may take to start
UNDER_WAY = ("vllm:num_requests_running", "vllm:num_requests_waiting")


@dataclass(frozen=True)
class Load:
    """What a client sends."""

    requests: int
    concurrency: int  # at most, at once
    rate: float  # requests a second, on average; inf: at once
    input_tokens: int  # of a prompt: half to one and a half times as many
    output_tokens: int

    def options(self, seed: int) -> list[str]:
        return [
            *("--dataset-name", "random", "--random-range-ratio", "0.5", "--seed", str(seed)),
            *("--random-input-len", str(self.input_tokens)),
            *("--random-output-len", str(self.output_tokens), "--ignore-eos"),
            *("--num-prompts", str(self.requests), "--max-concurrency", str(self.concurrency)),
            *("--request-rate", str(self.rate), "--temperature", "0", "--disable-tqdm"),
        ]


class Server:
    """A server in a process of its own; close() ends it."""

    def __init__(self, command: list[str], folder: Path, name: str) -> None:
        """Raises RuntimeError with the last words of a server that does not start."""
        with socket.socket() as one:
            one.bind((HOST, 0))
            self.port = one.getsockname()[1]
        self._folder, self._name = folder, name
        log = folder / f"{name}.log"
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                [*command, "--host", HOST, "--port", str(self.port)], stdout=out, stderr=out
            )
        until = time.monotonic() + START
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > until:
                self.close()
                raise RuntimeError(f"{name} did not start:\n{log.read_text()[-4000:]}")
            time.sleep(1)

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(f"http://{HOST}:{self.port}/health", timeout=5)
        except OSError:
            return False
        return True

    def run(self, model: str, load: Load, seed: int) -> dict[str, Any]:
        """What vLLM's client says of one run."""
        found = self._folder / "found.json"
        command = [sys.executable, "-m", "icecache.vllm.command", "bench", "serve"]
        command += [
            "--backend",
            "openai",
            "--endpoint",
            "/v1/completions",
            "--host",
            HOST,
            "--port",
            str(self.port),
            "--model",
            model,
        ]
        command += ["--served-model-name", MODEL, *load.options(seed), "--save-result"]
        command += ["--result-dir", str(found.parent), "--result-filename", found.name]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(f"vLLM's client failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        made: dict[str, Any] = json_lines.loads(found.read_text())
        return made

    def metric(self, name: str) -> float:
        """A gauge of the server's; raises RuntimeError where there is none."""
        page = urllib.request.urlopen(f"http://{HOST}:{self.port}/metrics", timeout=30)
        found = re.search(rf"^{name}\{{[^}}]*\}} (\S+)$", page.read().decode(), re.MULTILINE)
        if found is None:
            raise RuntimeError(f"{self._name}: its metrics do not tell {name}")
        return float(found[1])

    def memory(self) -> float:
        """Resident MiB of the server and its children."""
        return sum(_resident(pid) for pid in _family(self._process.pid)) / 2**20

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _family(pid: int) -> Iterator[int]:
    """A process and its children, theirs included."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from _family(int(child))


def _resident(pid: int) -> int:
    """Bytes."""
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def commands(model: str, token_budget: int, seats: int) -> dict[str, list[str]]:
    """Of both servers, alike but for IceCache."""
    common = ["--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", str(seats)]
    common += ["--served-model-name", MODEL, "--gpu-memory-utilization", "0.3"]
    ours = [sys.executable, "-m", "icecache", "serve", model]
    ours += ["--token-budget", str(token_budget), "--host-memory", "4GiB"]
    stock = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    return {OURS: [*ours, *common], STOCK: [*stock, *common]}


def results(load: Load, runs: dict[str, list[dict[str, Any]]], tail: str) -> list[Result]:
    """Of one load, all rounds."""
    found = []
    params = {
        "requests": load.requests,
        "rate": str(load.rate),
        "input_tokens": load.input_tokens,
        "output_tokens": load.output_tokens,
        "rounds": len(runs[OURS]),
    }
    for name, own in runs.items():
        failed = sum(load.requests - one["completed"] for one in own)
        found.append(Result(f"failed_{name}_{tail}", failed, "requests", params))
        for ours, theirs, unit in (
            ("throughput", "output_throughput", "tokens/s"),
            ("ttft_ms", "median_ttft_ms", "ms"),
            ("tpot_ms", "median_tpot_ms", "ms"),
        ):
            value = median(one[theirs] for one in own)
            found.append(Result(f"{ours}_{name}_{tail}", value, unit, params))
    pairs = zip(runs[OURS], runs[STOCK], strict=True)
    ratios = [ours["output_throughput"] / stock["output_throughput"] for ours, stock in pairs]
    return [*found, median_result(f"throughput_ratio_{tail}", ratios, "ratio", params)]


def main(
    concurrency: Annotated[str, typer.Option(help="Requests at once.")] = "1,16,64",
    requests: Annotated[int, typer.Option(min=1, help="For each that may be under way.")] = 2,
    least: Annotated[int, typer.Option(min=1, help="Requests of a run at least.")] = 12,
    rate: Annotated[float, typer.Option(min=0.01, help="Requests a second.")] = 8,
    input_tokens: Annotated[int, typer.Option(min=2, help="Of a prompt, on average.")] = 256,
    output_tokens: Annotated[int, typer.Option(min=2, help="Of an answer, on average.")] = 48,
    rounds: Annotated[int, typer.Option(min=1, help="Of each load.")] = 3,
    token_budget: Annotated[int, typer.Option(min=1, help="Tokens attended exactly.")] = 256,
    json: Annotated[Path | None, typer.Option(help="Where the results go.")] = None,
) -> None:
    """Serve random requests; takes about half an hour."""
    folder = str(icecache.models.smollm2())
    sizes = numbers("--concurrency", concurrency, 1, 4096)
    found: list[Result] = []
    with Progress(console=Console(), transient=True) as bar, ExitStack() as stack:
        task = bar.add_task("start", total=rounds * len(sizes) * 2)
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = {}
        for name, command in commands(folder, token_budget, max(sizes)).items():
            servers[name] = Server(command, place, name)
            stack.callback(servers[name].close)
        for server in servers.values():
            server.run(folder, Load(8, 8, 100, input_tokens, 4), seed=0)  # warms up
        memory: dict[str, list[float]] = defaultdict(list)
        runs: dict[int, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
        loads = {
            size: Load(max(least, requests * size), size, rate, input_tokens, output_tokens)
            for size in sizes
        }
        for turn in range(rounds):
            for size, load in loads.items():
                for name, server in servers.items():
                    bar.update(task, description=f"{name}: {size} at once")
                    runs[size][name].append(server.run(folder, load, 1 + turn))
                    bar.advance(task)
            for name, server in servers.items():
                memory[name].append(server.memory())
        for size, load in loads.items():
            found += results(load, runs[size], str(size))
        for name, server in servers.items():
            params = {"rounds": rounds}
            left = sum(server.metric(gauge) for gauge in UNDER_WAY)
            found.append(Result(f"left_requests_{name}", left, "requests", params))
            grown = memory[name][-1] - memory[name][0]
            found.append(Result(f"memory_growth_mib_{name}", grown, "MiB", params))
    show_and_write("SmolLM2-135M-Instruct, float32", found, json)


if __name__ == "__main__":
    typer.run(main)
