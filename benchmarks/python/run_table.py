"""The table of a run of `icecache bench`: a row for each method, budget and part of the samples.

    icecache bench longbench --data-dir MINILONGBENCH --model smollm2 \\
        --budget 64,128,256 --limit 40 --out RUN
    python benchmarks/python/run_table.py RUN --json benchmarks/results/longbench.json

Parts: all samples, and the two halves (every second sample of each task); of generated prompts,
each length. `gold_likelihood` is exp(-(mean NLL - full attention's)), `gold_likelihood_mean` the
mean over samples of exp(-(NLL - full attention's)).

What IceCache should hold is printed below the table, as it is; --check fails where it does not.
"""

from __future__ import annotations

import json as json_module
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import icecache
import typer
from icecache.bench.runner import Record, read_records
from icecache.bench.scores import Line, halves, label, lines
from icecache.bench.tasks.records import read_json
from icecache.outputs import check_output_file
from rich.console import Console
from rich.table import Table

_MEASURES = ("kl", "agreement", "gold_likelihood", "mass", "bytes_read")
_SHOWN = {
    "score": "{:.1f}",
    "share": "{:.3f}",
    "kl": "{:.4f}",
    "agreement": "{:.4f}",
    "gold_likelihood": "{:.4f}",
    "gold_likelihood_mean": "{:.4f}",
    "bytes_read": "{:,.0f}",
}

Row = dict[str, Any]
console = Console()


def main(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    json: Annotated[Path | None, typer.Option(help="Where the table goes.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Fail where a bound is broken.")] = False,
) -> None:
    """Write and show the table of a run, and what IceCache holds in it."""
    if json is not None:
        check_output_file("--json", json)
    settings = read_json(run / "run.json")
    records = read_records(run)
    if not records:
        raise icecache.InvalidArgument(f"RUN: expected a run with samples, got {run}")
    arguments = dict(settings["arguments"])
    if arguments.get("data"):
        arguments["data"] = Path(arguments["data"]).name  # not where it lay
    suite = arguments["suite"]
    rows = [row for part, held in parts(suite, records) for row in table(part, held)]
    bounds = list(BOUNDS.get(suite, _nothing)(rows))
    made = {
        "meta": {**settings["machine"], **_shape(records), "arguments": arguments},
        "bounds": bounds,
        "rows": rows,
        "samples": [differences(record) for record in records],
    }
    _show(rows, bounds)
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(_one_a_line(made), encoding="utf-8")
    if check and not all(bound["holds"] for bound in bounds):
        raise typer.Exit(1)


def parts(suite: str, records: Sequence[Record]) -> Iterator[tuple[str, Sequence[Record]]]:
    """The samples of which there is a table each, by name; "all" first."""
    yield "all", records
    if suite == "ruler":
        for length in sorted({_length(record) for record in records}):
            yield f"{length} tokens", [one for one in records if _length(one) == length]
    else:
        yield from zip(("half 1", "half 2"), halves(records), strict=True)


def _length(record: Record) -> int:
    """Of a generated prompt: what was asked for."""
    return int(record["sample"].partition("/")[0])


def table(part: str, records: Sequence[Record]) -> list[Row]:
    """One row a method and budget, the smallest budget first."""
    made = sorted(lines(records), key=lambda line: line.budget)
    return [_row(part, line, records) for line in made]


def _row(part: str, line: Line, records: Sequence[Record]) -> Row:
    row: Row = {"part": part, "method": line.method, "token_budget": line.budget, "n": line.n}
    row |= {"score": line.score, "score_low": line.score_low, "score_high": line.score_high}
    row["share"] = line.share
    row |= {name: getattr(line, name) for name in _MEASURES}
    known_gaps = (_gap(record, line.method, line.budget) for record in records)
    gaps = [gap for gap in known_gaps if gap is not None]
    if line.budget and gaps:
        row["gold_likelihood_mean"] = fmean(math.exp(-gap) for gap in gaps)
    known = {k: v for k, v in row.items() if not (isinstance(v, float) and math.isnan(v))}
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in known.items()}


def _gap(record: Record, method: str, budget: int) -> float | None:
    """NLL of the right answer less full attention's; None where a sample has none."""
    held = {(row["method"], row["budget"]): row.get("gold_nll") for row in record["rows"]}
    ours, full = held.get((method, budget)), held.get(("full", 0))
    return None if ours is None or full is None else ours - full


