"""What the engine of an enabled model, or of a cache of its own, did."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from icecache.hf.engine_handle import EngineHandle


@dataclass
class LosslessStats:
    """Counters since `enable`; a token counts once for each row of the batch.

    `kept` of the `drafted` tokens were what full attention chose. Seconds are of wall time.
    """

    drafted: int = 0
    kept: int = 0
    verifications: int = 0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0


@dataclass(frozen=True)
class ModelStats:
    """Counters since the engine was made, over all sequences.

    `layers[model_layer][kv_head]` is the engine's HeadStats; layers that stay stock are absent, and
    those that share the tokens of another one, which counts their steps.
    `memory` is the engine's MemoryStats. `lossless` counts drafts, where the model was enabled so.
    """

    layers: dict[int, list[Any]]
    memory: Any
    lossless: LosslessStats | None = None

    def total(self, field: str) -> float:
        """Sum of a HeadStats field (say "steps" or "bytes_read") over layers and KV heads."""
        return float(sum(getattr(head, field) for heads in self.layers.values() for head in heads))

    @property
    def sparse_prompt(self) -> float:
        """Share of the prompts' tokens that attended within `prefill_budget`; 0 without any.

        Mean over layers and KV heads. Prompts that torch attended, exactly, do not count.
        """
        tokens = self.total("prompt_tokens")
        return self.total("sparse_prompt_tokens") / tokens if tokens else 0.0

    @property
    def worst_mass(self) -> float:
        """Least share of the attention mass that a decode step attended exactly; 1 without any."""
        return min(
            (head.worst_mass for heads in self.layers.values() for head in heads), default=1.0
        )


def collect(handle: EngineHandle, lossless: LosslessStats | None = None) -> ModelStats | None:
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
        lossless=None if lossless is None else replace(lossless),
    )
