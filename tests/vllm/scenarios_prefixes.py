"""Scenarios of prefix caching: what is found again, what is announced, what is lost."""

from __future__ import annotations

import random
from typing import Any

from engines import answers, make, sampling, scheduler_of, store_of
from models import VOCABULARY


def lost_owner(spec: dict[str, Any]) -> dict[str, Any]:
    """A request whose beginning the workers do not have any more, beside one that they have."""
    llm = make({**spec, "llm": {"enable_prefix_caching": True, **spec["llm"]}})
    generator = random.Random(2)
    first, second = ([generator.randrange(8, VOCABULARY) for _ in range(300)] for _ in range(2))
    expected = answers(llm, [first, second], 12)
    llm.llm_engine.step()  # tells the workers to keep both
    store = store_of()
    gone = min(store._kept)
    store.engine.release(store._sequence[gone])  # as the engine does where it needs the pages
    again = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in (first, second)], sampling(12), use_tqdm=False
    )
    after = answers(llm, [first, second], 12)
    return {
        "same": [list(output.outputs[0].token_ids) for output in again] == expected == after,
        "reasons": [output.outputs[0].finish_reason for output in again],
        "failed": store.requests_failed,
    }


def reuse(spec: dict[str, Any]) -> dict[str, Any]:
    """Requests one after another, each with its own "sampling", "lora" (name, number, folder)
    and "embedded" tokens: their cached tokens, and events of the prefix store."""
    from vllm import SamplingParams
    from vllm.config import KVEventsConfig
    from vllm.lora.request import LoRARequest

    events = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    llm = make({**spec, "llm": {**spec["llm"], "kv_events_config": events}})
    scheduler, taken = scheduler_of(llm), []
    scheduler.kv_event_publisher.publish = lambda batch: taken.extend(batch.events)
    cached, made = [], []
    for request in spec["requests"]:
        params = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, max_tokens=8)
        for name, value in request.pop("sampling", {}).items():
            setattr(params, name, value)
        lora = request.pop("lora", None)
        lora = LoRARequest(*lora) if lora else None
        if "embedded" in request:
            request["prompt_embeds"] = embedded(request.pop("embedded"))
        (output,) = llm.generate([request], params, use_tqdm=False, lora_request=lora)
        cached.append(output.num_cached_tokens)
        made.append(list(output.outputs[0].token_ids))
    llm.llm_engine.step()
    kept = {block for blocks in scheduler._prefixes._hashes.values() for block in blocks}
    told = announced(taken)
    llm.reset_prefix_cache()
    answers(llm, [[9] * 5], 2)
    return {
        "cached": cached,
        "made": made,
        "blocks": len(told),
        "consistent": told == kept,
        "left": len(announced(taken)),
    }


def passes(spec: dict[str, Any]) -> dict[str, Any]:
    """spec["prompts"] served together spec["passes"] times, and once more after a reset: answers,
    and what vLLM's counters of prefixes outside of its own pool add in each pass."""
    on = {"enable_prefix_caching": True, "disable_log_stats": False}
    llm = make({**spec, "llm": {**on, **spec["llm"]}})
    rounds = []
    for number in range(spec["passes"] + 1):
        if number == spec["passes"]:
            llm.reset_prefix_cache()
        before = counters(llm)
        prompts = [{"prompt_token_ids": prompt} for prompt in spec["prompts"]]
        outputs = llm.generate(prompts, sampling(spec["tokens"]), use_tqdm=False)
        rounds.append(
            {
                "made": [list(output.outputs[0].token_ids) for output in outputs],
                "cached": [output.num_cached_tokens for output in outputs],
                **{name: value - before[name] for name, value in counters(llm).items()},
            }
        )
    return {"rounds": rounds}


def counters(llm: Any) -> dict[str, int]:
    """Tokens that were looked up, and found."""
    names = {"vllm:external_prefix_cache_queries": "queries"}
    names |= {"vllm:external_prefix_cache_hits": "hits"}
    found = {"queries": 0, "hits": 0}
    for metric in llm.get_metrics():
        if metric.name in names:
            found[names[metric.name]] += int(metric.value)
    return found


def embedded(tokens: list[int]) -> Any:
    """Rows of a table that is no model's, [len(tokens), hidden size of the tiny models]."""
    import torch

    table = torch.randn(VOCABULARY, 64, generator=torch.Generator().manual_seed(0))
    return table[tokens]


def announced(events: list[Any]) -> set[Any]:
    """The blocks that a router takes for stored in host memory."""
    held: set[Any] = set()
    for event in events:
        if getattr(event, "medium", "CPU") != "CPU":  # of vLLM's own pool
            continue
        kind = type(event).__name__
        if kind == "AllBlocksCleared":  # by vLLM, of its own pool
            held.clear()
        elif kind == "BlockRemoved":
            held -= set(event.block_hashes)
        else:
            assert len(event.token_ids) == len(event.block_hashes) * event.block_size
            assert event.parent_block_hash is None or event.parent_block_hash in held
            held |= set(event.block_hashes)
    return held