def differences(record: Record) -> Row:
    """Of IceCache to full attention, at each budget, for one sample."""
    made: Row = {"task": record["task"], "sample": record["sample"], "tokens": record["tokens"]}
    made |= {"truncated": record["truncated"], "gold_tokens": record.get("gold_tokens")}
    made["full_score"] = next((r["score"] for r in record["rows"] if not r["budget"]), None)
    for row in record["rows"]:
        if row["method"] == "icecache":
            gap = _gap(record, "icecache", row["budget"])
            made[str(row["budget"])] = {
                "score": round(row["score"], 4),
                "kl": round(fmean(row["kl"]), 5) if row["kl"] else None,
                "agreement": round(fmean(row["agrees"]), 4) if row["agrees"] else None,
                "gold_nll_more": None if gap is None else round(gap, 5),
            }
    return made


def _shape(records: Sequence[Record]) -> Row:
    tokens = [record["tokens"] for record in records]
    return {
        "n": len(records),
        "tasks": len({record["task"] for record in records}),
        "prompt_tokens": [min(tokens), max(tokens)],
        "truncated": sum(record["truncated"] for record in records),
    }


def _bound(part: str, text: str, value: float, limit: float, holds: bool) -> Row:
    return {"part": part, "bound": text, "value": value, "limit": limit, "holds": holds}


def _at(rows: Sequence[Row], part: str, method: str, budget: int) -> Row:
    for row in rows:
        if (row["part"], row["method"], row["token_budget"]) == (part, method, budget):
            return row
    raise icecache.InvalidArgument(f"RUN: expected {label(method, budget)}, got a run without it")


def _longbench(rows: Sequence[Row]) -> Iterator[Row]:
    """Nearness to full attention, for all samples and for each half."""
    for part in dict.fromkeys(row["part"] for row in rows):
        for name, least in (("gold_likelihood", 0.995), ("agreement", 0.97)):
            value = _at(rows, part, "icecache", 256)[name]
            yield _bound(part, f"{name} at 256", value, least, value >= least)
        ours = _at(rows, part, "icecache", 64)["kl"]
        published = [
            row["kl"]
            for row in rows
            if row["part"] == part
            and row["method"].startswith("paper")
            and row["token_budget"] == 256
        ]
        best = min(published)
        yield _bound(part, "KL at 64, paper at 256", ours, best, ours < best)
        exact = _at(rows, part, "exact top-B", 128)["kl"]
        yield _bound(part, "KL at 64, exact top-B at 128", ours, exact, ours < exact)
        for budget in sorted({row["token_budget"] for row in rows} - {0}):
            ours = _at(rows, part, "icecache", budget)["kl"]
            others = {
                row["method"]: row["kl"]
                for row in rows
                if row["part"] == part
                and row["token_budget"] == budget
                and row["method"] != "icecache"
            }
            name = min(others, key=lambda method: others[method])
            least = others[name]
            yield _bound(part, f"KL at {budget}, next {name}", ours, least, ours < least)


def _ruler(rows: Sequence[Row]) -> Iterator[Row]:
    """What is found of what full attention finds."""
    for part in dict.fromkeys(row["part"] for row in rows):
        for budget, least in ((64, 0.97), (128, 0.99)):
            share = _at(rows, part, "icecache", budget)["share"]
            yield _bound(part, f"share of full at {budget}", share, least, share >= least)


def _nothing(rows: Sequence[Row]) -> Iterator[Row]:
    return iter(())


BOUNDS = {"longbench": _longbench, "ruler": _ruler}


def _one_a_line(made: Row) -> str:
    """JSON with a line for each entry of a list: its changes can be read."""
    dump = json_module.dumps
    blocks = [f' "meta": {dump(made["meta"], indent=1)}']
    for name in ("bounds", "rows", "samples"):
        entries = ",\n".join(f"  {dump(one)}" for one in made[name])
        blocks.append(f' "{name}": [\n{entries}\n ]' if entries else f' "{name}": []')
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def _show(rows: Sequence[Row], bounds: Sequence[Row]) -> None:
    shown = Table("part", "method", "tokens", *_SHOWN, "n", box=None)
    previous = None
    for row in rows:
        if previous is not None and row["part"] != previous:
            shown.add_section()
        previous = row["part"]
        cells = [form.format(row[name]) if name in row else "" for name, form in _SHOWN.items()]
        budget = str(row["token_budget"] or "all")
        shown.add_row(row["part"], row["method"], budget, *cells, str(row["n"]))
    console.print(shown)
    for bound in bounds:
        mark = "[green]holds[/]" if bound["holds"] else "[red]broken[/]"
        text = f"{bound['part']}: {bound['bound']}: {bound['value']:.4f} of {bound['limit']:.4f}"
        console.print(f"{mark}  {text}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
