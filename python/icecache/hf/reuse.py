"""`generate` for prompts that begin as earlier ones did: it goes on from what these left.

The setting `reuse_prefixes` of icecache.enable. What is kept is an IceCache for each text; the
engine ends the least recently used ones where it needs their pages.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import PretrainedConfig

from icecache import PREFILL_BLOCK, InvalidArgument
from icecache.hf.cache import IceCache
from icecache.hf.engine_handle import EngineHandle
from icecache.hf.support import CACHE, CACHE_NAMES
from icecache.prefix_store import PrefixTable

BLOCK = 16  # tokens; fewer in common are not worth a fork
# Arguments with which a prompt is no text of one row, or its cache not that text's.
_OTHERS = ("assistant_model", "prompt_lookup_num_tokens", "inputs_embeds", *CACHE_NAMES)


class Reuse:
    """What `generate` of one model keeps. Not thread-safe."""

    def __init__(self, config: PretrainedConfig, handle: EngineHandle) -> None:
        """Raises InvalidArgument for a model with layers whose tokens are not in the engine."""
        self._config, self._handle = config, handle
        self._table = PrefixTable(BLOCK)
        self._kept: dict[int, IceCache] = {}
        self._next = 0
        self.tokens_reused = 0  # since the start
        if self._new_cache().stock_layers():
            raise InvalidArgument(
                "reuse_prefixes: expected a model whose layers all have full attention; this one "
                "has others, whose tokens transformers keeps. Leave it out, and continue caches "
                "by hand"
            )

    def generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stands in for `generate`, a model's own method."""
        ids = self._text_of(generate, args, kwargs)
        if ids is None:
            return generate(*args, **kwargs)
        cache = self._open(ids)
        result = generate(*args, **kwargs, **{CACHE: cache})
        written = result if isinstance(result, torch.Tensor) else result.sequences
        self._keep(cache, written[0].tolist()[: cache.rows.seen])
        return result

    def _text_of(
        self, generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[int] | None:
        """The prompt, where it is one row of plain text that is continued in one way."""
        bound = inspect.signature(generate).bind_partial(*args, **kwargs).arguments
        given: dict[str, Any] = {**bound.pop("kwargs", {}), **bound}
        ids = given.pop("inputs", None)
        ids = given.pop("input_ids", None) if ids is None else ids
        mask = given.pop("attention_mask", None)
        config = given.get("generation_config") or generate.args[0].generation_config  # type: ignore[attr-defined]
        several = any(
            (given.get(name) or getattr(config, name, None) or 1) != 1
            for name in ("num_beams", "num_return_sequences")
        )
        uses_cache = given.get("use_cache", getattr(config, "use_cache", True))
        others = [name for name in _OTHERS if given.get(name) is not None]
        tensors = [name for name, value in given.items() if isinstance(value, torch.Tensor)]
        if several or uses_cache is False or others or tensors:
            return None
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[0] != 1:
            return None
        if mask is not None and not bool(torch.as_tensor(mask).all()):
            return None
        tokens: list[int] = ids[0].tolist()
        return tokens

    def _new_cache(self) -> IceCache:
        return IceCache(self._config, handle=self._handle)

    def _open(self, tokens: list[int]) -> IceCache:
        """A cache with as many of the first tokens as there are, but not the last one."""
        text = self._table.text(tokens)
        while True:
            number, common = self._table.find(text)
            common = min(common, len(tokens) - 1)
            if self._handle.attends_prompts:  # tokens that choose together stay together
                common -= common % PREFILL_BLOCK
            if common < BLOCK:
                return self._new_cache()
            kept = self._kept[number]
            if kept.rows.is_held():
                self._table.use(number)
                self.tokens_reused += common
                return kept.fork(common)
            self._forget(number)

    def _keep(self, cache: IceCache, tokens: list[int]) -> None:
        if cache.failed is not None or cache.rows.seen != len(tokens) or not cache.rows.is_text():
            return
        kept = cache.fork()  # the caller may go on with its own
        kept.rows.retain()
        self._kept[self._next] = kept
        for old in self._table.add(self._next, self._table.text(tokens)):
            del self._kept[old]
        self._next += 1

    def _forget(self, number: int) -> None:
        self._table.remove(number)
        del self._kept[number]
