"""`attn_implementation="icecache"`: attention over the engine, and in torch for all else."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from icecache import InvalidArgument, device
from icecache.engine import Phase
from icecache.hf.cache import IceCache, IceLayer
from icecache.hf.eager import outside_graphs
from icecache.hf.engine_handle import EngineLike
from icecache.hf.mask import LazyMask, icecache_mask
from icecache.hf.new_tokens import NewTokens
from icecache.hf.rows import Chunk
from icecache.hf.softmax import Softmax
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
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function of transformers' AttentionInterface.

    Query `[B, Hq, T, D]`; key and value are what the cache's `update` returned, for this layer or
    for the one whose tokens it shares. Returns `[B, T, Hq, D]`. Raises InvalidArgument for
    attention that the engine does not compute, and the engine's errors; then the cache is as it was
    before the forward call.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    softmax = Softmax(scale, softcap or 0.0, s_aux)
    if not isinstance(key, NewTokens) or not isinstance(value, NewTokens):
        mask = attention_mask.dense() if isinstance(attention_mask, LazyMask) else attention_mask
        output = softmax.attend(module, query, key, value, mask, dropout=dropout, **kwargs)
        return output.transpose(1, 2).contiguous(), None

    layer = key.layer
    try:
        mask = check_attention(query, key, value, attention_mask, dropout, kwargs)
        if query.device.type == device.KIND:
            _check_device(softmax, layer)
        call = _begin(module, layer, query, key.plain(), mask, softmax)
        output = call.run(query, key.plain(), value.plain())
    except BaseException as error:
        layer.cache.take_back(str(error))
        raise
    return output.transpose(1, 2).contiguous(), None


def _check_device(softmax: Softmax, layer: IceLayer) -> None:
    """Raises InvalidArgument for what only the engine on the CPU computes."""
    if softmax.sinks is not None:
        raise InvalidArgument(
            "model: it has learned attention sinks, which a CUDA device does not compute; run the "
            "model on the CPU, or without IceCache"
        )
    if not layer.is_pending:
        raise InvalidArgument(
            f"model: a layer attends to the tokens of layer {layer.model_layer}, which a CUDA "
            "device does not compute; run the model on the CPU, or without IceCache"
        )


def _begin(
    module: torch.nn.Module,
    layer: IceLayer,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: LazyMask,
    softmax: Softmax,
) -> _Call:
    """The call of a layer with queries `[B, Hq, T, D]` and new keys `[B, Hkv, T, D]`."""
    cache = layer.cache
    engine = cache.handle.bind(
        CacheShape(
            num_layers=len(cache.handle.model_layers),
            num_q_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            head_dim=key.shape[-1],
            dtype=key.dtype,
            scale=softmax.scale,
            logit_softcap=softmax.softcap,
        )
    )
    chunk = cache.rows.begin(engine, mask.whole, query.shape[0])
    if layer.seen != chunk.start + chunk.length:
        raise InvalidArgument(
            f"{CACHE}: layer {layer.model_layer} holds "
            f"{layer.seen - chunk.length} tokens where {chunk.start} were expected; an earlier "
            "forward call was interrupted. Call reset() and start again"
        )
    return _Call(module, engine, layer, chunk, softmax)


class _Call:
    """One layer's part of one forward call.

    A layer appends the new tokens and attends, or shares the tokens that another one has appended,
    and attends. One that shares may have queries for the last tokens of the chunk alone.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        engine: EngineLike,
        layer: IceLayer,
        chunk: Chunk,
        softmax: Softmax,
    ) -> None:
        self.module = module
        self.engine = engine
        self.layer = layer.engine_layer
        self.rows = layer.cache.rows
        self.chunk = chunk
        self.softmax = softmax
        # The first to attend to the new tokens is the layer whose they are.
        self.appends, layer.is_pending = layer.is_pending, False
        # First chunks of prompts have all their tokens at hand: else torch attends to them.
        self.by_engine = layer.cache.handle.attends_prompts
        self.phases = _phases(layer.cache, chunk)

    def run(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """All tensors and the result are `[B, H, T, D]`."""
        kinds = set(zip((early == 0 for early in self.chunk.earlier), self.phases, strict=True))
        alike = self.chunk.real is None and len(kinds) == 1
        return (self._batch if alike else self._ragged)(query, key, value)

    def _batch(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """All rows at once, in one phase: no padding, and all rows empty before it or none."""
        sequences, phase = self.rows.sequences, self.phases[0]
        if self.chunk.earlier[0] == 0 and not self.by_engine:
            if self.appends:
                self.engine.append(sequences, self.layer, key, value)
            output = self._stock(query, key, value)
            if self.appends:
                self.engine.observe(sequences, self.layer, query)
            return output
        asked = self.softmax.asks(query)
        if self.appends:
            output = self.engine.step(sequences, self.layer, query, key, value, phase, **asked)
        else:
            output = self.engine.attend(sequences, self.layer, query, phase, **asked)
        return self.softmax.with_sinks(output, asked.get("lse"))

    def _ragged(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Row by row, on the real tokens.

        The output of padding is 0, except in the last column: `generate` samples from it in
        right-padded batches. There padding sees the row's tokens, as in stock attention.
        """
        output = torch.zeros_like(query)
        without = self.chunk.length - query.shape[2]  # columns that have no query
        columns = [self._columns(row) for row in range(query.shape[0])]
        asking = [own[own >= without] - without for own in columns]
        filled = [row for row, own in enumerate(columns) if own.numel()]
        first = [row for row in filled if self.chunk.earlier[row] == 0 and not self.by_engine]
        later = [row for row in filled if row not in first and asking[row].numel()]
        keys = {row: key[row][:, columns[row]] for row in filled}
        values = {row: value[row][:, columns[row]] for row in filled}
        queries = {row: query[row][:, asking[row]] for row in filled}
        if filled and self.appends:
            self.engine.append(
                self._sequences(filled), self.layer, list(keys.values()), list(values.values())
            )
        for row in first:
            if asking[row].numel():
                output[row][:, asking[row]] = self._stock(
                    queries[row][None], keys[row][None], values[row][None]
                )[0]
        if first and self.appends:
            self.engine.observe(self._sequences(first), self.layer, [queries[r] for r in first])
        if later:
            for phase in dict.fromkeys(self.phases[row] for row in later):
                those = [row for row in later if self.phases[row] == phase]
                self._attend(those, [queries[row] for row in those], output, asking, phase)
        self._attend_padding(query, output, columns)
        return output

    def _attend_padding(
        self, query: torch.Tensor, output: torch.Tensor, columns: list[torch.Tensor]
    ) -> None:
        """The last token of a row stands for padding behind it: both see all tokens of the row."""
        end = self.chunk.length - 1
        padded = [
            row
            for row, own in enumerate(columns)
            if self.chunk.earlier[row] + own.numel() and not (own == end).any()
        ]
        if padded:
            last = [torch.tensor([query.shape[2] - 1])] * query.shape[0]
            # With prefill_budget the engine counts the tokens of a prompt, and this is none.
            phase = Phase.VERIFY if self.by_engine else self.phases[0]
            self._attend(padded, [query[row][:, -1:] for row in padded], output, last, phase)

    def _attend(
        self,
        rows: list[int],
        queries: list[torch.Tensor],
        output: torch.Tensor,
        columns: list[torch.Tensor],
        phase: Phase,
    ) -> None:
        asked = [self.softmax.asks(query) for query in queries]
        lse = [one["lse"] for one in asked if one]
        results = self.engine.attend(
            self._sequences(rows), self.layer, queries, phase, **({"lse": lse} if lse else {})
        )
        for row, result, one in zip(rows, results, asked, strict=True):
            output[row][:, columns[row]] = self.softmax.with_sinks(result, one.get("lse"))

    def _stock(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return self.softmax.attend(self.module, query, key, value, None, is_causal=True)

    def _columns(self, row: int) -> torch.Tensor:
        own = self.chunk.columns(row)
        return torch.arange(self.chunk.length) if own is None else own

    def _sequences(self, rows: list[int]) -> list[int]:
        return [self.rows.sequences[row] for row in rows]


def _phases(cache: IceCache, chunk: Chunk) -> list[Phase]:
    """Of each row of a forward call."""
    lengths, ends, handle = cache.rows.lengths, cache.prompt_lengths, cache.handle
    if cache.is_exact:
        return [Phase.VERIFY] * len(lengths)
    is_prompt = ends is not None or chunk.length > handle.decode_tokens
    if not handle.attends_prompts or not is_prompt:
        return [Phase.AUTO] * len(lengths)
    return [
        Phase.PROMPT_END if length >= end else Phase.PREFILL
        for length, end in zip(lengths, ends or lengths, strict=True)
    ]


def register() -> None:
    """Makes `attn_implementation="icecache"` known to transformers."""
    check_transformers()
    AttentionInterface.register(IMPLEMENTATION, icecache_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, icecache_mask)
