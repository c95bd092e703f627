"""Drafted tokens, found in the text or by layers: the answers of decoding without them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import models
import pytest
from conftest import EngineFailed, Run

SMALL: dict[str, Any] = {"max_model_len": 1024, "block_size": 32, "max_num_seqs": 16}
SIZES = [1, 2, 31, 32, 33, 64, 65, 127, 300, 500]
TOKENS = 130
EXACT = {"exact": True, "token_budget": 64, "dense_tokens": 64, "host_memory": "256M"}
# Segments of few tokens: many are sealed and merged while tokens are drafted.
BUDGET = {"token_budget": 64, "dense_tokens": 64, "segment_tokens": 32, "host_memory": "256M"}
SETTINGS = {"exact": EXACT, "budget": BUDGET}


def drafting(method: str, drafts: int, model: Path | None = None) -> dict[str, Any]:
    """vLLM's arguments."""
    config: dict[str, Any] = {"method": method, "num_speculative_tokens": drafts}
    if method == "ngram":
        config |= {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
    if model is not None:
        config["model"] = str(model)
    return {"speculative_config": config}


def repetitive(sizes: list[int]) -> list[list[int]]:
    """Prompts of which parts repeat, so that there is something to be found."""
    generator = random.Random(5)
    prompts = []
    for size in sizes:
        part = [generator.randrange(8, 512) for _ in range(max(1, size // 3))]
        prompts.append((part * 4)[:size])
    return prompts


def generate(run: Run, model: Path, icecache: dict[str, Any] | None, **llm: Any) -> dict[str, Any]:
    given = {"prompts": repetitive(SIZES), "tokens": TOKENS, "llm": {**SMALL, **llm}}
    return run("generate", model=model, icecache=icecache, **given)


@pytest.fixture(scope="module")
def without(run: Run, llama: Path) -> dict[str, list[list[int]]]:
    """Tokens without drafts."""
    return {name: generate(run, llama, given)["tokens"] for name, given in SETTINGS.items()}


@pytest.fixture(scope="module")
def drafters(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """vLLM's arguments by what drafts: layers with keys and values of their own."""
    folder = tmp_path_factory.mktemp("drafters")
    other = models.tiny_llama(folder / "other", 2, 1, num_layers=1, seed=3)
    head = models.eagle_head(folder / "head", llama)
    return {
        "the same model": drafting("draft_model", 4, llama),
        "another model": drafting("draft_model", 3, other),
        "a head": drafting("eagle", 3, head),
    }


@pytest.mark.parametrize(
    ("settings", "method", "drafts"),
    [
        ("exact", "ngram", 1),  # 4: test_as_many_drafts_are_accepted_as_by_stock
        ("exact", "ngram", 15),
        ("exact", "suffix", 15),
        ("budget", "ngram", 1),
        ("budget", "ngram", 4),
        ("budget", "ngram", 15),
        ("budget", "suffix", 15),
    ],
)
def test_the_tokens_are_those_without_drafts(
    run: Run,
    llama: Path,
    without: dict[str, list[list[int]]],
    settings: str,
    method: str,
    drafts: int,
) -> None:
    result = generate(run, llama, SETTINGS[settings], **drafting(method, drafts))
    assert result["tokens"] == without[settings]
    assert result["blocks_lost"] == 0 and result["requests"] == 0
    assert 0 < result["drafts"]["accepted"] < result["drafts"]["made"]


@pytest.mark.parametrize("drafter", ["the same model", "another model", "a head"])
def test_the_tokens_are_those_without_layers_that_draft(
    run: Run,
    llama: Path,
    without: dict[str, list[list[int]]],
    drafters: dict[str, dict[str, Any]],
    drafter: str,
) -> None:
    result = generate(run, llama, BUDGET, **drafters[drafter])
    assert result["tokens"] == without["budget"]
    assert result["blocks_lost"] == 0 and result["requests"] == 0
    drafts = result["drafts"]
    assert 0 <= drafts["accepted"] < drafts["made"]
    if drafter == "the same model":
        assert drafts["accepted"] > 0.5 * drafts["made"], "the budget makes the difference"


def as_stock(run: Run, model: Path, **llm: Any) -> dict[str, Any]:
    """A run whose answers and drafts are those of stock vLLM."""
    ours = generate(run, model, EXACT, **llm)
    stock = generate(run, model, None, **llm)
    assert ours["tokens"] == stock["tokens"]
    for counted in ("steps", "made", "accepted", "ids"):
        assert ours["drafts"][counted] == stock["drafts"][counted]
    assert ours["drafts"]["made"] > 0
    return ours


@pytest.mark.parametrize("drafter", ["ngram", "the same model", "a head"])
def test_as_many_drafts_are_accepted_as_by_stock(
    run: Run,
    llama: Path,
    without: dict[str, list[list[int]]],
    drafters: dict[str, dict[str, Any]],
    drafter: str,
) -> None:
    result = as_stock(run, llama, **(drafters.get(drafter) or drafting("ngram", 4)))
    assert result["tokens"] == without["exact"]
    assert result["drafts"]["accepted"] > 0


@pytest.mark.sweep
def test_heads_of_other_kinds_and_beside_sliding_windows(
    run: Run, llama: Path, gemma: Path, tmp_path: Path
) -> None:
    as_stock(run, models.mtp_model(tmp_path), load_format="dummy", **drafting("mtp", 2))
    head = models.eagle_head(tmp_path / "head", llama)
    assert as_stock(run, gemma, **drafting("eagle", 2, head))["drafts"]["accepted"] > 0
    target = models.tiny_llama(tmp_path / "target", num_layers=8)  # EAGLE 3 reads from three layers
    as_stock(run, target, load_format="dummy", **drafting("eagle3", 2, head))


@pytest.mark.parametrize(
    ("settings", "drafter"),
    [("exact", "ngram"), ("budget", "ngram"), ("exact", "a head"), ("budget", "the same model")],
)
def test_random_requests_with_aborts_and_preemption(
    run: Run, llama: Path, drafters: dict[str, dict[str, Any]], settings: str, drafter: str
) -> None:
    # Layers that draft have blocks of all tokens: room for one longest request, and some more.
    by_layers = drafter in drafters
    llm = drafters[drafter] if by_layers else drafting("ngram", 5)
    host_memory = (1400 if by_layers else 1800) << 10
    result = run(
        "storm",
        model=llama,
        count=50 if by_layers else 200,
        abort_share=0.02,
        tokens=60,
        icecache={**SETTINGS[settings], "host_memory": host_memory, "integrity": "always"},
        # 1 KiB a token of both layers and KV heads: room for few of the requests at once.
        llm={
            **SMALL,
            **llm,
            "num_gpu_blocks_override": 34 if by_layers else 13,
            "max_num_batched_tokens": 96,
            "scheduler_reserve_full_isl": False,
        },
    )
    assert result["drafts"]["accepted"] > (20 if drafter == "a head" else 100)
    # Within a budget what a preempted request had made is part of its prompt from then on.
    may_differ = result["preempted"] if settings == "budget" else []
    assert result["preempted"] and set(result["differing"]) <= set(may_differ)
    assert result["drafts"]["behind_prompts"] > 0, "of one token"
    assert result["answered"] > (40 if by_layers else 100)
    assert result["blocks_lost"] == 0
    assert result["requests_left"] == 0 and result["page_bytes_left"] == 0


@pytest.mark.parametrize("host_memory", [64 << 20, 2400 << 10])
def test_random_requests_that_share_prefixes(run: Run, llama: Path, host_memory: int) -> None:
    """Hits that leave one token of a prompt come with drafts that nobody knows."""
    llm = {**SMALL, **drafting("ngram", 5), "num_gpu_blocks_override": 17}
    llm["scheduler_reserve_full_isl"] = False
    result = run(
        "prefix_storm",
        model=llama,
        count=200,
        abort_share=0.1,
        longest=400,
        tokens=60,
        choices=0.0,  # vLLM's rejection sampler fails on a CPU at top_k and a step without drafts
        icecache={**EXACT, "host_memory": host_memory, "integrity": "always"},
        llm={**llm, "max_num_batched_tokens": 128},
    )
    assert result["differing"] == [] and result["drafts"]["accepted"] > 30
    assert result["drafts"]["behind_prompts"] > 0
    assert result["cached_tokens"] > 1_000 and result["failed"] == 0
    assert (result["preemptions"] > 0) == (host_memory < 64 << 20)
    assert result["sequences_left"] == 0 and result["page_bytes_left"] == 0
    assert result["blocks_lost"] == 0 and result["slots_left"] == 0


def test_what_is_kept_of_requests_with_drafts_is_shared_as_without(run: Run, llama: Path) -> None:
    texts = repetitive([31, 64, 97, 300, 301, 302])
    requests = [
        {"prompt_token_ids": [*text, *more], "sampling": {"max_tokens": tokens}}
        for text in texts
        for more, tokens in (([], 40), ([], 8), ([9], 33), ([9, 11], 8))
    ]
    made = []
    for llm in ({}, drafting("ngram", 7)):
        given = {"requests": requests, "llm": {**SMALL, "enable_prefix_caching": True, **llm}}
        result = run("reuse", model=llama, icecache=BUDGET, **given)
        assert result["consistent"] and sum(result["cached"]) > 1000
        made.append((result["made"], result["cached"], result["blocks"]))
    assert made[0] == made[1]


def test_a_request_with_nan_fails_alone(run: Run, llama: Path) -> None:
    llm = {**SMALL, **drafting("ngram", 3), "max_num_batched_tokens": 64}
    result = run("broken", model=llama, icecache=EXACT, llm=llm)
    assert result["reasons"].pop("bad") == result["reasons"].pop("bad, one token") == "error"
    assert set(result["reasons"].values()) == {"length"}
    assert result["differing"] == [] and result["requests_left"] == 0


@pytest.mark.parametrize(
    ("icecache", "drafts", "message"),
    [
        (BUDGET, 16, "num_speculative_tokens: expected at most 15, one less than window_tokens"),
        ({**BUDGET, "decode_tokens": 4}, 4, r"at most 3, .* decode_tokens \(4\), got 4; lower it"),
        ({**BUDGET, "index": "dci"}, 3, "speculative decoding and index=dci: .*use index=tree"),
    ],
)
def test_drafts_that_would_leave_a_trace_are_refused(
    run: Run, llama: Path, icecache: dict[str, Any], drafts: int, message: str
) -> None:
    with pytest.raises(EngineFailed, match=message):
        generate(run, llama, icecache, **drafting("ngram", drafts))
