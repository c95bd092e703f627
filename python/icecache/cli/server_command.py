"""The vLLM command that `icecache serve` runs: the plugin's flags, and what makes a server start.

Nothing that a user has given is set again: not by a flag, not in vLLM's configuration file, not in
the environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from icecache.errors import InvalidArgument
from icecache.machine import usable_cores, usable_memory
from icecache.vllm.drafts import IN_TEXT

SMOLLM2 = "smollm2"
_MAX_NUM_SEQS = 64  # where the user names no --max-num-seqs

# Set from our own options: given as vLLM's too, one of the two would be ignored.
_OURS = (
    "--additional-config",
    "--kv-transfer-config",
    "--scheduler-cls",
)
_COMPILATION = (
    "--enforce-eager",
    "--no-enforce-eager",
    "--compilation-config",
    "-cc",
    "-O",
    "--optimization-level",
)
_MEMORY = ("--kv-cache-memory-bytes", "--gpu-memory-utilization")
# With more than one worker, or another way of starting them.
_PARALLEL = (
    "--tensor-parallel-size",
    "-tp",
    "--pipeline-parallel-size",
    "-pp",
    "--data-parallel-size",
    "-dp",
    "--distributed-executor-backend",
    "--nnodes",
    "-n",
)
_GIB = 1 << 30
_MOST_POOL = 4 * _GIB


class Flags:
    """vLLM's flags as the user gave them, those of its configuration file included."""

    def __init__(self, arguments: Sequence[str]) -> None:
        """Raises InvalidArgument for a configuration file that cannot be read."""
        self.arguments = list(arguments)
        self._values: dict[str, str] = {}
        path = _given(arguments).get("--config")
        if path is not None:
            self._values.update(_read_configuration(path))
        self._values.update(_given(arguments))

    def has(self, *names: str) -> bool:
        """Whether any of them is given."""
        return any(name in self._values for name in names)

    def value(self, name: str) -> str | None:
        """What was given last; None where the flag is not there, "" where it has no value."""
        return self._values.get(name)

    def is_parallel(self) -> bool:
        """Whether the server may have more than one worker."""
        return self.has(*_PARALLEL)

    def number(self, name: str, default: int, low: int, high: int) -> int:
        """A whole number. Raises InvalidArgument for anything else."""
        text = self._values.get(name)
        if text is None:
            return default
        if not text.isdigit() or not low <= int(text) <= high:
            raise InvalidArgument(f"{name} must be a number from {low} to {high}, got {text!r}")
        return int(text)


def _given(arguments: Sequence[str]) -> dict[str, str]:
    """Names, as vLLM reads them, and values of `--name VALUE`, `--name=VALUE` and `--name`."""
    values: dict[str, str] = {}
    for index, argument in enumerate(arguments):
        if not argument.startswith("-") or argument[1:2].isdigit():
            continue
        key, equals, text = argument.partition("=")
        if key.startswith("-O"):  # -O3, -O 3
            key = "-O"
        # --additional-config.icecache.exact is a part of --additional-config.
        name = key.partition(".")[0].replace("_", "-")
        following = arguments[index + 1] if index + 1 < len(arguments) else ""
        values[name] = text if equals else "" if following.startswith("--") else following
    return values


def _read_configuration(path: str) -> dict[str, str]:
    import yaml

    try:
        read = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InvalidArgument(f"--config {path} cannot be read: {error}") from None
    if not isinstance(read, dict):
        raise InvalidArgument(f"--config {path} must hold names and values, got {read!r}")
    return {f"--{name}".replace("_", "-"): str(value) for name, value in read.items()}


def server_command(
    model: str,
    folder: str,
    fields: dict[str, Any],
    flags: Flags,
    *,
    on_cpu: bool,
    all_full: bool,
) -> list[str]:
    """The command that starts the server.

    `model` is what the user calls it and `folder` what vLLM does; `all_full` where all its layers
    have full attention. Raises InvalidArgument for flags that are set here.
    """
    from icecache.vllm import engine_args

    for flag in _OURS:
        if flags.has(flag):
            raise InvalidArgument(
                f"{flag}: icecache serve sets it; use --token-budget, --host-memory and --set, or "
                "start vLLM by its own command"
            )
    arguments = engine_args(**fields)
    command = [sys.executable, "-m", "icecache.vllm.command", "serve", folder]
    command += ["--additional-config", json.dumps(arguments["additional_config"])]
    command += ["--kv-transfer-config", json.dumps(arguments["kv_transfer_config"])]
    command += ["--scheduler-cls", arguments["scheduler_cls"]]
    command += ["--no-disable-hybrid-kv-cache-manager"]
    seqs = flags.number("--max-num-seqs", _MAX_NUM_SEQS, 1, 1 << 20)
    if not flags.has("--max-num-seqs"):
        command += ["--max-num-seqs", str(seqs)]
    if model == SMOLLM2:
        command += _unless(flags, "--served-model-name", SMOLLM2)
        command += _unless(flags, "--dtype", "float32")  # what the docs' numbers are of
    if all_full and not _may_draft_by_layers(flags):
        # One block a request, and the one that vLLM keeps for itself.
        command += _unless(flags, "--num-gpu-blocks-override", str(seqs + 1))
    if on_cpu:
        command += _start_on_cpu(flags)
    return [*command, *flags.arguments]


def _may_draft_by_layers(flags: Flags) -> bool:
    """Whether layers may draft, which keep keys and values in vLLM's blocks."""
    if not flags.has("--speculative-config", "-sc", "--spec-model", "--spec-method"):
        return False
    given = flags.value("--speculative-config") or flags.value("-sc") or ""
    method = flags.value("--spec-method")
    # Given by parts, or in vLLM's file, it is not JSON.
    with contextlib.suppress(ValueError, LookupError, TypeError):
        method = json.loads(given)["method"]
    return method not in IN_TEXT


def _unless(flags: Flags, name: str, value: str) -> list[str]:
    return [] if flags.has(name) else [name, value]


def _start_on_cpu(flags: Flags) -> list[str]:
    """What makes vLLM's build for CPUs start on a machine that is in use, and soon."""
    command = []
    if not flags.has(*_COMPILATION):
        command += ["--enforce-eager"]  # torch.compile takes minutes on a CPU
    if not flags.has(*_MEMORY) and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        # Where no size is given, vLLM demands that 92 % of the machine's memory be free. What is
        # taken is that of --num-gpu-blocks-override, where that is given.
        pool = min(_MOST_POOL, max(_free_memory() // 4, _GIB // 4))
        command += ["--kv-cache-memory-bytes", str(pool)]
    return command


def _free_memory() -> int:
    """Bytes that can be had without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return min(int(line.split()[1]) * 1024, usable_memory())
    except OSError:
        pass
    return usable_memory()


def server_environment(
    environment: Mapping[str, str], flags: Flags, *, on_cpu: bool
) -> dict[str, str]:
    """The variables that a server needs beside those of `environment`."""
    added: dict[str, str] = {}
    if not on_cpu or flags.is_parallel() or "VLLM_CPU_OMP_THREADS_BIND" in environment:
        return added
    # Bound to its core, a thread waits for it while another one is idle.
    added["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    if "OMP_NUM_THREADS" not in environment:
        added["OMP_NUM_THREADS"] = str(usable_cores())
    if "VLLM_ENABLE_V1_MULTIPROCESSING" not in environment:
        # The worker in the engine's own process: one process less to start, and none that waits for
        # another one in a loop in every step.
        added["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return added
