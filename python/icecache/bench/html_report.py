"""A run as one HTML file: tables, and plots as SVG within it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np

from icecache.bench.html_page import html_figure, html_page, html_settings, html_table
from icecache.bench.runner import Record
from icecache.bench.scores import Line, halves, lines, task_scores
from icecache.bench.tables import Column, Table, html_of, number, table_of, tokens


def _percent(value: float, digits: int = 1) -> str:
    return number(100 * value, f".{digits}f")


_COLUMNS: tuple[Column[Line], ...] = (
    ("method", lambda line: line.method),
    ("tokens", lambda line: tokens(line.budget)),
    ("score", lambda line: f"{line.score:.1f}"),
    ("95\u00a0%", lambda line: f"{line.score_low:.1f}–{line.score_high:.1f}"),
    ("of full", lambda line: _percent(line.share)),
    ("agreement", lambda line: _percent(line.agreement)),
    ("KL", lambda line: number(line.kl, ".4f")),
    ("gold likelihood", lambda line: _percent(line.gold_likelihood, 2)),
    ("perplexity", lambda line: number(line.perplexity, ".2f")),
    ("mass", lambda line: _percent(line.mass)),
    ("output error", lambda line: number(line.output_error, ".3f")),
    ("MiB a step", lambda line: number(line.bytes_read / 2**20, ".2f")),
    ("written", lambda line: number(line.answer_tokens, ".0f")),
    ("ms a step", lambda line: number(line.step_ms, ".1f")),
    ("n", lambda line: str(line.n)),
)


def html_report(title: str, settings: dict[str, Any], records: Sequence[Record]) -> str:
    """A page that needs nothing beside itself."""
    parts = [
        f"<p>{_summary(records)}</p>",
        html_of(method_rows(records)),
        *_plots(records),
        "<h2>Halves</h2><p>Every second sample of each task.</p>",
        *(html_of(method_rows(part)) for part in halves(records) if part),
        "<h2>Tasks</h2>",
        *_task_tables(records),
        html_settings(settings),
    ]
    return html_page(title, parts)


def _summary(records: Sequence[Record]) -> str:
    lengths = [record["tokens"] for record in records]
    cut = sum(record["truncated"] for record in records)
    return (
        f"{len(records)} samples of {len({record['task'] for record in records})} tasks, prompts "
        f"of {min(lengths):,} to {max(lengths):,} tokens, {cut} of them truncated in the middle. "
        "KL, agreement and mass are along full attention's own answer; gold likelihood is that of "
        "the right answer, relative to full attention; written counts a method's own tokens until "
        "it stops. Per cent where no unit is given."
    )


def method_rows(records: Sequence[Record], names: Sequence[str] = ()) -> Table:
    """One row for each method and budget; all columns for no `names`."""
    return table_of(lines(records), _COLUMNS, names)


def _task_tables(records: Sequence[Record]) -> Iterator[str]:
    """Scores of each task: full attention beside the methods, a table for each budget."""
    tasks, table = task_scores(records), lines(records)
    for budget in sorted({line.budget for line in table if line.budget}) or [0]:
        shown = [line for line in table if line.budget in (0, budget)]
        rows = [
            ("", [task, *(number(scores.get(line.label, math.nan), ".1f") for line in shown)])
            for task, scores in tasks.items()
        ]
        if budget:
            yield f"<h3>{budget} tokens</h3>"
        yield html_table(["task", *(line.method for line in shown)], rows)


def _plots(records: Sequence[Record]) -> Iterator[str]:
    table = lines(records)
    budgets = sorted({line.budget for line in table if line.budget})
    if not budgets:
        return
    yield html_figure(
        "Score at each budget; the dashed line is full attention.",
        lambda axes: _curves(axes, table, "score", "score"),
    )
    yield html_figure(
        "KL divergence to full attention, lower is nearer.",
        lambda axes: _curves(axes, table, "kl", "KL, nats", log=True),
    )
    yield html_figure(
        "KL against the bytes that a step reads: below and left is better.",
        lambda axes: _pareto(axes, table),
    )
    for budget in budgets:
        errors = _errors(records, "icecache", budget)
        if errors is not None:
            yield html_figure(
                f"Relative error of IceCache's output at {budget} tokens, by layer and query head.",
                partial(_heat, values=errors, x="query head", y="layer"),
            )
    yield from _needles(records)


def _methods(table: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(line.method for line in table if line.budget))


def _style(method: str) -> dict[str, Any]:
    return {"marker": "o", "markersize": 4, "linewidth": 2.4 if method == "icecache" else 1.2}


def _curves(axes: Any, table: Sequence[Line], measure: str, label: str, log: bool = False) -> None:
    for method in _methods(table):
        points = sorted(
            (line.budget, getattr(line, measure)) for line in table if line.method == method
        )
        axes.plot(*zip(*points, strict=True), label=method, **_style(method))
    full = [getattr(line, measure) for line in table if not line.budget]
    if full and not log:
        axes.axhline(full[0], linestyle="--", color="gray")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({line.budget for line in table if line.budget}))
    axes.xaxis.set_major_formatter("{x:.0f}")
    if log:
        axes.set_yscale("log")
    axes.set(xlabel="token budget", ylabel=label)


def _pareto(axes: Any, table: Sequence[Line]) -> None:
    for method in _methods(table):
        points = sorted(
            (line.bytes_read / 2**20, line.kl) for line in table if line.method == method
        )
        axes.plot(*zip(*points, strict=True), label=method, **_style(method))
    axes.set(xscale="log", yscale="log", xlabel="MiB a step", ylabel="KL, nats")


def _errors(records: Sequence[Record], method: str, budget: int) -> np.ndarray[Any, Any] | None:
    """[layers, Hq], mean over samples."""
    held = [
        row["output_error"]
        for record in records
        for row in record["rows"]
        if row["method"] == method and row["budget"] == budget and row.get("output_error")
    ]
    return np.mean(held, axis=0) if held else None


def _heat(axes: Any, values: np.ndarray[Any, Any], x: str, y: str, **options: Any) -> None:
    image = axes.imshow(values, aspect="auto", cmap="viridis", **options)
    axes.set(xlabel=x, ylabel=y)
    axes.figure.colorbar(image, ax=axes)


def _needles(records: Sequence[Record]) -> Iterator[str]:
    """Where needles are found: depth and length, for runs that have such tasks."""
    placed = [(depth, record) for record in records if (depth := _depth(record)) is not None]
    if not placed:
        return
    names = list(
        dict.fromkeys((row["method"], row["budget"]) for _, r in placed for row in r["rows"])
    )
    for method, budget in names:
        if method not in ("full", "icecache"):
            continue
        cells: dict[tuple[int, int], list[float]] = defaultdict(list)
        for depth, record in placed:
            row = next(r for r in record["rows"] if (r["method"], r["budget"]) == (method, budget))
            cells[min(9, int(10 * depth)), round(record["length"] / 512)].append(row["score"])
        widths = sorted({width for _, width in cells})
        grid = np.full((10, len(widths)), np.nan)
        for (depth, width), scores in cells.items():
            grid[depth, widths.index(width)] = fmean(scores)
        where = f" at {budget} tokens" if budget else ""

        def draw(axes: Any, grid: Any = grid, widths: list[int] = widths) -> None:
            _heat(axes, grid, "tokens of the prompt", "depth, tenths", vmin=0, vmax=1)
            axes.set_xticks(range(len(widths)), [f"{512 * width:,}" for width in widths])

        yield html_figure(f"Needles found by {method}{where}.", draw)


def _depth(record: Record) -> float | None:
    fields = record.get("fields", {})
    if "depth" in fields:
        return float(fields["depth"])
    if "token_position_answer" in fields and record.get("length"):
        return float(fields["token_position_answer"]) / float(record["length"])
    return None
