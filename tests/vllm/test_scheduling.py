"""What a step of 1,024 requests costs vLLM's scheduler with the plugin, and without it."""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from icecache.vllm import engine_args
from icecache.vllm.prefixes import AHEAD
from icecache.vllm.spec import IceCacheSpec
from scheduling import make_request
from vllm import EngineArgs, SamplingParams
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.structured_output import StructuredOutputManager

REQUESTS = 1024
BLOCK = 128
SHAPE: dict[str, Any] = {
    "block_size": BLOCK,
    "num_kv_heads": 2,
    "head_size": 32,
    "dtype": torch.float32,
}
SPECS = {
    "stock": FullAttentionSpec(**SHAPE),
    "ours": IceCacheSpec(**SHAPE, host_slots=10_000_000, slot_bytes=1024),
}


def scheduler(model: Path, name: str) -> Any:
    """vLLM's, or ours, with requests that decode."""
    arguments = engine_args() if name == "ours" else {}
    config = EngineArgs(
        str(model),
        dtype="float32",
        max_model_len=1024,
        skip_tokenizer_init=True,
        max_num_seqs=REQUESTS,
        max_num_batched_tokens=8 * REQUESTS,
        **arguments,
    ).create_engine_config()
    groups = [KVCacheGroupSpec(["layer"], SPECS[name])]
    config.cache_config.num_gpu_blocks = blocks = 2 * REQUESTS
    made = config.scheduler_config.get_scheduler_cls()(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(blocks, kv_cache_tensors=[], kv_cache_groups=groups),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        hash_block_size=BLOCK,
    )
    params = SamplingParams(max_tokens=900, ignore_eos=True)
    for number in range(REQUESTS):
        prompt = [8 + number % 500, 9 + number // 500, 10]
        made.add_request(make_request(f"request {number}", prompt, params=params))
    step(made)
    assert len(made.running) == REQUESTS
    return made


def step(made: Any) -> float:
    """Seconds of the processor that scheduling takes; every request then has a token more."""
    before = time.process_time()
    output = made.schedule()
    seconds = time.process_time() - before
    names = list(output.num_scheduled_tokens)
    places = {name: place for place, name in enumerate(names)}
    tokens = [[77]] * len(names)
    made.update_from_output(output, ModelRunnerOutput(names, places, sampled_token_ids=tokens))
    return seconds


@pytest.fixture(scope="module")
def schedulers(llama: Path) -> dict[str, Any]:
    return {name: scheduler(llama, name) for name in SPECS}


def test_a_step_takes_no_longer_than_stocks(schedulers: dict[str, Any]) -> None:
    """By turns, so that others on the machine slow both."""
    times: dict[str, list[float]] = {name: [] for name in SPECS}
    for _ in range(AHEAD + 1):  # in one of them each request asks for memory
        for name, made in schedulers.items():
            times[name].append(step(made))
    ours, stock = (statistics.median(times[name]) for name in ("ours", "stock"))
    assert ours < 1.3 * stock, f"{1e3 * ours:.2f} ms, and {1e3 * stock:.2f} ms without the plugin"


def test_a_step_calls_little_for_each_request(schedulers: dict[str, Any]) -> None:
    calls = 0

    def count(frame: FrameType, event: str, _: Any) -> None:
        nonlocal calls
        module = frame.f_globals.get("__name__", "")
        calls += event == "call" and module.startswith("icecache.")

    steps = AHEAD + 1
    sys.setprofile(count)
    try:
        for _ in range(steps):
            step(schedulers["ours"])
    finally:
        sys.setprofile(None)
    # vLLM's four questions about blocks, a row for the worker, and now and then memory.
    assert 4 < calls / steps / REQUESTS < 6.5
