"""Each kernel of a step of DeviceCache, against what the memory and the link of this GPU give."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from typing import Any

import torch
from cuda_cache import BUDGET, Tokens, fill, make_cache, seconds
from llama_8b import DIM, GROUP, KV_HEADS
from torch.profiler import ProfilerActivity, profile


def roofs() -> dict[str, float]:
    """What the device's memory and the link to it give, in GB/s, and the memory's size."""
    big = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(big)
    copy = statistics.median(seconds(lambda: other.copy_(big)))
    host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    part = big[: 1 << 28]
    to_device = statistics.median(seconds(lambda: part.copy_(host, non_blocking=True)))
    return {
        "memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30,
        "memory_gbs": 2 * (1 << 30) / copy / 1e9,
        "link_gbs": (1 << 28) / to_device / 1e9,
    }


def staged_us(rows: int, row_bytes: int) -> float:
    """Microseconds for `rows` of pinned host memory, packed by the host and copied at once."""
    held = (1 << 30) // row_bytes
    host = torch.empty(held, row_bytes, dtype=torch.uint8, pin_memory=True)
    packed = torch.empty(rows, row_bytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(rows, row_bytes, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(12):
        which = torch.randint(held, (rows,))
        torch.cuda.synchronize()
        begin = time.perf_counter()
        torch.index_select(host, 0, which, out=packed)
        target.copy_(packed, non_blocking=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[2:]) * 1e6


def warm_up() -> None:
    """Loads the kernels, which a first launch does, and which no graph should record."""
    cache = make_cache(1, 1024, 1)
    fill(cache, 1024)
    new = Tokens(0).normal(1, KV_HEADS, 1, DIM)
    cache.step(0, Tokens(0).queries(1)[:, :, None], new, new)
    torch.cuda.synchronize()


def added_by_kernel(recorded: profile, runs: int) -> dict[str, float]:
    """Microseconds that each of our kernels adds to one of `runs` runs."""
    kernels: dict[str, float] = defaultdict(float)
    times = [(e.time_range.end, e.time_range.start, e.name) for e in recorded.events()]
    ended = 0.0
    for end, start, name in sorted(times):
        if "_kernel" in name and "icecache" in name:
            # A kernel may have begun before the one ahead of it had ended.
            added = end - max(start, ended)
            kernels[name.split("_kernel")[0].split("::")[-1]] += added / runs
            ended = end
    return dict(kernels)


def bench_kernels(batch: int, tokens: int, roof: dict[str, Any]) -> dict[str, Any]:
    """Each kernel of a step, over eight layers, so that caches of the chip hold little."""
    layers = 8
    cache = make_cache(batch, tokens, layers)
    took = fill(cache, tokens)
    made = [Tokens(100 + layer) for layer in range(layers)]
    queries = [Tokens(layer).queries(batch)[:, :, None] for layer in range(layers)]
    new = [
        (made[i].normal(batch, KV_HEADS, 1, DIM), made[i].normal(batch, KV_HEADS, 1, DIM))
        for i in range(layers)
    ]

    graph = torch.cuda.CUDAGraph()  # not graph_of: it takes a step, and the row cache is to be cold
    with torch.cuda.graph(graph):
        for layer in range(layers):
            cache.step(layer, queries[layer], *new[layer])

    def measure(steps: int) -> tuple[dict[str, float], int]:
        """Microseconds that each kernel adds to one layer's step, and bytes from the host in it."""
        before = sum(cache.stats(layer).bytes_moved for layer in range(layers))
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            for _ in range(steps):
                graph.replay()
            torch.cuda.synchronize()
        after = sum(cache.stats(layer).bytes_moved for layer in range(layers))
        return added_by_kernel(recorded, steps * layers), (after - before) // (steps * layers)

    cold, cold_bytes = measure(1)  # nothing is in the row cache
    for _ in range(3):
        graph.replay()
    warm, warm_bytes = measure(8)
    step = statistics.median(seconds(graph.replay)) / layers
    pairs, row = batch * KV_HEADS, 2 * DIM
    config = cache.config
    nodes = tokens // config.far_node_tokens
    attended = pairs * ((BUDGET + nodes) * (row + 16))
    scanned = pairs * tokens * (config.sketch_rank // 2 + 2 * GROUP)
    found = pairs * config.candidates * row
    return {
        "batch": batch,
        "tokens": tokens,
        "prefill_index_ms_per_layer": took / layers * 1e3,
        "us": warm,
        "us_cold": cold,
        "step_us": step * 1e6,
        "bytes_moved": warm_bytes,
        "bytes_moved_cold": cold_bytes,
        "scan_share_of_memory": scanned / warm["scan"] / 1e3 / roof["memory_gbs"],
        "attend_share_of_memory": attended / warm["attend"] / 1e3 / roof["memory_gbs"],
        "gather_share_of_link": found / cold["rescore"] / 1e3 / roof["link_gbs"],
        # The same rows by a packed copy, and the pages that they are in: to compare with
        # us_cold["rescore"].
        "staged_rows_us": staged_us(pairs * config.candidates, row),
        "staged_pages_us": staged_us(pairs * config.candidates, row * config.page_size),
    }
