"""MagicPIG (Chen et al. 2025, ICLR, arXiv:2410.16179): keys sampled by hashing, then reweighted."""

from __future__ import annotations

import math

import numpy as np
import torch

from icecache.bench.baselines.budget import SINK, near_tokens, window_of
from icecache.bench.baselines.tensor_session import Selection, Step, TensorSession
from icecache.bench.prefill import Prefill

_LEAST = 1e-4  # a sampled key counts at most 1 / _LEAST times


class MagicPIGSession(TensorSession):
    """A key is sampled where its hash is the query's in at least two of L tables of K bits.

    Bits are signs of random projections of the query and of the key less the prompt's mean key, so
    a bit agrees with p = 1 - angle / pi, and a key is sampled with
    u = 1 - (1 - p^K)^L - L p^K (1 - p^K)^(L - 1), by which its weight is divided. Sink and window
    are attended as they are. K = 10 is the paper's.

    The paper fixes L, 150 with K = 10, and with it the mean cost. Here every query head uses the
    most tables, up to `tables`, whose samples fit in the budget: L is one less than the table at
    which the first key that does not fit would join. For keys that are hashed independently such a
    threshold leaves weights of 1 / u unbiased (Cohen and Kaplan 2007, bottom-k sketches). The
    budget holds for each query head, which has samples of its own; where everything fits all is
    attended.

    Bytes beside keys and values: 4 for each id in a bucket that is looked up.
    """

    def __init__(
        self,
        prefill: Prefill,
        budget: int,
        scale: float,
        *,
        bits: int = 10,
        tables: int = 300,
        seed: int = 0,
    ) -> None:
        self._recent = window_of(budget)
        super().__init__(prefill, budget, scale)
        self._bits, self._tables = bits, tables
        _, heads, _, dim = prefill.keys.shape
        random = torch.Generator().manual_seed(seed)
        self._directions = torch.randn(bits, heads, dim, tables, generator=random)
        self._means = [keys.float().mean(1, keepdim=True) for keys in prefill.keys]
        centered = [
            keys.float() - mean for keys, mean in zip(prefill.keys, self._means, strict=True)
        ]
        self._norms = [keys.norm(dim=-1) for keys in centered]  # [Hkv, L] a layer
        self._codes = [self._hash(keys) for keys in centered]  # [Hkv, L, tables] a layer

    def select(self, step: Step) -> Selection:
        heads, _, length = step.scores.shape
        self._append(step)
        if length <= self.budget:
            return Selection(torch.ones(heads, 1, length, dtype=torch.bool))
        near = near_tokens(length, self._recent)
        joins, ids = self._look_up(step, near)
        room = self.budget - SINK - self._recent
        used = (joins.kthvalue(room + 1, -1, keepdim=True).values - 1).clamp_max(self._tables)
        read = ids * (torch.arange(self._tables) < used)
        return Selection(
            (joins <= used) | near,
            log_scale=-self._log_probability(step, used).masked_fill(near, 0.0),
            bytes_read=4 * int(read.sum()),
        )

    def _append(self, step: Step) -> None:
        layer, known = step.layer, self._norms[step.layer]
        keys = self.span(layer, known.shape[-1], step.length)[0].float() - self._means[layer]
        self._codes[layer] = torch.cat([self._codes[layer], self._hash(keys)], 1)
        self._norms[layer] = torch.cat([known, keys.norm(dim=-1)], 1)

    def _hash(self, vectors: torch.Tensor) -> torch.Tensor:
        """[Hkv, n, D] -> [Hkv, n, tables] int16."""
        heads, count, _ = vectors.shape
        codes = torch.zeros(heads, count, self._tables, dtype=torch.int16)
        for bit, directions in enumerate(self._directions):
            codes += (vectors @ directions > 0).to(torch.int16) << bit
        return codes

    def _look_up(self, step: Step, near: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The number of tables with which a key is sampled [Hkv, G, L], tables + 1 where with none;
        and how many ids the query's bucket has in each table [Hkv, G, tables]."""
        heads, group, length = step.scores.shape
        joins = torch.full((heads, group * length), self._tables + 1)
        ids = torch.zeros(heads, group * self._tables, dtype=torch.int64)
        queries = self._hash(step.queries.float())
        for head, codes in enumerate(self._codes[step.layer]):
            # numpy finds the few equal codes several times as fast as torch.
            equal = codes.numpy() == queries[head, :, None].numpy()  # [G, L, tables]
            hits = torch.from_numpy(np.flatnonzero(equal))
            hits = hits[~near[hits // self._tables % length]]
            row, table = hits // self._tables, hits % self._tables
            again = row[1:] == row[:-1]
            second = torch.cat([again[:1], again[1:] & ~again[:-1]]).nonzero()[:, 0] + 1
            joins[head, row[second]] = table[second] + 1
            bucket = row // length * self._tables + table
            ids[head] = bucket.bincount(minlength=ids.shape[1])
        return joins.unflatten(1, (group, -1)), ids.unflatten(1, (group, -1))

    def _log_probability(self, step: Step, used: torch.Tensor) -> torch.Tensor:
        """log u [Hkv, G, L] with `used` [Hkv, G, 1] tables."""
        queries = step.queries.double()
        dots = step.scores.double() - queries @ self._means[step.layer].double().mT
        norms = queries.norm(dim=-1, keepdim=True) * self._norms[step.layer][:, None]
        angle = torch.arccos((dots / norms.clamp_min(1e-12)).clamp(-1.0, 1.0))
        agree = (1 - angle / math.pi) ** self._bits
        tables = used.double()
        none = (1 - agree) ** tables
        one = tables * agree * (1 - agree) ** (tables - 1)
        return (1 - none - one).clamp_min(_LEAST).log().to(step.scores.dtype)
