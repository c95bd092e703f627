"""What the engine of an enabled model, or of a cache of its own, did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from icecache.hf.engine_handle import EngineHandle


@dataclass(frozen=True)
class ModelStats:
    """Counters since the engine was made, over all sequences.

    `layers[model_layer][kv_head]` is the engine's HeadStats; layers that stay stock are absent.
    `memory` is the engine's MemoryStats.
    """

    layers: dict[int, list[Any]]
    memory: Any

    def total(self, field: str) -> float:
        """Sum of a HeadStats field (say "steps" or "bytes_read") over layers and KV heads."""
        return float(sum(getattr(head, field) for heads in self.layers.values() for head in heads))

    @property
    def worst_mass(self) -> float:
        """Least share of the attention mass that a decode step attended exactly; 1 without any."""
        return min(
            (head.worst_mass for heads in self.layers.values() for head in heads), default=1.0
        )


def collect(handle: EngineHandle) -> ModelStats | None:
    """The counters of the engine behind `handle`; None before it was made."""
    engine, shape = handle.engine, handle.shape
    if engine is None or shape is None:
        return None
    return ModelStats(
        layers={
            model_layer: [engine.stats(layer, head) for head in range(shape.num_kv_heads)]
            for layer, model_layer in enumerate(handle.model_layers)
        },
        memory=engine.memory(),
    )
