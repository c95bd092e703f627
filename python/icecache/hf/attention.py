"""`attn_implementation="icecache"`: attention over the engine, stock sdpa for all else."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from icecache import InvalidArgument
from icecache.engine import Phase
from icecache.hf.cache import IceLayer
from icecache.hf.eager import outside_graphs
from icecache.hf.engine_handle import EngineLike
from icecache.hf.mask import LazyMask, icecache_mask
from icecache.hf.new_tokens import NewTokens
from icecache.hf.rows import Chunk
from icecache.hf.sinks import (
    attend_with_sinks,
    narrow,
    widen_queries,
    widen_tokens,
    with_sink_token,
)
from icecache.hf.support import CACHE, check_attention, check_transformers
from icecache.shape import CacheShape

IMPLEMENTATION = "icecache"


@outside_graphs
def icecache_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function of transformers' AttentionInterface.

    Query `[B, Hq, T, D]`; key and value are what the cache's `update` returned. Returns
    `[B, T, Hq, D]`. Raises InvalidArgument for attention that the engine does not compute, and the
    engine's errors; then the cache is as it was before the forward call.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    sinks = kwargs.get("s_aux")
    if not isinstance(key, NewTokens) or not isinstance(value, NewTokens):
        mask = attention_mask.dense() if isinstance(attention_mask, LazyMask) else attention_mask
        if sinks is None:
            output: torch.Tensor = sdpa_attention_forward(
                module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
            )[0]
            return output, None
        output = attend_with_sinks(query, key, value, mask, sinks, scale)
        return output.transpose(1, 2).contiguous(), None

    layer = key.layer
    cache = layer.cache
    try:
        mask = check_attention(query, key, value, attention_mask, dropout, kwargs)
        output = _attend(module, layer, query, key.plain(), value.plain(), mask, scale, sinks)
    except BaseException as error:
        cache.take_back(str(error))
        raise
    return output.transpose(1, 2).contiguous(), None


def _attend(
    module: torch.nn.Module,
    layer: IceLayer,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: LazyMask,
    scale: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Appends the new tokens and attends; all tensors and the result are `[B, H, T, D]`."""
    if sinks is not None:
        query = widen_queries(query, sinks, scale)
        key, value = widen_tokens(key), widen_tokens(value)
    cache = layer.cache
    layers = len(cache.handle.model_layers)
    engine = cache.handle.bind(
        CacheShape(layers, query.shape[1], key.shape[1], key.shape[-1], key.dtype, scale)
    )
    cache.rows.prefix = 0 if sinks is None else 1
    chunk = cache.rows.begin(engine, mask, query.shape[0])
    if layer.seen != chunk.start + chunk.length:
        raise InvalidArgument(
            f"{CACHE}: layer {layer.model_layer} holds "
            f"{layer.seen - query.shape[2]} tokens where {chunk.start} were expected; an earlier "
            "forward call was interrupted. Call reset() and start again"
        )
    call = _Call(module, engine, layer, chunk, scale, sinks is not None)
    alike = chunk.real is None and len({earlier == 0 for earlier in chunk.earlier}) == 1
    output = call.batch(query, key, value) if alike else call.ragged(query, key, value)
    return output if sinks is None else narrow(output)


class _Call:
    """One layer's part of one forward call."""

    def __init__(
        self,
        module: torch.nn.Module,
        engine: EngineLike,
        layer: IceLayer,
        chunk: Chunk,
        scale: float,
        has_sinks: bool,
    ) -> None:
        self.module = module
        self.engine = engine
        self.layer = layer.engine_layer
        self.rows = layer.cache.rows
        self.chunk = chunk
        self.scale = scale
        self.has_sinks = has_sinks
        self.phase = Phase.VERIFY if layer.cache.is_exact else Phase.AUTO

    def batch(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """All rows at once: no padding in the chunk, and all rows empty before it or none."""
        sequences = self.rows.sequences
        is_first = self.chunk.earlier[0] == 0
        if not is_first:
            return self.engine.step(sequences, self.layer, query, key, value, self.phase)
        if self.has_sinks:
            self.engine.append(sequences, self.layer, *with_sink_token(key, value))
            result: torch.Tensor = self.engine.attend(sequences, self.layer, query, self.phase)
            return result
        self.engine.append(sequences, self.layer, key, value)
        output = self._stock(query, key, value)
        self.engine.observe(sequences, self.layer, query)
        return output

    def ragged(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Row by row, on the real tokens.

        The output of padding is 0, except in the last column: `generate` samples from it in
        right-padded batches. There padding sees the row's tokens, as in stock attention.
        """
        output = torch.zeros_like(query)
        columns = [self._columns(row) for row in range(query.shape[0])]
        filled = [row for row, own in enumerate(columns) if own.numel()]
        first = [row for row in filled if self.chunk.earlier[row] == 0]
        later = [row for row in filled if self.chunk.earlier[row] != 0]
        keys = {row: key[row][:, columns[row]] for row in filled}
        values = {row: value[row][:, columns[row]] for row in filled}
        queries = {row: query[row][:, columns[row]] for row in filled}
        appended = dict(zip(filled, zip(keys.values(), values.values(), strict=True), strict=True))
        if self.has_sinks:
            appended |= {row: with_sink_token(*appended[row]) for row in first}
            first, later = [], filled
        if filled:
            self.engine.append(
                self._sequences(filled),
                self.layer,
                [appended[row][0] for row in filled],
                [appended[row][1] for row in filled],
            )
        for row in first:
            output[row][:, columns[row]] = self._stock(
                queries[row][None], keys[row][None], values[row][None]
            )[0]
        if first:
            self.engine.observe(self._sequences(first), self.layer, [queries[r] for r in first])
        if later:
            self._attend(later, [queries[row] for row in later], output, columns)
        # The last token of a row stands for padding behind it: both see all tokens of the row.
        end = self.chunk.length - 1
        padded = [
            row
            for row, own in enumerate(columns)
            if self.chunk.earlier[row] + own.numel() and not (own == end).any()
        ]
        if padded:
            last = [torch.tensor([end])] * query.shape[0]
            self._attend(padded, [query[row][:, -1:] for row in padded], output, last)
        return output

    def _attend(
        self,
        rows: list[int],
        queries: list[torch.Tensor],
        output: torch.Tensor,
        columns: list[torch.Tensor],
    ) -> None:
        results = self.engine.attend(self._sequences(rows), self.layer, queries, self.phase)
        for row, result in zip(rows, results, strict=True):
            output[row][:, columns[row]] = result

    def _stock(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = sdpa_attention_forward(
            self.module, query, key, value, None, scaling=self.scale, is_causal=True
        )[0]
        return output.transpose(1, 2)

    def _columns(self, row: int) -> torch.Tensor:
        own = self.chunk.columns(row)
        return torch.arange(self.chunk.length) if own is None else own

    def _sequences(self, rows: list[int]) -> list[int]:
        return [self.rows.sequences[row] for row in rows]


def register() -> None:
    """Makes `attn_implementation="icecache"` known to transformers."""
    check_transformers()
    AttentionInterface.register(IMPLEMENTATION, icecache_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, icecache_mask)
