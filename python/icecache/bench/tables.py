"""Tables of a run's lines, for terminals and pages alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from icecache.bench.html_page import html_table


class _Line(Protocol):
    @property
    def budget(self) -> int: ...


_L = TypeVar("_L", bound=_Line)

# A title, and how the cell of a line reads.
Column = tuple[str, Callable[[_L], str]]

# Titles, and rows each with its budget.
Table = tuple[list[str], list[tuple[int, list[str]]]]


def number(value: float, form: str) -> str:
    """`value` in this form; nothing for NaN, which was not measured."""
    return "" if math.isnan(value) else format(value, form)


def tokens(budget: int) -> str:
    """How tables show a budget; 0: every token."""
    return str(budget) if budget else "all"


def table_of(
    lines: Sequence[_L], columns: Sequence[Column[_L]], names: Sequence[str] = ()
) -> Table:
    """Lines by budget; all columns for no `names`."""
    shown = [(name, show) for name, show in columns if not names or name in names]
    ordered = sorted(lines, key=lambda line: line.budget)
    rows = [(line.budget, [show(line) for _, show in shown]) for line in ordered]
    return [name for name, _ in shown], rows


def html_of(table: Table) -> str:
    """For a page, with IceCache's own rows marked."""
    header, rows = table
    return html_table(header, [("ours" if row[0] == "icecache" else "", row) for _, row in rows])
