"""No argument of any type or size crashes the library, and none that is invalid is accepted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from icecache import _core, device, ops
from wild_cases import all_cases

SHARDS = 11  # of the table; these of them by default:
TRIED = range(SHARDS if os.environ.get("ICECACHE_WILD_ALL") else 4)
LEAST = 375  # cases of one


def test_wild_arguments_are_refused_and_touch_nothing() -> None:
    script = Path(__file__).with_name("wild_arguments.py")
    parts = f"{','.join(map(str, TRIED))}/{SHARDS}"
    run = subprocess.run(
        [sys.executable, script, parts], capture_output=True, text=True, timeout=1800 * len(TRIED)
    )
    assert run.returncode == 0, run.stderr
    counts = re.search(r"^(\d+) cases, (\d+) wrong", run.stdout, re.MULTILINE)
    assert counts is not None and int(counts[1]) >= LEAST * len(TRIED), run.stdout
    assert int(counts[2]) == 0, run.stdout


def test_the_table_has_every_function_and_operator() -> None:
    assert device.KIND and ops.LIBRARY  # the imports registered the operators
    wanted = {
        name.replace("::", ".")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("icecache::")
    }
    for name, value in vars(_core).items():
        if name.startswith("_") or (isinstance(value, type) and issubclass(value, BaseException)):
            continue
        wanted.add(name)
        if name in ("Engine", "DeviceCache", "Config"):
            methods = [m for m in vars(value) if callable(vars(value)[m])]
            wanted |= {f"{name}.{method}" for method in methods if not method.startswith("_")}
        elif isinstance(value, type):
            attributes = [a for a in vars(value) if isinstance(vars(value)[a], property)]
            wanted |= {f"{name}.{attribute}" for attribute in attributes}
    names = " ".join(f"{case.name} " for case in all_cases())
    missing = {name for name in wanted if not re.search(rf"\b{re.escape(name)}\b", names)}
    assert not missing, missing
