"""The plugin with its cache on a CUDA device: here on the emulator, in a real vLLM on the CPU."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import models
import pytest
import torch
from conftest import EngineFailed, Run
from icecache import InvalidArgument, OutOfPages, device
from icecache.reference import dense_attention
from icecache.shape import CacheShape
from icecache.vllm import prompt_attention, worker
from icecache.vllm.engines import Layer
from icecache.vllm.names import FLASH_ATTENTION, FullAttentionSpec
from icecache.vllm.spec import IceCacheSpec
from test_drafts import drafting
from test_engine import prompts
from test_refusals import config

sys.path.append(str(Path(__file__).resolve().parents[1] / "python"))
from emulated import require_emulator

SMALL = {"max_model_len": 512, "block_size": 32, "max_num_seqs": 6, "num_gpu_blocks_override": 7}
SIZES = [1, 5, 33, 100, 200, 300, 64, 17]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a head size that the kernels cover."""
    require_emulator()
    return models.tiny_llama(tmp_path_factory.mktemp("llama"), head_dim=64)


def serve(run: Run, model: Path, icecache: dict[str, Any], **llm: Any) -> dict[str, Any]:
    return run(
        "generate",
        model=model,
        prompts=prompts(SIZES),
        tokens=12,
        emulated=True,
        icecache={"host_memory": "64M", **icecache},
        llm={**SMALL, **llm},
    )


@pytest.fixture(scope="module")
def stock(run: Run, model: Path) -> list[list[int]]:
    """What vLLM itself answers."""
    llm = {**SMALL, "num_gpu_blocks_override": None}
    result = run("generate", model=model, prompts=prompts(SIZES), tokens=12, llm=llm)
    return list(result["tokens"])


@pytest.mark.parametrize(
    ("batched_tokens", "device_tokens"),
    [(1024, 0), (48, 0), (1024, 1024)],
    ids=["whole prompts", "48 tokens a step", "some are resident"],
)
def test_a_budget_as_long_as_the_context_gives_the_tokens_of_stock(
    run: Run, model: Path, stock: list[list[int]], batched_tokens: int, device_tokens: int
) -> None:
    budget = {"token_budget": 512, "device_tokens": device_tokens}
    result = serve(run, model, budget, max_num_batched_tokens=batched_tokens)
    assert result["tokens"] == stock
    # Eight requests in six seats: they step in changing company, beside prompts.
    assert result["steps"] + result["dense_steps"] == 8 * 11 * 2 * 2
    assert (result["dense_steps"] > 0) == (device_tokens > 0) and result["steps"] > 0
    assert result["blocks_lost"] == 0 and result["requests"] == 0
    assert result["page_misses"] > 0


def test_requests_that_the_device_holds_give_the_tokens_of_stock(
    run: Run, model: Path, stock: list[list[int]]
) -> None:
    small = {"token_budget": 48, "window_tokens": 16, "device_tokens": 8192}
    result = serve(run, model, small, max_num_batched_tokens=48)
    assert result["tokens"] == stock
    assert result["steps"] == 0 and result["dense_steps"] == 8 * 11 * 2 * 2


def test_drafts_change_no_token(run: Run, model: Path, stock: list[list[int]]) -> None:
    """With residents, and with requests that the budget holds."""
    budget = {"token_budget": 512, "device_tokens": 1024}
    result = serve(run, model, budget, **drafting("ngram", 5))
    assert result["tokens"] == stock
    assert 0 < result["drafts"]["accepted"] < result["drafts"]["made"]
    assert result["steps"] > 0 and result["dense_steps"] > 0
    assert result["blocks_lost"] == 0 and result["requests"] == 0


def test_requests_come_and_go(run: Run, model: Path) -> None:
    result = run(
        "storm",
        model=model,
        count=24,
        abort_share=0.1,
        emulated=True,
        icecache={"host_memory": "64M", "token_budget": 64},
        llm=SMALL,
    )
    assert result["most_requests"] >= 4
    assert result["answered"] > 10 and not result["differing"]
    assert result["requests_left"] == 0 and result["page_bytes_left"] == 0


def test_requests_grow_and_wait_for_room(run: Run, model: Path) -> None:
    result = run(
        "storm",
        model=model,
        count=8,
        abort_share=0,
        sizes=[20, 1020, 1040],
        emulated=True,
        # Four steps of room; a request of the longest takes two of them.
        icecache={"host_memory": "8M", "token_budget": 64},
        llm={**SMALL, "max_model_len": 2048, "max_num_batched_tokens": 4096},
    )
    assert result["most_requests"] >= 3  # two, if each took room for the longest
    assert result["answered"] == 8
    assert result["requests_left"] == 0 and result["page_bytes_left"] == 0
    # A request that was preempted gets an index of all its tokens when it comes again.
    assert len(result["differing"]) <= result["preemptions"]


