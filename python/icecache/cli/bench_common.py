"""What the commands `icecache bench SUITE` and `generation` share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from icecache.bench.names import unknown
from icecache.cli.usage import words

if TYPE_CHECKING:
    from rich.console import Console

# Of icecache.bench.methods, in its order.
METHODS = (
    *("full", "icecache", "topk", "paper", "quest", "streaming", "icecache-lossless", "faiss"),
    *("topk_head", "paper_reuse", "h2o", "snapkv", "arkvale", "omnikv", "pqcache", "magicpig"),
    "retroinfer",
)
_DEFAULT = ",".join(METHODS[:6])

METHOD_HELP = f'Methods, comma-separated; "all" for every one; else {_DEFAULT}.'


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


def show_table(
    console: Console, title: str, made: tuple[list[str], Sequence[tuple[int, list[str]]]]
) -> None:
    """A header and rows, each with its budget, between which lines are drawn."""
    from rich.table import Table

    header, rows = made
    table = Table(title=title, box=None)
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
