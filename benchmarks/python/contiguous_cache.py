"""A cache that is filled in place: transformers' DynamicCache without its copies."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer


class ContiguousLayer(DynamicLayer):
    """Room for `capacity` tokens, taken at the first update; keys and values are views of it."""

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity = capacity

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        rows, heads, _, dim = key_states.shape
        shape = (rows, heads, self.capacity, dim)
        self._keys, self._values = key_states.new_zeros(shape), value_states.new_zeros(shape)
        self.keys, self.values = self._keys[:, :, :0], self._values[:, :, :0]
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        self._keys[:, :, start:end] = key_states
        self._values[:, :, start:end] = value_states
        self.keys, self.values = self._keys[:, :, :end], self._values[:, :, :end]
        return self.keys, self.values


def contiguous_cache(layers: int, capacity: int) -> Cache:
    return Cache(layers=[ContiguousLayer(capacity) for _ in range(layers)])
