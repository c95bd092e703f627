"""icecache bench: what IceCache gains on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from icecache.cli.bench_generation import generation
from icecache.cli.bench_lm_eval import lm_eval
from icecache.cli.bench_suites import add_suites
from icecache.cli.options import MOST_THREADS, MOST_TOKENS, NumberFormat
from icecache.cli.usage import Command, numbers
from icecache.config import Config
from icecache.errors import InvalidArgument
from icecache.machine import usable_memory
from icecache.outputs import check_output_file

bench = typer.Typer(help="Measure IceCache: its speed here, its quality.", no_args_is_help=True)
add_suites(bench)
bench.command(cls=Command)(generation)
# lm_eval's flags are passed on as they are, --help too.
_AS_THEY_ARE = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
bench.command("lm-eval", cls=Command, context_settings=_AS_THEY_ARE)(lm_eval)


@bench.callback()
def _group() -> None:
    """Commands are `icecache bench NAME`."""


@bench.command(cls=Command)
def step(
    lengths: Annotated[
        str, typer.Option(help="Tokens of the sequence, comma-separated.")
    ] = "2048,8192,32768,131072",
    steps: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Timed steps of each length.")
    ] = 30,
    token_budget: Annotated[
        int, typer.Option(min=1, max=MOST_TOKENS, help="Tokens attended exactly.")
    ] = 256,
    head_dim: Annotated[int, typer.Option(min=8, max=256, help="Dimensions of a head.")] = 128,
    batch: Annotated[int, typer.Option(min=1, max=65_536, help="Sequences of one call.")] = 1,
    dtype: Annotated[
        NumberFormat, typer.Option(help="Number format of queries and cache.")
    ] = NumberFormat.bfloat16,
    threads: Annotated[
        int, typer.Option(min=0, max=MOST_THREADS, help="0: as many as torch takes.")
    ] = 0,
    json: Annotated[Path | None, typer.Option(help="Where the results go.")] = None,
) -> None:
    """Time one decode step of one layer beside full attention; takes about a minute."""
    wanted = numbers("--lengths", lengths, 256, MOST_TOKENS)
    Config(token_budget=token_budget).check()
    if head_dim % 8:
        raise InvalidArgument(f"--head-dim must be a multiple of 8, got {head_dim}")
    if json is not None:
        check_output_file("--json", json)

    import torch
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from icecache.bench.report import machine, write_json
    from icecache.bench.step import DENSE, OURS, SDPA, StepCase, measure

    number = getattr(torch, dtype.value)
    cases = [
        StepCase(length, head_dim, number, batch=batch, token_budget=token_budget)
        for length in wanted
    ]
    needed, held = max(case.bytes(steps) for case in cases), usable_memory()
    if needed > held:
        raise InvalidArgument(
            f"--lengths must fit this machine's {held / 2**30:,.0f} GiB, got {max(wanted)}, which "
            f"with --batch {batch} and --steps {steps} takes about {needed / 2**30:,.0f} GiB"
        )
    if threads:
        torch.set_num_threads(threads)
    console = Console()
    table = Table("tokens", title=f"one step of one layer, {torch.get_num_threads()} threads")
    for title in ("IceCache us", "dense us", "SDPA us", "speed-up", "KiB read"):
        table.add_column(title, justify="right")
    results = []
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("", total=len(wanted) * (steps + 3))
        for case in cases:
            bar.update(task, description=f"{case.length:,} tokens")
            times = measure(case, steps, lambda: bar.advance(task))
            made = times.results()
            results += made
            values = {one.name: one.value for one in made}
            table.add_row(
                f"{case.length:,}",
                *(f"{values[f'step_us_{name}_{case.size}']:,.0f}" for name in (OURS, DENSE, SDPA)),
                f"{times.speedup:.2f}",
                f"{times.bytes_read / 1024:,.0f}",
            )
    console.print(table)
    console.print(
        "[dim]Medians. dense: this engine's own exact attention; SDPA: torch's, over a contiguous "
        "cache; the speed-up is over the faster of the two. 2 KV heads of 4 query heads.[/]"
    )
    if json is not None:
        write_json(json, machine(), results)
