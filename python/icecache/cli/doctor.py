"""icecache doctor: what is installed, what the machine can do, what is missing."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Show versions, SIMD level, memory, CUDA; what is missing and how to get it.

    The exit status is 1 where something that icecache needs is missing or broken.
    """
    from icecache.cli.findings import BROKEN, findings

    rows = list(findings())
    healthy = all(row.state != BROKEN for row in rows)
    if as_json:
        report = {"healthy": healthy, "findings": [asdict(row) for row in rows]}
        typer.echo(json.dumps(report, indent=2))
    else:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table("", "part", "found", box=None, show_header=False)
        marks = {"ok": ("✓", "green"), "absent": ("–", "yellow"), "broken": ("✗", "bold red")}
        for row in rows:
            found = Text(row.found)
            if row.advice:
                found.append(f"\n{row.advice}", style="dim")
            table.add_row(Text(*marks[row.state]), row.part, found)
        Console(markup=False).print(table)
    if not healthy:
        raise typer.Exit(1)
