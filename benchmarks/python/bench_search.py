"""Finding the tokens that matter: the engine's selection beside exact and approximate search.

One KV head, one thread. The engine's time is its select_seconds: sketch scan, exact scores of the
candidates, the pick, within a budget of 256 tokens, k of them picked. Rivals look for the k keys of
largest inner product with each query of the group: torch's matmul and topk over keys in bfloat16
and float32, and FAISS over float32 keys (flat, IVF, HNSW). What a rival would still have to do
(joining its lists, weighing them) is not timed.

Recall is the share of the k tokens of most attention mass, summed over the group, that are picked;
for rivals, the k best of what they found. `search_mass_*` is the attention mass of the picked
tokens over that of the true k. IVF and HNSW run with the smallest nprobe and efSearch whose recall
comes up to the engine's. All take turns, query by query, so each finds the caches as the others
left them.

Times are for D = 128 and 4 query heads over synthetic keys (icecache.bench.step). Their noise is of
full rank, so what they say of recall is a lower bound for the engine, which sketches. Names with
"_smollm2" are over the keys of real text in a real model, D = 64 and 3 query heads, all KV heads of
one layer (head_tokens.py).

    python benchmarks/python/bench_search.py --json benchmarks/results/search.json
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import faiss
import icecache
import torch
import typer
from faiss_indexes import BUILDERS
from head_tokens import HeadTokens, model_heads, synthetic_head, text_tokens
from icecache.bench.report import Result, machine, write_json
from icecache.engine import Engine
from icecache.models.local import load_model
from lengths import parse_lengths, size
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

OURS = "icecache"
METHODS = (OURS, "torch_bfloat16", "torch_float32", "flat", "ivf", "hnsw")
PARAMETERS = {"ivf": "nprobe", "hnsw": "efSearch"}
BUDGET = 256
LAYER = 10  # of SmolLM2's 30
TUNING = 16  # queries that choose nprobe and efSearch; others are timed

# Queries [G, D] bfloat16 to token numbers [G, k].
Search = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Truth:
    """Attention of one query group over the tokens that the engine picks from."""

    mass: torch.Tensor  # [L], summed over the group; 0 for sink and window
    picked: torch.Tensor  # [k]: what the engine picked

    def recall(self, found: torch.Tensor) -> float:
        """Of the k best tokens of all, by the k best of `found`."""
        return float(torch.isin(self._best(), self._chosen(found)).float().mean())

    def share(self, found: torch.Tensor) -> float:
        """Mass of the k best of `found` over that of the k best of all."""
        return float(self.mass[self._chosen(found)].sum() / self.mass[self._best()].sum())

    def _best(self) -> torch.Tensor:
        return self.mass.topk(self.picked.numel()).indices

    def _chosen(self, found: torch.Tensor) -> torch.Tensor:
        candidates = found.unique()
        count = min(candidates.numel(), self.picked.numel())
        chosen: torch.Tensor = candidates[self.mass[candidates].topk(count).indices]
        return chosen


@dataclass(frozen=True)
class Known:
    """A query group [G, D] in bfloat16 and what is true of it."""

    queries: torch.Tensor
    truth: Truth


class Head:
    """The tokens of one KV head, in an engine, and as rows for the rivals."""

    def __init__(self, tokens: HeadTokens) -> None:
        self.tokens = tokens
        self.rows = tokens.keys.float().contiguous()
        values = torch.randn_like(tokens.keys)
        self._engines = {name: self._filled(values, name) for name in ("on", "trace")}

    def select(self, queries: torch.Tensor) -> float:
        """Seconds of the engine's selection for queries [G, D]."""
        engine, sequence = self._engines["on"]
        before = engine.stats(0, 0).select_seconds
        engine.attend([sequence], 0, queries[None, :, None])
        engine.synchronize()
        return engine.stats(0, 0).select_seconds - before

    def known(self, queries: torch.Tensor) -> Known:
        engine, sequence = self._engines["trace"]
        engine.attend([sequence], 0, queries[None, :, None])
        trace = engine.trace(sequence, 0, 0)
        logits = queries.float() @ self.rows.T * self.rows.shape[1] ** -0.5
        mass = torch.softmax(logits, -1).sum(0)
        mass[trace.sink + trace.window] = 0
        return Known(queries, Truth(mass, torch.tensor(trace.selected)))

    def _filled(self, values: torch.Tensor, telemetry: str) -> tuple[Engine, int]:
        engine = Engine(
            num_layers=1,
            num_q_heads=self.tokens.recent.shape[0],
            num_kv_heads=1,
            head_dim=self.rows.shape[1],
            dtype=torch.bfloat16,
            token_budget=BUDGET,
            num_threads=1,
            index_threads=1,
            telemetry=telemetry,
        )
        sequence = engine.new_sequence()
        engine.append([sequence], 0, self.tokens.keys[None, None], values[None, None])
        engine.observe([sequence], 0, self.tokens.recent[None])
        engine.synchronize()
        return engine, sequence


def torch_search(keys: torch.Tensor, count: int) -> Search:
    def search(queries: torch.Tensor) -> torch.Tensor:
        return (queries.to(keys.dtype) @ keys.T).topk(count, sorted=False).indices

    return search


def faiss_search(index: Any, count: int) -> Search:
    def search(queries: torch.Tensor) -> torch.Tensor:
        found = torch.from_numpy(index.search(queries.float().numpy(), count)[1])
        return found.clamp_(min=0)  # -1: fewer than count were found

    return search


