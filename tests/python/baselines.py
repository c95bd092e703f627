"""Tiny random prefills, and how the tests of baselines decode them; no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from icecache.bench.decoder import Decoder
from icecache.bench.methods import find_methods
from icecache.bench.prefill import Prefill
from icecache.bench.session import Session
from icecache.shape import CacheShape

LAYERS, HEADS, GROUP, DIM = 3, 2, 3, 16
LENGTH, BUDGET, STEPS = 200, 90, 20
SCALE = DIM**-0.5

Token = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # queries, keys and values of one layer


SHAPE = CacheShape(LAYERS, HEADS * GROUP, HEADS, DIM, torch.float32, SCALE)


@dataclass(frozen=True)
class Shape:
    """What an engine's session reads of a Decoder."""

    num_layers: int = LAYERS
    num_kv_heads: int = HEADS
    scale: float = SCALE
    layers: tuple[int, ...] = tuple(range(LAYERS))
    shape: CacheShape = SHAPE


DECODER = cast(Decoder, Shape())


def prefill_of(keys: torch.Tensor, values: torch.Tensor, queries: torch.Tensor) -> Prefill:
    empty = torch.empty(0)
    tokens = torch.zeros(keys.shape[2], dtype=torch.int64)
    fields = {"tokens": tokens, "keys": keys, "values": values, "queries": queries}
    others = ("first_logits", "continuation", "logits", "sinks")
    return Prefill(**fields, **dict.fromkeys(others, empty), stock_layers=())


def random_prefill(length: int = LENGTH, seed: int = 0, layers: int = LAYERS) -> Prefill:
    random = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, layers, HEADS, length, DIM, generator=random)
    queries = torch.randn(layers, HEADS * GROUP, min(length, 256), DIM, generator=random)
    return prefill_of(2 * keys, values, queries)


def random_tokens(steps: int = STEPS, seed: int = 1, layers: int = LAYERS) -> list[list[Token]]:
    random = torch.Generator().manual_seed(seed)

    def rows(heads: int) -> torch.Tensor:
        return torch.randn(heads, 1, DIM, generator=random)

    return [
        [(rows(HEADS * GROUP), 2 * rows(HEADS), rows(HEADS)) for _ in range(layers)]
        for _ in range(steps)
    ]


def decode(session: Session, tokens: Sequence[Sequence[Token]]) -> torch.Tensor:
    """Outputs [steps, layers, Hq, 1, D]."""
    return torch.stack(
        [
            torch.stack([session.attend(layer, *token) for layer, token in enumerate(step)])
            for step in tokens
        ]
    )


def open_by_name(name: str, prefill: Prefill, budget: int) -> Session:
    return find_methods([name])[0].open(DECODER, prefill, budget)


NEEDLE = 61


def needle_prefill() -> tuple[Prefill, list[list[Token]]]:
    """One prompt key that the next query, of every head, matches; its value alone is far from 0."""
    prefill = random_prefill()
    direction = torch.nn.functional.normalize(torch.ones(DIM), dim=0)
    keys, values = 0.5 * prefill.keys, 0.1 * prefill.values
    keys[:, :, NEEDLE] = 12 * direction
    values[:, :, NEEDLE] = 5.0
    queries = 12 * direction.expand(HEADS * GROUP, 1, DIM)
    asking = [[(queries, 0.5 * key, 0.1 * value) for _, key, value in random_tokens(1)[0]]]
    return prefill_of(keys, values, prefill.queries), asking
