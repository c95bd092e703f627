"""SnapKV (Li et al. 2024, arXiv:2404.14469): the prompt as its last queries saw it."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from icecache.bench.baselines.budget import require_budget
from icecache.bench.baselines.observed import observed_attention
from icecache.bench.baselines.tensor_session import Selection, Step, TensorSession
from icecache.bench.prefill import Prefill


class SnapKVSession(TensorSession):
    """The last `window` tokens of the prompt, and of those before them the ones they vote for.

    A token's vote is the attention that it gets from the window's queries, their mean, pooled over
    neighbours with `kernel`, then the mean over the group's heads. `window` 32, `kernel` 7 and max
    pooling are the paper's for LongBench. There the cache grows while decoding; here it does not: a
    new token takes the place of the one of fewest votes, and, where only window and decoded tokens
    are left, of the oldest.
    """

    def __init__(
        self,
        prefill: Prefill,
        budget: int,
        scale: float,
        *,
        window: int = 32,
        kernel: int = 7,
        pooling: Literal["max", "mean"] = "max",
    ) -> None:
        require_budget(budget, window, f"the observation window = {window}")
        super().__init__(prefill, budget, scale)
        self._window, self._kernel = window, kernel
        self._pool = F.max_pool1d if pooling == "max" else F.avg_pool1d
        self._votes = [self._vote(layer) for layer in range(prefill.keys.shape[0])]

    def select(self, step: Step) -> Selection:
        votes = self._votes[step.layer]
        later = torch.arange(votes.shape[-1], step.length)  # above every vote, the newest most
        rank = torch.cat([votes, (1.0 + later).expand(votes.shape[0], -1)], -1)
        kept = rank.topk(min(self.budget, step.length), -1).indices
        attended = torch.zeros_like(rank, dtype=torch.bool).scatter(-1, kept, True)
        return Selection(attended[:, None])

    def _vote(self, layer: int) -> torch.Tensor:
        """[Hkv, tokens before the window], each at most 1."""
        seen = observed_attention(self.prefill, layer, self._window, self.scale)
        votes = seen[..., : -self._window].mean(2).float()
        if votes.shape[-1] > 0:
            votes = self._pool(votes, self._kernel, stride=1, padding=self._kernel // 2)
        return votes.mean(1)
