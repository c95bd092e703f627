"""What a fork costs: a sequence that shares a long prefix with another and goes on by itself.

A parent of so many tokens is forked, the fork is truncated by 100 tokens, and a suffix is appended
to it and indexed. Extra memory is what the engine holds then over what it held for the parent
alone: pages (`fork_pages_*`), index (`fork_index_*`) and recent queries, in bytes; the suffix' own
keys and values stand beside them. `fork_us_*` and `truncate_us_*` are the calls' times, medians of
`--repeats` with the fastest and the slowest. One layer, 4 KV heads, D = 128, bfloat16.

    python benchmarks/python/bench_fork.py --json benchmarks/results/fork.json
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from icecache.bench.report import Result, machine, write_json
from icecache.bench.step import synthetic
from icecache.engine import Engine
from lengths import parse_lengths, size
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

HEADS, GROUP, DIM, DTYPE = 4, 4, 128, torch.bfloat16
QUERIES = 256
TAKEN_BACK = 100  # tokens that the fork drops of its parent's
TOKEN_BYTES = 2 * HEADS * DIM * DTYPE.itemsize
MOST_US = 1000.0  # of fork and truncate together
PARENT_PARTS = 4  # a suffix of more than one of these may be merged with its parent's tokens


@dataclass(frozen=True)
class Fork:
    """One fork with its suffix: seconds of the calls, and bytes over the parent's."""

    fork_s: float
    truncate_s: float
    pages: int
    index: int
    queries: int


class Parent:
    """An engine with one indexed sequence of `length` synthetic tokens."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.engine = Engine(
            num_layers=1,
            num_q_heads=HEADS * GROUP,
            num_kv_heads=HEADS,
            head_dim=DIM,
            dtype=DTYPE,
            num_threads=torch.get_num_threads(),
            index_threads=torch.get_num_threads(),
        )
        self.sequence = self.engine.new_sequence()
        self._extend(self.sequence, 0, length)

    def fork(self, suffix: int) -> Fork:
        """Forks, measures, and releases the fork."""
        engine, before = self.engine, self.engine.memory()
        start = time.perf_counter()
        other = engine.fork(self.sequence)
        forked = time.perf_counter()
        engine.truncate(other, self.length - TAKEN_BACK)
        truncated = time.perf_counter()
        self._extend(other, self.length - TAKEN_BACK, suffix)
        after = engine.memory()
        engine.release(other)
        engine.synchronize()
        return Fork(
            forked - start,
            truncated - forked,
            after.pool_bytes - before.pool_bytes,
            after.index_bytes - before.index_bytes,
            after.query_bytes - before.query_bytes,
        )

    def _extend(self, sequence: int, position: int, count: int) -> None:
        """Appends `count` tokens as a prompt, and waits for their index."""
        keys = synthetic(HEADS, count, DIM, position, 0)[None].to(DTYPE)
        self.engine.append([sequence], 0, keys, torch.randn_like(keys))
        shown = min(count, QUERIES)
        queries = synthetic(HEADS * GROUP, shown, DIM, position + count - shown, 100)
        self.engine.observe([sequence], 0, queries[None].to(DTYPE))
        self.engine.synchronize()


def fork_results(
    length: int, suffixes: list[int], repeats: int, tick: Callable[[], None] = lambda: None
) -> Iterator[Result]:
    """Of one parent. Names end in its length, and those of memory in the suffix before it."""
    parent = Parent(length)
    made: list[Fork] = []
    for suffix in suffixes:
        forks = []
        for _ in range(repeats):
            forks.append(parent.fork(suffix))
            tick()
        made += forks
        params = {"length": length, "suffix": suffix, "suffix_bytes": suffix * TOKEN_BYTES}
        tail = f"{size(suffix)}_of_{size(length)}"
        for name in ("pages", "index", "queries"):
            held = [getattr(one, name) for one in forks]
            spread = {"least": min(held), "most": max(held), "n": repeats}
            yield Result(f"fork_{name}_{tail}", median(held), "bytes", {**params, **spread})
    for name in ("fork", "truncate"):
        times = [1e6 * getattr(one, f"{name}_s") for one in made]
        spread = {"length": length, "least": min(times), "most": max(times), "n": len(times)}
        yield Result(f"{name}_us_{size(length)}", median(times), "us", spread)


def broken_bounds(results: list[Result]) -> Iterator[str]:
    """A line for each bound that does not hold.

    Of a suffix of at most a quarter of the parent, pages: 1.15 times the suffix and 32 pages a
    head; index: a tenth of the suffix and 64 KiB a head. Fork and truncate together: a millisecond.
    """
    page = Engine(
        num_layers=1, num_q_heads=1, num_kv_heads=1, head_dim=DIM, dtype=DTYPE
    ).config.page_size
    spare = {"pages": 32 * page * TOKEN_BYTES, "index": HEADS << 16}
    share = {"pages": 1.15, "index": 0.1}
    times: dict[int, float] = {}
    for one in results:
        kind = one.name.split("_")[1]
        if one.name.startswith("fork_") and kind in spare:
            if PARENT_PARTS * one.params["suffix"] > one.params["length"]:
                continue
            most = share[kind] * one.params["suffix_bytes"] + spare[kind]
            if one.value > most:
                yield f"{one.name}: {one.value:,.0f} bytes, must be at most {most:,.0f}"
        elif one.unit == "us":
            length = one.params["length"]
            times[length] = times.get(length, 0.0) + one.value
    for length, took in times.items():
        if took > MOST_US:
            yield f"fork and truncate at {length:,}: {took:,.0f} us, must be at most {MOST_US:,.0f}"


def main(
    lengths: Annotated[
        str, typer.Option(help="Tokens of the parent, comma-separated.")
    ] = "8192,32768",
    suffixes: Annotated[
        str, typer.Option(help="Tokens that the fork goes on with, comma-separated.")
    ] = "512,2048,8192",
    repeats: Annotated[int, typer.Option(min=1, help="Forks of each case.")] = 5,
    json: Annotated[Path | None, typer.Option(help="Where the results go.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Fail where a bound is broken.")] = False,
) -> None:
    """Measure memory and time of forks; takes about a minute."""
    parents, wanted = parse_lengths(lengths), parse_lengths(suffixes)
    console, results = Console(), list[Result]()
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("", total=len(parents) * len(wanted) * repeats)
        for length in parents:
            bar.update(task, description=f"parent of {size(length)}")
            results += fork_results(length, wanted, repeats, lambda: bar.advance(task))
    _show(console, results)
    if json is not None:
        write_json(json, machine(), results)
    broken = list(broken_bounds(results))
    for line in broken:
        console.print(f"[red]{line}[/]")
    if check and broken:
        raise typer.Exit(1)


def _show(console: Console, results: list[Result]) -> None:
    table = Table("name", title=f"one layer, {HEADS} KV heads, D = {DIM}, bfloat16")
    for column in ("median", "least", "most", "suffix", "unit"):
        table.add_column(column, justify="right")
    for one in results:
        unit, scale = ("MiB", 2**20) if one.unit == "bytes" else (one.unit, 1)
        cells = [one.value, one.params["least"], one.params["most"]]
        suffix = one.params.get("suffix_bytes")
        own = "" if suffix is None else f"{suffix / scale:,.2f}"
        table.add_row(one.name, *(f"{cell / scale:,.2f}" for cell in cells), own, unit)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
