"""Prefix caching by the plugin: the answers of cold requests, and nothing leaked."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path
from typing import Any

import models
from conftest import Run
from icecache.bench.tasks import gsm8k
from transformers import AutoTokenizer

SMALL: dict[str, Any] = {"max_model_len": 1024, "block_size": 32, "max_num_seqs": 16}

LORA = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
# Requests of a storm. ICECACHE_STORM=2000 takes minutes, and is not for every day.
COUNT = int(os.environ.get("ICECACHE_STORM", "200"))


def storm(run: Run, model: Path, icecache: dict[str, Any], **spec: Any) -> dict[str, Any]:
    llm = {**SMALL, "num_gpu_blocks_override": 17, "max_num_batched_tokens": 128}
    llm |= spec.pop("llm", {})
    given = {"count": COUNT, "abort_share": 0.1, "longest": 400, "adapters": [], **spec}
    given |= {"llm": llm, "longest_seconds": 600 + 3 * COUNT}
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
    assert result["cached_tokens"] > 30 * COUNT and result["kept"] > 0


def test_an_adapter_loaded_anew_from_elsewhere_shares_nothing(
    run: Run, llama: Path, tmp_path: Path
) -> None:
    one, two = (models.random_adapter(tmp_path / f"{i}", llama, seed=i) for i in range(2))
    prompt = [8 + i % 400 for i in range(300)]
    loras = [["a", 1, one], ["a", 1, one], ["a", 2, two], ["b", 3, two], ["a", 2, two], None]
    requests = [{"prompt_token_ids": prompt, "lora": lora} for lora in loras]
    llm = {**SMALL, **LORA, "enable_prefix_caching": True}
    given = {"requests": requests, "llm": llm}
    result = run("reuse", model=llama, icecache={"exact": True, "host_memory": "64M"}, **given)
    assert result["cached"] == [0, 299, 0, 0, 299, 0]
    made = result["made"]
    assert made[0] == made[1] and made[2] == made[3] == made[4]
    assert len({tuple(answer) for answer in made}) == 3, "adapters that change nothing"
    assert result["consistent"] and result["left"] == 0


def test_in_a_pool_that_is_too_small_what_is_kept_goes_first(
    run: Run, llama: Path, tmp_path: Path
) -> None:
    """And adapters share nothing with one another."""
    folders = [models.random_adapter(tmp_path / name, llama, seed=i) for i, name in enumerate("ab")]
    adapters = [[folder.name, folder] for folder in folders]
    llm = {**LORA, "scheduler_reserve_full_isl": False}
    result = storm(run, llama, {"host_memory": 2400 * 1024}, adapters=adapters, llm=llm)
    check(result)
    assert result["cached_tokens"] > 5 * COUNT and result["evictions"] > 0
    assert result["preemptions"] > 0


def test_a_request_whose_beginning_is_gone_starts_cold(run: Run, llama: Path) -> None:
    result = run(
        "lost_owner", model=llama, icecache={"exact": True, "host_memory": "64M"}, llm=SMALL
    )
    assert result["same"] and result["reasons"] == ["length", "length"]
    assert result["failed"] == 1, "the one that was to fork what was gone"


def test_what_is_cached_is_what_is_alike_and_of_the_same_user(run: Run, llama: Path) -> None:
    document = [8 + i % 400 for i in range(300)]
    question, other = [*document, 17, 19], [*document, 11, 12, 13]
    requests: list[dict[str, Any]] = [
        {"prompt_token_ids": question},
        {"prompt_token_ids": other},
        {"prompt_token_ids": other},  # as if its answer were asked for again
        {"prompt_token_ids": document, "cache_salt": "alice"},
        {"prompt_token_ids": other, "cache_salt": "alice"},
        {"prompt_token_ids": other, "cache_salt": "bob"},
        {"prompt_token_ids": other, "sampling": {"skip_reading_prefix_cache": True}},
        {"prompt_token_ids": document[:20]},  # less than a block
        {"prompt_token_ids": document[:33]},
    ]
    given = {"requests": requests, "llm": {**SMALL, "enable_prefix_caching": True}}
    result = run("reuse", model=llama, icecache={"exact": True, "host_memory": "64M"}, **given)
    assert result["cached"] == [0, 300, 302, 0, 300, 0, 0, 0, 32]
    assert result["made"][1] == result["made"][2] == result["made"][4] == result["made"][5]
    assert result["blocks"] > 0 and result["consistent"] and result["left"] == 0


def test_behind_prompts_given_as_embeddings_whole_blocks_are_shared(run: Run, llama: Path) -> None:
    text = [16 + i % 400 for i in range(300)]
    requests = [{"embedded": ids} for ids in (text, text, [*text[:100], *text[:200]])]
    llm = {**SMALL, "enable_prefix_caching": True, "enable_prompt_embeds": True}
    given = {"requests": requests, "llm": llm}
    result = run("reuse", model=llama, icecache={"exact": True, "host_memory": "64M"}, **given)
    assert result["cached"] == [0, 288, 96]
    assert result["made"][0] == result["made"][1] != result["made"][2]


def test_a_second_pass_over_gsm8k_reads_nothing_again(
    run: Run, smollm2: Path, shared_dir: Path
) -> None:
    """vLLM's own recipe for stores of prefixes: by its counters, and with equal answers."""
    data = shared_dir / "data" / "gsm8k_test.jsonl"
    samples = list(islice(gsm8k.open_source(data).samples(gsm8k.TASK), 8))
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompts = [tokenizer(sample.prompt)["input_ids"] for sample in samples]
    given = {"prompts": prompts, "passes": 2, "tokens": 16, "llm": {**SMALL, "max_model_len": 1536}}
    result = run("passes", model=smollm2, icecache={"exact": True, "host_memory": "1G"}, **given)
    first, second, cold = result["rounds"]
    tokens = sum(len(prompt) for prompt in prompts)
    assert first["queries"] == second["queries"] == cold["queries"] == tokens
    for one in result["rounds"]:
        assert one["hits"] == sum(one["cached"])
    examples = min(len(prompt) for prompt in prompts) // 2
    assert first["cached"].count(0) == 1, "who reads the examples"
    assert sorted(first["cached"])[1] > examples
    assert second["cached"] == [len(prompt) - 1 for prompt in prompts]
    assert first["made"] == second["made"] == cold["made"]
    scores = [
        [gsm8k.score(tokenizer.decode(ids), s) for ids, s in zip(one["made"], samples, strict=True)]
        for one in (first, second)
    ]
    assert scores[0] == scores[1]


def test_a_server_may_turn_it_off(run: Run, llama: Path) -> None:
    requests = [{"prompt_token_ids": [9] * 100}] * 2
    given = {"requests": requests, "llm": {**SMALL, "enable_prefix_caching": False}}
    result = run("reuse", model=llama, icecache={"exact": True, "host_memory": "64M"}, **given)
    assert result["cached"] == [0, 0] and result["blocks"] == 0


def test_a_model_with_sliding_windows_shares_nothing_and_answers_right(
    run: Run, gemma: Path
) -> None:
    prompt = [8 + i % 400 for i in range(300)]
    requests = [{"prompt_token_ids": [*prompt, 8 + i]} for i in (0, 0, 1)]
    llm = {**SMALL, "enable_prefix_caching": True}
    stock = run(
        "generate",
        model=gemma,
        prompts=[r["prompt_token_ids"] for r in requests],
        tokens=8,
        llm=SMALL,
    )
    given = {"requests": requests, "llm": llm}
    result = run("reuse", model=gemma, icecache={"exact": True, "host_memory": "64M"}, **given)
    assert result["made"] == stock["tokens"] and result["cached"] == [0, 0, 0]
