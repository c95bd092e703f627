"""Scenarios of models: one and the same served by stock vLLM and by the engines."""

from __future__ import annotations

import gc
import traceback
from typing import Any

from engines import choices, likely, make, ours, scheduler_of, store_of

# How a model runs: stock, with every token attended to, and within a budget.
MODES: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "exact": {"exact": True, "token_budget": 64, "dense_tokens": 64},
    "budget": {"token_budget": 64, "dense_tokens": 64},
}


def compare(spec: dict[str, Any]) -> dict[str, Any]:
    """What spec["prompts"] get in each of MODES, until one does not start or fails: then why."""
    result: dict[str, Any] = {}
    for mode, settings in MODES.items():
        try:
            result[mode] = served(spec, settings)
        except Exception as error:
            traceback.print_exc()
            said = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
            return {**result, mode: {"error": f"{type(error).__name__}: {said}"}}
        gc.freeze()  # an engine that ends undoes it, and collections would take most of the time
    return result


def served(spec: dict[str, Any], settings: dict[str, Any] | None) -> dict[str, Any]:
    """Greedy tokens of an LLM, and how the engines serve it."""
    memory = {"host_memory": "64M", **settings} if settings is not None else None
    llm = make({**spec, "icecache": memory})
    prompts = [{"prompt_token_ids": prompt} for prompt in spec["prompts"]]
    outputs = choices(llm, prompts, spec["tokens"])
    result: dict[str, Any] = {
        "tokens": [list(output.token_ids) for output in outputs],
        "likely": [likely(output) for output in outputs],
        "reasons": sorted({output.finish_reason for output in outputs}),
    }
    if settings is not None:
        from icecache.vllm.metrics import sums

        result |= {**described(llm), **sums(store_of())}
    llm.llm_engine.engine_core.shutdown()
    return result


def described(llm: Any) -> dict[str, Any]:
    """The layers that the engines serve, and the kinds of all layers."""
    from icecache.vllm.worker import current_worker

    worker = current_worker()
    assert worker is not None
    groups = scheduler_of(llm).kv_cache_config.kv_cache_groups
    shapes = {layer.shape for layer in worker.layers}
    return {
        "layers": ours(llm),
        "kinds": sorted({type(group.kv_cache_spec).__name__ for group in groups}),
        "shapes": len(shapes),
        "sinks": any(layer.sinks is not None for layer in worker.layers),
        "shared": sum(layer.owner is not None for layer in worker.layers),
        "softcap": max(shape.logit_softcap for shape in shapes),
    }
