"""benchmarks/python/run_table.py: a run as a table, and what holds in it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import run_table
import typer
from icecache.bench.runner import RunFolder
from typer.testing import CliRunner

# method, budget -> KL, NLL of the right answer, score
MADE = {
    ("full", 0): (0.0, 1.0, 1.0),
    ("icecache", 64): (0.01, 1.02, 1.0),
    ("icecache", 128): (0.005, 1.01, 1.0),
    ("icecache", 256): (0.002, 1.003, 1.0),
    ("exact top-B", 64): (0.03, 1.05, 0.5),
    ("exact top-B", 128): (0.02, 1.04, 0.5),
    ("exact top-B", 256): (0.001, 1.03, 0.5),
    ("paper p=.01", 256): (0.02, 1.04, 0.5),
}


def record(task: str, sample: str, flip: float = 1.0) -> dict[str, Any]:
    rows = [
        {
            "method": method,
            "budget": budget,
            "score": score,
            "kl": [kl, kl],
            "agrees": [True, True],
            "bytes_read": 10.0 * budget,
            "gold_nll": 1.0 + flip * (nll - 1.0),
        }
        for (method, budget), (kl, nll, score) in MADE.items()
    ]
    base = {"task": task, "sample": sample, "tokens": 500, "truncated": False, "gold_tokens": 4}
    return {**base, "length": None, "fields": {}, "rows": rows}


def table_of(folder: Path, suite: str, records: list[dict[str, Any]], *flags: str) -> Any:
    settings = {"arguments": {"suite": suite}, "machine": {"cpu": "some"}}
    run = RunFolder(folder / "run", settings)
    for one in records:
        run.add(one)
    app = typer.Typer()
    app.command()(run_table.main)
    out = folder / "table.json"
    done = CliRunner().invoke(app, [str(folder / "run"), "--json", str(out), *flags])
    return done, json.loads(out.read_text()) if out.exists() else None


def test_a_row_for_each_method_budget_and_half(tmp_path: Path) -> None:
    records = [record("a", "0"), record("a", "1", -1.0), record("b", "0")]
    done, made = table_of(tmp_path, "longbench", records)
    assert done.exit_code == 0, done.output
    assert made["meta"]["cpu"] == "some" and made["meta"]["n"] == 3
    rows = {(row["part"], row["method"], row["token_budget"]): row for row in made["rows"]}
    assert [rows[part, "icecache", 256]["n"] for part in ("all", "half 1", "half 2")] == [3, 2, 1]
    row = rows["all", "icecache", 256]
    assert row["gold_likelihood"] == pytest.approx(math.exp(-0.001), abs=1e-5)
    both = (2 * math.exp(-0.003) + math.exp(0.003)) / 3
    assert row["gold_likelihood_mean"] == pytest.approx(both, abs=1e-5)
    assert row["share"] == 1.0 and rows["all", "exact top-B", 256]["share"] == 0.5
    assert made["samples"][1]["256"]["gold_nll_more"] == -0.003


def test_what_is_broken_is_said_and_fails_where_that_is_asked_for(tmp_path: Path) -> None:
    records = [record("a", "0"), record("a", "1")]
    done, made = table_of(tmp_path, "longbench", records, "--check")
    assert done.exit_code == 1
    broken = [one["bound"] for one in made["bounds"] if not one["holds"] and one["part"] == "all"]
    assert broken == ["KL at 256, next exact top-B"]


def test_needles_by_length(tmp_path: Path) -> None:
    records = [record("ruler/niah_single_1", "2048/0"), record("ruler/niah_single_1", "4096/0")]
    done, made = table_of(tmp_path, "ruler", records, "--check")
    assert done.exit_code == 0, done.output
    parts = list(dict.fromkeys(row["part"] for row in made["rows"]))
    assert parts == ["all", "2048 tokens", "4096 tokens"]
    assert [one["bound"] for one in made["bounds"]] == [
        "share of full at 64",
        "share of full at 128",
    ] * 3


def test_answers_may_hold_ends_of_lines_and_the_last_line_may_be_torn(tmp_path: Path) -> None:
    records = [record("a", "0"), record("a", "1")]
    for one in records:
        one["rows"][0]["text"] = "a\u2028b\u2029c\x85d"
    table_of(tmp_path, "longbench", records)
    samples = tmp_path / "run" / "samples.jsonl"
    lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in records]
    samples.write_bytes("".join(lines).encode() + b'{"task": "a", "sa')
    app = typer.Typer()
    app.command()(run_table.main)
    out = tmp_path / "again.json"
    done = CliRunner().invoke(app, [str(tmp_path / "run"), "--json", str(out)])
    assert done.exit_code == 0, done.output
    assert json.loads(out.read_text())["meta"]["n"] == 2


def test_a_run_without_samples_is_refused(tmp_path: Path) -> None:
    settings = {"arguments": {"suite": "longbench"}, "machine": {}}
    RunFolder(tmp_path / "run", settings).add({})
    (tmp_path / "run" / "samples.jsonl").write_text("")
    app = typer.Typer()
    app.command()(run_table.main)
    done = CliRunner().invoke(app, [str(tmp_path / "run")])
    assert "expected a run with samples" in str(done.exception)
