"""Attention of a whole prompt within prefill_budget, against exact attention of all of it.

One layer, `--kv-heads` KV heads of 4 query heads each, D = 128, bfloat16, synthetic keys and
queries. All sides attend to the same tokens in the same process with the same threads: the engine
within the budget and the engine exactly in calls of `--call` tokens, in turns, and torch's SDPA, a
causal one, in one call, as it is fastest. Building of segments is counted; the index of the ended
prompt, which all need alike, is not.

- prefill_ms_*: the whole prompt
- prefill_speedup_*: the faster of both exact ones over the one within the budget
- prefill_sparse_*: the share of tokens that attended within the budget

    python benchmarks/python/bench_prefill.py --json benchmarks/results/prefill.json
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from icecache.bench.report import Result, machine, write_json
from icecache.bench.step import synthetic
from icecache.engine import Engine, Phase
from lengths import parse_lengths, size
from rich.console import Console
from rich.table import Table

GROUP, HEAD_DIM = 4, 128
DTYPE = torch.bfloat16
EXACT = ("engine", "sdpa")


@dataclass(frozen=True)
class Case:
    """A prompt, and how it is attended to."""

    length: int
    kv_heads: int
    budget: int
    call: int
    threads: int


class EngineSide:
    """An engine of one layer."""

    def __init__(self, case: Case, budget: int) -> None:
        self.engine = Engine(
            num_layers=1,
            num_q_heads=case.kv_heads * GROUP,
            num_kv_heads=case.kv_heads,
            head_dim=HEAD_DIM,
            dtype=DTYPE,
            num_threads=case.threads,
            index_threads=case.threads,
            prefill_budget=budget,
        )
        self.sequences = [self.engine.new_sequence()]

    def attend(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """The next tokens."""
        self.engine.step(self.sequences, 0, queries, keys, values, Phase.PREFILL)

    def sparse_share(self) -> float:
        """Of the tokens so far."""
        stats = self.engine.stats(0, 0)
        return stats.sparse_prompt_tokens / max(1, stats.prompt_tokens)


@torch.inference_mode()
def measured(case: Case) -> tuple[dict[str, float], float]:
    """Seconds of every side for the whole prompt, and the share that was sparse."""
    keys = synthetic(case.kv_heads, case.length, HEAD_DIM, 0, 0)[None].to(DTYPE)
    values = torch.randn_like(keys)
    queries = synthetic(case.kv_heads * GROUP, case.length, HEAD_DIM, 0, 100)[None].to(DTYPE)
    sparse = EngineSide(case, case.budget)
    sides: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]] = {
        "budget": sparse.attend,
        "engine": EngineSide(case, 0).attend,
    }
    seconds: dict[str, float] = defaultdict(float)
    for first in range(0, case.length, case.call):
        chunk = [x[:, :, first : first + case.call].contiguous() for x in (queries, keys, values)]
        for name, attend in sides.items():
            start = time.perf_counter()
            attend(*chunk)
            seconds[name] += time.perf_counter() - start
    start = time.perf_counter()
    F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
    seconds["sdpa"] = time.perf_counter() - start
    return seconds, sparse.sparse_share()


def results(case: Case) -> list[Result]:
    """Of one length."""
    seconds, share = measured(case)
    params = {
        "length": case.length,
        "kv_heads": case.kv_heads,
        "group": GROUP,
        "head_dim": HEAD_DIM,
        "prefill_budget": case.budget,
        "call_tokens": case.call,
        "threads": case.threads,
    }
    tail = size(case.length)
    times = [
        Result(f"prefill_ms_{name}_{tail}", 1e3 * taken, "ms", params)
        for name, taken in seconds.items()
    ]
    best = min(seconds[name] for name in EXACT)
    return [
        *times,
        Result(f"prefill_speedup_{tail}", best / seconds["budget"], "x", params),
        Result(f"prefill_sparse_{tail}", share, "", params),
    ]


def main(
    json: Annotated[Path | None, typer.Option(help="Where the results go.")] = None,
    lengths: Annotated[
        str, typer.Option(help="Tokens of prompts, comma-separated.")
    ] = "8192,32768,65536,131072",
    budget: Annotated[int, typer.Option(min=1, help="prefill_budget.")] = 1024,
    kv_heads: Annotated[int, typer.Option(min=1, help="KV heads, of 4 query heads each.")] = 1,
    call: Annotated[int, typer.Option(min=64, help="Tokens of a call.")] = 2048,
    threads: Annotated[int, typer.Option(min=1, help="Of each side.")] = 2,
) -> None:
    """Time the attention of whole prompts."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    table = Table(box=None)
    for column in ("tokens", "within the budget", "engine, exact", "SDPA", "times as fast"):
        table.add_column(column, justify="right")
    made: list[Result] = []
    for length in parse_lengths(lengths):
        made += results(Case(length, kv_heads, budget, call, threads))
        *times, speedup, _ = made[-5:]
        cells = [f"{one.value / 1e3:.2f} s" for one in times]
        table.add_row(f"{length:,}", *cells, f"{speedup.value:.2f}")
    Console().print(table)
    if json is not None:
        write_json(json, machine(), made)


if __name__ == "__main__":
    typer.run(main)
