"""Processes that ask samples side by side, each with a model and cores of its own."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from icecache.bench.tasks.task import Sample, Task
from icecache.machine import usable_cores, usable_memory

if TYPE_CHECKING:
    from icecache.bench.ask import Ask

_SHARE = 0.75  # of the machine's memory


def fitting_workers(bytes_each: int) -> int:
    """As many as this machine has cores and memory for; at least 1."""
    return max(1, min(usable_cores(), int(_SHARE * usable_memory()) // bytes_each))


@contextmanager
def worker_processes(count: int, make: Callable[..., Ask], *given: Any) -> Iterator[Executor]:
    """Workers for ask_in_worker(); each calls make(*given), a function of a module, once."""
    context = multiprocessing.get_context("spawn")
    numbers: Any = context.Queue()
    for number in range(count):
        numbers.put(number)
    with ProcessPoolExecutor(count, context, _begin, (count, numbers, make, given)) as pool:
        yield pool


def ask_in_worker(task: Task, sample: Sample) -> dict[str, Any]:
    """What the worker's Ask answers; to be submitted to worker_processes()."""
    assert _ask is not None
    return _ask(task, sample)


_ask: Ask | None = None  # of a worker process


def _begin(count: int, numbers: Any, make: Callable[..., Ask], given: Sequence[Any]) -> None:
    global _ask
    import torch

    threading.Thread(target=end_with_parent, daemon=True).start()
    cores = share_of(sorted(os.sched_getaffinity(0)), numbers.get(), count)
    os.sched_setaffinity(0, cores)  # the engine's threads too: one for each core that it may use
    torch.set_num_threads(len(cores))
    _ask = make(*given)


def end_with_parent() -> None:
    """Ends this process when its parent has: a killed run must not go on computing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def share_of(cores: Sequence[int], number: int, workers: int) -> list[int]:
    """The cores of worker `number` of `workers`; where there are more workers, one each in turn."""
    return list(cores[number::workers]) or [cores[number % len(cores)]]
