"""One decode step of one layer, timed: IceCache beside full attention on the same tokens.

A step is append + select + attend for one new token. Rivals are torch's SDPA with the query heads
of a KV head packed into one call, over a preallocated contiguous store that the new token is
written into, and this engine's own dense kernel (`exact=True`). All take turns, step by step and
layer by layer, in one process with the same number of threads, so that each finds the caches as
the others left them. Keys are synthetic: clusters that drift, rotated as RoPE rotates.

With `busy` processes that compute beside it for half of the steps, it tells how many times as long
a step then takes, for each method.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from icecache.bench.busy import BusyProcesses
from icecache.bench.report import Result
from icecache.engine import Engine

OURS, DENSE, SDPA = "icecache", "dense", "sdpa"
# With busy processes: steps without them and with them take turns of so many. The first of a turn
# are not counted: the scheduler has yet to see what runs.
TURN, SETTLING = 10, 2
WARM = 3  # steps before the first that counts


@dataclass(frozen=True)
class StepCase:
    """Shape of one layer and the length L of its sequences before the first step."""

    length: int
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    kv_heads: int = 2
    group: int = 4
    batch: int = 1
    token_budget: int = 256
    layers: int = 2

    @property
    def size(self) -> str:
        """ "32k" for 32,768."""
        return f"{self.length // 1024}k" if self.length % 1024 == 0 else str(self.length)

    def bytes(self, steps: int) -> int:
        """About what measure() holds: keys and values of the store and of both engines, and one
        layer's keys while they are made."""
        row = self.kv_heads * self.head_dim * (self.length + steps)
        held = 3 * 2 * self.layers * self.batch * row * self.dtype.itemsize
        return held + 4 * row * torch.float32.itemsize


@dataclass(frozen=True)
class StepTimes:
    """Seconds of every step by method, and what IceCache read per step."""

    case: StepCase
    seconds: dict[str, list[float]]
    bytes_read: float
    busy: int = 0  # processes that computed beside other steps, which are not among `seconds`
    busy_seconds: dict[str, list[float]] = field(default_factory=dict)  # of those steps

    def growth(self, method: str) -> float:
        """How many times as long a step takes beside the busy processes, of the medians."""
        return median(self.busy_seconds[method]) / median(self.seconds[method])

    @property
    def speedup(self) -> float:
        """Of the medians, against the faster of the two dense methods."""
        fastest = min(median(self.seconds[DENSE]), median(self.seconds[SDPA]))
        return fastest / median(self.seconds[OURS])

    def results(self) -> list[Result]:
        case = self.case
        params = {
            "head_dim": case.head_dim,
            "dtype": str(case.dtype).removeprefix("torch."),
            "kv_heads": case.kv_heads,
            "group": case.group,
            "batch": case.batch,
            "token_budget": case.token_budget,
            "threads": torch.get_num_threads(),
            "n": len(self.seconds[OURS]),
        }
        made = [Result(f"step_speedup_{case.size}", self.speedup, "ratio", params)]
        for method, seconds in self.seconds.items():
            spread = {**params, "p10": _quantile(seconds, 0.1), "p90": _quantile(seconds, 0.9)}
            made.append(Result(f"step_us_{method}_{case.size}", _us(median(seconds)), "us", spread))
        made.append(Result(f"step_bytes_{case.size}", self.bytes_read, "bytes", params))
        for method, seconds in self.busy_seconds.items():
            spread = {
                **params,
                "n": len(seconds),
                "busy": self.busy,
                "us": _us(median(seconds)),
                "p10": _quantile(seconds, 0.1),
                "p90": _quantile(seconds, 0.9),
            }
            name = f"step_growth_busy_{method}_{case.size}"
            made.append(Result(name, self.growth(method), "ratio", spread))
        return made


