"""icecache config: every parameter of the engine."""

from __future__ import annotations

from typing import Annotated

import typer

from icecache.config import config_fields


def config(
    markdown: Annotated[bool, typer.Option("--markdown", help="As a Markdown table.")] = False,
) -> None:
    """List the engine's parameters with defaults, units and meanings."""
    fields = config_fields()
    if markdown:
        typer.echo("| parameter | default | unit | meaning |\n|---|---|---|---|")
        for field in fields:
            meaning = field.meaning.replace("|", "\\|")
            default = f"`{field.default}`" if field.default else ""
            typer.echo(f"| `{field.name}` | {default} | {field.unit} | {meaning} |")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("parameter", "type", "default", "unit", "meaning")
    for field in fields:
        table.add_row(field.name, field.type, field.default, field.unit, field.meaning)
    Console(markup=False).print(table)
