"""The kernels and the index on one core, as shares of what the core can do.

Runs icecache_bench (benchmarks/cpp, google-benchmark) and writes its results in the form of the
other benchmarks: CPU time of one call, and as params GB/s, `roof_share` (over a streaming read of
256 MB in the same process; above 1 where the caches serve the reads), GMAC/s and `fma_share` (over
fp32 multiply-adds from registers). "/memory": operands far larger than the last-level cache, taken
in turn; "/cache": operands within half of the second-level cache.

    python benchmarks/python/bench_kernels.py --json benchmarks/results/kernels.json
"""

from __future__ import annotations

import json as json_module
import subprocess
from pathlib import Path
from typing import Annotated, Any

import typer
from icecache.bench.report import Result, machine, write_json
from rich.console import Console
from rich.table import Column, Table

PROGRAM = Path(__file__).resolve().parents[2] / "build/release/benchmarks/icecache_bench"
TO_US = {"ns": 1e-3, "us": 1.0, "ms": 1e3, "s": 1e6}
# google-benchmark's counter: our name and what to multiply by.
COUNTERS = {
    "bytes_per_second": ("gb_per_s", 1e-9),
    "roof_share": ("roof_share", 1.0),
    "GMAC/s": ("gmac_per_s", 1.0),
    "fma_share": ("fma_share", 1.0),
    "tokens_per_second": ("tokens_per_s", 1.0),
}


def results(benchmarks: list[dict[str, Any]]) -> list[Result]:
    """From the "benchmarks" of google-benchmark's JSON."""
    made = []
    for one in benchmarks:
        params = {
            name: one[counter] * factor
            for counter, (name, factor) in COUNTERS.items()
            if counter in one
        }
        params["n"] = one["iterations"]
        made.append(Result(one["name"], one["cpu_time"] * TO_US[one["time_unit"]], "us", params))
    return made


def main(
    program: Annotated[Path, typer.Option(help="icecache_bench as built.")] = PROGRAM,
    filter: Annotated[str, typer.Option(help="Regular expression; empty: all.")] = "",
    min_time: Annotated[float, typer.Option(help="Seconds of each benchmark at least.")] = 0.5,
    json: Annotated[Path | None, typer.Option(help="Where the results go.")] = None,
) -> None:
    """Run the C++ benchmarks on one core; takes about 3 minutes."""
    if not program.is_file():
        raise typer.BadParameter(
            f"--program must be icecache_bench, got {program}; `make build-bench` builds it"
        )
    command = [str(program), "--benchmark_format=json", f"--benchmark_min_time={min_time}"]
    if filter:
        command.append(f"--benchmark_filter={filter}")
    console = Console()
    with console.status("icecache_bench (its output comes at the end)"):
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    data = json_module.loads(output)
    roofs = {name: float(data["context"][name]) for name in ("read_gbs", "fma_gmacs")}
    simd = data["context"]["simd"]
    made = results(data["benchmarks"])
    table = Table(
        Column("benchmark", overflow="fold"),
        title=f"one core, {simd}: {roofs['read_gbs']:.1f} GB/s read, "
        f"{roofs['fma_gmacs']:.0f} GMAC/s",
    )
    for title in ("us", "GB/s", "of roof", "GMAC/s", "of peak"):
        table.add_column(title, justify="right")
    for one in made:
        cells = [
            f"{one.params[name]:{form}}" if name in one.params else ""
            for name, form in (
                ("gb_per_s", ".1f"),
                ("roof_share", ".0%"),
                ("gmac_per_s", ".1f"),
                ("fma_share", ".0%"),
            )
        ]
        table.add_row(one.name, f"{one.value:,.2f}", *cells)
    console.print(table)
    if json is not None:
        write_json(json, {**machine(), **roofs, "simd": simd}, made)


if __name__ == "__main__":
    typer.run(main)
