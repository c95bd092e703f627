"""Prompts within `prefill_budget`: vLLM cuts them between blocks, so that answers stay the same."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from icecache import PREFILL_BLOCK, Config, InvalidArgument
from icecache.shape import CacheShape
from icecache.vllm import engine_args, support
from icecache.vllm.engines import Layer
from icecache.vllm.prompts import check_prompt_layers, whole_blocks
from icecache.vllm.spec import IceCacheSpec
from scheduling import BLOCK, Scheduling, make_request
from vllm import EngineArgs
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.structured_output import StructuredOutputManager

WITHIN = {"token_budget": 64, "dense_tokens": 64, "prefill_budget": 64, "prefill_chunk": 256}
SEQS = 8
SHAPE = CacheShape(1, 4, 2, 32)


def config(model: Path, settings: dict[str, Any] | None = None, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "model": str(model),
        "dtype": "float32",
        "max_model_len": 2048,
        "max_num_seqs": SEQS,
        "max_num_batched_tokens": 256,
        "skip_tokenizer_init": True,
        **engine_args(**(settings or WITHIN)),
    }
    return EngineArgs(**{**arguments, **changes}).create_engine_config()


def scheduler(given: Any) -> Any:
    """Ours, with host memory for everybody."""
    shape: dict[str, Any] = {"block_size": 128, "num_kv_heads": 2, "head_size": 32}
    spec = IceCacheSpec(**shape, dtype=torch.float32, host_slots=1 << 20, slot_bytes=1024)
    given.cache_config.num_gpu_blocks = blocks = 2 * SEQS
    groups = [KVCacheGroupSpec(["layer"], spec)]
    return given.scheduler_config.get_scheduler_cls()(
        vllm_config=given,
        kv_cache_config=KVCacheConfig(blocks, kv_cache_tensors=[], kv_cache_groups=groups),
        structured_output_manager=StructuredOutputManager(given),
        block_size=128,
        hash_block_size=128,
    )


@pytest.mark.parametrize("budget", [PREFILL_BLOCK + SEQS, 3 * PREFILL_BLOCK + 10, 2048])
def test_steps_end_between_blocks_and_nobody_waits_for_ever(llama: Path, budget: int) -> None:
    """Requests come at random; each step's tokens of a prompt end with a block or the prompt."""
    made = scheduler(config(llama, max_num_batched_tokens=budget))
    chance = random.Random(budget)
    requests = {
        f"r{n}": make_request(f"r{n}", range(8, 8 + chance.randint(1, 600)), chance.randint(1, 30))
        for n in range(24)
    }
    waiting, cut = list(requests.values()), 0
    for _ in range(3000):
        if waiting and chance.random() < 0.3:
            made.add_request(waiting.pop())
        if not waiting and not made.get_num_unfinished_requests():
            break
        output = made.schedule()
        counts = output.num_scheduled_tokens
        for name, count in counts.items():
            request = requests[name]
            end = request.num_computed_tokens  # counted as soon as it is scheduled
            assert end % PREFILL_BLOCK == 0 or end >= request.num_tokens, (name, end, count)
            cut += end < request.num_tokens
        names = list(counts)
        done = [requests[name].num_computed_tokens >= requests[name].num_tokens for name in names]
        tokens = [[77] if is_done else [] for is_done in done]
        places = {name: place for place, name in enumerate(names)}
        runner = ModelRunnerOutput(names, places, sampled_token_ids=tokens)
        made.update_from_output(output, runner)
    assert not waiting and not made.get_num_unfinished_requests(), "some request waits for ever"
    assert cut > 0 or budget == 2048


def test_tokens_of_a_step() -> None:
    size = PREFILL_BLOCK
    assert whole_blocks(0, 5 * size + 9, 1000, size) == 5 * size
    assert whole_blocks(0, size - 1, 1000, size) == 0
    assert whole_blocks(10, size, 1000, size) == size - 10  # where an earlier turn has ended
    assert whole_blocks(5 * size, 9, 5 * size + 9, size) == 9  # the end of the prompt
    assert whole_blocks(700, 1, 701, size) == 1  # a step that decodes, one with drafts
    assert whole_blocks(700, 4, 701, size) == 4
    assert whole_blocks(3, 7, 1000, 1) == 7


