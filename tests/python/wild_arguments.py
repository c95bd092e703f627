"""Every function of `_core` and every torch operator, called with one wild argument at a time.

A case runs in a process of its own, forked from this one. Cases that end by showing that nothing
has changed share one, up to AT_MOST of them: a fork takes longer than they do. `python
wild_arguments.py [SHARD,...,SHARD/SHARDS [NAME]]` tries some of SHARDS equal parts of the table
(0/1: the whole) of those whose name holds NAME, and prints one line for each case that died, hung,
accepted what is invalid, refused what is valid, raised another class of errors than documented, or
changed memory that it must not.
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
AT_MOST = 16  # cases of one process


@dataclass
class Child:
    cases: list[Case]
    reader: int
    deadline: float
    said: bytes = b""  # a line for each case that has ended: "-", and what is wrong with it


def batches(cases: list[Case]) -> list[list[Case]]:
    """What runs in one process each, in order."""
    made: list[list[Case]] = []
    for case in cases:
        if made and case.leaves_all and made[-1][-1].leaves_all and len(made[-1]) < AT_MOST:
            made[-1].append(case)
        else:
            made.append([case])
    return made


def start(cases: list[Case]) -> tuple[int, Child]:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        for case in cases:
            said = ""
            try:
                case.run()
            except BaseException as error:
                said = " ".join(f"{type(error).__name__}: {error}"[:300].split())
            os.write(writer, b"-" + said.encode("utf-8", "replace") + b"\n")
            if said:
                break  # what comes next would meet what this one left
        os._exit(0)
    os.close(writer)
    return pid, Child(cases, reader, time.monotonic() + LIMIT)


def end(pid: int, child: Child, late: bool) -> tuple[str | None, int]:
    """What is wrong with the last case that ran, and how many ran."""
    if late:
        os.kill(pid, signal.SIGKILL)
    os.close(child.reader)
    status = os.waitpid(pid, 0)[1]
    lines = child.said.decode("utf-8", "replace").split("\n")[:-1]
    if late:
        return f"hung for {LIMIT} s", min(len(lines) + 1, len(child.cases))
    if status != 0 or not lines:
        return f"died with status {status}", min(len(lines) + 1, len(child.cases))
    return lines[-1][1:] or None, len(lines)


def run_all(cases: list[Case]) -> list[str]:
    """Names of those that are wrong; prints one line for each."""
    waiting = batches(cases)[::-1]
    running: dict[int, Child] = {}
    wrong: list[str] = []
    while True:
        while len(running) < AT_ONCE and waiting:
            pid, child = start(waiting.pop())
            running[pid] = child
        if not running:
            return wrong
        soonest = min(child.deadline for child in running.values()) - time.monotonic()
        readers = [child.reader for child in running.values()]
        ready = select.select(readers, [], [], max(0.0, soonest))[0]
        for pid, child in list(running.items()):
            late = time.monotonic() > child.deadline
            if child.reader in ready and (said := os.read(child.reader, 1 << 16)):
                child.said += said
            elif child.reader in ready or late:
                del running[pid]
                fault, ran = end(pid, child, late)
                if fault is not None:
                    wrong.append(child.cases[ran - 1].name)
                    print(f"{child.cases[ran - 1].name}: {fault}", flush=True)
                if rest := child.cases[ran:]:
                    waiting.append(rest)


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for form in wild_values.NO_MEMORY.values():  # what they import is imported once
        form(torch.ones(1, 2, 3, wild_values.DIM))
    part, name = (sys.argv[1:] + ["0/1", ""][len(sys.argv) - 1 :])[:2]
    chosen, shards = part.split("/")
    named = [case for case in all_cases() if name in case.name]
    cases = [case for shard in chosen.split(",") for case in named[int(shard) :: int(shards)]]
    wild_values.the_world()
    gc.freeze()  # a collection in a child would copy the pages of all objects
    started = time.monotonic()
    wrong = run_all(cases)
    print(f"{len(cases)} cases, {len(wrong)} wrong, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
