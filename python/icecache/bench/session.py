"""One sequence under one method of attention: the interface that all methods share."""

from __future__ import annotations

from typing import Protocol

import torch


class Session(Protocol):
    """Filled from a prefill; takes one decode step after the other."""

    def attend(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Appends one token and attends; queries and result [Hq, 1, D], the rest [Hkv, 1, D]."""
        ...

    def fork(self) -> Session:
        """A session with the same tokens; to be closed before this one."""
        ...

    def mass(self) -> float:
        """Mean share of the attention mass that was attended exactly, over steps and heads."""
        ...

    def bytes_read(self) -> int:
        """By the decode steps so far, all layers and heads: attended keys and values, and what the
        method reads to find them."""
        ...

    def close(self) -> None:
        """Frees what the session holds; it takes no further step."""
        ...
