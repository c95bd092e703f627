"""Every function of `_core` and every torch operator, called with one wild argument at a time.

A case runs in a process of its own, forked from this one. `python wild_arguments.py [SHARD/SHARDS
[NAME]]` tries one of SHARDS equal parts of the table (0/1: the whole) of those whose name holds
NAME, and prints one line for each case that died, hung, accepted what is invalid, refused what is
valid, raised another class of errors than documented, or changed memory that it must not.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import gc
import select
import signal
import sys
import time
import warnings
from dataclasses import dataclass

import torch
import wild_values
from wild_cases import Case, all_cases

LIMIT = 60.0  # seconds of a case
AT_ONCE = 2


@dataclass
class Child:
    case: Case
    reader: int
    deadline: float


def start(case: Case) -> tuple[int, Child]:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = ""
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            case.run()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"[:300]
        os.write(writer, b"-" + said.encode("utf-8", "replace"))
        os._exit(0)
    os.close(writer)
    return pid, Child(case, reader, time.monotonic() + LIMIT)


def end(pid: int, child: Child) -> str | None:
    """What is wrong with a case whose process has ended or is late; None where nothing is."""
    late = not select.select([child.reader], [], [], 0)[0]
    if late:
        os.kill(pid, signal.SIGKILL)
    said = os.read(child.reader, 2000).decode("utf-8", "replace")
    os.close(child.reader)
    status = os.waitpid(pid, 0)[1]
    if late:
        return f"hung for {LIMIT} s"
    if status != 0 or not said:
        return f"died with status {status}"
    return said[1:] or None


def run_all(cases: list[Case]) -> list[str]:
    """Names of those that are wrong; prints one line for each."""
    waiting = iter(cases)
    running: dict[int, Child] = {}
    wrong: list[str] = []
    while True:
        while len(running) < AT_ONCE and (case := next(waiting, None)) is not None:
            pid, child = start(case)
            running[pid] = child
        if not running:
            return wrong
        soonest = min(child.deadline for child in running.values()) - time.monotonic()
        readers = [child.reader for child in running.values()]
        ended = select.select(readers, [], [], max(0.0, soonest))[0]
        for pid, child in list(running.items()):
            if child.reader in ended or time.monotonic() > child.deadline:
                del running[pid]
                if (fault := end(pid, child)) is not None:
                    wrong.append(child.case.name)
                    print(f"{child.case.name}: {fault}", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for form in wild_values.NO_MEMORY.values():  # what they import is imported once
        form(torch.ones(1, 2, 3, wild_values.DIM))
    part, name = (sys.argv[1:] + ["0/1", ""][len(sys.argv) - 1 :])[:2]
    shard, shards = map(int, part.split("/"))
    cases = [case for case in all_cases() if name in case.name][shard::shards]
    wild_values.the_world()
    gc.freeze()  # a collection in a child would copy the pages of all objects
    started = time.monotonic()
    wrong = run_all(cases)
    print(f"{len(cases)} cases, {len(wrong)} wrong, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
