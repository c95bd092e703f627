"""Random sequences of cache operations: an IceCache in exact mode does what a DynamicCache does."""

from __future__ import annotations

import random
from typing import Any

import hf_models
import icecache
import pytest
import torch
from hf_models import Model
from icecache.hf.support import CACHE
from transformers import DynamicCache

STEPS = 25
EXACT = {**hf_models.SCARCE, "exact": True}


class Pair:
    """The same rows in an IceCache and in transformers' own cache."""

    def __init__(self, enabled: Model, stock: Model, rows: int, chance: random.Random) -> None:
        self.models = (enabled, stock)
        self.caches: tuple[Any, Any] = (
            icecache.IceCache(enabled.config, **EXACT),
            DynamicCache(config=stock.config),
        )
        self.mask = torch.zeros(rows, 0, dtype=torch.long)
        self.chance = chance

    @torch.inference_mode()
    def feed(self, tokens: int) -> None:
        """Random tokens; the first ones come with padding on the left or right."""
        rows, seen = self.mask.shape
        ids = torch.tensor([[self.chance.randrange(3, 96) for _ in range(tokens)]] * rows)
        ids = (ids + torch.arange(rows)[:, None]) % hf_models.VOCABULARY
        new = torch.ones(rows, tokens, dtype=torch.long)
        if not seen:
            is_left = self.chance.random() < 0.5
            for row in new:
                padding = self.chance.randrange(tokens // 2)
                row[: padding if is_left else 0] = 0
                row[tokens - (0 if is_left else padding) :] = 0
        self.mask = torch.cat([self.mask, new], 1)
        positions = (self.mask.cumsum(1) - 1).clamp_min(0)[:, seen:]
        real = new.bool()
        outputs = [
            model(ids, attention_mask=self.mask, position_ids=positions, **{CACHE: cache}).logits[
                real
            ]
            for model, cache in zip(self.models, self.caches, strict=True)
        ]
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=5e-4)

    def rearrange(self) -> None:
        rows = self.mask.shape[0]
        order = torch.tensor([self.chance.randrange(rows) for _ in range(rows)])
        for cache in self.caches:
            cache.reorder_cache(order)
        self.mask = self.mask[order]

    def repeat(self) -> None:
        for cache in self.caches:
            cache.batch_repeat_interleave(2)
        self.mask = self.mask.repeat_interleave(2, 0)

    def select(self) -> None:
        rows = self.mask.shape[0]
        kept = torch.tensor(sorted(self.chance.sample(range(rows), (rows + 1) // 2)))
        for cache in self.caches:
            cache.batch_select_indices(kept)
        self.mask = self.mask[kept]

    def crop(self) -> None:
        columns = self.chance.randrange(1, self.mask.shape[1])
        for cache in self.caches:
            cache.crop(-columns)
        self.mask = self.mask[:, :-columns]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "olmo2"])
@pytest.mark.parametrize("seed", range(4))
def test_random_operations_agree_with_a_dynamic_cache(architecture: str, seed: int) -> None:
    chance = random.Random(seed)
    stock = hf_models.model(architecture)
    enabled = icecache.enable(hf_models.build(architecture), **EXACT)
    pair = Pair(enabled, stock, rows=3, chance=chance)
    pair.feed(24)
    for _ in range(STEPS):
        operations = [pair.rearrange]
        if pair.mask.shape[0] <= 4:
            operations.append(pair.repeat)
        if pair.mask.shape[0] > 2:
            operations.append(pair.select)
        if pair.mask.shape[1] > 30:
            operations.append(pair.crop)
        chance.choice(operations)()
        pair.feed(chance.choice([1, 1, 1, 2, 7, 40]))
    ice = pair.caches[0]
    memory = ice.stats().memory
    assert memory.sequences == pair.mask.shape[0]
    ice.handle.engine.check_integrity()
