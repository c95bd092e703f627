"""A vLLM engine in this process, and what a scenario looks at behind its API."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def make(spec: dict[str, Any]) -> Any:
    """vllm.LLM, through the plugin unless spec["icecache"] is None."""
    from vllm import LLM, ModelRegistry

    # Else vLLM looks at the model's class in another process, which imports vLLM first.
    config = json.loads((Path(spec["model"]) / "config.json").read_text())
    for name in config["architectures"]:
        ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())

    arguments: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "seed": 0,
        "kv_cache_memory_bytes": 64 << 20,  # is filled with zeros
        "skip_tokenizer_init": True,
    }
    if spec["icecache"] is not None:
        from icecache.vllm import engine_args

        arguments |= engine_args(**spec["icecache"])
    return LLM(model=spec["model"], **(arguments | spec.get("llm", {})))


def sampling(tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)


def answers(llm: Any, prompts: list[list[int]], tokens: int, lora: Any = None) -> list[list[int]]:
    """Greedy tokens of all prompts, served together, by one of vLLM's LoRARequests if given."""
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(given, sampling(tokens), use_tqdm=False, lora_request=lora)
    return [list(output.outputs[0].token_ids) for output in outputs]


def inner(llm: Any) -> dict[str, Any]:
    """What a test looks at behind the API."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    result = {"pool": pool, "preemptions": [0]}
    preempt = scheduler._preempt_request

    def counted(*args: Any, **kwargs: Any) -> Any:
        result["preemptions"][0] += 1
        return preempt(*args, **kwargs)

    scheduler._preempt_request = counted
    return result


def store_of() -> Any:
    from icecache.vllm.worker import current_worker

    worker = current_worker()
    assert worker is not None and worker.store is not None
    return worker.store


def scheduler_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler
