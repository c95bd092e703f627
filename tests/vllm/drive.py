"""Runs scenarios on a real vLLM engine, each in its own process, as lines of its input name them.

    ["SCENARIO", {"model": FOLDER, "icecache": {...} | null, "llm": {...}, ...},
     ENVIRONMENT, OUTPUT]

ENVIRONMENT holds variables for this scenario alone. What a scenario says goes to the file OUTPUT,
last its result as JSON; then a line tells that it is over. "emulated": true puts the cache on the
emulator of a CUDA device. The scenarios are in scenarios_*.py, what they share in engines.py.

vLLM keeps a process's first connector for ever, and takes many seconds to import: conftest.py forks
a process that has imported it and loaded no plugin, and that forks another for each scenario.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from scenarios_answers import asked, broken, everything, generate, in_turns, ranks
from scenarios_models import compare
from scenarios_prefixes import lost_owner, passes, reuse
from scenarios_storms import prefix_storm, storm

LONGEST = 600  # seconds that a scenario may take, unless its "longest_seconds" says more
# What engines import when they are made, most of the time that one takes.
MODULES = (
    "vllm.entrypoints.llm",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.model_executor.models.gemma3",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.warmup.kernel_warmup",
    "vllm.models.deepseek_v4",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.gpu.warmup",
)


_ALL: list[Callable[[dict[str, Any]], dict[str, Any]]] = [
    asked,
    broken,
    compare,
    everything,
    generate,
    in_turns,
    lost_owner,
    passes,
    prefix_storm,
    ranks,
    reuse,
    storm,
]
SCENARIOS = {scenario.__name__: scenario for scenario in _ALL}


def emulate() -> None:
    """The cache on the emulator of a CUDA device; vLLM and its model stay on the CPU."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / "python"))
    import pytest
    from emulated import emulate_device

    emulate_device(pytest.MonkeyPatch())


def run(scenario: str, given: dict[str, Any], environment: dict[str, str]) -> None:
    """Prints the result."""
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in environment:  # OpenMP was loaded without it
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    if given.get("emulated"):
        emulate()
    result = SCENARIOS[scenario](given)
    sys.stdout.flush()
    print("RESULT " + json.dumps(result), flush=True)


def attend(lines: TextIO) -> None:
    """Runs what `lines` name, one after another, until the other end closes them."""
    gc.collect()
    gc.freeze()  # vLLM collects often: the objects of what it imports are left alone
    for line in lines:
        scenario, given, environment, output = json.loads(line)
        child = os.fork()
        if child == 0:
            signal.alarm(given.get("longest_seconds", LONGEST))
            with open(os.devnull, "rb") as nothing, open(output, "wb") as file:
                for number, of in enumerate((nothing, file, file)):
                    os.dup2(of.fileno(), number)
            # pytest has put files of its own in their place.
            sys.stdout, sys.stderr = (os.fdopen(number, "w") for number in (1, 2))
            for handler in logging.getLogger("vllm").handlers:
                handler.setStream(sys.stderr)  # type: ignore[attr-defined]
            try:
                run(scenario, given, environment)
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(0)  # vLLM's threads would keep the process for seconds
        os.waitpid(child, 0)
        print("over", file=lines, flush=True)
