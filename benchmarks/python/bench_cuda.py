"""DeviceCache on this GPU: kernels, transfers, and steps of a whole model beside full attention.

python benchmarks/python/bench_cuda.py --json benchmarks/results/GPU-NAME.json

The model has the shape of Llama-3.1-8B and random weights; its keys are synthetic (clusters), its
queries drift from step to step, and prompts are put into the caches without computing them: what is
measured is time and memory, not quality. Both sides run the same steps as CUDA graphs in one
process. Full attention is torch's SDPA over a preallocated cache, the query heads of a group packed
into one matrix, which is the faster of its two forms.
"""

from __future__ import annotations

import functools
import gc
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import icecache
import torch
import torch.nn.functional as F
import typer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

LAYERS, HEADS, KV_HEADS, DIM, HIDDEN, MLP, WORDS = 32, 32, 8, 128, 4096, 14336, 128256
GROUP = HEADS // KV_HEADS
BUDGET = 256
DRIFT = 0.95  # of a query from one step to the next
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


def machine() -> dict[str, Any]:
    """What the memory and the link of this machine give, in GB/s."""
    big = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(big)
    copy = statistics.median(seconds(lambda: other.copy_(big)))
    host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    part = big[: 1 << 28]
    to_device = statistics.median(seconds(lambda: part.copy_(host, non_blocking=True)))
    return {
        "gpu": torch.cuda.get_device_name(),
        "memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30,
        "torch": torch.__version__,
        "icecache": icecache.__version__,
        "memory_gbs": 2 * (1 << 30) / copy / 1e9,
        "link_gbs": (1 << 28) / to_device / 1e9,
    }


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


