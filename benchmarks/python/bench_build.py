"""What an index costs: its build, of a prompt (32k tokens) and of what is sealed (512).

A build is everything between the last append and an index ready to answer: reading the keys, the
query metric, tree, sketch, summaries and the copy into pages. `build_ms_*` is the time that one
head took by the engine's telemetry, `build_wall_ms_*` the time from the first job to the last
divided by heads, with several heads for each thread. Names without more are of D = 128, bfloat16,
one thread; "_d64", "_float32" and "_2threads" say what differs. FAISS builds its indexes from the
same keys (float32, the only type it takes) in the same process; "ivf" is training and adding.

    python benchmarks/python/bench_build.py --json benchmarks/results/build.json
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import faiss
import torch
import typer
from faiss_indexes import BUILDERS
from icecache.bench.report import Result, machine, write_json
from icecache.bench.step import synthetic
from icecache.engine import Engine
from lengths import parse_lengths, size
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

GROUP = 4
QUERIES = 256
RIVALS = ("ivf", "hnsw")


@dataclass(frozen=True)
class BuildCase:
    """Tokens, form of a head, and index threads."""

    length: int
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    threads: int = 1

    @property
    def suffix(self) -> str:
        """What differs from the default, for names."""
        parts = ["" if self.head_dim == 128 else f"_d{self.head_dim}"]
        parts.append("" if self.dtype == torch.bfloat16 else f"_{self.dtype_name}")
        parts.append("" if self.threads == 1 else f"_{self.threads}threads")
        return "".join(parts)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def params(self) -> dict[str, Any]:
        return {
            "length": self.length,
            "head_dim": self.head_dim,
            "dtype": self.dtype_name,
            "threads": self.threads,
        }


class FilledEngine:
    """An engine of one layer whose sequence holds synthetic tokens that nothing has indexed yet."""

    def __init__(self, case: BuildCase, heads: int) -> None:
        self.case, self.heads = case, heads
        self.engine = Engine(
            num_layers=1,
            num_q_heads=heads * GROUP,
            num_kv_heads=heads,
            head_dim=case.head_dim,
            dtype=case.dtype,
            num_threads=case.threads,
            index_threads=case.threads,
        )
        self.sequences = [self.engine.new_sequence()]
        keys = synthetic(heads, case.length, case.head_dim, 0, 0)[None].to(case.dtype)
        self.engine.append(self.sequences, 0, keys, torch.randn_like(keys))

    def build(self) -> None:
        """Shows the queries, which starts the builds, and waits for them."""
        first = self.case.length - QUERIES
        queries = synthetic(self.heads * GROUP, QUERIES, self.case.head_dim, first, 100)
        shown = queries[None].to(self.case.dtype)
        self.engine.observe(self.sequences, 0, shown)
        self.engine.synchronize()

    def index_seconds(self) -> float:
        """Mean over heads since the last reset."""
        stats = [self.engine.stats(0, head) for head in range(self.heads)]
        return sum(one.index_seconds for one in stats) / self.heads


def build_results(case: BuildCase, heads: int, repeats: int) -> Iterator[Result]:
    """Medians of `repeats` builds of `heads` heads."""
    telemetry, wall = [], []
    for _ in range(repeats):
        filled = FilledEngine(case, heads)
        start = time.perf_counter()
        filled.build()
        wall.append((time.perf_counter() - start) / heads)
        telemetry.append(filled.index_seconds())
    params = {**case.params(), "heads": heads, "n": repeats}
    tail = size(case.length) + case.suffix
    yield Result(f"build_ms_{tail}", 1e3 * median(telemetry), "ms", params)
    yield Result(f"build_wall_ms_{tail}", 1e3 * median(wall), "ms", params)


def rival_results(case: BuildCase) -> Iterator[Result]:
    """FAISS's builds of one head."""
    rows = synthetic(1, case.length, case.head_dim, 0, 0)[0].numpy()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(case.threads)
    try:
        for name in RIVALS:
            start = time.perf_counter()
            BUILDERS[name](rows)
            took = 1e3 * (time.perf_counter() - start)
            params = {**case.params(), "dtype": "float32", "n": 1}
            yield Result(f"build_ms_{name}_{size(case.length)}{case.suffix}", took, "ms", params)
    finally:
        faiss.omp_set_num_threads(before)


def main(
    lengths: Annotated[
        str, typer.Option(help="Tokens of the sequence, comma-separated.")
    ] = "512,4096,8192,32768,131072",
    heads: Annotated[int, typer.Option(min=1, help="KV heads built together.")] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="Builds of each case.")] = 3,
    json: Annotated[Path | None, typer.Option(help="Where the results go.")] = None,
) -> None:
    """Time builds of the index beside FAISS; takes several minutes."""
    shapes = [
        BuildCase(length, head_dim, dtype)
        for length, head_dim, dtype in product(
            parse_lengths(lengths), (128, 64), (torch.bfloat16, torch.float32)
        )
    ]
    plain = [case for case in shapes if case.suffix == ""]
    builds = shapes + [replace(case, threads=2) for case in plain]
    rivals = [replace(case, threads=threads) for case in plain for threads in (1, 2)]
    results: list[Result] = []
    console = Console()
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("", total=len(builds) + len(rivals))
        for case in builds:
            bar.update(task, description=f"build {size(case.length)}{case.suffix}")
            results += build_results(case, heads, repeats)
            bar.advance(task)
        for case in rivals:
            bar.update(task, description=f"FAISS {size(case.length)}{case.suffix}")
            results += rival_results(case)
            bar.advance(task)
    table = Table("name", title="the index of one KV head")
    table.add_column("value", justify="right")
    table.add_column("unit")
    for one in results:
        table.add_row(one.name, f"{one.value:,.1f}", one.unit)
    console.print(table)
    if json is not None:
        write_json(json, {**machine(), "faiss": faiss.__version__}, results)


if __name__ == "__main__":
    typer.run(main)
