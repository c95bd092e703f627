"""A vLLM engine in this process, and what a scenario looks at behind its API."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any


def make(spec: dict[str, Any]) -> Any:
    """vllm.LLM, through the plugin unless spec["icecache"] is None."""
    from vllm import LLM, ModelRegistry

    # Else vLLM looks at the model's class in another process, which imports vLLM first.
    drafts = spec.get("llm", {}).get("speculative_config") or {}
    names = architectures(spec["model"])
    if "model" in drafts:
        head = {"eagle": "Eagle", "eagle3": "Eagle3"}.get(drafts["method"], "")
        names += [head + name for name in architectures(drafts["model"])]
    for name in names:
        ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())

    arguments: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "seed": 0,
        "kv_cache_memory_bytes": 64 << 20,  # is filled with zeros
        "skip_tokenizer_init": True,
    }
    if drafts.get("method") == "suffix":
        fake_suffix_trees()
    if spec["icecache"] is not None:
        from icecache.vllm import engine_args

        arguments |= engine_args(**spec["icecache"])
    return LLM(model=spec["model"], **(arguments | spec.get("llm", {})))


def architectures(model: str) -> list[str]:
    """Names of the classes of a model, which is in a folder."""
    config = json.loads((Path(model) / "config.json").read_text())
    return list(config["architectures"])


def sampling(tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)


def answers(llm: Any, prompts: list[list[int]], tokens: int, lora: Any = None) -> list[list[int]]:
    """Greedy tokens of all prompts, served together, by one of vLLM's LoRARequests if given."""
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(given, sampling(tokens), use_tqdm=False, lora_request=lora)
    return [list(output.outputs[0].token_ids) for output in outputs]


def choices(llm: Any, prompts: list[Any], tokens: int) -> list[Any]:
    """vLLM's greedy outputs, with log-probabilities."""
    params = sampling(tokens)
    params.logprobs = 8
    return [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]


def likely(output: Any) -> list[list[tuple[int, float]]]:
    """The likeliest tokens of each step with their log-probabilities."""
    return [sorted((token, p.logprob) for token, p in step.items()) for step in output.logprobs]


def ours(llm: Any) -> list[str]:
    """Layers with a backend of icecache, or with any class of it in implementation or builder."""
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    found = []
    for name, layer in layers.items():
        if not hasattr(layer, "impl"):  # mixtures of experts, state spaces
            continue
        backend = layer.get_attn_backend()
        parts = (type(layer.impl), backend.get_builder_cls())
        classes = [backend, *(of for part in parts for of in part.__mro__)]
        if any("icecache" in of.__module__ for of in classes):
            found.append(name)
    return found


def inner(llm: Any) -> dict[str, Any]:
    """What a test looks at behind the API."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    result: dict[str, Any] = {"pool": pool, "preemptions": [0], "preempted": set()}
    preempt = scheduler._preempt_request

    def counted(*args: Any, **kwargs: Any) -> Any:
        result["preemptions"][0] += 1
        result["preempted"].add(args[0].request_id)
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


def drafts_of(llm: Any) -> dict[str, int]:
    """Drafted tokens from now on: steps with drafts, those made, those accepted; the sum of their
    ids, as they are handed to the scheduler; and rows in which they come right behind a prompt."""
    scheduler = scheduler_of(llm)
    counts = {"steps": 0, "made": 0, "accepted": 0, "ids": 0, "behind_prompts": 0}
    observe, take = scheduler.make_spec_decoding_stats, scheduler.update_draft_token_ids

    def taken(drafted: Any) -> None:
        counts["ids"] += sum(map(sum, drafted.draft_token_ids))
        take(drafted)

    scheduler.update_draft_token_ids = taken

    def counted(stats: Any, num_draft_tokens: int, num_accepted_tokens: int, **more: Any) -> Any:
        counts["steps"] += 1
        counts["made"] += num_draft_tokens
        counts["accepted"] += num_accepted_tokens
        return observe(stats, num_draft_tokens, num_accepted_tokens, **more)

    scheduler.make_spec_decoding_stats = counted
    connector = scheduler.connector
    if connector is not None:
        build = connector.build_connector_meta

        def built(*args: Any) -> Any:
            step = build(*args)
            counts["behind_prompts"] += sum(row.drafts > 0 for row in step.rows)
            return step

        connector.build_connector_meta = built
    return counts


def stop_drafts(llm: Any) -> None:
    """From now on no token is drafted."""
    scheduler_of(llm).update_draft_token_ids = lambda drafted: None
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    drafter = getattr(worker.model_runner, "drafter", None)
    if drafter is not None:
        drafter.propose = _nothing


def _nothing(*given: Any, **named: Any) -> Any:
    """In place of what a drafter of vLLM proposes: the layers of one that has any do not run."""
    if "next_token_ids" in named:
        return named["next_token_ids"].new_zeros(len(named["next_token_ids"]), 1)
    sampled = next(tokens for tokens in given if isinstance(tokens, list))
    return [[] for _ in sampled]


def fake_suffix_trees() -> None:
    """The part of arctic_inference that vLLM calls: drafts of any length up to what is asked."""
    from vllm.config import speculative

    class Found:
        def __init__(self, token_ids: list[int]) -> None:
            self.token_ids = token_ids

    class SuffixDecodingCache:
        def __init__(self, **_: Any) -> None:
            self.texts: dict[str, list[int]] = {}
            self.cached_requests: set[str] = set()

        @property
        def active_requests(self) -> set[str]:
            return set(self.texts)

        def start_request(self, name: str, prompt: Any) -> None:
            self.texts[name] = [int(token) for token in prompt]

        def add_active_response(self, name: str, tokens: list[int]) -> None:
            self.texts[name] += tokens

        def stop_request(self, name: str) -> None:
            del self.texts[name]

        def speculate(self, name: str, pattern: Any, max_spec_tokens: int, **_: Any) -> Found:
            text = self.texts[name]
            for at in range(len(text) - 2, 0, -1):
                if text[at - 1 : at + 1] == text[-2:]:
                    return Found(text[at + 1 : at + 1 + min(max_spec_tokens, len(text) % 9)])
            return Found([])

    module = types.ModuleType("arctic_inference.suffix_decoding")
    module.SuffixDecodingCache = SuffixDecodingCache  # type: ignore[attr-defined]
    sys.modules["arctic_inference"] = types.ModuleType("arctic_inference")
    sys.modules["arctic_inference.suffix_decoding"] = module
    speculative.has_arctic_inference = lambda: True
