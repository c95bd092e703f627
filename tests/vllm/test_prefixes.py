"""Prefix caching by the plugin: the answers of cold requests, and nothing leaked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conftest import Run

SMALL: dict[str, Any] = {"max_model_len": 1024, "block_size": 32, "max_num_seqs": 16}


def storm(run: Run, model: Path, icecache: dict[str, Any], **spec: Any) -> dict[str, Any]:
    llm = {**SMALL, "num_gpu_blocks_override": 17, "max_num_batched_tokens": 128}
    llm |= spec.pop("llm", {})
    given = {"count": 300, "abort_share": 0.1, "longest": 400, "llm": llm, **spec}
    return run("prefix_storm", model=model, icecache={"exact": True, **icecache}, **given)


def check(result: dict[str, Any]) -> None:
    assert result["differing"] == []
    assert result["failed"] == 0 and result["blocks_lost"] == 0
    assert result["sequences_left"] == 0 and result["page_bytes_left"] == 0
    assert result["slots_left"] == 0


def test_random_requests_that_share_prefixes_get_the_answers_of_cold_ones(
    run: Run, llama: Path
) -> None:
    result = storm(run, llama, {"host_memory": "64M", "integrity": "always"})
    check(result)
    assert result["cached_tokens"] > 10_000 and result["kept"] > 0


def test_in_a_pool_that_is_too_small_what_is_kept_goes_first(run: Run, llama: Path) -> None:
    greedy = {"scheduler_reserve_full_isl": False}
    result = storm(run, llama, {"host_memory": 2400 * 1024}, llm=greedy)
    check(result)
    assert result["cached_tokens"] > 1_000 and result["evictions"] > 0
    assert result["preemptions"] > 0
