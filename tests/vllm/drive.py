"""Runs scenarios on a real vLLM engine, each in its own process, as lines of its input name them.

    ["SCENARIO", {"model": FOLDER, "icecache": {...} | null, "llm": {...}, ...},
     ENVIRONMENT, OUTPUT]

ENVIRONMENT holds variables for this scenario alone. What a scenario says goes to the file OUTPUT,
last its result as JSON; then a line tells that it is over. "emulated": true puts the cache on the
emulator of a CUDA device.

vLLM keeps a process's first connector for ever, and takes many seconds to import: conftest.py forks
a process that has imported it and loaded no plugin, and that forks another for each scenario.
"""

from __future__ import annotations

import gc
import json
import logging
import multiprocessing
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from models import NAN_TOKEN, SIDE, VOCABULARY

LONGEST = 600  # seconds that a scenario may take
# What engines import when they are made, most of the time that one takes.
MODULES = (
    "vllm.entrypoints.llm",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.model_executor.models.gemma3",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.warmup.kernel_warmup",
    "vllm.models.deepseek_v4",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.gpu.warmup",
)


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


def answers(llm: Any, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Greedy tokens of all prompts, served together."""
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], sampling(tokens), use_tqdm=False
    )
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


def poison(llm: Any) -> None:
    """NaN in every block of vLLM's pool."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    for cache in worker.model_runner.kv_caches:
        cache.fill_(float("nan"))


def store_of() -> Any:
    from icecache.vllm.worker import current_worker

    worker = current_worker()
    assert worker is not None and worker.store is not None
    return worker.store


def generate(spec: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens of spec["prompts"], all at once, and what the engine saw of it."""
    llm = make(spec)
    seen = inner(llm)
    if spec.get("poison"):
        poison(llm)
    free = seen["pool"].get_num_free_blocks()
    result: dict[str, Any] = {
        "tokens": answers(llm, spec["prompts"], spec["tokens"]),
        "preemptions": seen["preemptions"][0],
        "blocks_lost": free - seen["pool"].get_num_free_blocks(),
    }
    if spec["icecache"] is not None:
        llm.llm_engine.step()  # tells the workers of the last ones that finished
        from icecache.vllm.metrics import sums

        result |= {**sums(store_of()), "requests": store_of().requests}
    return result


def ranks(spec: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens of spec["prompts"] where workers are processes of their own.

    vLLM starts those anew on a CPU; with "forked": true they have its modules from this process.
    """
    if spec.get("forked"):
        from vllm.v1.executor import multiproc_executor

        multiproc_executor.get_mp_context = partial(multiprocessing.get_context, "fork")
    return {"tokens": answers(make(spec), spec["prompts"], spec["tokens"])}


def storm(spec: dict[str, Any]) -> dict[str, Any]:
    """spec["count"] random requests, a share of them aborted; each then served alone."""
    llm = make(spec)
    seen = inner(llm)
    engine = llm.llm_engine
    free = seen["pool"].get_num_free_blocks()
    generator = random.Random(spec.get("seed", 0))
    prompts, lengths = {}, {}
    for number in range(spec["count"]):
        name = f"r{number}"
        some = spec.get("sizes") or [1, 2, 15, 16, 17, 31, 33, generator.randint(1, 400)]
        size = generator.choice(some)
        prompts[name] = [generator.randrange(8, VOCABULARY) for _ in range(size)]
        lengths[name] = generator.randint(1, 16)
    waiting, running, made = list(prompts), set(), {}
    most = 0
    while waiting or engine.has_unfinished_requests():
        for _ in range(generator.randint(0, 3)):
            if waiting and len(running) < 12:
                name = waiting.pop()
                engine.add_request(
                    name, {"prompt_token_ids": prompts[name]}, sampling(lengths[name])
                )
                running.add(name)
        if running and generator.random() < spec["abort_share"]:
            victim = generator.choice(sorted(running))
            engine.abort_request([victim])
            running.discard(victim)
        for output in engine.step():
            if output.finished and output.request_id in running:
                made[output.request_id] = list(output.outputs[0].token_ids)
                running.discard(output.request_id)
        most = max(most, store_of().requests)
    engine.step()
    store = store_of()
    if not spec.get("emulated"):
        store.engine.check_integrity()
    result = {
        "answered": len(made),
        "most_requests": most,
        "preemptions": seen["preemptions"][0],
        "blocks_lost": free - seen["pool"].get_num_free_blocks(),
        "requests_left": store.requests,
        "page_bytes_left": store.engine.pool_bytes(),
    }
    differing = [
        name
        for name in sorted(made)
        if answers(llm, [prompts[name]], lengths[name]) != [made[name]]
    ]
    return {**result, "differing": differing}


def prefix_storm(spec: dict[str, Any]) -> dict[str, Any]:
    """spec["count"] random requests over shared beginnings, some with salts, several choices or an
    early end; then each of them once more, with nothing to share."""
    llm = make({**spec, "llm": {"enable_prefix_caching": True, **spec["llm"]}})
    seen = inner(llm)
    engine = llm.llm_engine
    free = seen["pool"].get_num_free_blocks()
    generator = random.Random(spec.get("seed", 0))

    def some(size: int) -> list[int]:
        return [generator.randrange(8, VOCABULARY) for _ in range(size)]

    shared = [some(generator.randint(1, spec["longest"] // 2)) for _ in range(20)]
    requests: dict[str, dict[str, Any]] = {}
    made: dict[str, list[list[int]]] = {}
    waiting = [f"r{number}" for number in range(spec["count"])]
    running: set[str] = set()
    said: list[list[int]] = []  # prompts with their answers, for turns to come
    cached = {}
    while waiting or engine.has_unfinished_requests():
        for _ in range(generator.randint(0, 3)):
            if not waiting or len(running) >= 12:
                continue
            name = waiting.pop()
            begin = generator.choice(said[-8:] if said and generator.random() < 0.3 else shared)
            prompt = begin[: spec["longest"]] + some(generator.choice([0, 0, 1, 5, 17, 40]))
            salt = generator.choice([None, None, "a", "b"])
            request = {"prompt_token_ids": prompt, **({"cache_salt": salt} if salt else {})}
            params = sampling(generator.randint(1, 16))
            if generator.random() < 0.2:  # of which vLLM wants no temperature of 0
                params.n, params.temperature, params.top_k = 3, 1.0, 1
            requests[name] = {"request": request, "tokens": params.max_tokens}
            engine.add_request(name, request, params)
            running.add(name)
        if running and generator.random() < spec["abort_share"]:
            victim = generator.choice(sorted(running))
            engine.abort_request([victim])
            running.discard(victim)
        for output in engine.step():
            if output.finished and output.request_id in running:
                answers_made = [list(choice.token_ids) for choice in output.outputs]
                made[output.request_id] = answers_made
                cached[output.request_id] = output.num_cached_tokens
                said.append([*output.prompt_token_ids, *answers_made[0]])
                running.discard(output.request_id)
        if generator.random() < spec.get("reset_share", 0.0):
            llm.reset_prefix_cache()
    prefixes = scheduler_of(llm)._prefixes
    kept, evictions = prefixes.kept, prefixes.evictions
    llm.reset_prefix_cache()
    engine.step()
    store = store_of()
    store.engine.check_integrity()
    result = {
        "answered": len(made),
        "cached_tokens": sum(cached.values()),
        "kept": kept,
        "evictions": evictions,
        "preemptions": seen["preemptions"][0],
        "failed": store.requests_failed,
        "blocks_lost": free - seen["pool"].get_num_free_blocks(),
        "sequences_left": store.engine.memory().sequences,
        "page_bytes_left": store.engine.pool_bytes(),
        "slots_left": prefixes.ledger.used,
    }
    differing = []
    for name in sorted(made):
        llm.reset_prefix_cache()
        request = requests[name]
        alone = answers(llm, [request["request"]["prompt_token_ids"]], request["tokens"])
        if any(answer != alone[0] for answer in made[name]):
            differing.append(name)
    return {**result, "differing": differing}


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
    """Requests one after another: their cached tokens, what the API and the metrics say of them,
    and events of the prefix store."""
    from vllm import SamplingParams
    from vllm.config import KVEventsConfig

    events = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    llm = make({**spec, "llm": {**spec["llm"], "kv_events_config": events}})
    scheduler, taken = scheduler_of(llm), []
    scheduler.kv_event_publisher.publish = lambda batch: taken.extend(batch.events)
    cached, made = [], []
    for request in spec["requests"]:
        params = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, max_tokens=8)
        for name, value in request.pop("sampling", {}).items():
            setattr(params, name, value)
        (output,) = llm.generate([request], params, use_tqdm=False)
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


def scheduler_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def broken(spec: dict[str, Any]) -> dict[str, Any]:
    """Requests whose keys are NaN, between others; one of them for a single token."""
    llm = make(spec)
    engine = llm.llm_engine
    generator = random.Random(1)
    prompts = {f"r{n}": [generator.randrange(8, VOCABULARY) for _ in range(150)] for n in range(4)}
    prompts["bad"] = [*prompts["r0"][:100], NAN_TOKEN, *prompts["r0"][:40]]
    prompts["bad, one token"] = [NAN_TOKEN, *prompts["r1"][:30]]
    for name, prompt in prompts.items():
        tokens = 1 if "one token" in name else 12
        engine.add_request(name, {"prompt_token_ids": prompt}, sampling(tokens))
    reasons, made = {}, {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                reasons[output.request_id] = output.outputs[0].finish_reason
                made[output.request_id] = list(output.outputs[0].token_ids)
    engine.step()
    differing = [
        name
        for name, prompt in prompts.items()
        if not name.startswith("bad") and answers(llm, [prompt], 12) != [made[name]]
    ]
    engine.step()
    return {
        "reasons": reasons,
        "tokens_of_lost": [made[name] for name in prompts if name.startswith("bad")],
        "differing": differing,
        "failed": store_of().requests_failed,
        "requests_left": store_of().requests,
    }


def everything(spec: dict[str, Any]) -> dict[str, Any]:
    """All that comes out for spec["prompts"], and the layers that have anything of ours."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    llm = make(spec)
    result: dict[str, Any] = {
        "plugin": AttentionBackendEnum.CPU_ATTN.is_overridden(),
        "ours": ours(llm),
    }
    prompts: list[Any] = [{"prompt_token_ids": prompt} for prompt in spec["prompts"]]
    if spec.get("kind") == "cross attention":
        for prompt in prompts:
            prompt["multi_modal_data"] = {"audio": (_noise(16000), 16000)}
    if spec.get("kind") == "vision":
        from PIL import Image

        picture = Image.fromarray((_noise(SIDE, SIDE, 3) * 255).astype("uint8"))
        for prompt in prompts:
            prompt["multi_modal_data"] = {"image": picture}
    if spec["llm"].get("runner") == "pooling":
        outputs = llm.embed(prompts, use_tqdm=False)
        return {**result, "outputs": [output.outputs.embedding for output in outputs]}
    from vllm import SamplingParams

    greedy = SamplingParams(
        temperature=0, max_tokens=spec["tokens"], ignore_eos=True, detokenize=False, logprobs=8
    )
    outputs = [output.outputs[0] for output in llm.generate(prompts, greedy, use_tqdm=False)]
    return {
        **result,
        "outputs": [
            [
                list(output.token_ids),
                [
                    sorted((token, p.logprob) for token, p in step.items())
                    for step in output.logprobs
                ],
            ]
            for output in outputs
        ],
    }


def ours(llm: Any) -> list[str]:
    """Layers with a backend of icecache, or with any class of it in implementation or builder."""
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    found = []
    for name, layer in layers.items():
        backend = layer.get_attn_backend()
        parts = (type(layer.impl), backend.get_builder_cls())
        classes = [backend, *(of for part in parts for of in part.__mro__)]
        if any("icecache" in of.__module__ for of in classes):
            found.append(name)
    return found


def in_turns(spec: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens of a stock LLM, of one with IceCache and of a stock one, in one process."""
    result: dict[str, Any] = {"tokens": [], "ours": []}
    for settings in (None, spec["icecache"], None):
        llm = make({**spec, "icecache": settings})
        result["tokens"].append(answers(llm, spec["prompts"], spec["tokens"]))
        result["ours"].append(ours(llm))
        # vLLM has one connector a process, until its engine ends.
        llm.llm_engine.engine_core.shutdown()
    return result


def _noise(*shape: int) -> Any:
    import numpy

    return numpy.random.default_rng(0).random(shape, dtype=numpy.float32)


SCENARIOS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "generate": generate,
    "ranks": ranks,
    "prefix_storm": prefix_storm,
    "lost_owner": lost_owner,
    "reuse": reuse,
    "storm": storm,
    "broken": broken,
    "everything": everything,
    "in_turns": in_turns,
}


def emulate() -> None:
    """The cache on the emulator of a CUDA device; vLLM and its model stay on the CPU."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / "python"))
    import pytest
    from emulated import emulate_device

    emulate_device(pytest.MonkeyPatch())


def run(scenario: str, given: dict[str, Any], environment: dict[str, str]) -> None:
    """Prints the result."""
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in environment:  # OpenMP was loaded without it
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    if given.get("emulated"):
        emulate()
    result = SCENARIOS[scenario](given)
    sys.stdout.flush()
    print("RESULT " + json.dumps(result), flush=True)


def attend(lines: TextIO) -> None:
    """Runs what `lines` name, one after another, until the other end closes them."""
    gc.collect()
    gc.freeze()  # vLLM collects often: the objects of what it imports are left alone
    for line in lines:
        scenario, given, environment, output = json.loads(line)
        child = os.fork()
        if child == 0:
            signal.alarm(LONGEST)
            with open(os.devnull, "rb") as nothing, open(output, "wb") as file:
                for number, of in enumerate((nothing, file, file)):
                    os.dup2(of.fileno(), number)
            # pytest has put files of its own in their place.
            sys.stdout, sys.stderr = (os.fdopen(number, "w") for number in (1, 2))
            for handler in logging.getLogger("vllm").handlers:
                handler.setStream(sys.stderr)  # type: ignore[attr-defined]
            try:
                run(scenario, given, environment)
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(0)  # vLLM's threads would keep the process for seconds
        os.waitpid(child, 0)
        print("over", file=lines, flush=True)
