"""Attention of the prompt's last queries: what methods that evict at the end of prefill go by."""

from __future__ import annotations

import torch

from icecache.bench.baselines.tensor_session import sinks_of, softmax
from icecache.bench.prefill import Prefill


def observed_attention(prefill: Prefill, layer: int, count: int, scale: float) -> torch.Tensor:
    """Full attention's probabilities of the last `count` queries that the prefill keeps.

    [Hkv, G, W, L] with W <= count; a query sees the tokens up to its own.
    """
    keys = prefill.keys[layer]
    heads, length, _ = keys.shape
    queries = prefill.queries[layer, :, -count:]
    rows = queries.shape[1]
    grouped = scale * queries.unflatten(0, (heads, -1))
    scores = (grouped.flatten(1, 2) @ keys.mT).unflatten(1, (-1, rows))
    later = torch.ones(rows, length, dtype=torch.bool).triu(length - rows + 1)
    scores = scores.masked_fill(later, -torch.inf)
    sinks = sinks_of(prefill, layer)
    return softmax(scores, None if sinks is None else sinks[..., None].expand(*scores.shape[:3], 1))
