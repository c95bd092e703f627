"""Attention within a token budget that sees every key: what a method could reach."""

from __future__ import annotations

import torch

from icecache.bench.baselines.budget import SINK, best_tokens, near_tokens, window_of
from icecache.bench.baselines.tensor_session import Selection, Step, TensorSession
from icecache.bench.prefill import Prefill


class FullSession(TensorSession):
    """Full attention."""

    def select(self, step: Step) -> Selection:
        return Selection(torch.ones(step.heads, 1, step.length, dtype=torch.bool))


class RecentSession(TensorSession):
    """Sink and the most recent tokens (Xiao et al. 2024, StreamingLLM, arXiv:2309.17453).

    Keys keep the positions that they were made with.
    """

    def __init__(self, prefill: Prefill, budget: int, scale: float) -> None:
        window_of(budget)
        super().__init__(prefill, budget, scale)

    def select(self, step: Step) -> Selection:
        near = near_tokens(step.length, self.budget - SINK)
        return Selection(near.expand(step.heads, 1, -1))


class TopSession(TensorSession):
    """Sink, window, and the tokens of most attention mass summed over the heads of the group.

    `per_head`: each query head has the budget for itself, and its own tokens.
    Bytes beside keys and values attended to: all other keys.
    """

    def __init__(
        self, prefill: Prefill, budget: int, scale: float, *, per_head: bool = False
    ) -> None:
        window_of(budget)
        super().__init__(prefill, budget, scale)
        self._per_head = per_head

    def select(self, step: Step) -> Selection:
        worth = step.weights if self._per_head else step.weights.sum(1, keepdim=True)
        attended = best_tokens(worth, self.budget)
        others = (~attended.any(1)).sum()
        return Selection(attended, bytes_read=self.bytes_of(others))
