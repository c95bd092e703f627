"""What an enabled model's engine did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelStats:
    """Counters since `icecache.enable`, over all sequences.

    `layers[model_layer][kv_head]` is the engine's HeadStats; layers that stay stock are absent.
    `memory` is the engine's MemoryStats.
    """

    layers: dict[int, list[Any]]
    memory: Any

    def total(self, field: str) -> float:
        """Sum of a HeadStats field (say "steps" or "bytes_read") over layers and KV heads."""
        return sum(getattr(head, field) for heads in self.layers.values() for head in heads)

    @property
    def worst_mass(self) -> float:
        """Least share of the attention mass that a decode step attended exactly; 1 without any."""
        return min(
            (head.worst_mass for heads in self.layers.values() for head in heads), default=1.0
        )
