"""One decode step of one layer, timed: IceCache beside full attention on the same tokens.

A step is append + select + attend for one new token. Rivals are torch's SDPA with the query heads
of a KV head packed into one call, over a preallocated contiguous store that the new token is
written into, and this engine's own dense kernel (`exact=True`). All take turns, step by step and
layer by layer, in one process with the same number of threads, so that each finds the caches as
the others left them. Keys are synthetic: clusters that drift, rotated as RoPE rotates.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from icecache.bench.report import Result
from icecache.engine import Engine

OURS, DENSE, SDPA = "icecache", "dense", "sdpa"


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


def measure(case: StepCase, steps: int, tick: Callable[[], None] = lambda: None) -> StepTimes:
    """`steps` steps over `case.layers` layers after a few to warm up; `tick` after each."""
    warm = 3
    rows = case.kv_heads * case.group
    shape = (case.batch, case.kv_heads, case.length + steps + warm, case.head_dim)
    engines = {
        OURS: _engine(case, token_budget=case.token_budget),
        DENSE: _engine(case, exact=True),
    }
    sequences = {
        name: [engine.new_sequence() for _ in range(case.batch)] for name, engine in engines.items()
    }
    stores = []
    for layer in range(case.layers):
        keys = torch.empty(shape, dtype=case.dtype)
        values = torch.empty(shape, dtype=case.dtype)
        keys[:, :, : case.length] = synthetic(case.kv_heads, case.length, case.head_dim, 0, layer)
        values[:, :, : case.length].normal_()
        stores.append((keys, values))
        queries = synthetic(rows, 256, case.head_dim, case.length - 256, layer + 100)
        for name, engine in engines.items():
            known = keys[:, :, : case.length], values[:, :, : case.length]
            engine.append(sequences[name], layer, *known)
            seen = queries.to(case.dtype).expand(case.batch, -1, -1, -1)
            engine.observe(sequences[name], layer, seen)
    for engine in engines.values():
        engine.synchronize()
    seconds: dict[str, list[float]] = {OURS: [], DENSE: [], SDPA: []}
    for step in range(warm + steps):
        if step == warm:
            engines[OURS].reset_stats()
        position = case.length + step
        for layer, (keys, values) in enumerate(stores):
            new = synthetic(case.kv_heads, 1, case.head_dim, position, layer).to(case.dtype)
            new = new.expand(case.batch, -1, -1, -1)
            query = synthetic(rows, 1, case.head_dim, position, layer + 100).to(case.dtype)
            query = query.expand(case.batch, -1, -1, -1).contiguous()
            took = {}
            for name, engine in engines.items():
                start = time.perf_counter()
                engine.step(sequences[name], layer, query, new, new)
                took[name] = time.perf_counter() - start
            packed = query.view(case.batch, case.kv_heads, case.group, case.head_dim)
            start = time.perf_counter()
            keys[:, :, position] = new[:, :, 0]
            values[:, :, position] = new[:, :, 0]
            F.scaled_dot_product_attention(
                packed, keys[:, :, : position + 1], values[:, :, : position + 1]
            )
            took[SDPA] = time.perf_counter() - start
            if step >= warm:
                for name, value in took.items():
                    seconds[name].append(value)
        tick()
    heads = [engines[OURS].stats(i, h) for i in range(case.layers) for h in range(case.kv_heads)]
    read = sum(head.bytes_read for head in heads) / (case.layers * steps)
    return StepTimes(case, seconds, read)


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
