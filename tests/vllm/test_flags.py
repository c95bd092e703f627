"""vLLM's flags beside the plugin, in real engines: the answers are stock vLLM's."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import kinds
import pytest
from conftest import Run
from serving import serving
from test_engine import EXACT, SMALL, prompts

ICECACHE = {**EXACT, "host_memory": "64M"}


def ask(run: Run, model: Path, icecache: dict[str, Any] | None, **spec: Any) -> dict[str, Any]:
    given = {"sampling": {"max_tokens": 12, "detokenize": False}, **spec}
    given["llm"] = {**SMALL, **given.get("llm", {})}
    return run("asked", model=model, icecache=icecache, **given)


def test_priorities(run: Run, llama: Path) -> None:
    given: dict[str, Any] = {"prompts": prompts([300, 301, 302, 303, 304, 305, 306, 307])}
    given["priority"] = [7, 6, 5, 4, 3, 2, 1, 0]
    given["sampling"] = {"max_tokens": 40, "detokenize": False}
    llm = {"scheduling_policy": "priority", "scheduler_reserve_full_isl": False}
    # 1 KiB a token of both layers and KV heads: room for the longest request, not for all.
    ours = ask(run, llama, {**EXACT, "host_memory": 1400 * 1024}, llm=llm, **given)
    stock = ask(run, llama, None, **{**given, "priority": None})
    assert ours["preemptions"] > 0
    assert ours["rounds"][0]["tokens"] == stock["rounds"][0]["tokens"]


def test_log_probabilities_of_prompts(run: Run, llama: Path) -> None:
    given: dict[str, Any] = {"prompts": prompts([1, 2, 33, 300])}
    given["sampling"] = {"max_tokens": 4, "detokenize": False, "prompt_logprobs": 2}
    given["llm"] = {"enable_prefix_caching": True, "max_num_batched_tokens": 64}
    ours = ask(run, llama, ICECACHE, **given, levels=[0])
    stock = ask(run, llama, None, **given)["rounds"][0]
    for one in ours["rounds"]:
        assert one["tokens"] == stock["tokens"] and sum(one["cached"]) == 0
        for got, expected in zip(one["prompt_logprobs"], stock["prompt_logprobs"], strict=True):
            assert len(got) == len(expected)
            for at, other in zip(got, expected, strict=True):
                assert [token for token, _ in at] == [token for token, _ in other]
                assert [p for _, p in at] == pytest.approx([p for _, p in other], abs=1e-4)


def test_sleep(run: Run, llama: Path) -> None:
    """From level 1 on vLLM has all caches dropped, as where weights have changed."""
    given: dict[str, Any] = {"prompts": prompts([100, 300]), "levels": [0, 1]}
    given["llm"] = {"enable_prefix_caching": True}
    first, slept, dropped = ask(run, llama, ICECACHE, **given)["rounds"]
    stock = ask(run, llama, None, prompts=given["prompts"])["rounds"][0]
    assert first["tokens"] == slept["tokens"] == dropped["tokens"] == stock["tokens"]
    assert slept["cached"] == [99, 299] and dropped["cached"] == [0, 0]


def test_structured_outputs(run: Run, smollm2: Path) -> None:
    question = "The capital of France is"
    given: dict[str, Any] = {"prompts": [question, question + " the city of"]}
    given["sampling"] = {
        "max_tokens": 12,
        "structured_outputs": {"regex": "[A-Z]{3,8}-[0-9]{2}"},
        "ignore_eos": False,
    }
    given["llm"] = {"skip_tokenizer_init": False, "block_size": 32}
    ours = ask(run, smollm2, {"host_memory": "256M", "exact": True}, **given)["rounds"][0]
    stock = ask(run, smollm2, None, **given)["rounds"][0]
    assert ours["texts"] == stock["texts"]
    assert all(re.fullmatch("[A-Z]{3,8}-[0-9]{2}", text) for text in ours["texts"])


def test_embeddings(run: Run, tmp_path: Path) -> None:
    given = {
        "model": kinds.make("pooling", tmp_path),
        "prompts": prompts([100, 300]),
        "llm": {**SMALL, "runner": "pooling", "convert": "embed", "skip_tokenizer_init": False},
    }
    stock = run("everything", **given)["outputs"]
    ours = run("everything", icecache=ICECACHE, **given)
    assert len(ours["ours"]) == 2
    for one, other in zip(ours["outputs"], stock, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_engines_and_front_ends_beside_each_other(
    run: Run, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Data parallelism, several API servers, and vLLM's own file for both."""
    model = kinds.make("pooling", tmp_path / "model")
    asked = prompts([1, 17, 100, 300, 400, 500])
    expected = ask(run, model, None, prompts=asked)["rounds"][0]["tokens"]
    file = tmp_path / "flags.yaml"
    file.write_text(
        "data-parallel-size: 2\napi-server-count: 2\nmax-num-seqs: 5\nblock-size: 32\n"
        "kv-cache-memory-bytes: 16777216\n"
    )
    options = ("--config", str(file), "--host-memory", "64M", "--set", "exact=true")
    with serving(model, tmp_path / "log", *options) as server:
        client = server.client()

        def answer(prompt: list[int]) -> list[int]:
            made = client.completions.create(
                model=server.model,
                prompt=prompt,
                max_tokens=12,
                temperature=0,
                extra_body={"return_token_ids": True, "ignore_eos": True},
            )
            return list(made.choices[0].token_ids)  # type: ignore[attr-defined]

        with ThreadPoolExecutor(6) as threads:
            for _ in range(30):  # engines are looked at once a second
                assert list(threads.map(answer, asked)) == expected
                if server.metrics().get("icecache:dense_steps_total", 0) > 0:
                    break
                time.sleep(1)
            else:
                pytest.fail(f"no steps are counted: {server.metrics()}")
        log = server.log.read_text()
    assert log.count("IceCache: host memory holds 65,536 tokens") == 2, "an engine each"
