"""The engine as a method: a sequence of an engine of its own, filled from a prefill."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

import icecache
from icecache.bench.decoder import Decoder
from icecache.bench.prefill import Prefill


class EngineSession:
    """A Session. Forks share the engine and with it the statistics."""

    def __init__(
        self, decoder: Decoder, prefill: Prefill, budget: int, fields: Mapping[str, Any]
    ) -> None:
        """`fields` are those of icecache.Config. Raises the engine's errors."""
        self.engine = icecache.Engine(
            num_layers=decoder.num_layers,
            num_q_heads=decoder.num_q_heads,
            num_kv_heads=decoder.num_kv_heads,
            head_dim=decoder.head_dim,
            dtype=decoder.dtype,
            scale=decoder.scale,
            **{"token_budget": budget, **fields},
        )
        self._heads = [
            (layer, head)
            for layer in range(decoder.num_layers)
            for head in range(decoder.num_kv_heads)
        ]
        self.sequence = self.engine.new_sequence()
        for layer in range(decoder.num_layers):
            keys, values = prefill.keys[layer, None], prefill.values[layer, None]
            self.engine.append([self.sequence], layer, keys, values)
            self.engine.observe([self.sequence], layer, prefill.queries[layer, None])
        self.engine.synchronize()

    def attend(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        self.engine.append([self.sequence], layer, keys[None], values[None])
        output: torch.Tensor = self.engine.attend([self.sequence], layer, queries[None])
        return output[0]

    def fork(self) -> EngineSession:
        other = copy.copy(self)
        other.sequence = self.engine.fork(self.sequence)
        return other

    def mass(self) -> float:
        """As the engine estimates it: against its far field, or its scan where that is off."""
        heads = [self.engine.stats(layer, head) for layer, head in self._heads]
        dense = sum(head.dense_steps for head in heads)
        steps = sum(head.steps for head in heads) + dense
        mass = sum(head.mass for head in heads)
        return (mass + dense) / max(1, steps)

    def bytes_read(self) -> int:
        """By the decode steps of all forks: sketches, summaries, candidates, attended K and V."""
        return sum(self.engine.stats(layer, head).bytes_read for layer, head in self._heads)

    def close(self) -> None:
        self.engine.release(self.sequence)
