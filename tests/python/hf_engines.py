"""Engines that watch or fail, and caches over them."""

from __future__ import annotations

from typing import Any

import icecache
import torch
from hf_models import Model
from icecache.hf import IceCache
from icecache.hf.support import CACHE


class CountingEngine(icecache.Engine):
    """Counts what the front end asks for."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.forks = 0
        self.truncations = 0

    def fork(self, seq: int, length: int | None = None) -> int:
        self.forks += 1
        return super().fork(seq, length)

    def truncate(self, seq: int, length: int) -> None:
        self.truncations += 1
        super().truncate(seq, length)


class FailingEngine(CountingEngine):
    """Runs out of pages at the second layer once 14 tokens are there."""

    is_full = True

    def append(self, seqs: Any, layer: int, keys: Any, values: Any) -> None:
        if self.is_full and layer == 1 and self.length(seqs[0], layer) >= 14:
            raise icecache.OutOfPages("host_memory: the page pool is full")
        super().append(seqs, layer, keys, values)

    def step(
        self,
        seqs: Any,
        layer: int,
        queries: Any,
        keys: Any,
        values: Any,
        phase: icecache.Phase = icecache.Phase.AUTO,
        lse: Any = None,
    ) -> torch.Tensor:
        self.append(seqs, layer, keys, values)
        result: torch.Tensor = self.attend(seqs, layer, queries, phase, lse)
        return result


class ForgetfulEngine(icecache.Engine):
    """Reads a zero in place of one token's value, as a corrupted page would."""

    def append(self, seqs: Any, layer: int, keys: Any, values: Any) -> None:
        values = [row.clone() for row in values]
        for seq, row in zip(seqs, values, strict=True):
            if self.length(seq, layer) <= 20 < self.length(seq, layer) + row.shape[1]:
                row[:, 20 - self.length(seq, layer)] = 0
        super().append(seqs, layer, list(keys), values)


def new_cache(model: Model) -> IceCache:
    return IceCache(model.config, engine_class=CountingEngine)


@torch.inference_mode()
def feed(model: Model, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    logits: torch.Tensor = model(ids, **{CACHE: cache}).logits
    return logits


def engine(cache: IceCache) -> CountingEngine:
    found = cache.handle.engine
    assert isinstance(found, CountingEngine)
    return found
