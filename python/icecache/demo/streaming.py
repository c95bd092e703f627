"""StreamingLLM over a cache of the budget's size: what the demo shows beside the engine."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from icecache.bench.prefill import Prefill


class StreamingSession:
    """StreamingLLM: sinks and recent tokens, the rest is gone. A Session of the harness."""

    def __init__(self, prefill: Prefill, budget: int, sink: int = 16) -> None:
        recent = budget - sink
        parts = [prefill.keys, prefill.values]
        held = [torch.cat([part[:, :, :sink], part[:, :, -recent:]], 2) for part in parts]
        self._keys, self._values = list(held[0]), list(held[1])
        self._sink = sink
        self._bytes = 0

    def attend(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        self._keys[layer] = self._shift(self._keys[layer], keys)
        self._values[layer] = self._shift(self._values[layer], values)
        self._bytes += 2 * self._keys[layer].nbytes
        return decode_attention(queries[None], self._keys[layer][None], self._values[layer][None])[
            0
        ]

    def fork(self) -> StreamingSession:
        other = object.__new__(StreamingSession)
        other._keys, other._values = list(self._keys), list(self._values)
        other._sink, other._bytes = self._sink, self._bytes
        return other

    def mass(self) -> float:
        """Not known: what is gone cannot be weighed."""
        return float("nan")

    def bytes_read(self) -> int:
        return self._bytes

    def close(self) -> None:
        self._keys, self._values = [], []

    def _shift(self, held: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        kept = held[:, self._sink + 1 :]
        return torch.cat([held[:, : self._sink], kept, new], 1)


def decode_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """One token's attention [1, Hq, 1, D], the heads of a group as rows of one product."""
    heads, dim = keys.shape[1], keys.shape[3]
    packed = queries.reshape(1, heads, -1, dim)
    return F.scaled_dot_product_attention(packed, keys, values).reshape(queries.shape)
