"""The demo as one picture, which the README shows: the methods, and what IceCache looked at."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from icecache.bench.libraries import library
from icecache.demo.document import Document
from icecache.demo.report import Facts
from icecache.demo.run import Row
from icecache.demo.trace import QuestionTrace
from icecache.errors import Error

_INK, _ICE, _HOT, _SOFT = "#15222e", "#0b7fab", "#e4572e", "#5b6b7a"
_COLUMNS = ("method", "tokens", "numbers found", "agreement", "KL to full", "mass", "read a step")


def write_picture(
    path: Path, facts: Facts, document: Document, rows: list[Row], trace: QuestionTrace
) -> None:
    """Draws the step of `trace` that its maps are of.

    Raises Error where it cannot be written, Unavailable where matplotlib is not installed.
    """
    figure = library("matplotlib.figure").Figure(figsize=(11.8, 10.5), layout="constrained")
    upper, lower = figure.subplots(2, height_ratios=(1, 2.2))
    figure.suptitle(
        f"{facts.model} reads {document.tokens.shape[0]:,} tokens with {len(document.needles)} "
        f"numbers hidden in them. Below: one step of IceCache at {facts.traced_budget} tokens",
        color=_INK,
    )
    _draw_rows(upper, rows)
    _draw_step(lower, facts, document, trace)
    try:
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:  # ValueError: a format that matplotlib does not know
        raise Error(f"the picture cannot be written to {path}: {error}") from error


def _draw_rows(axes: Any, rows: list[Row]) -> None:
    axes.axis("off")
    cells = [_cells(row) for row in rows]
    table = axes.table(cells, colLabels=_COLUMNS, bbox=(0, 0, 1, 1), edges="horizontal")
    for (number, column), cell in table.get_celld().items():
        cell.set_edgecolor("#dde5ec")
        ours = number > 0 and rows[number - 1].name.startswith("IceCache")
        cell.set_text_props(
            color=_SOFT if number == 0 else _ICE if ours and column == 0 else _INK,
            ha="left" if column == 0 else "right",
        )


def _cells(row: Row) -> list[str]:
    return [
        row.name,
        "all" if row.budget is None else str(row.budget),
        f"{sum(row.found)} of {len(row.found)}",
        f"{row.agreement:.1%}",
        "–" if row.budget is None else f"{row.kl:.4f}",
        "–" if row.mass is None else f"{row.mass:.1%}",
        f"{row.bytes_per_step / 2**20:.1f} MiB",
    ]


def _draw_step(axes: Any, facts: Facts, document: Document, trace: QuestionTrace) -> None:
    """A row for each layer and KV head; a mark where it attended exactly."""
    begin, end = trace.needle
    heads = np.concatenate([np.full(len(row), at) for at, row in enumerate(_picks(trace, facts))])
    positions = np.concatenate(list(_picks(trace, facts)))
    asked = (begin <= positions) & (positions < end)
    for of, color, label in (
        (~asked, _ICE, "attended exactly, beside the first and the latest tokens"),
        (asked, _HOT, f"of these, the number asked for: {trace.answer}"),
    ):
        axes.scatter(positions[of], heads[of], s=4, marker="s", linewidths=0, c=color, label=label)
    places = [(one.begin + one.end) / 2 for one in document.needles]
    axes.plot(places, [-2.5] * len(places), "v", color=_SOFT, markersize=5, label="hidden numbers")
    ticks = range(0, facts.num_layers, 5)
    axes.set_yticks([facts.num_kv_heads * layer for layer in ticks], [f"layer {n}" for n in ticks])
    axes.set(xlim=(0, document.tokens.shape[0]), ylim=(facts.num_layers * facts.num_kv_heads, -5))
    axes.set_xlabel("position in the document", color=_INK)
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3, frameon=False, markerscale=3
    )


def _picks(trace: QuestionTrace, facts: Facts) -> Iterator[np.ndarray[Any, Any]]:
    """Positions that each layer and KV head picked in the step, in order."""
    flat, at = np.frombuffer(base64.b64decode(trace.selected), np.uint16), 0
    heads = facts.num_layers * facts.num_kv_heads
    for number in range((trace.focus + 1) * heads):
        count = int(flat[at])
        if number >= trace.focus * heads:
            yield flat[at + 1 : at + 1 + count].astype(np.int64)
        at += 1 + count
