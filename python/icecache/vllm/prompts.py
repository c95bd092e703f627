"""Prompts within `prefill_budget`: where vLLM may cut them, and what is not served with it.

Of a prompt PREFILL_BLOCK tokens choose together, in the engine. Steps that end within a block would
split their choice, and which do depends on who else is served. So steps end at multiples of it, or
with the prompt; and a request takes over multiples of it from one that begins alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from icecache import Config, InvalidArgument
from icecache.vllm.engines import Layer
from icecache.vllm.settings import device_of, engine_config

_REFUSAL = "prefill_budget: IceCache does not serve with it"


def whole_blocks(start: int, count: int, length: int, block: int) -> int:
    """As many of `count` tokens from `start` on as end with a block, or all where they reach the
    request's `length`. May be 0."""
    end = start + count
    return count if end >= length else max(0, end - end % block - start)


def check_prompts(vllm_config: Any) -> None:
    """Raises InvalidArgument where vLLM would cut prompts elsewhere, or could not go on at all."""
    block = engine_config(vllm_config).prompt_block
    if block == 1:
        return
    if device_of(vllm_config) is not None:
        raise InvalidArgument(f"{_REFUSAL} on a CUDA device: leave it out")
    if getattr(vllm_config.cache_config, "mamba_cache_mode", "none") == "align":
        raise InvalidArgument(
            f"{_REFUSAL} for a model whose states are cached at multiples of a block of their own: "
            "add --no-enable-prefix-caching, or leave it out"
        )
    scheduler, speculative = vllm_config.scheduler_config, vllm_config.speculative_config
    longest = scheduler.long_prefill_token_threshold
    if 0 < longest < block:
        raise InvalidArgument(
            f"long_prefill_token_threshold: expected 0, or at least {block} with prefill_budget, "
            f"got {longest}"
        )
    each = 1
    if speculative is not None:
        each += speculative.num_speculative_tokens
        each += int(getattr(speculative, "max_num_new_slots_for_drafting", 0))
    # The first of the requests that read their prompts has room for a block, whoever decodes.
    needed = block + each * scheduler.max_num_seqs
    tokens = getattr(scheduler, "max_num_scheduled_tokens", None)
    tokens = scheduler.max_num_batched_tokens if tokens is None else tokens
    if tokens < needed:
        raise InvalidArgument(
            f"max_num_batched_tokens: expected at least {needed} with prefill_budget ({block} "
            f"tokens of a prompt beside {scheduler.max_num_seqs} requests that decode), got "
            f"{tokens}; raise --max-num-batched-tokens, or lower --max-num-seqs"
        )


def check_prompt_layers(layers: Sequence[Layer], config: Config) -> None:
    """Raises InvalidArgument for layers that do not attend to prompts within a budget."""
    sharing = [layer.name for layer in layers if layer.owner is not None]
    if config.prompt_block > 1 and sharing:
        raise InvalidArgument(
            f"{_REFUSAL} layers that share keys and values ({sharing[0]} among them): leave it out "
            "for this model"
        )
