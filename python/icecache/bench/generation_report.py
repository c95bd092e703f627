"""What a run of `icecache bench generation` says: numbers by position, tables, plots."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from icecache.bench.generation_plan import BLOCK
from icecache.bench.html_page import html_figure, html_page, html_settings, html_table
from icecache.bench.report import Result
from icecache.bench.runner import Record
from icecache.bench.scores import Row, label, measures, name_of, rows_by_method
from icecache.bench.tables import Column, Table, html_of, number, table_of, tokens


@dataclass(frozen=True)
class Block:
    """Positions from `start` on; over all texts."""

    start: int
    kl: float  # nats, mean
    worst: float  # of a step
    agreement: float


@dataclass(frozen=True)
class Checkpoint:
    """Mean KL over texts from `at` tokens on, as in growth.Checkpoint."""

    at: int
    grown: float
    rebuilt: float
    exact: float


@dataclass(frozen=True)
class Line:
    """One method at one budget over n texts; NaN where nothing was measured."""

    method: str
    budget: int  # 0: every token
    n: int
    blocks: tuple[Block, ...]
    checkpoints: tuple[Checkpoint, ...]
    kl: float  # nats, mean over positions
    late: float  # the same over the second half of the positions of the text
    spread: float  # a text's worst block over its median block, the largest of all texts
    worst: float  # step
    agreement: float
    mass: float
    perplexity: float  # of the text
    bytes_read: float  # a step

    @property
    def label(self) -> str:
        return label(self.method, self.budget)

    @property
    def ratio(self) -> float:
        """KL of the index as it grew, over that of one built at the moment: all checkpoints."""
        rebuilt = sum(one.rebuilt for one in self.checkpoints)
        grown = sum(one.grown for one in self.checkpoints)
        return grown / rebuilt if rebuilt else math.nan

    @property
    def last_ratio(self) -> float:
        """The same at the last checkpoint alone."""
        if not self.checkpoints or not self.checkpoints[-1].rebuilt:
            return math.nan
        return self.checkpoints[-1].grown / self.checkpoints[-1].rebuilt

    @property
    def exact(self) -> float:
        """KL of full attention over the keys and values of the last checkpoint."""
        return self.checkpoints[-1].exact if self.checkpoints else math.nan


def lines(records: Sequence[Record]) -> list[Line]:
    """In the order of the first record."""
    return [_line(*name, pairs) for name, pairs in rows_by_method(records).items()]


def _line(method: str, budget: int, pairs: Sequence[tuple[Record, Row]]) -> Line:
    rows = [row for _, row in pairs]
    start, length = pairs[0][0]["prompt"], pairs[0][0]["tokens"]
    every = [kl for row in rows for kl in row["kl"]]
    middle = max(0, length // 2 - start)
    return Line(
        method=method,
        budget=budget,
        n=len(rows),
        blocks=tuple(_blocks(rows, start)),
        checkpoints=tuple(_checkpoints(rows)),
        kl=fmean(every),
        late=fmean(kl for row in rows for kl in row["kl"][middle:]),
        spread=max(_spread(row, start) for row in rows),
        worst=max(every),
        agreement=fmean(agrees for row in rows for agrees in row["agrees"]),
        mass=fmean(row["mass"] for row in rows),
        perplexity=math.exp(fmean(row["nll"] for row in rows)),
        bytes_read=fmean(row["bytes_read"] for row in rows),
    )


def _parts(start: int, count: int) -> Iterator[tuple[int, slice]]:
    """Blocks that begin at multiples of BLOCK: the first position, and the steps, of `count`.

    What is left at the ends is a block where it is half of one or more, else part of its neighbour.
    """
    bounds = [start]
    first = -(-start // BLOCK) * BLOCK
    bounds += [at for at in range(first, start + count, BLOCK) if at > start]
    bounds.append(start + count)
    if len(bounds) > 2 and bounds[-1] - bounds[-2] < BLOCK // 2:
        del bounds[-2]
    if len(bounds) > 2 and bounds[1] - bounds[0] < BLOCK // 2:
        del bounds[1]
    for one, following in pairwise(bounds):
        yield one, slice(one - start, following - start)


def _blocks(rows: Sequence[Row], start: int) -> Iterator[Block]:
    for first, part in _parts(start, len(rows[0]["kl"])):
        kl = [one for row in rows for one in row["kl"][part]]
        agreement = fmean(one for row in rows for one in row["agrees"][part])
        yield Block(first, fmean(kl), max(kl), agreement)


def _spread(row: Row, start: int) -> float:
    means = [fmean(row["kl"][part]) for _, part in _parts(start, len(row["kl"]))]
    middle = median(means)
    return max(means) / middle if middle else math.nan


def _checkpoints(rows: Sequence[Row]) -> Iterator[Checkpoint]:
    for same in zip(*(row["checkpoints"] for row in rows), strict=True):
        means = [fmean(one[name] for one in same) for name in ("grown", "rebuilt", "exact")]
        yield Checkpoint(same[0]["at"], *means)


@dataclass(frozen=True)
class FreeLine:
    """What one method wrote by itself, means over n prompts."""

    method: str
    budget: int
    n: int
    written: float  # tokens
    ended: int  # texts that ended with a stop token
    perplexity: float  # under full attention
    repetition: float  # share of n-grams that were there before

    @property
    def label(self) -> str:
        return label(self.method, self.budget)


def free_lines(records: Sequence[Record]) -> list[FreeLine]:
    """In the order of the first record; none where nothing was written."""
    made = []
    for (method, budget), pairs in rows_by_method(records, "free").items():
        rows = [row for _, row in pairs]
        line = FreeLine(
            method=method,
            budget=budget,
            n=len(rows),
            written=fmean(len(row["written"]) for row in rows),
            ended=sum(row["ended"] for row in rows),
            perplexity=math.exp(fmean(row["nll"] for row in rows)),
            repetition=fmean(row["repetition"] for row in rows),
        )
        made.append(line)
    return made


_UNITS = {
    "kl": "nats",
    "late": "nats",
    "worst": "nats",
    "spread": "ratio",
    "agreement": "share",
    "mass": "share",
    "perplexity": "ratio",
    "bytes_read": "bytes",
    "ratio": "ratio",
    "last_ratio": "ratio",
    "exact": "nats",
}
_FREE_UNITS = {"written": "tokens", "ended": "texts", "perplexity": "ratio", "repetition": "share"}


def results(records: Sequence[Record]) -> Iterator[Result]:
    """All numbers: "kl_icecache_256", by position "kl_icecache_256_at_1024", "free_written_...".

    `late`: the second half of the text; `ratio`: grown index over one built at the moment.
    """
    for line in lines(records):
        name, params = name_of(line.label), {"method": line.method, "token_budget": line.budget}
        yield from measures(line, _UNITS, name, {**params, "n": line.n})
        for block in line.blocks:
            more = {**params, "worst": block.worst, "agreement": block.agreement}
            yield Result(f"kl_{name}_at_{block.start}", block.kl, "nats", more)
        for one in line.checkpoints:
            more = {**params, "rebuilt": one.rebuilt, "exact": one.exact}
            yield Result(f"grown_{name}_at_{one.at}", one.grown, "nats", more)
    for free in free_lines(records):
        params = {"method": free.method, "token_budget": free.budget, "n": free.n}
        yield from measures(free, _FREE_UNITS, name_of(free.label), params, "free_")


_COLUMNS: tuple[Column[Line], ...] = (
    ("method", lambda line: line.method),
    ("tokens", lambda line: tokens(line.budget)),
    ("KL", lambda line: f"{line.kl:.4f}"),
    ("late", lambda line: f"{line.late:.4f}"),
    ("worst block", lambda line: f"{max(block.kl for block in line.blocks):.4f}"),
    ("/ median", lambda line: number(line.spread, ".2f")),
    ("worst step", lambda line: f"{line.worst:.3f}"),
    ("agreement", lambda line: f"{100 * line.agreement:.1f}"),
    ("perplexity", lambda line: f"{line.perplexity:.2f}"),
    ("mass", lambda line: f"{100 * line.mass:.1f}"),
    ("MiB a step", lambda line: f"{line.bytes_read / 2**20:.2f}" if line.budget else ""),
    ("/ built", lambda line: number(line.ratio, ".2f")),
)


_FREE_COLUMNS: tuple[Column[FreeLine], ...] = (
    ("method", lambda line: line.method),
    ("tokens", lambda line: tokens(line.budget)),
    ("written", lambda line: f"{line.written:.0f}"),
    ("ended", lambda line: str(line.ended)),
    ("perplexity to full", lambda line: f"{line.perplexity:.2f}"),
    ("repetition", lambda line: f"{100 * line.repetition:.1f}"),
    ("n", lambda line: str(line.n)),
)

# What fits beside each other on a terminal.
SHORT = ("method", "tokens", "KL", "late", "worst block", "/ median", "agreement", "/ built")


def summary(records: Sequence[Record], names: Sequence[str] = ()) -> Table:
    """One row for each method and budget; all columns for no `names`."""
    return table_of(lines(records), _COLUMNS, names)


def checkpoint_table(records: Sequence[Record]) -> Table:
    """KL of grown indexes beside others over the same keys and values; maybe no rows."""
    header = ["method", "tokens", "held", "grown", "rebuilt", "ratio", "full attention"]
    rows = []
    for line in sorted(lines(records), key=lambda line: line.budget):
        for one in line.checkpoints:
            ratio = one.grown / one.rebuilt if one.rebuilt else math.nan
            numbers = [f"{one.grown:.5f}", f"{one.rebuilt:.5f}", number(ratio, ".2f")]
            cells = [line.method, str(line.budget), f"{one.at:,}", *numbers, f"{one.exact:.5f}"]
            rows.append((line.budget, cells))
    return header, rows


def free_table(records: Sequence[Record]) -> Table:
    """What was written freely; maybe no rows."""
    return table_of(free_lines(records), _FREE_COLUMNS)


def html_report(settings: dict[str, Any], records: Sequence[Record]) -> str:
    """A page that needs nothing beside itself."""
    table = [line for line in lines(records) if line.budget]
    parts = [f"<p>{_about(records)}</p>", html_of(summary(records))]
    for budget in dict.fromkeys(line.budget for line in table):
        shown = [line for line in table if line.budget == budget]
        marks = _changes(records, budget)
        text = f"KL to full attention by position at {budget} tokens, means of {BLOCK} positions."
        if marks:
            text += " Lines below: where an index was sealed (short) or merged (long)."
        parts.append(html_figure(text, partial(_curves, lines=shown, marks=marks), 9))
    checkpoints, free = checkpoint_table(records), free_table(records)
    if checkpoints[1]:
        parts += ["<h2>Indexes built anew over the same keys and values</h2>", html_of(checkpoints)]
    if free[1]:
        parts += ["<h2>Written freely</h2>", html_of(free)]
    parts += ["<h2>By position</h2>", *_block_tables(table), html_settings(settings)]
    return html_page("generation", parts)


def _about(records: Sequence[Record]) -> str:
    first = records[0]
    return (
        f"{len(records)} texts, fed token by token from {first['prompt']:,} to "
        f"{first['tokens']:,} tokens. KL to full attention in nats, `late` over the second half; "
        f"agreement, mass and repetition in per cent. / median: a text's worst block of {BLOCK} "
        "positions over its median block. / built: over an index built at the moment from the same "
        "keys and values. Perplexity is of the text, or under full attention of what was written."
    )


def _block_tables(table: Sequence[Line]) -> Iterator[str]:
    """Mean KL and the worst step of every block, a table for each budget."""
    for budget in dict.fromkeys(line.budget for line in table):
        shown = [line for line in table if line.budget == budget]
        rows = []
        for same in zip(*(line.blocks for line in shown), strict=True):
            cells = [f"{block.kl:.4f} ({block.worst:.2f})" for block in same]
            rows.append(("", [f"{same[0].start:,}", *cells]))
        yield f"<h3>{budget} tokens: mean KL (worst step)</h3>"
        yield html_table(["from position", *(line.method for line in shown)], rows)


def _changes(records: Sequence[Record], budget: int) -> list[list[int]]:
    """[position, seals, merges] of IceCache's index along the first text."""
    rows: list[Row] = records[0]["rows"]
    found = [row for row in rows if (row["method"], row["budget"]) == ("icecache", budget)]
    return found[0]["changes"] if found else []


def _curves(axes: Any, lines: Sequence[Line], marks: Sequence[Sequence[int]]) -> None:
    for line in lines:
        points = [(block.start, block.kl) for block in line.blocks if block.kl > 0]
        if points:
            width = 2.4 if line.method == "icecache" else 1.2
            axes.plot(*zip(*points, strict=True), label=line.method, linewidth=width)
    for line in lines:
        if line.method == "icecache" and line.checkpoints:
            points = [(one.at, one.rebuilt) for one in line.checkpoints if one.rebuilt > 0]
            axes.plot(*zip(*points, strict=True), "kx", label="icecache, built anew")
    for position, seals, merges in marks:
        if seals:
            axes.axvline(position, 0, 0.03, color="gray", linewidth=0.8)
        if merges:
            axes.axvline(position, 0, 0.08, color="black", linewidth=0.8)
    axes.set(xlabel="position", ylabel="KL, nats", yscale="log")