def test_hits_are_of_whole_blocks() -> None:
    machine, whole = Scheduling(), 2 * BLOCK
    machine.prefixes.turn_on(BLOCK, 400, True, whole)
    prompt = list(range(30))
    for name, tokens, hit in (
        ("first", prompt, 0),
        ("again", prompt, 24),
        ("another", [*prompt[:17], 99], 16),
        ("short", prompt[:whole], 0),
        ("as long as a block", prompt[: whole + 1], whole),
    ):
        machine.add(make_request(name, tokens))
        machine.run()
        assert machine.hits[name] == hit, name
    machine.check_empty()


def test_what_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    support.check_config(config(llama, max_num_batched_tokens=PREFILL_BLOCK + SEQS))
    given = config(llama, max_num_batched_tokens=PREFILL_BLOCK + SEQS - 1)
    with pytest.raises(InvalidArgument, match=r"max_num_batched_tokens: expected at least 72.*71;"):
        support.check_config(given)
    support.check_config(config(llama, {**WITHIN, "exact": True}, max_num_batched_tokens=SEQS))
    given = config(llama, long_prefill_token_threshold=63)
    with pytest.raises(InvalidArgument, match=r"long_prefill_token_threshold: .* least 64.*63"):
        support.check_config(given)
    given = config(llama)
    given.cache_config.mamba_cache_mode = "align"
    with pytest.raises(InvalidArgument, match=r"prefill_budget: .*--no-enable-prefix-caching"):
        support.check_config(given)
    shares = [Layer("a", SHAPE), replace(Layer("b", SHAPE), owner="a")]
    check_prompt_layers(shares, Config())
    with pytest.raises(InvalidArgument, match=r"prefill_budget: .* share keys and values"):
        check_prompt_layers(shares, Config(prefill_budget=64))
    monkeypatch.setattr("icecache.vllm.prompts.device_of", lambda _: torch.device("cuda"))
    with pytest.raises(InvalidArgument, match=r"prefill_budget: .* on a CUDA device: leave it out"):
        support.check_config(config(llama))


def test_answers_do_not_depend_on_chunks_or_company(run: Run, llama: Path) -> None:
    chance = random.Random(5)
    prompts = [[chance.randrange(8, 512) for _ in range(size)] for size in (700, 1201, 300, 960)]
    given: dict[str, Any] = {"model": llama, "prompts": prompts, "tokens": 16}
    llm = {"max_model_len": 1400, "max_num_seqs": 4, "num_gpu_blocks_override": 5}
    answers, heads = [], 2 * 2
    for budget in (4096, 320, 128):
        result = run(
            "generate",
            **given,
            icecache={"host_memory": "64M", **WITHIN},
            llm={**llm, "max_num_batched_tokens": budget},
            alone=budget == 4096,  # then each prompt once more, by itself
        )
        tokens = heads * sum(map(len, prompts))
        assert result["prompt_tokens"] == (2 * tokens if budget == 4096 else tokens)
        assert 0.3 < result["sparse_prompt_tokens"] / result["prompt_tokens"] < 1
        assert result["steps"] > 0
        answers += [result["tokens"], *([result["alone"]] if budget == 4096 else [])]
    assert all(other == answers[0] for other in answers[1:])


def test_a_prompt_that_begins_alike_reads_the_rest(run: Run, llama: Path) -> None:
    chance = random.Random(6)
    text = [chance.randrange(8, 512) for _ in range(900)]
    prompts = [text, text, [*text[:500], *text[:77]], text[:300]]
    result = run(
        "reuse",
        model=llama,
        requests=[{"prompt_token_ids": prompt} for prompt in prompts],
        icecache={"host_memory": "64M", **WITHIN},
        llm={"max_model_len": 1024, "max_num_seqs": 4, "block_size": 32}
        | {"max_num_batched_tokens": 320, "enable_prefix_caching": True},
    )
    assert result["cached"] == [0, 896, 448, 256]
    assert result["consistent"] and result["left"] == 0
