"""The benchmarks, in settings that take seconds: what they promise to write, they write."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_build
import bench_fork
import bench_generate
import bench_kernels
import bench_lossless
import bench_prefill
import bench_row_cache
import bench_search
import hf_models
import plots
import pytest
import torch
import typer
from contiguous_cache import contiguous_cache
from head_tokens import model_heads
from icecache.bench.report import Result, commit, machine, write_json
from icecache.hf.support import CACHE
from lengths import parse_lengths, size
from transformers import DynamicCache
from typer.testing import CliRunner


def run(main: Callable[..., None], *arguments: str) -> Any:
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, arguments)


def written(path: Path) -> dict[str, dict[str, Any]]:
    """Results by name; fails where the form is not that of icecache.bench.report."""
    data = json.loads(path.read_text(encoding="utf-8"))
    assert {"cpu", "cores", "simd", "commit", "date", "command"} <= data["meta"].keys()
    for one in data["results"]:
        assert one.keys() == {"name", "value", "unit", "params"}
        assert one["value"] >= 0
    names = [one["name"] for one in data["results"]]
    assert len(set(names)) == len(names)
    return {one["name"]: one for one in data["results"]}


def test_builds_and_faiss(tmp_path: Path) -> None:
    path = tmp_path / "build.json"
    arguments = ["--lengths", "512,1024", "--heads", "1", "--repeats", "1"]
    result = run(bench_build.main, *arguments, "--json", str(path))
    assert result.exit_code == 0, result.output
    found = written(path)
    for length in ("512", "1k"):
        for name in ("build_ms", "build_wall_ms"):
            for suffix in ("", "_d64", "_float32", "_d64_float32", "_2threads"):
                assert found[f"{name}_{length}{suffix}"]["value"] > 0
        for rival in ("ivf", "hnsw"):
            assert found[f"build_ms_{rival}_{length}"]["value"] > 0
            assert found[f"build_ms_{rival}_{length}_2threads"]["params"]["threads"] == 2
    assert found["build_ms_1k_d64"]["params"]["head_dim"] == 64


def test_prompts_within_a_budget(tmp_path: Path) -> None:
    path = tmp_path / "prefill.json"
    given = ["--lengths", "1024", "--budget", "64", "--call", "256", "--json", str(path)]
    result = run(bench_prefill.main, *given)
    assert result.exit_code == 0, result.output
    found = written(path)
    times = [found[f"prefill_ms_{name}_1k"]["value"] for name in ("budget", "engine", "sdpa")]
    assert found["prefill_speedup_1k"]["value"] == pytest.approx(min(times[1:]) / times[0])
    assert found["prefill_sparse_1k"]["value"] == 0.0  # shorter than a chunk


def test_forks(tmp_path: Path) -> None:
    path = tmp_path / "fork.json"
    given = ["--lengths", "1024,2048", "--suffixes", "512", "--repeats", "2", "--json", str(path)]
    result = run(bench_fork.main, *given)
    assert result.exit_code == 0, result.output
    found = written(path)
    for length in ("1k", "2k"):
        for name in ("fork_pages_512_of_", "fork_index_512_of_", "fork_us_", "truncate_us_"):
            one = found[name + length]
            assert 0 < one["params"]["least"] <= one["value"] <= one["params"]["most"]
        pages = found[f"fork_pages_512_of_{length}"]
        assert pages["params"]["suffix_bytes"] == 512 * 2 * 4 * 128 * 2
        # What the fork truncated is still its parent's: its own tokens are at least the suffix.
        assert pages["value"] >= pages["params"]["suffix_bytes"]


def test_bounds_of_forks() -> None:
    params = {"length": 2048, "suffix": 512, "suffix_bytes": 1 << 20}
    most = {"pages": 1.15 * (1 << 20) + 32 * 4 * (16 * 2 * 128 * 2)}
    most["index"] = 0.1 * (1 << 20) + 4 * (64 << 10)
    held = [Result(f"fork_{kind}_512_of_2k", most[kind], "bytes", params) for kind in most]
    took = [
        Result("fork_us_2k", 400.0, "us", params),
        Result("truncate_us_2k", 600.0, "us", params),
    ]
    assert list(bench_fork.broken_bounds([*held, *took])) == []
    more = [Result(one.name, one.value + 2, one.unit, params) for one in (*held, *took)]
    broken = list(bench_fork.broken_bounds(more))
    assert [line.split(":")[0] for line in broken] == [
        "fork_pages_512_of_2k",
        "fork_index_512_of_2k",
        "fork and truncate at 2,048",
    ]
    large = [Result(one.name, one.value, one.unit, {**params, "length": 2047}) for one in more[:2]]
    assert list(bench_fork.broken_bounds(large)) == []


def test_lossless(tmp_path: Path) -> None:
    path = tmp_path / "lossless.json"
    given = ["--lengths", "512", "--prompts", "1", "--steps", "8", "--budgets", "64"]
    result = run(bench_lossless.main, *given, "--json", str(path))
    assert result.exit_code == 0, result.output
    found = written(path)
    assert found["lossless_equal_64_512"]["value"] == 1
    assert 0 <= found["lossless_kept_64_512"]["value"] <= 1
    for rival in ("dynamic", "contiguous"):
        assert found[f"lossless_speedup_{rival}_64_512"]["value"] > 0


def test_texts_are_equal_but_for_ties() -> None:
    def said(tokens: list[int], gap: float = 1.0) -> bench_lossless.Answer:
        return bench_lossless.Answer(tokens, 0.1, [gap] * len(tokens))

    assert bench_lossless.equal_tokens(said([1, 2, 3]), said([1, 2, 3])) is None
    assert bench_lossless.equal_tokens(said([1, 2, 3]), said([1, 5, 3])) == 1
    assert bench_lossless.equal_tokens(said([1, 2, 3]), said([1, 5, 3], gap=1e-5)) is None


def test_searches(tmp_path: Path) -> None:
    path = tmp_path / "search.json"
    arguments = ["--lengths", "1024", "--model-lengths", "", "--steps", "2"]
    result = run(bench_search.main, *arguments, "--json", str(path))
    assert result.exit_code == 0, result.output
    found = written(path)
    assert found["select_us_1k"]["value"] > 0
    for method in bench_search.METHODS:
        assert 0 < found[f"search_recall_{method}_1k"]["value"] <= 1
        assert 0 < found[f"search_mass_{method}_1k"]["value"] <= 1
        if method != bench_search.OURS:
            assert found[f"search_us_{method}_1k"]["value"] > 0
    # Keys in bfloat16 order near-equal logits otherwise; over those in float32 search is exact.
    assert found["search_mass_flat_1k"]["value"] > 0.99
    ours = found["search_recall_icecache_1k"]["value"]
    assert found["search_recall_ivf_1k"]["value"] > ours - 0.1
    assert found["search_us_ivf_1k"]["params"]["nprobe"]


def test_a_row_cache_forgets_the_longest_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_row_cache, "CANDIDATES", 2)
    monkeypatch.setattr(bench_row_cache, "FILLING", 1)
    # Candidates are the first two; the third is the runner-up.
    best = [[0, 1, 2], [2, 1, 5], [0, 5, 9], [0, 5, 9]]
    assert bench_row_cache.play(best, 2, 0) == (3 / 6, 3 / 6)  # 2, then 0 and 5
    assert bench_row_cache.play(best, 9, 0) == (2 / 6, 2 / 6)  # 2 and 5
    assert bench_row_cache.play(best, 9, 1) == (0, 2 / 6)  # 5 and 9, before anyone wanted them


@pytest.mark.model
def test_row_caches(tmp_path: Path) -> None:
    path = tmp_path / "row_cache.json"
    result = run(bench_row_cache.main, "--lengths", "1024", "--steps", "20", "--json", str(path))
    assert result.exit_code == 0, result.output
    found = written(path)
    few, many = (found[f"row_cache_missing_1k_{kept}_steps_0_more"]["value"] for kept in (2, 6))
    assert 0 <= many < few < 1


def test_recall_counts_the_best_of_what_was_found() -> None:
    truth = bench_search.Truth(torch.tensor([0.0, 0.5, 0.1, 0.3, 0.1]), torch.tensor([1, 2]))
    assert truth.recall(truth.picked) == 0.5
    assert truth.share(truth.picked) == pytest.approx(0.6 / 0.8)
    assert truth.recall(torch.tensor([[1, 0], [3, 4]])) == 1
    assert truth.recall(torch.tensor([3])) == 0.5


def test_keys_of_a_model_are_those_of_its_cache() -> None:
    model, layer, queries, length = hf_models.model("llama"), 1, 8, 400
    tokens = hf_models.prompt(1, length + queries)
    with torch.inference_mode():
        cache = model(tokens)[CACHE]
    heads = list(model_heads(model, tokens[0], queries, layer, chunk=length + queries))
    assert len(heads) == 2
    for head, made in enumerate(heads):
        expected = cache.layers[layer].keys[0, head, :length].to(torch.bfloat16)
        torch.testing.assert_close(made.keys, expected)
        assert made.recent.shape == (2, 256, 16)
        assert made.queries.shape == (queries, 2, 16)
    chunked = list(model_heads(model, tokens[0], queries, layer, chunk=100))
    assert chunked[0].keys.shape == heads[0].keys.shape
    torch.testing.assert_close(chunked[0].keys[:100], heads[0].keys[:100])


@pytest.mark.parametrize("batch", [1, 4])
def test_a_model_end_to_end(tmp_path: Path, batch: int) -> None:
    model, steps = hf_models.build("llama", max_position_embeddings=1100), 20
    tokens = hf_models.prompt(batch, 1024 + steps)
    ticks: list[str] = []
    times = bench_generate.measure(model, tokens, steps, budget=64, tick=ticks.append)
    assert len(ticks) == 2 * bench_generate.PROMPTS + 3
    assert all(len(turns) == 2 for turns in times.turns.values())
    assert isinstance(model(tokens[:, :8])[CACHE], DynamicCache)  # left as it was
    write_json(tmp_path / "generate.json", machine(), list(times.results()))
    found = written(tmp_path / "generate.json")
    tail = "1k" if batch == 1 else "batch4_1k"
    expected = {f"decode_speedup_{tail}", f"decode_speedup_static_{tail}", f"ttft_ratio_{tail}"}
    expected |= {f"tpot_ms_{method}_{tail}" for method in times.turns}
    assert expected <= found.keys()
    assert found[f"decode_speedup_static_{tail}"]["params"]["rival"] in ("static", "contiguous")


def test_a_contiguous_cache_gives_the_logits_of_the_stock_one() -> None:
    model, tokens = hf_models.model("llama"), hf_models.prompt(2, 60)
    caches = [DynamicCache(config=model.config), contiguous_cache(3, 60)]
    with torch.inference_mode():
        for part in (tokens[:, :50], tokens[:, 50:51], tokens[:, 51:]):
            stock, own = (model(part, **{CACHE: cache}).logits for cache in caches)
            torch.testing.assert_close(own, stock)


@pytest.mark.model
@pytest.mark.slow
def test_smollm2_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_generate, "PROMPTS", 1)
    monkeypatch.setattr(bench_generate, "TURN", 2)
    path = tmp_path / "generate.json"
    arguments = ["--lengths", "512", "--batch-lengths", "", "--steps", "8", "--json", str(path)]
    result = run(bench_generate.main, *arguments)
    assert result.exit_code == 0, result.output
    assert "decode_speedup_512" in written(path)


def test_results_of_google_benchmark_are_converted() -> None:
    raw = {"name": "row_logits/cache", "iterations": 9, "cpu_time": 2.0, "time_unit": "ms"}
    counters = {"bytes_per_second": 4e9, "roof_share": 0.5, "GMAC/s": 3.0, "fma_share": 0.25}
    (one,) = bench_kernels.results([{**raw, **counters}])
    assert one == Result(
        "row_logits/cache",
        2000.0,
        "us",
        {"gb_per_s": 4.0, "roof_share": 0.5, "gmac_per_s": 3.0, "fma_share": 0.25, "n": 9},
    )


def test_kernels(tmp_path: Path) -> None:
    if not bench_kernels.PROGRAM.is_file():
        reason = f"{bench_kernels.PROGRAM.name} is not built; `make build-bench` builds it"
        if os.environ.get("ICECACHE_REQUIRE_SHARED") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    path = tmp_path / "kernels.json"
    chosen = (
        r"^(attend_pages/bfloat16/D:64/cache|matmul|sketch_scan/cache|tree_select/.*D:64.*4096)"
    )
    result = run(bench_kernels.main, "--filter", chosen, "--min-time", "0.001", "--json", str(path))
    assert result.exit_code == 0, result.output
    found = written(path)
    names = {name.split("/")[0] for name in found}
    assert names == {"attend_pages", "matmul", "sketch_scan", "tree_select"}
    for one in found.values():
        assert one["params"]["roof_share"] > 0
    meta = json.loads(path.read_text(encoding="utf-8"))["meta"]
    assert meta["read_gbs"] > 0.1 and meta["fma_gmacs"] > 0.1


def test_plots_are_drawn_from_the_results_that_are_there(tmp_path: Path) -> None:
    lengths = ("2k", "8k", "32k")
    shape = {"kv_heads": 2, "group": 4, "head_dim": 128, "dtype": "bfloat16", "token_budget": 256}

    def write(file: str, names: list[str], **meta: Any) -> None:
        results = [Result(name, 1.0 + i, "us", shape) for i, name in enumerate(names)]
        write_json(tmp_path / f"{file}.json", {**machine(), **meta}, results)

    steps = [f"step_us_{name}_{n}" for name in ("icecache", "dense", "sdpa") for n in lengths]
    write("step", [*steps, *(f"step_speedup_{n}" for n in lengths)])
    result = run(plots.main, "--results", str(tmp_path), "--out", str(tmp_path / "docs"))
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "docs").iterdir()} == {
        "step_time.png",
        "speedup.png",
    }
    write("build", [f"build_ms_{name}{n}" for name in ("", "ivf_", "hnsw_") for n in lengths])
    rivals = [f"search_us_{name}_{n}" for name in ("flat", "ivf", "hnsw") for n in lengths]
    write("search", [*(f"select_us_{n}" for n in lengths), *rivals])
    write("generate", ["decode_speedup_7k", "decode_speedup_static_7k"])
    params = {"gb_per_s": 4.0, "gmac_per_s": 3.0}
    kernels = [Result("row_logits/float32/D:128/memory", 1.0, "us", params)]
    roofs = {"read_gbs": 10.0, "fma_gmacs": 50.0}
    write_json(tmp_path / "kernels.json", {**machine(), **roofs}, kernels)
    result = run(plots.main, "--results", str(tmp_path), "--out", str(tmp_path / "docs"))
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "docs").iterdir()} == {
        file for file, _, _ in plots.PLOTS
    }


def test_lengths_are_parsed_and_refused() -> None:
    assert parse_lengths("2048,8192") == [2048, 8192]
    assert [size(length) for length in (2048, 131072, 1000)] == ["2k", "128k", "1000"]
    for text, message in (("2k", "numbers and commas"), ("100", "at least 512")):
        with pytest.raises(typer.BadParameter, match=message):
            parse_lengths(text)


def test_the_commit_is_named_in_a_checkout(repository: Path) -> None:
    if not (repository / ".git").exists():
        pytest.skip("needs a checkout")
    assert commit()
