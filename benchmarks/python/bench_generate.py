"""A real model end to end: time to the first token and per token after it, beside full attention.

SmolLM2-135M-Instruct in float32 through transformers, on long real text. Methods:

- icecache: `icecache.enable(model, token_budget=...)`
- dynamic: transformers' default, sdpa over a DynamicCache
- static: sdpa over transformers' StaticCache, as long as prompt and answer need
- contiguous: sdpa over a preallocated cache that is written in place and attended up to its length

All live in one process on the same weights, each with its own cache of the same prompt. They take
turns of 8 tokens each, and are fed the same text, so that drift of the machine meets all of them.
`decode_speedup_*` is the median over turns of dynamic's time per token over IceCache's,
`decode_speedup_static_*` the same for the faster of the two preallocated caches. `ttft_ratio_*` is
IceCache's time to the first token over that of sdpa; index builds that it leaves to later steps are
`index_lag_s_*`. Names end in the prompt's length, "_batch4" where four prompts are decoded at once.

    python benchmarks/python/bench_generate.py --json benchmarks/results/generate.json
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import icecache
import torch
import typer
from contiguous_cache import contiguous_cache
from head_tokens import text_tokens
from icecache.bench.report import Result, machine, write_json
from icecache.hf.support import CACHE
from icecache.models.local import check_context, load_model, twin
from lengths import parse_lengths, size
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import Cache, DynamicCache, StaticCache

OURS, DYNAMIC, STATIC, CONTIGUOUS = "icecache", "dynamic", "static", "contiguous"
TURN = 8  # tokens that a method decodes before the next has its turn
WARM = 1  # turns that are not counted
PROMPTS = 3  # times that a prompt is taken


@dataclass
class Decoding:
    """One method in the middle of an answer: a model and its cache."""

    model: Any
    cache: Any  # None: the model makes its own

    @torch.inference_mode()
    def feed(self, tokens: torch.Tensor) -> float:
        """Seconds of one forward call over [B, T] and of choosing the next tokens."""
        start = time.perf_counter()
        output = self.model(tokens, **self._cache(), use_cache=True, logits_to_keep=1)
        output.logits[:, -1].argmax(-1).tolist()
        took = time.perf_counter() - start
        self.cache = output[CACHE]
        return took

    def _cache(self) -> dict[str, Any]:
        return {} if self.cache is None else {CACHE: self.cache}


@dataclass(frozen=True)
class GenerateTimes:
    """Of one prompt length and batch size; per-token times are those of the whole batch."""

    length: int
    batch: int
    budget: int
    first: dict[str, list[float]]
    index_lag: float
    turns: dict[str, list[float]]

    @property
    def suffix(self) -> str:
        return ("" if self.batch == 1 else f"batch{self.batch}_") + size(self.length)

    def speedups(self, rival: str) -> list[float]:
        """Of every turn, over `rival`."""
        pairs = zip(self.turns[rival], self.turns[OURS], strict=True)
        return [theirs / ours for theirs, ours in pairs]

    @property
    def preallocated(self) -> str:
        """The faster of the two."""
        return min((STATIC, CONTIGUOUS), key=lambda name: median(self.turns[name]))

    def results(self) -> Iterator[Result]:
        params = {
            "length": self.length,
            "batch": self.batch,
            "token_budget": self.budget,
            "threads": torch.get_num_threads(),
            "turns": len(self.turns[OURS]),
            "tokens_per_turn": TURN,
        }
        tail = self.suffix
        for name, rival in (
            (f"decode_speedup_{tail}", DYNAMIC),
            (f"decode_speedup_static_{tail}", self.preallocated),
        ):
            each = sorted(self.speedups(rival))
            spread = {"rival": rival, "least": each[0], "most": each[-1]}
            yield Result(name, median(each), "ratio", {**params, **spread})
        pairs = zip(self.first[OURS], self.first[DYNAMIC], strict=True)
        each = sorted(ours / theirs for ours, theirs in pairs)
        spread = {"n": len(each), "least": each[0], "most": each[-1]}
        yield Result(f"ttft_ratio_{tail}", median(each), "ratio", {**params, **spread})
        yield Result(f"index_lag_s_{tail}", self.index_lag, "s", {**params, "n": 1})
        for method, seconds in self.first.items():
            spread = {"n": len(seconds), "least": min(seconds), "most": max(seconds)}
            yield Result(f"ttft_s_{method}_{tail}", median(seconds), "s", {**params, **spread})
        for method, turns in self.turns.items():
            yield Result(f"tpot_ms_{method}_{tail}", 1e3 * median(turns), "ms", params)


def filled(source: Any, target: Cache) -> Cache:
    """`target` with the tokens of `source`, a DynamicCache."""
    for index, layer in enumerate(source.layers):
        target.update(layer.keys, layer.values, index)
    return target


def measure(
    model: Any,
    tokens: torch.Tensor,
    steps: int,
    budget: int,
    tick: Callable[[str], None] = lambda what: None,
) -> GenerateTimes:
    """Prompts tokens[:, :-steps] under every method, then `steps` tokens of each, in turns.

    tokens [B, L + steps]; `steps` counts the turn that warms up. `tick` is told what comes next.
    Both take the prompt PROMPTS times, in turns. `model` is left as it was.
    """
    length = tokens.shape[1] - steps
    prompt = tokens[:, :length]
    enabled = icecache.enable(twin(model), token_budget=budget)
    first: dict[str, list[float]] = {DYNAMIC: [], OURS: []}
    for _ in range(PROMPTS):
        ours, dynamic = Decoding(enabled, None), Decoding(model, DynamicCache(config=model.config))
        tick("prompt, sdpa")
        first[DYNAMIC].append(dynamic.feed(prompt))
        tick("prompt, icecache")
        first[OURS].append(ours.feed(prompt))
        start = time.perf_counter()
        icecache.stats(enabled)  # waits for the builds
        lag = time.perf_counter() - start
    static = StaticCache(config=model.config, max_cache_len=tokens.shape[1])
    contiguous = contiguous_cache(len(dynamic.cache.layers), tokens.shape[1])
    methods = {
        OURS: ours,
        DYNAMIC: dynamic,
        STATIC: Decoding(model, filled(dynamic.cache, static)),
        CONTIGUOUS: Decoding(model, filled(dynamic.cache, contiguous)),
    }
    turns: dict[str, list[float]] = {name: [] for name in methods}
    for turn, begin in enumerate(range(length, tokens.shape[1], TURN)):
        tick(f"turn {turn + 1}")
        end = min(begin + TURN, tokens.shape[1])
        for name, method in methods.items():
            took = [method.feed(tokens[:, at : at + 1]) for at in range(begin, end)]
            if turn >= WARM:
                turns[name].append(sum(took) / len(took))
    icecache.disable(enabled)
    return GenerateTimes(length, tokens.shape[0], budget, first, lag, turns)


def prompts(text: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """[batch, length]: stretches of `text` one after the other."""
    return text[: batch * length].view(batch, length)


def show(console: Console, all_times: list[GenerateTimes]) -> None:
    table = Table("prompt", "method", title="SmolLM2-135M-Instruct, float32")
    for title in ("first token s", "per token ms", "speed-up of IceCache"):
        table.add_column(title, justify="right")
    for times in all_times:
        for name, turns in times.turns.items():
            first = times.first.get(name)
            table.add_row(
                f"{times.batch} x {times.length:,}" if name == OURS else "",
                name,
                "" if first is None else f"{median(first):.1f}",
                f"{1e3 * median(turns):.1f}",
                "" if name == OURS else f"{median(times.speedups(name)):.2f}",
            )
        table.add_section()
    console.print(table)


def main(
    lengths: Annotated[
        str, typer.Option(help="Tokens of a single prompt, comma-separated.")
    ] = "4096,7168",
    batch: Annotated[int, typer.Option(min=1, help="Prompts decoded at once.")] = 4,
    batch_lengths: Annotated[
        str, typer.Option(help="Tokens of each of these; empty: no batch.")
    ] = "4096",
    steps: Annotated[int, typer.Option(min=8, help="Timed tokens of each method.")] = 64,
    token_budget: Annotated[int, typer.Option(min=1, help="Tokens attended exactly.")] = 256,
    json: Annotated[Path | None, typer.Option(help="Where the results go.")] = None,
) -> None:
    """Time SmolLM2 with IceCache and with full attention; takes about 10 minutes."""
    cases = [(1, length) for length in parse_lengths(lengths)]
    if batch_lengths:
        cases += [(batch, length) for length in parse_lengths(batch_lengths)]
    model, tokenizer = load_model(icecache.models.smollm2(), "float32")
    fed = steps + WARM * TURN
    for _, length in cases:
        check_context(model.config, length, fed)
    text = text_tokens(tokenizer, max(count * (length + fed) for count, length in cases))
    turns = -(-fed // TURN)
    console = Console()
    done: list[GenerateTimes] = []
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("", total=len(cases) * (2 * PROMPTS + turns))
        for count, length in cases:
            label = f"{count} x {length:,} tokens"

            def tick(what: str, label: str = label) -> None:
                bar.update(task, description=f"{label}: {what}", advance=1)

            tokens = prompts(text, count, length + fed)
            done.append(measure(model, tokens, fed, token_budget, tick))
    show(console, done)
    if json is not None:
        meta = {**machine(), "model": "SmolLM2-135M-Instruct, float32"}
        write_json(json, meta, [one for times in done for one in times.results()])


if __name__ == "__main__":
    typer.run(main)
