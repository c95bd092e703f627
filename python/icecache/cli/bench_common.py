"""What the commands `icecache bench SUITE` and `generation` share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer

from icecache.bench.names import unknown
from icecache.cli.options import MOST_TOKENS, parse_settings
from icecache.cli.usage import numbers, words
from icecache.config import check_budgets
from icecache.outputs import check_output_file, check_output_folder

if TYPE_CHECKING:
    from rich.console import Console

    from icecache.bench.tables import Table

# Of icecache.bench.methods, in its order.
METHODS = (
    *("full", "icecache", "topk", "paper", "quest", "streaming", "icecache-lossless"),
    *("icecache-prefill", "faiss", "topk_head", "paper_reuse", "h2o", "snapkv", "arkvale"),
    *("omnikv", "pqcache", "magicpig", "retroinfer"),
)
_DEFAULT = ",".join(METHODS[:6])

MethodNames: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--method", help=f'Methods, comma-separated; "all" for every one; else {_DEFAULT}.'
    ),
]
OutFolder: TypeAlias = Annotated[
    Path | None, typer.Option("--out", help="Folder of the run; one that was cut off goes on.")
]
JsonFile: TypeAlias = Annotated[
    Path | None, typer.Option("--json", help="Where the results go as well.")
]


def method_names(given: str | None) -> list[str]:
    """The names in an option --method. Raises InvalidArgument for those that no method has."""
    if given is None:
        given = _DEFAULT
    names = words("--method", given)
    if names == ["all"]:
        return list(METHODS)
    for name in names:
        if name not in METHODS:
            raise unknown("method", name, METHODS)
    return names


def budgets_and_fields(
    budget: str, settings: Sequence[str] | None
) -> tuple[list[int], dict[str, Any]]:
    """Of --budget and --set. Raises InvalidArgument where they contradict each other."""
    budgets, fields = numbers("--budget", budget, 1, MOST_TOKENS), parse_settings(settings)
    check_budgets(budgets, fields)
    return budgets, fields


def run_folder(name: str, model: str, out: Path | None, json: Path | None) -> Path:
    """The folder of a run. Raises InvalidArgument where its files, or `json`, cannot be written."""
    folder = out or Path(f"icecache-{name}-{Path(model).name}")
    check_output_folder("--out", folder)
    if json is not None:
        check_output_file("--json", json)
    return folder


def show_table(console: Console, title: str, made: Table) -> None:
    """Lines are drawn between rows of different budgets."""
    from rich import table as rich_table

    header, rows = made
    table = rich_table.Table(title=title, box=None)
    for name in header:
        justify: Literal["left", "right"] = "left" if name == "method" else "right"
        table.add_column(name, justify=justify, no_wrap=True)
    previous = None
    for budget, row in rows:
        if previous is not None and budget != previous:
            table.add_section()
        previous = budget
        table.add_row(*row)
    console.print(table)


def finish(console: Console, out: Path, json: Path | None) -> None:
    """Says where the files of the run in `out` are, and copies its results to `json`."""
    from rich.markup import escape

    console.print(
        f"[dim]{escape(str(out))}/report.html, results.json, samples.jsonl[/]", highlight=False
    )
    if json is not None:
        made = (out / "results.json").read_bytes()
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_bytes(made)  # which may be the same file
