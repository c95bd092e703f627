"""How often a step's candidates are on the device already: how large a row cache, what to prefetch.

DeviceCache keeps the rows that steps asked for, the longest unused go first, and reads what is
missing from host memory (docs/cuda.md). Here the same is played with real keys and queries:
SmolLM2, a few of its layers, decode steps along a text. Candidates are those of best exact scores.

Speculation asks for the runners-up of a step, too, so that they are there if the next one wants
them: fewer rows are missing, more rows move. Without a device; nothing is timed.

    python benchmarks/python/bench_row_cache.py --json benchmarks/results/row_cache.json
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import icecache
import typer
from head_tokens import HeadTokens, model_heads, text_tokens
from icecache.bench.report import Result, machine, write_json
from icecache.models.local import load_model
from lengths import parse_lengths, size
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

CANDIDATES = 440  # of a step at a budget of 256
LAYERS = (4, 14, 24)  # of SmolLM2's 30
KEPT = (2, 3, 6)  # rows of the cache, in steps' candidates
RUNNERS_UP = (0, 64, 128, 256)
FILLING = 16  # steps before any is counted


def ranked(head: HeadTokens, count: int) -> list[list[int]]:
    """The tokens of best scores for each query group, best first: [steps][count]."""
    keys, queries = head.keys.float(), head.queries.float()
    found = []
    for group in queries:  # [G, D]
        scores = group @ keys.T * keys.shape[1] ** -0.5
        shares = scores - scores.logsumexp(-1, keepdim=True)
        found.append(shares.amax(0).topk(min(count, len(keys))).indices.tolist())
    return found


def play(best: Sequence[Sequence[int]], rows: int, runners_up: int) -> tuple[float, float]:
    """Shares of the candidates: those missing when a step wants them, and rows moved in all."""
    cache: OrderedDict[int, None] = OrderedDict()  # the longest unused first
    missing = moved = 0
    for step, tokens in enumerate(best):
        for rank, token in enumerate(tokens[: CANDIDATES + runners_up]):
            is_new = token not in cache
            cache[token] = None
            cache.move_to_end(token)
            if step >= FILLING:
                moved += is_new
                missing += is_new and rank < CANDIDATES
        while len(cache) > rows:
            cache.popitem(last=False)
    counted = CANDIDATES * (len(best) - FILLING)
    return missing / counted, moved / counted


def main(
    lengths: Annotated[
        str, typer.Option(help="Tokens of the sequence, comma-separated.")
    ] = "8192,32768",
    steps: Annotated[int, typer.Option(min=FILLING + 1, help="Decode steps.")] = 200,
    json: Annotated[Path | None, typer.Option(help="Where the results go.")] = None,
) -> None:
    """Count the candidates that a row cache holds; takes some minutes."""
    model, tokenizer = load_model(icecache.models.smollm2(), "float32")
    results = []
    console = Console()
    table = Table("tokens", "rows kept", "runners-up", title="of a step's 440 candidates")
    table.add_column("missing", justify="right")
    table.add_column("moved", justify="right")
    wanted = parse_lengths(lengths)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("", total=len(wanted) * len(LAYERS))
        for length in wanted:
            tokens = text_tokens(tokenizer, length + steps)
            shares: dict[tuple[int, int], list[tuple[float, float]]] = {}
            for layer in LAYERS:
                bar.update(task, description=f"{length:,} tokens, layer {layer}")
                for head in model_heads(model, tokens, steps, layer):
                    best = ranked(head, CANDIDATES + max(RUNNERS_UP))
                    for kept in KEPT:
                        for more in RUNNERS_UP:
                            played = play(best, kept * CANDIDATES, more)
                            shares.setdefault((kept, more), []).append(played)
                bar.advance(task)
            for (kept, more), pairs in shares.items():
                missing, moved = (mean(pair[i] for pair in pairs) for i in (0, 1))
                table.add_row(
                    f"{length:,}", f"{kept} steps'", str(more), f"{missing:.1%}", f"{moved:.1%}"
                )
                params: dict[str, Any] = {"rows": kept * CANDIDATES, "runners_up": more}
                params |= {"length": length, "layers": LAYERS, "heads": len(pairs)}
                params |= {"steps": steps - FILLING}
                name = f"{size(length)}_{kept}_steps_{more}_more"
                results.append(Result(f"row_cache_missing_{name}", missing, "share", params))
                results.append(Result(f"row_cache_moved_{name}", moved, "share", params))
            table.add_section()
    console.print(table)
    if json is not None:
        write_json(json, machine(), results)


if __name__ == "__main__":
    typer.run(main)
