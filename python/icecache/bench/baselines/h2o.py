"""H2O (Zhang et al. 2023, arXiv:2306.14048): recent tokens and heavy hitters, the rest evicted."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from icecache.bench.baselines.budget import require_budget
from icecache.bench.baselines.observed import observed_attention
from icecache.bench.baselines.tensor_session import Selection, Step, TensorSession
from icecache.bench.prefill import Prefill
from icecache.bench.runs import QUERIES


class H2OSession(TensorSession):
    """Half of the budget are the most recent tokens, half those of most accumulated attention.

    Attention is accumulated over the group's heads, first of the prompt's last 256 queries (the
    paper: of all; a prefill keeps no more), then of every decode step over the tokens still kept.
    When a token comes that does not fit, the one of least attention among those that are not recent
    is evicted for good. There is no sink: first tokens stay as far as they are heavy hitters.

    Bytes beside keys and values: the accumulated attention, 4 a kept token.
    """

    def __init__(self, prefill: Prefill, budget: int, scale: float) -> None:
        require_budget(budget, 2, "one recent token + one heavy hitter = 2")
        super().__init__(prefill, budget, scale)
        self._received = [
            self._evict(observed_attention(prefill, layer, QUERIES, scale).sum((1, 2)))
            for layer in range(prefill.keys.shape[0])
        ]  # [Hkv, L] a layer: accumulated attention, -inf for evicted tokens

    def select(self, step: Step) -> Selection:
        received = self._evict(F.pad(self._received[step.layer], (0, 1)))
        kept = received.isfinite()[:, None]
        weights = step.softmax(step.scores.masked_fill(~kept, -torch.inf))
        self._received[step.layer] = received + weights.sum(1)
        return Selection(kept, bytes_read=4 * int(kept.sum()))

    def _evict(self, received: torch.Tensor) -> torch.Tensor:
        """`received` with -inf for all but the recent tokens and the heaviest hitters."""
        length = received.shape[-1]
        if length <= self.budget:
            return received
        rank = received.clone()
        rank[:, length - self.budget // 2 :] = torch.inf
        kept = rank.topk(self.budget, -1).indices
        evicted = torch.ones_like(rank, dtype=torch.bool).scatter(-1, kept, False)
        return received.masked_fill(evicted, -torch.inf)