def tune(index: Any, parameter: str, most: int, recall: Callable[[], float], goal: float) -> int:
    """Sets and returns the smallest `parameter`, doubling from 1 to `most`, with recall >= goal."""
    value = 1
    while True:
        faiss.ParameterSpace().set_index_parameter(index, parameter, value)
        if value == most or recall() >= goal:
            return value
        value = min(2 * value, most)


@contextmanager
def one_thread() -> Iterator[None]:
    """torch and FAISS on the calling thread alone."""
    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        faiss.omp_set_num_threads(before[1])


@dataclass
class SearchTimes:
    """Of every query group, by method; of several heads where `measure` was called for them."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    recall: dict[str, list[float]] = field(default_factory=dict)
    share: dict[str, list[float]] = field(default_factory=dict)
    settings: dict[str, list[int]] = field(default_factory=dict)  # of each head

    def results(self, suffix: str, params: dict[str, Any]) -> Iterator[Result]:
        for method, seconds in self.seconds.items():
            own = {**params, "threads": 1, "n": len(seconds)}
            if method in self.settings:
                own[PARAMETERS[method]] = self.settings[method]
            timed = f"select_us_{suffix}" if method == OURS else f"search_us_{method}_{suffix}"
            yield Result(timed, 1e6 * median(seconds), "us", own)
            yield Result(f"search_recall_{method}_{suffix}", mean(self.recall[method]), "", own)
            yield Result(f"search_mass_{method}_{suffix}", mean(self.share[method]), "", own)

    def rows(self, label: str) -> Iterator[list[str]]:
        """Lines of a table."""
        for method in METHODS:
            yield [
                label if method == OURS else "",
                method,
                f"{1e6 * median(self.seconds[method]):,.0f}",
                f"{mean(self.recall[method]):.3f}",
                f"{mean(self.share[method]):.4f}",
                ", ".join(map(str, self.settings.get(method, []))),
            ]


def measure(tokens: HeadTokens, times: SearchTimes, tick: Callable[[], None]) -> None:
    """Adds every query group of `tokens` but the first 16 to `times`, with a `tick` for each."""
    head = Head(tokens)
    known = [head.known(queries) for queries in tokens.queries]
    count = max(one.truth.picked.numel() for one in known)
    indexes = {name: build(head.rows.numpy()) for name, build in BUILDERS.items()}
    searches = {name: faiss_search(index, count) for name, index in indexes.items()}
    searches |= {
        "torch_bfloat16": torch_search(tokens.keys, count),
        "torch_float32": torch_search(head.rows, count),
    }
    tuning, timed = known[:TUNING], known[TUNING:]
    goal = mean(one.truth.recall(one.truth.picked) for one in tuning)
    most = {"ivf": indexes["ivf"].nlist, "hnsw": tokens.length}
    for name, parameter in PARAMETERS.items():

        def recall(search: Search = searches[name]) -> float:
            return mean(one.truth.recall(search(one.queries)) for one in tuning)

        chosen = tune(indexes[name], parameter, most[name], recall, goal)
        times.settings.setdefault(name, []).append(chosen)
    with one_thread():
        for one in timed:
            for method in METHODS:
                if method == OURS:
                    took, found = head.select(one.queries), one.truth.picked
                else:
                    start = time.perf_counter()
                    found = searches[method](one.queries)
                    took = time.perf_counter() - start
                times.seconds.setdefault(method, []).append(took)
                times.recall.setdefault(method, []).append(one.truth.recall(found))
                times.share.setdefault(method, []).append(one.truth.share(found))
            tick()


def main(
    lengths: Annotated[
        str, typer.Option(help="Tokens of the sequence, comma-separated.")
    ] = "2048,8192,32768,131072",
    model_lengths: Annotated[
        str, typer.Option(help="The same for keys of SmolLM2; empty: none.")
    ] = "2048,8192,32768",
    steps: Annotated[int, typer.Option(min=1, help="Timed query groups of each head.")] = 50,
    json: Annotated[Path | None, typer.Option(help="Where the results go.")] = None,
) -> None:
    """Time the selection beside brute force and FAISS; takes several minutes."""
    made_up = parse_lengths(lengths)
    real = parse_lengths(model_lengths) if model_lengths else []
    results: list[Result] = []
    console = Console()
    table = Table("tokens", "method", title="k tokens for a group of query heads, one thread")
    for title in ("us", "recall", "mass", "nprobe, efSearch"):
        table.add_column(title, justify="right")
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("", total=len(made_up) + len(real))

        def run(suffix: str, length: int, heads: list[HeadTokens]) -> None:
            times = SearchTimes()
            for tokens in heads:
                measure(tokens, times, lambda: bar.advance(task, 1 / steps / len(heads)))
            group, _, head_dim = heads[0].recent.shape
            params = {"length": length, "head_dim": head_dim, "group": group}
            results.extend(times.results(suffix, params))
            for row in times.rows(suffix):
                table.add_row(*row)
            table.add_section()

        for length in made_up:
            bar.update(task, description=f"{length:,} tokens")
            run(size(length), length, [synthetic_head(length, TUNING + steps)])
        if real:
            bar.update(task, description="SmolLM2")
            model, tokenizer = load_model(icecache.models.smollm2(), "float32")
        for length in real:
            bar.update(task, description=f"{length:,} tokens of SmolLM2")
            tokens = text_tokens(tokenizer, length + TUNING + steps)
            heads = list(model_heads(model, tokens, TUNING + steps, LAYER))
            run(f"smollm2_{size(length)}", length, heads)
    console.print(table)
    if json is not None:
        write_json(json, {**machine(), "faiss": faiss.__version__}, results)


if __name__ == "__main__":
    typer.run(main)