def synthetic(heads: int, tokens: int, dim: int, start: int, seed: int) -> torch.Tensor:
    """[heads, tokens, dim] float32 of positions start, start + 1, ..."""
    centres = torch.randn(heads, 64, dim, generator=torch.Generator().manual_seed(seed))
    chance = torch.Generator().manual_seed(seed + start + 1)
    position = torch.arange(start, start + tokens, dtype=torch.float32)
    drift = (position / 8192).long()[None, :] % 64
    chosen = (torch.randint(0, 16, (heads, tokens), generator=chance) + drift) % 64
    rows = torch.gather(centres, 1, chosen[..., None].expand(-1, -1, dim)) * 1.5
    rows += 0.5 * torch.randn(rows.shape, generator=chance)
    half = dim // 2
    angle = position[:, None] * 500_000.0 ** (-torch.arange(half) / half)
    cos, sin = angle.cos(), angle.sin()
    first, second = rows[..., :half], rows[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


@dataclass(frozen=True)
class _Step:
    """One of a run: beside the busy processes or not, and whether its time counts."""

    is_busy: bool
    counts: bool


def plan(steps: int, busy: int = 0) -> list[_Step]:
    """A few to warm up, and `steps` that count, with busy processes as many beside these."""
    made = [_Step(False, False)] * WARM
    if busy == 0:
        return made + [_Step(False, True)] * steps
    for first in range(0, steps, TURN):
        for is_busy in (False, True):
            made += [_Step(is_busy, False)] * SETTLING
            made += [_Step(is_busy, True)] * min(TURN, steps - first)
    return made


def measure(
    case: StepCase, steps: int, tick: Callable[[], None] = lambda: None, busy: int = 0
) -> StepTimes:
    """plan(steps, busy) over `case.layers` layers, beside `busy` processes; `tick` after each."""
    planned = plan(steps, busy)
    run = _Run(case, len(planned), rotates=busy > 0)
    seconds: dict[str, list[float]] = {OURS: [], DENSE: [], SDPA: []}
    busy_seconds: dict[str, list[float]] = {name: [] for name in seconds} if busy else {}
    since_reset, is_busy = 0, False
    with BusyProcesses(busy) as processes:
        for number, step in enumerate(planned):
            if step.is_busy != is_busy:
                is_busy = step.is_busy
                processes.run(is_busy)
            if number == WARM:
                run.engines[OURS].reset_stats()
            since_reset += number >= WARM
            for layer in range(case.layers):
                took = run.step(number, layer)
                for name, value in took.items() if step.counts else ():
                    (busy_seconds if is_busy else seconds)[name].append(value)
            tick()
    read = run.bytes_read() / (case.layers * since_reset)
    return StepTimes(case, seconds, read, busy, busy_seconds)


class _Run:
    """All methods with the same tokens, and room for `steps` more.

    Where it `rotates`, another method is the first in each step: the first one is told most often
    that its time slice is over.
    """

    def __init__(self, case: StepCase, steps: int, rotates: bool) -> None:
        self.case, self.rotates = case, rotates
        self.engines = {
            OURS: _engine(case, token_budget=case.token_budget),
            DENSE: _engine(case, exact=True),
        }
        self.sequences = {
            name: [engine.new_sequence() for _ in range(case.batch)]
            for name, engine in self.engines.items()
        }
        shape = (case.batch, case.kv_heads, case.length + steps, case.head_dim)
        self.stores: list[tuple[torch.Tensor, torch.Tensor]] = []  # by layer
        for layer in range(case.layers):
            keys, values = (
                torch.empty(shape, dtype=case.dtype),
                torch.empty(shape, dtype=case.dtype),
            )
            known = keys[:, :, : case.length], values[:, :, : case.length]
            known[0][:] = synthetic(case.kv_heads, case.length, case.head_dim, 0, layer)
            known[1].normal_()
            self.stores.append((keys, values))
            seen = synthetic(
                case.kv_heads * case.group, 256, case.head_dim, case.length - 256, layer + 100
            )
            queries = seen.to(case.dtype).expand(case.batch, -1, -1, -1)
            for name, engine in self.engines.items():
                engine.append(self.sequences[name], layer, *known)
                engine.observe(self.sequences[name], layer, queries)
        for engine in self.engines.values():
            engine.synchronize()

    def step(self, number: int, layer: int) -> dict[str, float]:
        """Seconds of step `number` of a layer by method."""
        case, (keys, values) = self.case, self.stores[layer]
        position, rows = case.length + number, case.kv_heads * case.group
        new = synthetic(case.kv_heads, 1, case.head_dim, position, layer).to(case.dtype)
        new = new.expand(case.batch, -1, -1, -1)
        query = synthetic(rows, 1, case.head_dim, position, layer + 100).to(case.dtype)
        query = query.expand(case.batch, -1, -1, -1).contiguous()
        packed = query.view(case.batch, case.kv_heads, case.group, case.head_dim)

        def sdpa() -> None:
            keys[:, :, position] = new[:, :, 0]
            values[:, :, position] = new[:, :, 0]
            F.scaled_dot_product_attention(
                packed, keys[:, :, : position + 1], values[:, :, : position + 1]
            )

        calls: list[tuple[str, Callable[[], object]]] = [
            (name, partial(engine.step, self.sequences[name], layer, query, new, new))
            for name, engine in self.engines.items()
        ]
        calls.append((SDPA, sdpa))
        first = number % len(calls) if self.rotates else 0
        took = {}
        for name, call in calls[first:] + calls[:first]:
            start = time.perf_counter()
            call()
            took[name] = time.perf_counter() - start
        return took

    def bytes_read(self) -> int:
        """By IceCache since its statistics were reset."""
        layers, heads = range(self.case.layers), range(self.case.kv_heads)
        stats = [self.engines[OURS].stats(layer, head) for layer in layers for head in heads]
        return sum(head.bytes_read for head in stats)


def _engine(case: StepCase, **fields: Any) -> Engine:
    threads = torch.get_num_threads()
    return Engine(
        num_layers=case.layers,
        num_q_heads=case.kv_heads * case.group,
        num_kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        dtype=case.dtype,
        num_threads=threads,
        index_threads=threads,
        **fields,
    )


def _us(seconds: float) -> float:
    return seconds * 1e6


def _quantile(seconds: list[float], share: float) -> float:
    return _us(sorted(seconds)[int(share * (len(seconds) - 1))])
