"""What a benchmark of vLLM found: shown, and written where that was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from icecache.bench.report import Result, machine, write_json
from rich.console import Console
from rich.table import Table


def median_result(
    name: str, values: Sequence[float], unit: str, params: Mapping[str, Any]
) -> Result:
    """The median of `values`, with their spread among its parameters."""
    spread = {"least": min(values), "most": max(values), "n": len(values)}
    return Result(name, median(values), unit, {**params, **spread})


def show_and_write(title: str, results: list[Result], path: Path | None) -> None:
    table = Table("", "", "", title=title)
    for result in results:
        table.add_row(result.name, f"{result.value:.4g}", result.unit)
    Console().print(table)
    if path is not None:
        import vllm

        write_json(path, {**machine(), "vllm": vllm.__version__}, results)
