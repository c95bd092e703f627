"""Full attention over a preallocated cache: the baseline, and where all other methods start."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from icecache.bench.decoder import Decoder
from icecache.bench.prefill import QUERIES, Prefill


class FullAttention:
    """Keys and values of one sequence, contiguous, and torch's own attention over them."""

    def __init__(self, decoder: Decoder, capacity: int) -> None:
        shape = (decoder.num_layers, decoder.num_kv_heads, capacity, decoder.head_dim)
        self.keys = torch.zeros(shape, dtype=decoder.dtype)
        self.values = torch.zeros(shape, dtype=decoder.dtype)
        self.queries: list[torch.Tensor] = [torch.empty(0)] * decoder.num_layers
        self.length = 0  # tokens of a finished forward pass
        self._decoder = decoder

    def run(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [V] after `tokens` [T], which become part of the sequence."""
        logits = self._decoder.run(tokens[None], self.length, self._attend)
        self.length += tokens.shape[0]
        return logits[0]

    def snapshot(
        self,
        tokens: torch.Tensor,
        first_logits: torch.Tensor,
        continuation: list[int],
        logits: list[torch.Tensor],
    ) -> Prefill:
        """What other methods start from after the prompt `tokens`; shares the cache's memory."""
        length = tokens.shape[0]
        return Prefill(
            tokens=tokens,
            keys=self.keys[:, :, :length],
            values=self.values[:, :, :length],
            queries=torch.stack([rows[:, -QUERIES:] for rows in self.queries]),
            first_logits=first_logits,
            continuation=torch.tensor(continuation),
            logits=torch.stack(logits),
        )

    def _attend(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        tokens = queries.shape[2]
        end = self.length + tokens
        self.keys[layer, :, self.length : end] = keys[0]
        self.values[layer, :, self.length : end] = values[0]
        if tokens > 1:
            seen = (
                queries[0] if self.length == 0 else torch.cat([self.queries[layer], queries[0]], 1)
            )
            self.queries[layer] = seen[:, -QUERIES:]
        all_keys, all_values = self.keys[layer, None, :, :end], self.values[layer, None, :, :end]
        if tokens == 1:
            return decode_attention(queries, all_keys, all_values)
        mask = torch.ones(tokens, end, dtype=torch.bool).tril(end - tokens)
        return F.scaled_dot_product_attention(
            queries, all_keys, all_values, attn_mask=mask, enable_gqa=True
        )


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