def test_requests_are_preempted_around_the_switch(run: Run, model: Path) -> None:
    """Residents that outgrow the device, some of them preempted, and with drafts."""
    result = run(
        "storm",
        model=model,
        count=8,
        compare=False,  # residents attend to more
        abort_share=0.02,
        sizes=[20, 1015, 1020],
        tokens=24,
        emulated=True,
        icecache={"host_memory": "8M", "token_budget": 64, "device_tokens": 1280},
        llm={
            **SMALL,
            **drafting("ngram", 3),
            "max_model_len": 2048,
            "max_num_batched_tokens": 4096,
            "scheduler_reserve_full_isl": False,
        },
    )
    assert result["preemptions"] > 0 and result["answered"] > 6
    assert result["steps"] > 0 and result["dense_steps"] > 0
    assert result["requests_left"] == 0 and result["page_bytes_left"] == 0
    assert result["drafts"]["made"] > 0


def test_a_small_pool_is_refused(run: Run, model: Path) -> None:
    with pytest.raises(EngineFailed, match="host_memory: expected at least"):
        serve(run, model, {"host_memory": "1M"})


def test_a_device_without_room_says_what_to_lower(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**settings: Any) -> None:
        raise OutOfPages("the device has no 7 bytes left")

    monkeypatch.setattr(device, "KIND", "cpu")
    monkeypatch.setattr(worker, "DeviceEngine", full)
    made = worker.Worker(config(model, max_num_seqs=9))
    stock = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float32)
    made.add_layer(Layer("layer", CacheShape(1, 4, 2, 64, scale=0.125)), stock)
    with pytest.raises(
        InvalidArgument,
        match=r"9 requests of which one has 1,024 tokens \(the device has no 7 .*lower --max-num",
    ):
        made.open_store()


def test_requests_take_room_by_steps() -> None:
    spec = IceCacheSpec(
        block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float32, room_step=1024
    )
    assert [spec.slots_of(tokens) for tokens in (1, 1024, 1025)] == [1024, 1024, 2048]


HEADS, KV_HEADS, DIM = 4, 2, 64


def vllm_flash_attention() -> Any:
    """vLLM's function, apart from its package, which cannot be imported without CUDA."""
    folder = importlib.util.find_spec("vllm.vllm_flash_attn", None).submodule_search_locations[0]
    path = f"{folder}/flash_attn_interface.py"
    spec = importlib.util.spec_from_file_location("flash_attn_interface", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.flash_attn_varlen_func


def flash(**arguments: Any) -> None:
    """What vLLM's FlashAttention does with these arguments, for one prompt."""
    given = inspect.signature(vllm_flash_attention()).bind(**arguments).arguments
    queries, keys, values = given["q"], given["k"], given["v"]
    assert given["fa_version"] == 3 and given["causal"]
    assert all(x.stride(-1) == 1 for x in (queries, keys, values, given["out"]))
    for ends, longest, rows in (
        ("cu_seqlens_q", "max_seqlen_q", queries),
        ("cu_seqlens_k", "max_seqlen_k", keys),
    ):
        assert given[ends].dtype == torch.int32 and given[ends].tolist() == [0, len(rows)]
        assert given[ends].is_contiguous() and given[longest] == len(rows)
    heads_first = (x.transpose(0, 1) for x in (queries, keys, values))
    attended, _ = dense_attention(*heads_first, given["softmax_scale"])
    given["out"].copy_(attended.transpose(0, 1))


@pytest.mark.parametrize(
    ("dtype", "version", "calls"),
    [(torch.float16, 3, 1), (torch.float16, None, 0), (torch.float32, 3, 0)],
    ids=["flash", "no flash for the device", "no flash for the numbers"],
)
@pytest.mark.parametrize("count", [1, 40, 100])
def test_attention_over_a_prompt(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, version: int | None, calls: int, count: int
) -> None:
    called = Mock(side_effect=flash)
    monkeypatch.setattr(prompt_attention, "resolve_obj_by_qualname", {FLASH_ATTENTION: called}.get)
    monkeypatch.setattr(prompt_attention, "get_flash_attn_version", lambda head_size: version)
    attend = prompt_attention.PromptAttention(
        CacheShape(1, HEADS, KV_HEADS, DIM, dtype, 0.2), torch.device("cuda")
    )
    packed = torch.randn(100, HEADS + 2 * KV_HEADS, DIM).to(dtype)
    queries, keys, values = packed.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    outputs = torch.zeros(102, HEADS, DIM, dtype=dtype)
    attend(
        queries[-count:],
        keys.transpose(0, 1).contiguous(),
        values.transpose(0, 1).contiguous(),
        outputs[1 : 1 + count],
    )
    assert called.call_count == calls
    expected, _ = dense_attention(*(x.transpose(0, 1) for x in (queries, keys, values)), 0.2)
    expected = expected.transpose(0, 1)[-count:]
    torch.testing.assert_close(outputs[1 : 1 + count], expected, rtol=1e-2, atol=2e-3)
    assert not outputs[0].any() and not outputs[1 + count :].any()
