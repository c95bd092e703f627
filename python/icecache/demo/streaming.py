"""StreamingLLM over a cache of the budget's size.

The harness's `RecentSession` sees every key, for the attention mass that this one cannot tell, and
takes longer: the demo shows what dropping tokens gains, too.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

from icecache.bench.prefill import Prefill

_SINK = 16  # tokens


class StreamingSession:
    """Sinks and recent tokens, the rest is gone. A Session of the harness."""

    def __init__(self, prefill: Prefill, budget: int, scale: float) -> None:
        recent = budget - _SINK
        layers = zip(prefill.keys, prefill.values, strict=True)
        both = (torch.stack(layer) for layer in layers)
        # Keys and values of each layer, [2, Hkv, budget, D].
        self._held = [torch.cat([one[:, :, :_SINK], one[:, :, -recent:]], 2) for one in both]
        self._scale = scale
        self._bytes = 0

    def attend(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        before = self._held[layer]
        parts = [before[:, :, :_SINK], before[:, :, _SINK + 1 :], torch.stack([keys, values])]
        held = self._held[layer] = torch.cat(parts, 2)
        self._bytes += held.nbytes
        # The heads of a group are rows of one product.
        packed = queries.reshape(1, keys.shape[0], -1, keys.shape[2])
        output = F.scaled_dot_product_attention(
            packed, held[0, None], held[1, None], scale=self._scale
        )
        return output.reshape(queries.shape)

    def fork(self) -> StreamingSession:
        other = copy.copy(self)
        other._held = list(self._held)
        return other

    def mass(self) -> float:
        """Not known: what is gone cannot be weighed."""
        return float("nan")

    def bytes_read(self) -> int:
        return self._bytes

    def close(self) -> None:
        self._held = []
