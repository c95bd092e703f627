"""icecache bench: what IceCache gains on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from icecache.cli.bench_lm_eval import lm_eval
from icecache.cli.bench_suites import add_suites
from icecache.errors import InvalidArgument

bench = typer.Typer(help="Measure IceCache: its speed here, its quality.", no_args_is_help=True)
add_suites(bench)
# lm_eval's flags are passed on as they are, --help too.
_AS_THEY_ARE = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
bench.command("lm-eval", context_settings=_AS_THEY_ARE)(lm_eval)


@bench.callback()
def _group() -> None:
    """Commands are `icecache bench NAME`."""


@bench.command()
def step(
    lengths: Annotated[
        str, typer.Option(help="Tokens of the sequence, comma-separated.")
    ] = "2048,8192,32768,131072",
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each length.")] = 30,
    token_budget: Annotated[int, typer.Option(min=1, help="Tokens attended exactly.")] = 256,
    head_dim: Annotated[int, typer.Option(help="Dimensions of a head.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of one call.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    threads: Annotated[int, typer.Option(min=0, help="0: as many as torch takes.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Where the results go.")] = None,
) -> None:
    """Time one decode step of one layer beside full attention; takes about a minute."""
    import torch
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from icecache.bench.report import machine, write_json
    from icecache.bench.step import DENSE, OURS, SDPA, StepCase, measure

    dtypes = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
    if dtype not in dtypes:
        raise InvalidArgument(f"--dtype must be {', '.join(dtypes)}, got {dtype!r}")
    try:
        wanted = [int(length) for length in lengths.split(",")]
    except ValueError:
        raise InvalidArgument(f"--lengths must be numbers and commas, got {lengths!r}") from None
    if min(wanted) < 256:
        raise InvalidArgument(f"--lengths must be at least 256, got {min(wanted)}")
    if threads:
        torch.set_num_threads(threads)
    console = Console()
    table = Table("tokens", title=f"one step of one layer, {torch.get_num_threads()} threads")
    for title in ("IceCache us", "dense us", "SDPA us", "speed-up", "KiB read"):
        table.add_column(title, justify="right")
    results = []
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("", total=len(wanted) * (steps + 3))
        for length in wanted:
            bar.update(task, description=f"{length:,} tokens")
            case = StepCase(length, head_dim, dtypes[dtype], batch=batch, token_budget=token_budget)
            times = measure(case, steps, lambda: bar.advance(task))
            made = times.results()
            results += made
            numbers = {one.name: one.value for one in made}
            table.add_row(
                f"{length:,}",
                *(f"{numbers[f'step_us_{name}_{case.size}']:,.0f}" for name in (OURS, DENSE, SDPA)),
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
