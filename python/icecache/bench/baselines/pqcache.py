"""PQCache (Zhang et al. 2025, SIGMOD, arXiv:2407.12820): tokens by product-quantised keys."""

from __future__ import annotations

import torch

from icecache.bench.baselines.budget import SINK, best_tokens, near_tokens, window_of
from icecache.bench.baselines.tensor_session import Selection, Step, TensorSession
from icecache.bench.libraries import library
from icecache.bench.prefill import Prefill


class PQCacheSession(TensorSession):
    """Keys in `parts` parts, each replaced by one of 2^bits centroids, per layer and KV head.

    2 parts of 6 bits are the paper's for LongBench. Centroids are FAISS's of the prompt's keys
    behind the sink, as many at most as there are such keys; decoded tokens get the nearest. Tokens
    are picked by the softmax of the approximate scores over what is neither sink nor window, summed
    over the group.

    Bytes beside keys and values: parts * bits / 8 a token, 2^bits D e of centroids.
    """

    def __init__(
        self,
        prefill: Prefill,
        budget: int,
        scale: float,
        *,
        parts: int = 2,
        bits: int = 6,
        seed: int = 0,
    ) -> None:
        self._recent = window_of(budget)
        super().__init__(prefill, budget, scale)
        self._parts, self._seed = parts, seed
        trained = max(1, prefill.length - SINK)
        self._bits = min(bits, trained.bit_length() - 1)
        layers = range(prefill.keys.shape[0])
        self._centroids = [self._train(layer) for layer in layers]  # [Hkv, parts, 2^bits, D/parts]
        self._codes = [
            _encode(prefill.keys[layer], self._centroids[layer]) for layer in layers
        ]  # [Hkv, parts, L] uint8 a layer

    def select(self, step: Step) -> Selection:
        layer, heads = step.layer, step.queries.shape[0]
        centroids, codes = self._centroids[layer], self._codes[layer]
        new, _ = self.span(layer, codes.shape[-1], step.length)
        codes = self._codes[layer] = torch.cat([codes, _encode(new, centroids)], -1)
        near = near_tokens(step.length, self._recent)
        approximate = _look_up(step.queries, centroids, codes).masked_fill(near, -torch.inf)
        worth = torch.softmax(approximate, -1).sum(1, keepdim=True)
        return Selection(best_tokens(worth, self.budget), bytes_read=heads * self._read(near))

    def _read(self, near: torch.Tensor) -> int:
        codes = int((~near).sum()) * self._parts * self._bits // 8
        return codes + self.bytes_of(1 << self._bits)

    def _train(self, layer: int) -> torch.Tensor:
        keys = self.prefill.keys[layer, :, SINK:].float()
        heads, _, dim = keys.shape
        if self._bits == 0:
            return keys.new_zeros(heads, self._parts, 1, dim // self._parts)
        faiss = library("faiss")
        made = []
        for head in keys:
            quantizer = faiss.ProductQuantizer(dim, self._parts, self._bits)
            quantizer.cp.seed = self._seed
            quantizer.cp.min_points_per_centroid = 1
            quantizer.train(head.contiguous().numpy())
            made.append(torch.from_numpy(faiss.vector_to_array(quantizer.centroids)))
        return torch.stack(made).reshape(heads, self._parts, 1 << self._bits, dim // self._parts)


def _encode(keys: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """The nearest centroid of each part of keys [Hkv, n, D] -> [Hkv, parts, n] uint8."""
    parts = keys.float().unflatten(-1, (centroids.shape[1], -1)).transpose(1, 2)
    return torch.cdist(parts, centroids).argmin(-1).to(torch.uint8)


def _look_up(queries: torch.Tensor, centroids: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Scores [Hkv, G, L] of queries [Hkv, G, D] and the keys that `codes` stand for."""
    parts = queries.float().unflatten(-1, (centroids.shape[1], -1)).transpose(1, 2)
    table: torch.Tensor = parts @ centroids.mT  # [Hkv, parts, G, 2^bits]
    rows = codes[:, :, None].expand(-1, -1, queries.shape[1], -1)
    return table.gather(-1, rows.long()).sum(1)
