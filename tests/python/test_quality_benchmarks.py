"""The benchmarks of quality on one prompt: what they promise to write, they write."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_mass_target
import bench_quality
import pytest
import typer
from icecache.bench.prompts import Prompt
from quality_prompts import quality_prompts
from typer.testing import CliRunner

pytestmark = [pytest.mark.model, pytest.mark.slow]


TOKENS = 800  # of the prompt, its last ones


def shortened(*given: Any) -> list[Prompt]:
    return [replace(one, tokens=one.tokens[-TOKENS:]) for one in quality_prompts(*given)]


@pytest.fixture
def results(
    shared_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, float]]:
    """results(main, argument, ...): a benchmark on one short prompt and few steps, by name."""
    for benchmark in (bench_quality, bench_mass_target):
        monkeypatch.setattr(benchmark, "STEPS", 4)
        monkeypatch.setattr(benchmark, "quality_prompts", shortened)

    def run(main: Callable[..., None], *arguments: str) -> dict[str, float]:
        app = typer.Typer()
        app.command()(main)
        path = tmp_path / "results.json"
        always = ["--prompts", "1", "--data", str(shared_dir / "data"), "--json", str(path)]
        done = CliRunner().invoke(app, [*always, *arguments])
        assert done.exit_code == 0, done.output
        written = json.loads(path.read_text(encoding="utf-8"))
        assert len(written["meta"]["prompts"]) == 1
        return {one["name"]: one["value"] for one in written["results"]}

    return run


def test_quality_by_method_and_budget(results: Callable[..., dict[str, float]]) -> None:
    chosen = ("--budgets", "64,256", "--methods", "icecache,topk,paper,streaming")
    found = results(bench_quality.main, *chosen)
    assert found["kl_256"] < found["kl_64"] < found["kl_topk_64"] < found["kl_streaming_64"]
    assert 0 < found["mass_64"] < found["mass_256"] < 1
    assert found["kl_ratio_to_topk_64"] == pytest.approx(
        found["kl_64"] / found["kl_topk_64"], rel=1e-3
    )


def test_tokens_that_heads_share(results: Callable[..., dict[str, float]]) -> None:
    found = results(bench_mass_target.main)
    assert found["mass_target_tokens_64_0"] == pytest.approx(64, abs=2)
    assert found["mass_target_kl_256_0"] < found["mass_target_kl_64_0"]
    tokens = [found[f"mass_target_tokens_64_{share}"] for share in (60, 75, 85)]
    assert tokens == sorted(tokens)
