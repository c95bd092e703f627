"""Time to the first token of a real model, its prompt attended within a budget or exactly.

SmolLM2-135M-Instruct in float32 through transformers' own `generate`, on real text. Methods:

- sdpa: transformers' default over a DynamicCache
- exact: `icecache.enable(model, token_budget=256)`
- prefill_N: the same with `prefill_budget=N`

All live in one process on the same weights and take the prompt in turns. `ttft_ratio_exact_N_*` is
the time of prefill_N over that of exact, `ttft_ratio_sdpa_N_*` over that of sdpa; medians over
turns. What a method leaves to be built behind the first token is `index_lag_s_*`. Names end in the
prompt's length.

    python benchmarks/python/bench_first_token.py --json benchmarks/results/first_token.json

`--context 4 --lengths 30000 --no-sdpa` goes past the model's 8,192 positions, which are scaled.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import icecache
import torch
import typer
from bench_lossless import stretches, with_longer_context
from icecache.bench.report import Result, machine, write_json
from icecache.cli.usage import numbers
from icecache.models.local import check_context, load_model, twin
from lengths import parse_lengths, size
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

SDPA, EXACT = "sdpa", "exact"
BUDGET = 256  # of decoding

Times = dict[str, list[float]]  # seconds, by method


def first_token(model: Any, prompt: torch.Tensor) -> float:
    """Seconds until the first token behind `prompt` [1, L]."""
    start = time.perf_counter()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=1,
        min_new_tokens=1,
        do_sample=False,
        pad_token_id=0,
    )
    return time.perf_counter() - start


def measure(models: dict[str, Any], prompts: list[torch.Tensor], bar: Progress) -> list[Times]:
    """Times to the first token, and of what is built behind it; each method takes each prompt."""
    first: Times = defaultdict(list)
    lag: Times = defaultdict(list)
    task = bar.add_task("", total=len(prompts) * len(models))
    for prompt in prompts:
        for name, model in models.items():
            bar.update(task, description=f"{prompt.shape[1]:,} tokens: {name}")
            first[name].append(first_token(model, prompt))
            if name != SDPA:
                start = time.perf_counter()
                icecache.stats(model)  # waits for the builds
                lag[name].append(time.perf_counter() - start)
            bar.advance(task)
    return [first, lag]


def results(length: int, budgets: list[int], first: Times, lag: Times) -> Iterator[Result]:
    tail, params = size(length), {"length": length, "threads": torch.get_num_threads()}
    for title, times in (("ttft_s", first), ("index_lag_s", lag)):
        for name, each in times.items():
            spread = {"n": len(each), "least": min(each), "most": max(each)}
            yield Result(f"{title}_{name}_{tail}", median(each), "s", {**params, **spread})
    for budget in budgets:
        for rival in (one for one in (EXACT, SDPA) if one in first):
            pairs = zip(first[f"prefill_{budget}"], first[rival], strict=True)
            ratios = sorted(ours / theirs for ours, theirs in pairs)
            spread = {"n": len(ratios), "least": ratios[0], "most": ratios[-1]}
            name = f"ttft_ratio_{rival}_{budget}_{tail}"
            yield Result(name, median(ratios), "ratio", {**params, **spread})


def main(
    lengths: Annotated[str, typer.Option(help="Tokens of a prompt, comma-separated.")] = "7168",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each length.")] = 3,
    budgets: Annotated[str, typer.Option(help="Of prompts, comma-separated.")] = "1024",
    data_dir: Annotated[Path | None, typer.Option(help="Folder of texts (.txt).")] = None,
    context: Annotated[
        float, typer.Option(min=1, help="Times the model's context, by scaled positions.")
    ] = 1,
    sdpa: Annotated[bool, typer.Option(help="Time sdpa, too.")] = True,
    json: Annotated[Path | None, typer.Option(help="Where the results go.")] = None,
) -> None:
    """Time the first token of prompts; takes about 3 minutes."""
    model, tokenizer = load_model(icecache.models.smollm2(), "float32")
    if context > 1:
        model = with_longer_context(model, context)
    sizes, chosen = parse_lengths(lengths), numbers("--budgets", budgets, 1, 1_000_000)
    for length in sizes:
        check_context(model.config, length, 1)
    models = {SDPA: model} if sdpa else {}
    models[EXACT] = icecache.enable(twin(model), BUDGET)
    for budget in chosen:
        made = icecache.enable(twin(model), BUDGET, prefill_budget=budget)
        models[f"prefill_{budget}"] = made
    console = Console()
    found: list[Result] = []
    table = Table("prompt", "method", "first token s", "of exact", "of sdpa", "built behind it s")
    with Progress(console=console, transient=True) as bar:
        for length in sizes:
            first, lag = measure(models, stretches(tokenizer, data_dir, prompts, length), bar)
            found += results(length, chosen, first, lag)
            for name, each in first.items():
                row = [f"{median(each):.2f}"]
                for rival in (EXACT, SDPA):
                    pairs = list(zip(each, first.get(rival, []), strict=False))
                    row.append(f"{median(a / b for a, b in pairs):.2f}" if pairs else "")
                row.append(f"{median(lag[name]):.2f}" if name in lag else "")
                table.add_row(f"{length:,}", name, *row)
    console.print(table)
    if json is not None:
        meta = {**machine(), "model": "SmolLM2-135M-Instruct, float32", "context": context}
        write_json(json, meta, found)


if __name__ == "__main__":
    typer.run(main)
