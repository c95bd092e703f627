"""ArkVale (Chen et al. 2024, NeurIPS): pages of consecutive tokens by a bounding volume."""

from __future__ import annotations

import torch

from icecache.bench.baselines.budget import (
    SINK,
    near_tokens,
    require_budget,
    take_fitting,
    window_of,
)
from icecache.bench.baselines.tensor_session import Selection, Step, TensorSession
from icecache.bench.prefill import Prefill
from icecache.config import Config

PAGE: int = Config().page_size


class ArkValeSession(TensorSession):
    """Pages of 16 tokens (the paper: 32) behind the sink; the best are attended as a whole.

    A page's digest is the cuboid around c = (min + max) / 2 with the half-widths r = mean |k - c|,
    each element by itself: "cuboid-mean", the best of the paper's volumes. It estimates the largest
    q.k as q.c + |q|.r, of which the group's heads take the mean. Tokens that have left the window
    and do not fill a page yet are a page too.

    Bytes beside keys and values: the digests, 2 D e a page.
    """

    def __init__(self, prefill: Prefill, budget: int, scale: float) -> None:
        self._recent = window_of(budget)
        least = SINK + self._recent + PAGE
        require_budget(budget, least, f"sink + window + page = {SINK} + {self._recent} + {PAGE}")
        super().__init__(prefill, budget, scale)
        empty = prefill.keys.new_empty(2, prefill.keys.shape[1], 0, prefill.keys.shape[3])
        self._digests = [empty] * prefill.keys.shape[0]  # [2, Hkv, full pages, D] a layer
        for layer in range(prefill.keys.shape[0]):
            self._digest_to(layer, prefill.length - self._recent)

    def select(self, step: Step) -> Selection:
        end = step.length - self._recent
        heads = step.queries.shape[0]
        near = near_tokens(step.length, self._recent).expand(heads, -1)
        digests = self._digest_to(step.layer, end)
        pages = digests.shape[2]
        if pages == 0:
            return Selection(near[:, None])
        center, radius = digests
        worth = (step.queries @ center.mT + step.queries.abs() @ radius.mT).mean(1)
        sizes = torch.full((pages,), PAGE)
        sizes[-1] = end - SINK - (pages - 1) * PAGE
        room = self.budget - SINK - self._recent
        taken = take_fitting(worth, sizes.expand(heads, -1), room)
        attended = near.clone()
        attended[:, SINK:end] = taken.repeat_interleave(sizes, 1)
        return Selection(attended[:, None], bytes_read=self.bytes_of(2 * heads * pages))

    def _digest_to(self, layer: int, end: int) -> torch.Tensor:
        """[2, Hkv, P, D] of the tokens from the sink to before `end`; full pages are kept."""
        kept = self._digests[layer]
        start = SINK + kept.shape[2] * PAGE
        if end <= start:
            return kept
        keys, _ = self.span(layer, start, end)
        full = (end - start) // PAGE * PAGE
        if full:
            kept = torch.cat([kept, _digest(keys[:, :full].unflatten(1, (-1, PAGE)))], 2)
            self._digests[layer] = kept
        if full == end - start:
            return kept
        return torch.cat([kept, _digest(keys[:, None, full:])], 2)


def _digest(pages: torch.Tensor) -> torch.Tensor:
    """[Hkv, P, S, D] -> center and half-widths [2, Hkv, P, D]."""
    center = (pages.amin(2) + pages.amax(2)) / 2
    radius = (pages - center[:, :, None]).abs().mean(2)
    return torch.stack([center, radius])
