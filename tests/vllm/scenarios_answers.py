"""Scenarios of answers: what an engine makes of given prompts."""

from __future__ import annotations

import multiprocessing
import random
from functools import partial
from typing import Any

from engines import (
    answers,
    choices,
    drafts_of,
    inner,
    likely,
    make,
    ours,
    sampling,
    scheduler_of,
    store_of,
)
from models import NAN_TOKEN, SIDE, VOCABULARY


def generate(spec: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens of spec["prompts"], all at once, and what the engine saw of it.

    With "alone": true also of each of them by itself, behind that.
    """
    llm = make(spec)
    seen, drafts = inner(llm), drafts_of(llm)
    if spec.get("poison"):
        poison(llm)
    free = seen["pool"].get_num_free_blocks()
    result: dict[str, Any] = {
        "tokens": answers(llm, spec["prompts"], spec["tokens"]),
        "preemptions": seen["preemptions"][0],
        "alone": [
            answers(llm, [prompt], spec["tokens"])[0]
            for prompt in spec["prompts"]
            if spec.get("alone")
        ],
        "blocks_lost": free - seen["pool"].get_num_free_blocks(),
        "drafts": drafts,
    }
    if spec["icecache"] is not None:
        llm.llm_engine.step()  # tells the workers of the last ones that finished
        from icecache.vllm.metrics import sums

        result |= {**sums(store_of()), "requests": store_of().requests}
    return result


def poison(llm: Any) -> None:
    """NaN in every block of vLLM's pool."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    for cache in worker.model_runner.kv_caches:
        cache.fill_(float("nan"))


def ranks(spec: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens of spec["prompts"] where workers are processes of their own.

    vLLM starts those anew on a CPU; with "forked": true they have its modules from this process.
    """
    if spec.get("forked"):
        from vllm.v1.executor import multiproc_executor

        multiproc_executor.get_mp_context = partial(multiprocessing.get_context, "fork")
    if spec.get("llm", {}).get("pipeline_parallel_size", 1) > 1:
        make_tensors_between_stages()
    return {"tokens": answers(make(spec), spec["prompts"], spec["tokens"])}


def make_tensors_between_stages() -> None:
    """vLLM's runner on CPUs makes them in a warm-up, which eager mode leaves out."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    gather = CPUModelRunner.sync_and_gather_intermediate_tensors

    def gathered(self: Any, *args: Any) -> Any:
        if self.intermediate_tensors is None:
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )
        return gather(self, *args)

    CPUModelRunner.sync_and_gather_intermediate_tensors = gathered


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


def asked(spec: dict[str, Any]) -> dict[str, Any]:
    """Tokens, texts and log-probabilities of spec["prompts"] (token ids or texts), all at once, by
    spec["sampling"] and spec["priority"]; again after each of the engine's sleeps of
    spec["levels"]."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    llm = make(spec)
    seen = inner(llm)
    given = {"temperature": 0, "ignore_eos": True, **spec["sampling"]}
    if "structured_outputs" in given:
        given["structured_outputs"] = StructuredOutputsParams(**given["structured_outputs"])
    prompts = [
        prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt}
        for prompt in spec["prompts"]
    ]
    rounds = []
    for level in (None, *spec.get("levels", [])):
        if level is not None:
            llm.sleep(level=level)
            llm.wake_up()
        outputs = llm.generate(
            prompts, SamplingParams(**given), use_tqdm=False, priority=spec.get("priority")
        )
        rounds.append(
            {
                "tokens": [list(output.outputs[0].token_ids) for output in outputs],
                "texts": [output.outputs[0].text for output in outputs],
                "cached": [output.num_cached_tokens for output in outputs],
                "prompt_logprobs": [_of_prompt(output.prompt_logprobs) for output in outputs],
            }
        )
    scheduler = type(scheduler_of(llm)).__name__
    return {"rounds": rounds, "preemptions": seen["preemptions"][0], "scheduler": scheduler}


def _of_prompt(logprobs: Any) -> list[Any]:
    """By position; the first token of a prompt has none."""
    steps = (logprobs or [])[1:]
    return [sorted((token, p.logprob) for token, p in step.items()) for step in steps]


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
    outputs = choices(llm, prompts, spec["tokens"])
    return {
        **result,
        "outputs": [[list(output.token_ids), likely(output)] for output in outputs],
    }


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
