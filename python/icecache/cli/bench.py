"""icecache bench: what IceCache gains on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

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

if TYPE_CHECKING:
    from rich.table import Table

    from icecache.bench.step import StepTimes

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
    busy: Annotated[
        int,
        typer.Option(
            min=0, max=MOST_THREADS, help="Processes that compute beside other steps, as many."
        ),
    ] = 0,
    json: Annotated[Path | None, typer.Option(help="Where the results go.")] = None,
) -> None:
    """Time one decode step of one layer beside full attention; takes about a minute.

    With --busy it tells, too, how many times as long a step takes while so many other processes
    want the cores.
    """
    wanted = numbers("--lengths", lengths, 256, MOST_TOKENS)
    Config(token_budget=token_budget).check()
    if head_dim % 8:
        raise InvalidArgument(f"--head-dim must be a multiple of 8, got {head_dim}")
    if json is not None:
        check_output_file("--json", json)

    import torch
    from rich.console import Console
    from rich.progress import Progress

    from icecache.bench.report import machine, write_json
    from icecache.bench.step import StepCase, measure, plan

    number = getattr(torch, dtype.value)
    cases = [
        StepCase(length, head_dim, number, batch=batch, token_budget=token_budget)
        for length in wanted
    ]
    count = len(plan(steps, busy))
    needed, held = max(case.bytes(count) for case in cases), usable_memory()
    if needed > held:
        raise InvalidArgument(
            f"--lengths must fit this machine's {held / 2**30:,.0f} GiB, got {max(wanted)}, which "
            f"with --batch {batch} and --steps {steps} takes about {needed / 2**30:,.0f} GiB"
        )
    if threads:
        torch.set_num_threads(threads)
    console = Console()
    measured: list[StepTimes] = []
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("", total=len(wanted) * count)
        for case in cases:
            bar.update(task, description=f"{case.length:,} tokens")
            measured.append(measure(case, steps, lambda: bar.advance(task), busy))
    console.print(_table(measured))
    console.print(
        "[dim]Medians. dense: this engine's own exact attention; SDPA: torch's, over a contiguous "
        "cache; the speed-up is over the faster of the two. 2 KV heads of 4 query heads."
        + (f" times: as long beside {busy} busy processes.[/]" if busy else "[/]")
    )
    if json is not None:
        write_json(json, machine(), [one for times in measured for one in times.results()])


def _table(measured: Sequence[StepTimes]) -> Table:
    """A row for each length; with busy processes, how many times as long each method takes."""
    import torch
    from rich.table import Table

    from icecache.bench.step import DENSE, OURS, SDPA

    methods = {OURS: "IceCache", DENSE: "dense", SDPA: "SDPA"}
    table = Table("tokens", title=f"one step of one layer, {torch.get_num_threads()} threads")
    for method in methods.values():
        table.add_column(f"{method} us", justify="right")
        if measured[0].busy:
            table.add_column("times", justify="right")
    for title in ("speed-up", "KiB read"):
        table.add_column(title, justify="right")
    for times in measured:
        row = [f"{times.case.length:,}"]
        for method in methods:
            row.append(f"{median(times.seconds[method]) * 1e6:,.0f}")
            if times.busy:
                row.append(f"{times.growth(method):.1f}")
        table.add_row(*row, f"{times.speedup:.2f}", f"{times.bytes_read / 1024:,.0f}")
    return table
