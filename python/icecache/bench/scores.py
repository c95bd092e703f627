"""What a run says of its methods: one line a method and budget, from the records of its samples."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from icecache.bench.report import Result
from icecache.bench.runner import Record

Row = dict[str, Any]
RESAMPLES = 2000


@dataclass(frozen=True)
class Line:
    """One method at one budget, means over n samples; NaN where nothing was measured."""

    method: str
    budget: int  # 0: every token
    n: int
    score: float  # 0 to 100: mean over tasks of their means over samples
    score_low: float  # 95 % confidence interval, by bootstrap over tasks and their samples
    score_high: float
    share: float  # of full attention's score
    agreement: float  # share of steps with full attention's most likely token
    kl: float  # nats
    gold_likelihood: float  # exp(-(NLL - full attention's NLL)) of a right answer's tokens
    perplexity: float  # of the right answers' tokens: exp(NLL)
    mass: float
    output_error: float  # relative L2, over layers and heads
    bytes_read: float  # a step, all layers and heads
    answer_tokens: float  # that it wrote by itself, its stop token included
    step_ms: float  # attention of a step, all layers
    open_s: float  # filling and indexing a cache

    @property
    def label(self) -> str:
        return label(self.method, self.budget)


def label(method: str, budget: int) -> str:
    """How reports name a method at a budget; 0: every token."""
    return f"{method} {budget}" if budget else method


def lines(records: Sequence[Record]) -> list[Line]:
    """In the order of the first record."""
    full = {_key(record): row for record in records for row in record["rows"] if not row["budget"]}
    whole = [(record, full[_key(record)]) for record in records]
    base = _score(whole) if whole else math.nan
    return [
        _line(method, budget, pairs, [full[_key(record)] for record, _ in pairs], base)
        for (method, budget), pairs in rows_by_method(records).items()
    ]


def rows_by_method(
    records: Sequence[Record], part: str = "rows"
) -> dict[tuple[str, int], list[tuple[Record, Row]]]:
    """Method and budget -> records, each with its row in this part; in the order of the first."""
    made: dict[tuple[str, int], list[tuple[Record, Row]]] = defaultdict(list)
    for record in records:
        for row in record[part]:
            made[row["method"], row["budget"]].append((record, row))
    return made


def _key(record: Record) -> tuple[str, str]:
    return record["task"], record["sample"]


def _line(
    method: str, budget: int, pairs: list[tuple[Record, Row]], full: list[Row], base: float
) -> Line:
    rows = [row for _, row in pairs]
    low, high = _interval(pairs)
    score = _score(pairs)
    gold = [
        (row["gold_nll"], whole["gold_nll"])
        for row, whole in zip(rows, full, strict=True)
        if row.get("gold_nll") is not None
    ]
    return Line(
        method=method,
        budget=budget,
        n=len(rows),
        score=score,
        score_low=low,
        score_high=high,
        share=score / base if base else math.nan,
        agreement=_mean(_mean(row["agrees"]) for row in rows if row.get("agrees")),
        kl=_mean(_mean(row["kl"]) for row in rows if row.get("kl")),
        gold_likelihood=math.exp(-_mean(mine - theirs for mine, theirs in gold)),
        perplexity=math.exp(_mean(mine for mine, _ in gold)),
        mass=_mean(row["mass"] for row in rows if "mass" in row),
        output_error=_mean(float(np.mean(e)) for row in rows if (e := row.get("output_error"))),
        bytes_read=_mean(row["bytes_read"] for row in rows if row.get("bytes_read")),
        answer_tokens=_mean(row["answer_tokens"] for row in rows if "answer_tokens" in row),
        step_ms=1e3 * _mean(row["step_s"] for row in rows if row.get("step_s")),
        open_s=_mean(row["open_s"] for row in rows if row.get("open_s")),
    )


def _mean(values: Any) -> float:
    held = list(values)
    return fmean(held) if held else math.nan


def _by_task(pairs: Sequence[tuple[Record, Row]]) -> list[list[float]]:
    tasks: dict[str, list[float]] = defaultdict(list)
    for record, row in pairs:
        tasks[record["task"]].append(row["score"])
    return list(tasks.values())


def _score(pairs: Sequence[tuple[Record, Row]]) -> float:
    return 100 * fmean(fmean(scores) for scores in _by_task(pairs))


def _interval(pairs: Sequence[tuple[Record, Row]]) -> tuple[float, float]:
    """Tasks are drawn too: of one or two samples of each, samples alone would tell of no doubt."""
    chance = np.random.default_rng(0)
    tasks = _by_task(pairs)
    means = np.empty((RESAMPLES, len(tasks)))
    for number, scores in enumerate(tasks):
        picks = chance.integers(len(scores), size=(RESAMPLES, len(scores)))
        means[:, number] = np.asarray(scores)[picks].mean(1)
    drawn = chance.integers(len(tasks), size=means.shape)
    low, high = np.percentile(100 * np.take_along_axis(means, drawn, 1).mean(1), [2.5, 97.5])
    return float(low), float(high)


def halves(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Every second sample of each task: to choose on one half and confirm on the other."""
    seen: dict[str, int] = defaultdict(int)
    parts: tuple[list[Record], list[Record]] = ([], [])
    for record in records:
        parts[seen[record["task"]] % 2].append(record)
        seen[record["task"]] += 1
    return parts


def task_scores(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """task -> method and budget -> mean score, 0 to 100."""
    tasks: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        for row in record["rows"]:
            tasks[record["task"]][label(row["method"], row["budget"])].append(row["score"])
    return {
        task: {name: 100 * fmean(scores) for name, scores in methods.items()}
        for task, methods in tasks.items()
    }


_UNITS = {
    "share": "share",
    "agreement": "share",
    "kl": "nats",
    "gold_likelihood": "share",
    "perplexity": "ratio",
    "mass": "share",
    "output_error": "ratio",
    "bytes_read": "bytes",
    "answer_tokens": "tokens",
    "step_ms": "ms",
    "open_s": "s",
}


def results(records: Sequence[Record]) -> Iterator[Result]:
    """All numbers of a run, of all samples and of both halves: "kl_icecache_256", "..._half1"."""
    first, second = halves(records)
    for suffix, part in (("", records), ("_half1", first), ("_half2", second)):
        for line in lines(part) if part else ():
            name = f"{name_of(line.label)}{suffix}"
            params = {"method": line.method, "token_budget": line.budget, "n": line.n}
            low_high = {"low": line.score_low, "high": line.score_high}
            yield Result(f"score_{name}", line.score, "percent", {**params, **low_high})
            yield from measures(line, _UNITS, name, params)


def measures(
    line: object, units: Mapping[str, str], name: str, params: dict[str, Any], start: str = ""
) -> Iterator[Result]:
    """A result "START measure_NAME" for each measure of a line that was taken, in its unit."""
    for measure, unit in units.items():
        value = getattr(line, measure)
        if not math.isnan(value):
            yield Result(f"{start}{measure}_{name}", value, unit, params)


def name_of(text: str) -> str:
    """A label as a part of a result's name."""
    return "".join(c if c.isalnum() else "_" for c in text)
