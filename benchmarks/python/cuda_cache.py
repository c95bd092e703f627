"""Caches of Llama-3.1-8B's shape on this GPU, what they are filled with, and clocks."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import icecache
import torch
from llama_8b import DIM, GROUP, HEADS, KV_HEADS

BUDGET = 256
DTYPE = torch.bfloat16
ROOM = 256  # tokens that a run may add


def seconds(run: Callable[[], object], repeats: int = 20, warm: int = 3) -> list[float]:
    """GPU seconds of each run."""
    for _ in range(warm):
        run()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(repeats)
    ]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def spread(times: list[float], unit: float = 1e3) -> dict[str, float]:
    """Median and quartiles, in 1 / unit seconds."""
    low, middle, high = statistics.quantiles(times, n=4)
    return {"median": middle * unit, "q25": low * unit, "q75": high * unit}


def clean() -> None:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


class Tokens:
    """Keys, values and queries of one layer, made on the device."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator("cuda").manual_seed(seed)
        self.centres = 0.7 * self.normal(KV_HEADS, 64, DIM)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.random, device="cuda", dtype=DTYPE)

    def prompt(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [Hkv, T, D]."""
        which = torch.randint(64, (KV_HEADS, tokens), generator=self.random, device="cuda")
        keys = self.centres.gather(1, which[..., None].expand(-1, -1, DIM))
        keys += 0.7 * self.normal(KV_HEADS, tokens, DIM)
        return keys, self.normal(KV_HEADS, tokens, DIM)

    def queries(self, rows: int) -> torch.Tensor:
        """[rows, Hq, D]: each head looks for one cluster."""
        which = torch.randint(64, (rows, HEADS), generator=self.random, device="cuda")
        head = torch.arange(HEADS, device="cuda") // GROUP
        return 1.5 * self.centres[head, which] + 0.5 * self.normal(rows, HEADS, DIM)


def make_cache(
    batch: int, tokens: int, layers: int, resident: bool = False
) -> icecache.DeviceCache:
    return icecache.DeviceCache(
        num_layers=layers,
        num_q_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        dtype=DTYPE,
        batch=batch,
        max_tokens=tokens + ROOM,
        token_budget=BUDGET,
        device_tokens=batch * (tokens + 2 * ROOM) if resident else 0,
        host_memory=96 << 30,
    )


def fill(cache: icecache.DeviceCache, tokens: int) -> float:
    """A prompt for every sequence, all alike (they share their pages); seconds to the index."""
    begin = time.perf_counter()
    for layer in range(cache.num_layers):
        made = Tokens(layer)
        keys, values = made.prompt(tokens)
        queries = made.queries(128).transpose(0, 1).contiguous()
        cache.prefill(layer, queries, keys, values, sequence=0)
    cache.synchronize()
    torch.cuda.synchronize()
    took = time.perf_counter() - begin
    for sequence in range(1, cache.batch):
        cache.fork(sequence, 0)
    return took
