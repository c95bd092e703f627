"""RetroInfer (Chen et al. 2025, arXiv:2505.02922): clusters of keys, retrieved or estimated."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from icecache.bench.baselines.budget import SINK, near_tokens, take_fitting, window_of
from icecache.bench.baselines.tensor_session import FarField, Selection, Step, TensorSession
from icecache.bench.libraries import library
from icecache.bench.prefill import Prefill

CLUSTER = 16  # tokens of a cluster, on average
SEGMENT = 8192  # tokens that are clustered together


@dataclass(frozen=True)
class _Clusters:
    """Of the n tokens of one layer that have left the window; C clusters, some maybe empty."""

    members: torch.Tensor  # [Hkv, n] int64: the cluster of each token
    sizes: torch.Tensor  # [Hkv, C] int64
    keys: torch.Tensor  # [Hkv, C, D]: sum of the members'
    values: torch.Tensor  # [Hkv, C, D]: sum of the members'

    def mean(self, sums: torch.Tensor) -> torch.Tensor:
        return sums / self.sizes.clamp_min(1)[..., None]

    def join(self, keys: torch.Tensor, values: torch.Tensor, members: torch.Tensor) -> _Clusters:
        """With n' more tokens: keys and values [Hkv, n', D], their clusters [Hkv, n']."""
        rows = members[..., None].expand(keys.shape)
        return _Clusters(
            torch.cat([self.members, members], 1),
            self.sizes.scatter_add(1, members, torch.ones_like(members)),
            self.keys.scatter_add(1, rows, keys),
            self.values.scatter_add(1, rows, values),
        )


class RetroInferSession(TensorSession):
    """The best clusters are attended exactly, all others through their centroid.

    Spherical k-means (FAISS) of the keys less their mean, per layer, KV head and segment of 8,192
    tokens, 16 tokens a cluster. Clusters rank by the softmax of q.centroid, summed over the group;
    those that fit in the budget as a whole are retrieved. One that is not retrieved weighs
    size exp(q.centroid) and has its members' mean value: the estimation zone, which the paper
    limits to 23 % of the clusters for speed and which has no limit here. Tokens that leave the
    window join the cluster of the nearest centroid; the paper clusters each 1,024 of them anew.

    Bytes beside keys and values: D e + 4 a cluster, and D e for each value in the estimation zone.
    """

    def __init__(self, prefill: Prefill, budget: int, scale: float, *, seed: int = 0) -> None:
        self._recent = window_of(budget)
        super().__init__(prefill, budget, scale)
        self._seed = seed
        self._clusters = [self._build(layer) for layer in range(prefill.keys.shape[0])]

    def select(self, step: Step) -> Selection:
        clusters = self._advance(step)
        empty = clusters.sizes == 0
        scores = step.queries @ clusters.mean(clusters.keys).mT
        scores = scores.masked_fill(empty[:, None], -torch.inf)
        worth = torch.softmax(scores, -1).sum(1)
        room = self.budget - SINK - self._recent
        taken = take_fitting(worth, clusters.sizes, room)
        near = near_tokens(step.length, self._recent)
        attended = near.repeat(scores.shape[0], 1)
        attended[:, SINK : SINK + clusters.members.shape[1]] |= taken.gather(1, clusters.members)
        far = scores + clusters.sizes.log()[:, None].to(scores.dtype)
        far = far.masked_fill(taken[:, None], -torch.inf)
        estimated = (~taken & ~empty).sum()
        summaries = self.bytes_of(empty.numel() + estimated) + 4 * empty.numel()
        return Selection(
            attended[:, None],
            far=FarField(far, clusters.mean(clusters.values)),
            bytes_read=summaries,
        )

    def _advance(self, step: Step) -> _Clusters:
        clusters = self._clusters[step.layer]
        start, end = SINK + clusters.members.shape[1], step.length - self._recent
        if end > start:
            keys, values = self.span(step.layer, start, end)
            distance = torch.cdist(keys, clusters.mean(clusters.keys))
            distance = distance.masked_fill(clusters.sizes[:, None] == 0, torch.inf)
            clusters = clusters.join(keys, values, distance.argmin(-1))
            self._clusters[step.layer] = clusters
        return clusters

    def _build(self, layer: int) -> _Clusters:
        keys, values = self.span(layer, SINK, max(SINK, self.prefill.length - self._recent))
        heads, _, dim = keys.shape
        centered = keys.float() - keys.float().mean(1, keepdim=True)
        members, count = [], 0
        for segment in centered.split(SEGMENT, 1):
            wanted = max(1, round(segment.shape[1] / CLUSTER))
            members.append(count + self._assign(segment, wanted))
            count += wanted
        zeros = keys.new_zeros(heads, count, dim)
        empty = _Clusters(
            torch.empty(heads, 0, dtype=torch.int64),
            torch.zeros(heads, count, dtype=torch.int64),
            zeros,
            zeros,
        )
        return empty.join(keys, values, torch.cat(members, 1))

    def _assign(self, keys: torch.Tensor, count: int) -> torch.Tensor:
        """The cluster, one of `count`, of each key [Hkv, n, D] -> [Hkv, n] int64."""
        if count == 1:
            return torch.zeros(keys.shape[:2], dtype=torch.int64)
        faiss = library("faiss")
        members = []
        for head in keys:
            points = head.contiguous().numpy()
            kmeans = faiss.Kmeans(
                keys.shape[-1],
                count,
                niter=10,
                seed=self._seed,
                spherical=True,
                min_points_per_centroid=1,
            )
            kmeans.train(points)
            members.append(torch.from_numpy(kmeans.index.search(points, 1)[1][:, 0]))
        return torch.stack(members)
