"""Long prompts of `generate` in several forward calls, where the engine attends within
`prefill_budget`.

A call then holds the states of some thousand tokens and not of the whole prompt. The engine lets
PREFILL_BLOCK tokens of a row choose together: calls end where each row has a multiple of them, so
that the answer is that of one call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.utils import logging

from icecache import PREFILL_BLOCK
from icecache.hf.cache import IceCache
from icecache.hf.support import CACHE

CHUNK = 2048  # tokens of a row in a call, where GenerationConfig.prefill_chunk_size says nothing
# Arguments with a column for each token, which can be cut.
_BY_COLUMN = ("attention_mask", "position_ids")
_MANY_CALLS = 8  # of a prompt, so that it takes a while


def feed_prompt(
    prefill: Callable[..., Any],
    input_ids: torch.Tensor,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Stands in for `_prefill`, a model's own step of `generate` that feeds the prompt.

    The outputs are those of the last call. Prompts that are more than tokens (embeddings, images)
    are fed as the model does it.
    """
    cache = model_kwargs.get(CACHE)
    if not isinstance(cache, IceCache) or not _is_text(model_kwargs):
        return prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
    start, ids = cache.rows.seen, _new_tokens(cache, input_ids, model_kwargs)
    total = start + ids.shape[1]
    mask = model_kwargs.get("attention_mask")
    real = torch.ones(len(ids), total, dtype=torch.bool) if mask is None else mask.bool()
    if real.shape != (len(ids), total) or not cache.handle.attends_prompts:
        return prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
    ends = call_ends(real, start, generation_config.prefill_chunk_size or CHUNK)
    if len(ends) <= 1:
        return prefill(input_ids, _whole(generation_config), model_kwargs, *args, **kwargs)
    cache.prompt_lengths = real.sum(1).tolist()
    try:
        with _progress(total - start, len(ends)) as bar:
            for begin, end in zip([start, *ends], ends, strict=False):
                part = {**model_kwargs, **_columns(model_kwargs, begin, end, total)}
                new = ids[:, begin - start : end - start]
                outputs = prefill(new, _whole(generation_config), part, *args, **kwargs)
                bar.update(end - begin)
    finally:
        cache.prompt_lengths = None
    return outputs


def call_ends(real: torch.Tensor, start: int, chunk: int) -> list[int]:
    """Columns at which calls end that feed the columns from `start` on, the last one included.

    `real` [B, L] bool: which columns are tokens. A call has at most `chunk` columns, or more up to
    the first column at which each row that goes on has a multiple of PREFILL_BLOCK tokens.
    """
    counts = real.cumsum(1)
    is_whole = (counts % PREFILL_BLOCK == 0) | (counts == counts[:, -1:])
    places = is_whole.all(0).nonzero()[:, 0] + 1
    total, ends = real.shape[1], list[int]()
    while total - start > chunk:
        later = places[places > start]
        near = later[later <= start + chunk]
        start = int(near[-1] if len(near) else later[0])
        ends.append(start)
    return ends if start == total else [*ends, total]


def _is_text(model_kwargs: Mapping[str, Any]) -> bool:
    """False where the prompt is more than tokens: what cannot be cut comes along."""
    return all(
        name in _BY_COLUMN or not isinstance(value, (torch.Tensor, list, tuple, dict))
        for name, value in model_kwargs.items()
    )


def _new_tokens(
    cache: IceCache, input_ids: torch.Tensor, model_kwargs: Mapping[str, Any]
) -> torch.Tensor:
    """Tokens [B, T] that the cache does not have."""
    mask = model_kwargs.get("attention_mask")
    if mask is not None and mask.shape[1] == input_ids.shape[1]:
        return input_ids[:, cache.rows.seen :]  # as transformers tells old tokens from new ones
    return input_ids


def _columns(
    model_kwargs: Mapping[str, Any], begin: int, end: int, total: int
) -> dict[str, torch.Tensor]:
    """The arguments of a call that ends at column `end` of `total`."""
    made = {}
    if (mask := model_kwargs.get("attention_mask")) is not None:
        made["attention_mask"] = mask[:, :end]
    if (positions := model_kwargs.get("position_ids")) is not None:
        shift = positions.shape[-1] - total  # below 0 where only new tokens have one
        made["position_ids"] = positions[..., begin + shift : end + shift]
    return made


def _progress(tokens: int, calls: int) -> Any:
    """A bar by transformers' settings for bars, on a terminal alone, of a prompt of many calls."""
    off = True if calls < _MANY_CALLS else None
    return logging.tqdm(total=tokens, desc="Prompt", unit="token", leave=False, disable=off)


def _whole(generation_config: Any) -> Any:
    """The same without a chunk size."""
    made = copy.copy(generation_config)
    made.prefill_chunk_size = None
    return made
