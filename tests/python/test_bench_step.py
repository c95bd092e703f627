"""The timing of one step, on lengths that take a second."""

from __future__ import annotations

import json
import time
from itertools import groupby
from pathlib import Path

import pytest
import torch
from icecache.bench.busy import BusyProcesses
from icecache.bench.step import (
    DENSE,
    OURS,
    SDPA,
    SETTLING,
    TURN,
    WARM,
    StepCase,
    StepTimes,
    measure,
    plan,
    synthetic,
)
from icecache.cli import app
from typer.testing import CliRunner


def test_every_method_is_timed_on_every_step() -> None:
    ticks = []
    case = StepCase(1024, head_dim=32, dtype=torch.float32, batch=2, token_budget=64)
    times = measure(case, 4, lambda: ticks.append(1))
    assert len(ticks) == 4 + 3
    assert {name: len(seconds) for name, seconds in times.seconds.items()} == dict.fromkeys(
        (OURS, DENSE, SDPA), 4 * case.layers
    )
    assert times.bytes_read > 0
    dense_bytes = 2 * 1024 * 32 * 4 * case.kv_heads * case.batch
    assert times.bytes_read < dense_bytes / 2


def test_steps_beside_busy_processes_are_told_apart() -> None:
    planned = plan(TURN + 3, busy=2)
    for is_busy in (False, True):
        assert sum(step.counts for step in planned if step.is_busy is is_busy) == TURN + 3
    turns = [[*turn] for _, turn in groupby(planned[WARM:], lambda step: step.is_busy)]
    assert [len(turn) for turn in turns] == [SETTLING + TURN] * 2 + [SETTLING + 3] * 2
    assert not any(step.counts for turn in turns for step in turn[:SETTLING])
    case = StepCase(512, head_dim=32, dtype=torch.float32, token_budget=64, layers=1)
    times = measure(case, 3, busy=1)
    assert {len(seconds) for seconds in times.busy_seconds.values()} == {3}
    numbers = {result.name: result for result in times.results()}
    growth = numbers["step_growth_busy_icecache_512"]
    assert growth.value == pytest.approx(times.growth(OURS)) and growth.params["busy"] == 1
    assert "step_growth_busy_icecache_512" not in {one.name for one in measure(case, 1).results()}


def test_busy_processes_compute_only_when_they_are_to_run() -> None:
    def states(processes: BusyProcesses) -> list[str]:
        paths = [Path(f"/proc/{one.pid}/stat") for one in processes._processes]
        return [path.read_text().rpartition(") ")[2][0] for path in paths]

    def wait_for(processes: BusyProcesses, state: str) -> None:
        end = time.monotonic() + 10
        while states(processes) != [state] * 2:
            assert time.monotonic() < end, states(processes)
            time.sleep(0.01)

    with BusyProcesses(2) as processes:
        held = [*processes._processes]
        for wanted, state in ((False, "T"), (True, "R"), (False, "T")):
            processes.run(wanted)
            wait_for(processes, state)
    assert all(process.returncode is not None for process in held)


def test_the_speedup_is_over_the_faster_rival() -> None:
    case = StepCase(32768)
    seconds = {OURS: [1e-4, 2e-4, 9e-4], DENSE: [8e-4] * 3, SDPA: [6e-4] * 3}
    times = StepTimes(case, seconds, 5.0)
    assert times.speedup == pytest.approx(3.0)
    numbers = {result.name: result for result in times.results()}
    assert numbers["step_speedup_32k"].value == pytest.approx(3.0)
    assert numbers["step_us_icecache_32k"].value == pytest.approx(200)
    assert numbers["step_us_sdpa_32k"].unit == "us"
    assert numbers["step_bytes_32k"].params["n"] == 3


def test_synthetic_keys_are_the_same_in_every_run() -> None:
    a, b = synthetic(2, 64, 32, 0, 7), synthetic(2, 64, 32, 0, 7)
    assert torch.equal(a, b)
    assert not torch.equal(a, synthetic(2, 64, 32, 64, 7))
    assert a.shape == (2, 64, 32)
    norms = a.norm(dim=-1)  # a rotation keeps them, so they are those of the clusters
    assert 4 < float(norms.mean()) < 16


def test_the_command_prints_a_table_and_writes_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    path = tmp_path / "step.json"
    arguments = ["bench", "step", "--lengths", "512,1024", "--steps", "2", "--json", str(path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "1,024" in result.output
    names = {one["name"] for one in json.loads(path.read_text())["results"]}
    assert {"step_speedup_1k", "step_speedup_512", "step_us_dense_1k"} <= names


LENGTHS = "whole numbers from 256 to 1073741824 with commas between them"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "2k"], f"--lengths must be {LENGTHS}, got '2k'"),
        (["--lengths", "100"], f"--lengths must be {LENGTHS}, got '100'"),
        (["--dtype", "int8"], "--dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (["--token-budget", "20"], "token_budget must be at least"),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", "step", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
