"""icecache bench lm-eval passes its arguments on."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any

import pytest
from icecache.cli import app
from icecache.cli.bench_lm_eval import command
from typer.testing import CliRunner

ICECACHE = ["--model", "icecache"]


@pytest.mark.parametrize(
    ("arguments", "passed_on"),
    [
        (["--tasks", "a,b", "--limit", "2"], [*ICECACHE, "--tasks", "a,b", "--limit", "2"]),
        (["run", "--tasks", "a"], ["run", *ICECACHE, "--tasks", "a"]),
        (["--model", "hf", "--tasks", "a"], ["--model", "hf", "--tasks", "a"]),
        (["--tasks", "a", "--model=hf"], ["--tasks", "a", "--model=hf"]),
        (["-M", "hf", "--tasks", "a"], ["-M", "hf", "--tasks", "a"]),
        (["ls", "tasks"], ["ls", "tasks"]),
        (["--help"], ["--help"]),
        (["run", "-h"], ["run", "-h"]),
        ([], []),
    ],
)
def test_the_model_is_icecache_where_none_is_named(
    arguments: list[str], passed_on: list[str]
) -> None:
    start = [sys.executable, "-m", "icecache.bench.lm_eval_model"]
    assert command(arguments) == [*start, *passed_on]


def test_arguments_are_passed_on_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    found: Any = object()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(os, "execv", lambda path, arguments: ran.append([path, *arguments]))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    flags = ["--tasks", "a", "-L", "2", "--model_args", "pretrained=x,token_budget=64", "--help"]
    done = CliRunner().invoke(app, ["bench", "lm-eval", *flags])
    assert done.exit_code == 0, done.output
    assert ran == [[sys.executable, *command(flags)]]
    assert "HF_HUB_OFFLINE" not in os.environ, "its tasks come from the hub"


def test_without_lm_eval_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = CliRunner().invoke(app, ["bench", "lm-eval", "--tasks", "a"])
    assert done.exit_code == 2 and "pip install 'icecache[lm-eval]'" in done.output
