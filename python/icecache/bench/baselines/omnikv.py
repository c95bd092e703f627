"""OmniKV (Hao et al. 2025, ICLR): a few layers select tokens for those that follow."""

from __future__ import annotations

import torch

from icecache.bench.baselines.budget import best_tokens, window_of
from icecache.bench.baselines.tensor_session import Selection, Step, TensorSession
from icecache.bench.prefill import Prefill

FILTERS = (2 / 32, 8 / 32, 18 / 32)  # the paper's layers 2, 8 and 18 of Llama-3-8B's 32


def filter_layers(layers: int) -> frozenset[int]:
    """The paper's filter layers at the same depths of `layers`; those before the first are too."""
    scaled = {min(layers - 1, round(layers * depth)) for depth in FILTERS}
    return frozenset(scaled) | frozenset(range(min(scaled)))


class OmniKVSession(TensorSession):
    """Filter layers pick the tokens of most attention; the layers up to the next filter use these.

    A token's attention is the largest of any head of the layer, and all heads share the picks. In
    the paper filter layers, and those before the first, attend to everything. That is
    `dense_filters`; otherwise they keep to the budget and attend to what they pick.

    Bytes beside keys and values attended to: in filter layers all other keys.
    """

    def __init__(
        self, prefill: Prefill, budget: int, scale: float, *, dense_filters: bool = False
    ) -> None:
        window_of(budget)
        super().__init__(prefill, budget, scale)
        self._filters = filter_layers(prefill.keys.shape[0])
        self._dense_filters = dense_filters
        self._picks: list[torch.Tensor] = []  # of the last filter layer: [1, 1, L] bool

    def select(self, step: Step) -> Selection:
        heads = step.heads
        if step.layer not in self._filters:
            return Selection(self._picks[0].expand(heads, -1, -1))
        picks = best_tokens(step.weights.amax((0, 1), keepdim=True), self.budget)
        self._picks = [picks]
        attended = torch.ones_like(picks) if self._dense_filters else picks
        others = heads * (~attended).sum()
        return Selection(attended.expand(heads, -1, -1), bytes_read=self.bytes_of(others))
