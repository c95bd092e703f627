"""The plugin in a real vLLM engine: the same tokens as stock, nothing leaked, others unharmed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import architectures
import models
import pytest
from architectures import FULL, SLIDING
from conftest import EngineFailed, Run

SIZES = [1, 2, 5, 15, 16, 17, 33, 64, 100, 127, 128, 129, 200, 300, 500, 900]
# Most prompts are longer than the budget; without `exact` their steps would leave tokens out.
EXACT = {"exact": True, "token_budget": 64, "dense_tokens": 64}
SMALL = {"max_model_len": 1024, "block_size": 32, "max_num_seqs": 16}


def prompts(sizes: list[int]) -> list[list[int]]:
    generator = random.Random(3)
    return [[generator.randrange(8, 512) for _ in range(size)] for size in sizes]


def serve(
    run: Run,
    model: Path,
    icecache: dict[str, Any],
    sizes: list[int] = SIZES,
    poison: bool = False,
    **llm: Any,
) -> dict[str, Any]:
    """24 greedy tokens of each prompt through the plugin, in a pool of one block a request."""
    return run(
        "generate",
        model=model,
        prompts=prompts(sizes),
        tokens=24,
        poison=poison,
        icecache={"host_memory": "256M", **icecache},
        llm={**SMALL, **llm, "num_gpu_blocks_override": 17},
    )


@pytest.fixture(scope="module")
def stock(run: Run, llama: Path) -> list[list[int]]:
    """What vLLM itself answers to 16 prompts."""
    result = run("generate", model=llama, prompts=prompts(SIZES), tokens=24, llm=SMALL)
    return list(result["tokens"])


@pytest.mark.parametrize(
    "llm",
    [
        {"max_num_batched_tokens": 2048},
        {"max_num_batched_tokens": 64},
        {"max_num_batched_tokens": 128, "long_prefill_token_threshold": 7},
        {"max_num_batched_tokens": 16, "long_prefill_token_threshold": 1},
    ],
    ids=["whole prompts", "64 a step", "chunks of 7", "token by token"],
)
def test_exact_mode_gives_the_tokens_of_stock(
    run: Run, llama: Path, stock: list[list[int]], llm: dict[str, Any]
) -> None:
    result = serve(run, llama, EXACT, poison=True, **llm)  # vLLM's own blocks are never read
    assert result["tokens"] == stock
    assert result["dense_steps"] > 0 and result["steps"] == 0
    assert result["blocks_lost"] == 0 and result["requests"] == 0


def test_eight_bits_are_near_stock(run: Run, llama: Path, stock: list[list[int]]) -> None:
    given = {**EXACT, "kv_dtype": "int8", "segment_tokens": 64, "integrity": "always"}
    result = serve(run, llama, given, max_num_batched_tokens=256)
    begins = [tokens[:4] for tokens in result["tokens"]]
    agreed = sum(one == two[:4] for one, two in zip(begins, stock, strict=True))
    assert agreed >= len(SIZES) - 2  # a near tie may go the other way
    assert result["blocks_lost"] == 0 and result["requests"] == 0
    del given["kv_dtype"]  # vLLM's own word for it
    flag = serve(run, llama, given, max_num_batched_tokens=256, kv_cache_dtype="fp8")
    assert flag["tokens"] == result["tokens"]


def test_a_budget_as_long_as_the_context_gives_the_tokens_of_stock(
    run: Run, llama: Path, stock: list[list[int]]
) -> None:
    result = serve(run, llama, {"token_budget": 1024})
    assert result["tokens"] == stock


def test_two_ranks_give_the_tokens_of_one(run: Run, tmp_path: Path) -> None:
    model = models.tiny_llama(tmp_path, num_q_heads=8, num_kv_heads=4)
    given = {"model": model, "prompts": prompts(SIZES[:12]), "tokens": 24}
    memory = {"host_memory": "64M"}
    one = run("ranks", **given, llm=SMALL)["tokens"]
    two = {**SMALL, "tensor_parallel_size": 2, "max_num_batched_tokens": 64}
    # Two processes on the same cores: bound to them all, as they would on a machine with more.
    bound = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    for settings, forked in ((EXACT, False), ({"token_budget": 1024}, True)):
        ours = {"icecache": {**memory, **settings}, "forked": forked}
        got = run("ranks", **given, llm=two, **ours, environment=bound)
        assert got["tokens"] == one


def test_two_stages_give_the_tokens_of_one(run: Run, tmp_path: Path) -> None:
    model = models.tiny_llama(tmp_path, num_layers=3)  # one stage has two of them, and less room
    given = {"model": model, "prompts": prompts(SIZES[:14]), "tokens": 24}
    bound = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    stages = {**SMALL, "pipeline_parallel_size": 2, "max_num_batched_tokens": 64}
    for settings in (EXACT, {"token_budget": 64, "dense_tokens": 64}):
        icecache = {"host_memory": "64M", **settings}
        one = run("ranks", **given, icecache=icecache, llm=SMALL)["tokens"]
        two = run("ranks", **given, icecache=icecache, llm=stages, forked=True, environment=bound)
        assert two["tokens"] == one


def test_within_the_budget_answers_do_not_depend_on_chunks_or_company(
    run: Run, llama: Path
) -> None:
    answers = []
    for chunk in (2048, 48):
        result = serve(
            run,
            llama,
            {"token_budget": 64, "dense_tokens": 64},
            [300, 400, 500],
            max_num_batched_tokens=chunk,
        )
        assert result["steps"] > 0
        answers.append(result["tokens"])
    assert answers[0] == answers[1]


def test_a_full_host_memory_preempts_and_resumes(
    run: Run, llama: Path, stock: list[list[int]]
) -> None:
    # 1 KiB a token of both layers and KV heads: room for the longest request, not for all.
    memory = {"exact": True, "host_memory": 1400 * 1024}
    result = serve(run, llama, memory, scheduler_reserve_full_isl=False)
    assert result["preemptions"] > 0
    assert result["tokens"] == stock
    assert result["blocks_lost"] == 0 and result["requests"] == 0


def test_random_requests_with_aborts_leak_nothing(run: Run, llama: Path) -> None:
    result = run(
        "storm",
        model=llama,
        count=250,
        abort_share=0.15,
        icecache={"exact": True, "host_memory": "8M", "integrity": "always"},
        llm={**SMALL, "num_gpu_blocks_override": 13, "max_num_batched_tokens": 96},
    )
    assert result["most_requests"] >= 8
    assert 100 < result["answered"] < 250
    assert result["differing"] == []
    assert result["blocks_lost"] == 0
    assert result["requests_left"] == 0 and result["page_bytes_left"] == 0


@pytest.mark.parametrize(
    ("model", "llm"),
    [
        ("llama", {"max_num_batched_tokens": 2048}),
        ("llama", {"max_num_batched_tokens": 64}),
        ("gemma", {"max_num_batched_tokens": 64}),
    ],
)
def test_a_request_with_nan_fails_alone(
    run: Run, request: pytest.FixtureRequest, model: str, llm: dict[str, Any]
) -> None:
    if model == "llama":
        llm["num_gpu_blocks_override"] = 17
    result = run(
        "broken",
        model=request.getfixturevalue(model),
        icecache={"exact": True, "host_memory": "64M"},
        llm={**SMALL, **llm},
    )
    assert result["reasons"].pop("bad") == "error"
    assert result["reasons"].pop("bad, one token") == "error"
    assert result["tokens_of_lost"] == [[], []]
    assert set(result["reasons"].values()) == {"length"}
    assert result["differing"] == [] and result["failed"] == 2 and result["requests_left"] == 0


def test_layers_of_two_shapes_share_prefixes_and_leak_nothing(run: Run, tmp_path: Path) -> None:
    result = run(
        "prefix_storm",
        model=architectures.make("Laguna", tmp_path, layer_types=[FULL] * 4),
        count=80,
        longest=200,
        abort_share=0.1,
        icecache={"exact": True, "host_memory": "8M", "integrity": "always"},
        llm={**SMALL, "num_gpu_blocks_override": 17, "max_num_batched_tokens": 128},
    )
    assert result["answered"] > 40 and result["cached_tokens"] > 1000 and result["kept"] > 0
    assert result["differing"] == [] and result["failed"] == 0
    assert result["blocks_lost"] == result["sequences_left"] == 0
    assert result["page_bytes_left"] == result["slots_left"] == 0


def test_a_request_with_nan_fails_in_all_engines(run: Run, tmp_path: Path) -> None:
    result = run(
        "broken",
        model=architectures.make("Laguna", tmp_path, models.with_nan_token),
        icecache={"exact": True, "host_memory": "64M"},
        llm={**SMALL, "max_num_batched_tokens": 64},
    )
    assert result["reasons"].pop("bad") == result["reasons"].pop("bad, one token") == "error"
    assert set(result["reasons"].values()) == {"length"}
    assert result["differing"] == [] and result["failed"] == 2 and result["requests_left"] == 0


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        # One sliding layer: vLLM makes groups of one layer, three of them of ours.
        ("Gemma 3", {"layer_types": [SLIDING, FULL, FULL, FULL]}),
        ("Granite hybrid", {}),
    ],
)
def test_models_of_several_groups_with_prefix_caching_on(
    run: Run, tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    given = {
        "model": architectures.make(name, tmp_path, **changes),
        "prompts": prompts(SIZES),
        "tokens": 24,
        "llm": {**SMALL, "enable_prefix_caching": True, "max_num_batched_tokens": 64},
    }
    given["llm"]["disable_hybrid_kv_cache_manager"] = False
    result = run("generate", **given, icecache={"host_memory": "64M", **EXACT})
    assert result["tokens"] == run("generate", **given)["tokens"]
    assert result["blocks_lost"] == 0 and result["requests"] == 0


def test_too_little_host_memory_is_refused_at_start(run: Run, llama: Path) -> None:
    with pytest.raises(EngineFailed, match=r"host_memory: expected at least .* GiB, room for one"):
        run(
            "generate",
            model=llama,
            prompts=prompts([5]),
            tokens=4,
            icecache={"host_memory": "1M"},
            llm=SMALL,
        )
