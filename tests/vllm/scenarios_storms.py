"""Scenarios of storms: random requests that come, are aborted and end; each then served alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from engines import (
    answers,
    drafts_of,
    inner,
    make,
    sampling,
    scheduler_of,
    stop_drafts,
    store_of,
)
from models import VOCABULARY

MOST_AT_ONCE = 12  # requests


class Request(NamedTuple):
    """What a storm asks of the engine."""

    prompt: dict[str, Any]  # as vLLM takes it
    params: Any  # vLLM's SamplingParams
    lora: Any = None  # vLLM's LoRARequest


def steps(
    llm: Any, generator: random.Random, spec: dict[str, Any], ask: Callable[[str], Request]
) -> Iterator[list[Any]]:
    """Steps the engine until spec["count"] requests have ended; `ask` makes each, by its name.

    Before a step a few requests come, and with a chance of spec["abort_share"] one is aborted.
    After each step: the outputs of the requests that ended with it, aborted ones left out.
    """
    engine = llm.llm_engine
    names = [f"r{number}" for number in range(spec["count"])]
    running: set[str] = set()
    while names or engine.has_unfinished_requests():
        for _ in range(generator.randint(0, 3)):
            if names and len(running) < MOST_AT_ONCE:
                name = names.pop()
                request = ask(name)
                engine.add_request(name, request.prompt, request.params, lora_request=request.lora)
                running.add(name)
        if running and generator.random() < spec["abort_share"]:
            victim = generator.choice(sorted(running))
            engine.abort_request([victim])
            running.discard(victim)
        outputs = [output for output in engine.step() if output.finished]
        ended = [output for output in outputs if output.request_id in running]
        running.difference_update(output.request_id for output in ended)
        yield ended
    engine.step()  # tells the workers of the last ones that finished


def some_tokens(generator: random.Random, size: int) -> list[int]:
    return [generator.randrange(8, VOCABULARY) for _ in range(size)]


def storm(spec: dict[str, Any]) -> dict[str, Any]:
    """Requests of random lengths that have nothing in common. With "compare": false nothing is said
    of their answers."""
    llm = make(spec)
    seen, drafts = inner(llm), drafts_of(llm)
    free = seen["pool"].get_num_free_blocks()
    generator = random.Random(spec.get("seed", 0))
    requests: dict[str, Request] = {}

    def ask(name: str) -> Request:
        sizes = spec.get("sizes") or [1, 2, 15, 16, 17, 31, 33, generator.randint(1, 400)]
        prompt = some_tokens(generator, generator.choice(sizes))
        tokens = generator.randint(1, spec.get("tokens", 16))
        requests[name] = Request({"prompt_token_ids": prompt}, sampling(tokens))
        return requests[name]

    made: dict[str, list[int]] = {}
    most = 0
    for ended in steps(llm, generator, spec, ask):
        made |= {output.request_id: list(output.outputs[0].token_ids) for output in ended}
        most = max(most, store_of().requests)
    from icecache.vllm.metrics import sums

    store = store_of()
    if not spec.get("emulated"):
        store.engine.check_integrity()
    counted = sums(store)
    result = {
        "steps": counted["steps"],
        "dense_steps": counted["dense_steps"],
        "answered": len(made),
        "most_requests": most,
        "preemptions": seen["preemptions"][0],
        "blocks_lost": free - seen["pool"].get_num_free_blocks(),
        "requests_left": store.requests,
        "page_bytes_left": store.engine.pool_bytes(),
        "drafts": dict(drafts),
        # vLLM's own names of requests begin with those that they were given.
        "preempted": [name.split("-")[0] for name in sorted(seen["preempted"])],
    }
    if not spec.get("compare", True):
        return result
    return {**result, "differing": differing(llm, requests, {n: [a] for n, a in made.items()})}


def prefix_storm(spec: dict[str, Any]) -> dict[str, Any]:
    """Requests over shared beginnings, some with salts, several choices or an early end, and with
    the LoRA adapters [name, folder] of spec["adapters"]; each is then served once more with nothing
    to share."""
    from vllm.lora.request import LoRARequest

    llm = make({**spec, "llm": {"enable_prefix_caching": True, **spec["llm"]}})
    # Without None: beside adapters vLLM's CPU build answers requests that have none wrongly.
    adapters = spec.get("adapters", [])
    loras = [LoRARequest(name, 1 + i, path) for i, (name, path) in enumerate(adapters)]
    seen, drafts = inner(llm), drafts_of(llm)
    free = seen["pool"].get_num_free_blocks()
    generator = random.Random(spec.get("seed", 0))
    sizes = [generator.randint(1, spec["longest"] // 2) for _ in range(20)]
    shared = [some_tokens(generator, size) for size in sizes]
    said: list[list[int]] = []  # prompts with their answers, for turns to come
    requests: dict[str, Request] = {}

    def ask(name: str) -> Request:
        begin = generator.choice(said[-8:] if said and generator.random() < 0.3 else shared)
        more = some_tokens(generator, generator.choice([0, 0, 1, 5, 17, 40]))
        prompt: dict[str, Any] = {"prompt_token_ids": begin[: spec["longest"]] + more}
        if salt := generator.choice([None, None, "a", "b"]):
            prompt["cache_salt"] = salt
        params = sampling(generator.randint(1, spec.get("tokens", 16)))
        if generator.random() < spec.get("choices", 0.2):
            # vLLM wants no temperature of 0 for them.
            params.n, params.temperature, params.top_k = 3, 1.0, 1
        requests[name] = Request(prompt, params, generator.choice(loras or [None]))
        return requests[name]

    made: dict[str, list[list[int]]] = {}
    cached = 0
    for ended in steps(llm, generator, spec, ask):
        for output in ended:
            made[output.request_id] = [list(choice.token_ids) for choice in output.outputs]
            cached += output.num_cached_tokens
            said.append([*output.prompt_token_ids, *made[output.request_id][0]])
        if generator.random() < spec.get("reset_share", 0.0):
            llm.reset_prefix_cache()
    prefixes = scheduler_of(llm)._prefixes
    result = {"cached_tokens": cached, "kept": prefixes.kept, "evictions": prefixes.evictions}
    llm.reset_prefix_cache()
    llm.llm_engine.step()
    store = store_of()
    store.engine.check_integrity()
    result |= {
        "answered": len(made),
        "preemptions": seen["preemptions"][0],
        "failed": store.requests_failed,
        "blocks_lost": free - seen["pool"].get_num_free_blocks(),
        "sequences_left": store.engine.sequences(),
        "page_bytes_left": store.engine.pool_bytes(),
        "slots_left": prefixes.ledger.used,
        "drafts": dict(drafts),
    }
    return {**result, "differing": differing(llm, requests, made)}


def differing(
    llm: Any, requests: dict[str, Request], made: dict[str, list[list[int]]]
) -> list[str]:
    """The requests of which an answer is not that of the request served alone, sharing nothing and
    without drafts."""
    stop_drafts(llm)
    found = []
    for name in sorted(made):
        llm.reset_prefix_cache()
        prompt, params, lora = requests[name]
        alone = answers(llm, [prompt["prompt_token_ids"]], params.max_tokens, lora)
        if any(answer != alone[0] for answer in made[name]):
            found.append(name)
    return found