def make_cache(batch: int, tokens: int, layers: int) -> icecache.DeviceCache:
    return icecache.DeviceCache(
        num_layers=layers,
        num_q_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        dtype=DTYPE,
        batch=batch,
        max_tokens=tokens + ROOM,
        token_budget=BUDGET,
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


def largest_batch(tokens: int) -> dict[str, Any]:
    """Sequences of `tokens` whose caches fit beside the model, by trying."""
    fits, fails, device_bytes = 0, 4097, 0
    tried = 1
    while fails - fits > max(1, fits // 32):
        try:
            cache = make_cache(tried, tokens, LAYERS)
            cache.limit_tokens(tried * (tokens + ROOM))
            device_bytes = cache.memory().device_bytes
        except icecache.OutOfPages:
            fails = tried
        else:
            fits = tried
        tried = min(2 * fits, (fits + fails) // 2) if fits else 1
    return {"tokens": tokens, "batch": fits, "device_gb": device_bytes / 1e9}


def warm_up() -> None:
    """Loads the kernels, which a first launch does, and which no graph should record."""
    cache = make_cache(1, 1024, 1)
    fill(cache, 1024)
    new = Tokens(0).normal(1, KV_HEADS, 1, DIM)
    cache.step(0, Tokens(0).queries(1)[:, :, None], new, new)
    torch.cuda.synchronize()


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
        kernels: dict[str, float] = defaultdict(float)
        times = [(e.time_range.end, e.time_range.start, e.name) for e in recorded.events()]
        ended = 0.0
        for end, start, name in sorted(times):
            if "_kernel" in name and "icecache" in name:
                # A kernel may have begun before the one ahead of it had ended.
                added = end - max(start, ended)
                kernels[name.split("_kernel")[0].split("::")[-1]] += added / (steps * layers)
                ended = end
        after = sum(cache.stats(layer).bytes_moved for layer in range(layers))
        return dict(kernels), (after - before) // (steps * layers)

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
    result = {
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
    return result


class Model:
    """A decoder of Llama-3.1-8B's shape with random weights, one token at a time."""

    def __init__(self) -> None:
        def weight(rows: int, columns: int) -> torch.Tensor:
            made = torch.randn(rows, columns, device="cuda", dtype=DTYPE)
            return made.mul_(columns**-0.5)

        self.embedding = weight(WORDS, HIDDEN)
        self.head = weight(WORDS, HIDDEN)
        self.norm = torch.ones(HIDDEN, device="cuda", dtype=DTYPE)
        self.layers = [
            (
                weight((HEADS + 2 * KV_HEADS) * DIM, HIDDEN),
                weight(HIDDEN, HEADS * DIM),
                weight(2 * MLP, HIDDEN),
                weight(HIDDEN, MLP),
            )
            for _ in range(LAYERS)
        ]

    def step(
        self, words: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], attend: Any
    ) -> torch.Tensor:
        """Words [B]; attend(layer, q [B, Hq, 1, D], k, v [B, Hkv, 1, D]) -> [B, Hq, 1, D]."""
        x = F.embedding(words, self.embedding)
        batch = words.shape[0]
        for number, (qkv, out, up, down) in enumerate(self.layers):
            y = F.rms_norm(x, (HIDDEN,), self.norm)
            q, k, v = (
                F.linear(y, qkv)
                .view(batch, HEADS + 2 * KV_HEADS, 1, DIM)
                .split([HEADS, KV_HEADS, KV_HEADS], dim=1)
            )
            q, k = rotate(q, *rotation), rotate(k, *rotation)
            x = x + F.linear(attend(number, q, k, v).reshape(batch, HEADS * DIM), out)
            gate, value = F.linear(F.rms_norm(x, (HIDDEN,), self.norm), up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * value, down)
        logits: torch.Tensor = F.linear(F.rms_norm(x, (HIDDEN,), self.norm), self.head)
        return logits.argmax(-1)


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-high, low), dim=-1) * sine


class DriftingQueries:
    """Stand in for the model's queries, which with random weights would look for nothing."""

    def __init__(self, batch: int) -> None:
        self.now = torch.stack([Tokens(i).queries(batch)[:, :, None] for i in range(LAYERS)])
        self.bank = torch.randn(16, *self.now.shape, device="cuda", dtype=DTYPE) * (
            0.8 * (1 - DRIFT**2) ** 0.5
        )
        self.at = torch.zeros(1, dtype=torch.long, device="cuda")

    def advance(self) -> None:
        self.now.mul_(DRIFT).add_(self.bank.index_select(0, self.at)[0])
        self.at.add_(1).remainder_(16)


def graph_of(step: Callable[[], torch.Tensor]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def time_steps(model: Model, batch: int, attend: Any) -> dict[str, float]:
    """Milliseconds of a step of the whole model, as a CUDA graph."""
    queries = DriftingQueries(batch)
    words = torch.zeros(batch, dtype=torch.long, device="cuda")
    angle = torch.rand(DIM // 2, device="cuda").repeat(2)
    rotation = angle.cos().to(DTYPE), angle.sin().to(DTYPE)

    def step() -> torch.Tensor:
        queries.advance()
        return model.step(
            words, rotation, lambda n, q, k, v: attend(n, queries.now[n] + 1e-3 * q, k, v)
        )

    graph = graph_of(step)
    return spread(seconds(graph.replay, repeats=40, warm=20))


def with_icecache(model: Model, batch: int, tokens: int) -> dict[str, Any]:
    cache = make_cache(batch, tokens, LAYERS)
    took = fill(cache, tokens)
    times = time_steps(model, batch, cache.step)
    stats = [cache.stats(layer) for layer in range(LAYERS)]
    held = cache.memory()
    asked = sum(s.hits + s.misses for s in stats)
    return {
        "tpot_ms": times,
        "device_gb": held.device_bytes / 1e9,
        "host_gb": held.host_bytes / 1e9,
        "index_s": took,
        "hit_share": sum(s.hits for s in stats) / max(1, asked),
        "bytes_moved_per_step": sum(s.bytes_moved for s in stats)
        / max(1, sum(s.steps for s in stats) / (LAYERS * batch * KV_HEADS)),
    }


def with_full_cache(model: Model, batch: int, tokens: int) -> dict[str, Any]:
    shape = (LAYERS, batch, KV_HEADS, tokens, DIM)
    bytes_needed = 2 * 2 * LAYERS * batch * KV_HEADS * tokens * DIM
    if bytes_needed > 0.95 * torch.cuda.mem_get_info()[0]:
        return {"fits": False, "device_gb": bytes_needed / 1e9}
    keys = torch.randn(shape, device="cuda", dtype=DTYPE)
    values = torch.randn(shape, device="cuda", dtype=DTYPE)

    def attend(n: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys[n, :, :, -1:] = k
        values[n, :, :, -1:] = v
        packed = q.view(batch, KV_HEADS, GROUP, DIM)
        out: torch.Tensor = F.scaled_dot_product_attention(packed, keys[n], values[n])
        return out.view(batch, HEADS, 1, DIM)

    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        times = time_steps(model, batch, attend)
    return {"fits": True, "tpot_ms": times, "device_gb": bytes_needed / 1e9}


def rounded(value: Any) -> Any:
    """Floats to five digits."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def clean() -> None:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Where results go.")] = None,
    seconds_allowed: Annotated[float, typer.Option("--seconds", help="No new run past it.")] = 300,
) -> None:
    """Measures DeviceCache on the current GPU."""
    begin = time.perf_counter()
    torch.manual_seed(0)
    results: dict[str, Any] = {
        "machine": machine(),
        "kernels": [],
        "model": [],
        "largest": [],
        "left_out": [],
    }
    print(json.dumps(results["machine"]), flush=True)

    def save() -> None:
        results["seconds"] = time.perf_counter() - begin
        if json_file is not None:
            json_file.write_text(json.dumps(rounded(results), indent=1) + "\n")

    def run(part: str, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        if time.perf_counter() - begin > seconds_allowed:
            results["left_out"].append(f"{name}: time was up")
            return
        try:
            results[part].append(measure())
        except (icecache.Error, RuntimeError) as error:
            results["left_out"].append(f"{name}: {error}")
        else:
            print(json.dumps(results[part][-1]), flush=True)
        clean()
        save()

    warm_up()
    for batch, tokens in ((1, 32768), (16, 32768), (1, 131072), (16, 131072)):
        measure = functools.partial(bench_kernels, batch, tokens, results["machine"])
        run("kernels", f"kernels at {batch} x {tokens}", measure)
    model = Model()

    def both(batch: int, tokens: int) -> dict[str, Any]:
        full = with_full_cache(model, batch, tokens)
        clean()
        ours = with_icecache(model, batch, tokens)
        row = {"batch": batch, "tokens": tokens, "icecache": ours, "full": full}
        if full["fits"]:
            row["speedup"] = full["tpot_ms"]["median"] / ours["tpot_ms"]["median"]
        return row

    for tokens in (32768, 131072, 1048576):
        run("largest", f"largest batch of {tokens}", functools.partial(largest_batch, tokens))
    cases = [(1, 1024), (1, 131072), (16, 131072), (1, 8192), (1, 32768), (1, 262144)]
    cases += [(4, 8192), (4, 32768), (4, 131072), (16, 8192), (16, 32768)]
    for batch, tokens in cases:
        run("model", f"model at {batch} x {tokens}", functools.partial(both, batch, tokens))
    at = {(row["batch"], row["tokens"]): row for row in results["model"]}
    if {(1, 1024), (1, 131072)} <= at.keys():
        results["tpot_128k_over_1k"] = (
            at[1, 131072]["icecache"]["tpot_ms"]["median"]
            / at[1, 1024]["icecache"]["tpot_ms"]["median"]
        )
    save()
    print(json.dumps({k: v for k, v in results.items() if not isinstance(v, list)}), flush=True)


if __name__ == "__main__":
    typer.run(main)
