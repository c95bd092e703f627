"""Keys and values of one layer, side by side as full attention reads them."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

_LEAST_ROOM, _MOST_ROOM = 32, 256  # tokens that a cache grows by, as many as it has between these


class DenseCache:
    """Grows in place. What was read before stays as it was: no token is overwritten."""

    def __init__(self, like: torch.Tensor | None = None) -> None:
        """`like` [Hkv, n, D] tells the shape while there is no token."""
        like = torch.empty(0, 0, 0) if like is None else like[:, :0]
        self._rows = torch.stack([like, like])  # keys and values, [2, Hkv, room, D]
        self.length = 0  # tokens

    @property
    def keys(self) -> torch.Tensor:
        """[Hkv, L, D], a view."""
        return self._rows[0, :, : self.length]

    @property
    def values(self) -> torch.Tensor:
        """[Hkv, L, D], a view."""
        return self._rows[1, :, : self.length]

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """T more tokens, [Hkv, T, D]."""
        start, end = self.length, self.length + keys.shape[1]
        if start == 0:
            self._rows = torch.stack([keys[:, :0], values[:, :0]])
        if end > self._rows.shape[2]:
            room = end + min(max(end, _LEAST_ROOM), _MOST_ROOM)
            self._rows = F.pad(self._rows, (0, 0, 0, room - self._rows.shape[2]))
        self._rows[0, :, start:end], self._rows[1, :, start:end] = keys, values
        self.length = end

    def fork(self) -> DenseCache:
        """A cache with the same tokens."""
        other = copy.copy(self)
        other._rows = self._rows.clone()
        return other
