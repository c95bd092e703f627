"""What a benchmark of vLLM found: shown, and written where that was asked for."""

from __future__ import annotations

from pathlib import Path

from icecache.bench.report import Result, machine, write_json
from rich.console import Console
from rich.table import Table


def show_and_write(title: str, results: list[Result], path: Path | None) -> None:
    table = Table("", "", "", title=title)
    for result in results:
        table.add_row(result.name, f"{result.value:.4g}", result.unit)
    Console().print(table)
    if path is not None:
        import vllm

        write_json(path, {**machine(), "vllm": vllm.__version__}, results)
