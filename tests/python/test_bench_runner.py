"""The files of a run: what they hold comes back, whatever it is and however the run ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from icecache import InvalidArgument
from icecache.bench.runner import RunFolder, read_records, run
from icecache.bench.tasks.task import Sample, Task
from test_bench_suites import SETTINGS, answer, question

# Ends of a line to str.splitlines(), to JavaScript, or to nobody; and what UTF-8 does not know.
ODD = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei\r\nj\rk\ud800l\0<!--<script>"


def test_records_come_back_whatever_an_answer_holds(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, SETTINGS)
    made = [{"task": "t", "sample": str(n), "text": ODD[n:]} for n in range(3)]
    for one in made:
        folder.add(one)
    assert folder.records() == read_records(tmp_path) == made
    assert (tmp_path / "samples.jsonl").read_bytes().isascii()
    assert RunFolder(tmp_path, SETTINGS).records() == made


def test_records_of_runs_that_were_not_ascii_are_read(tmp_path: Path) -> None:
    RunFolder(tmp_path, SETTINGS).add({"text": "é"})
    line = json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False) + "\n"
    torn = '{"text": "é'.encode()[:-1]
    (tmp_path / "samples.jsonl").write_bytes(line.encode() + torn)
    assert read_records(tmp_path) == [{"text": "a\u2028b\x85c"}]
    folder = RunFolder(tmp_path, SETTINGS)
    folder.add({"text": ""})
    assert folder.records() == [{"text": "a\u2028b\x85c"}, {"text": ""}]


@pytest.mark.parametrize("line", [b"{", b"[]", b"\xff", b'{"a": ' + b"[" * 100_000, b"9" * 5000])
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: bytes) -> None:
    RunFolder(tmp_path, SETTINGS).add({"text": ""})
    with (tmp_path / "samples.jsonl").open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(InvalidArgument, match=r"samples\.jsonl"):
        read_records(tmp_path)


def test_a_run_that_fails_before_its_first_record_leaves_nothing(tmp_path: Path) -> None:
    def refuse(task: Task, sample: Sample) -> dict[str, Any]:
        raise InvalidArgument("budget: expected more")

    out = tmp_path / "new" / "run"
    with pytest.raises(InvalidArgument, match="budget"):
        run([question(1)], RunFolder(out, SETTINGS), refuse)
    assert list(tmp_path.iterdir()) == []
    other = {"arguments": {"model": "m", "budgets": [128]}}
    assert len(run([question(1)], RunFolder(out, other), answer)) == 1


@pytest.mark.parametrize("name", ["samples.jsonl", "results.json", "report.html"])
def test_files_that_are_of_no_run_are_not_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(InvalidArgument, match=rf"--out: .* has a {name}, but no run\.json"):
        RunFolder(tmp_path, SETTINGS)
    assert (tmp_path / name).read_text() == "mine"
