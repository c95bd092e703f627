"""Attention within a token budget with every key in sight, in torch: what a method could reach."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from icecache import Config, InvalidArgument
from icecache.bench.prefill import Prefill

SINK = Config().sink_tokens

# Full attention's probabilities [Hkv, G, L] and the token budget -> attended [Hkv, L] bool.
Pick = Callable[[torch.Tensor, int], torch.Tensor]


def window_of(budget: int) -> int:
    """The engine's default window at this budget; InvalidArgument where not even that fits."""
    window = 16 if budget <= 64 else 32
    if budget < SINK + window:
        raise InvalidArgument(
            f"budget: expected at least sink + window = {SINK} + {window}, got {budget}"
        )
    return window


def pick_all(weights: torch.Tensor, budget: int) -> torch.Tensor:
    """Full attention."""
    return torch.ones_like(weights[:, 0], dtype=torch.bool)


def pick_recent(weights: torch.Tensor, budget: int) -> torch.Tensor:
    """Sink and the most recent tokens (StreamingLLM)."""
    window_of(budget)
    return _sink_and_recent(weights, budget - SINK)


def pick_top(weights: torch.Tensor, budget: int) -> torch.Tensor:
    """Sink, window, and the tokens of most attention mass summed over the heads of the group."""
    window = window_of(budget)
    attended = _sink_and_recent(weights, window)
    count = min(budget - SINK - window, int((~attended[0]).sum()))
    mass = weights.sum(1).masked_fill(attended, -1.0)
    return attended.scatter(1, mass.topk(count, dim=1).indices, True)


def _sink_and_recent(weights: torch.Tensor, recent: int) -> torch.Tensor:
    heads, _, length = weights.shape
    attended = torch.zeros(heads, length, dtype=torch.bool)
    attended[:, :SINK] = True
    attended[:, max(0, length - recent) :] = True
    return attended


class OracleSession:
    """A Session over tensors. Keys and values of the prompt are the prefill's own, not copies."""

    def __init__(self, prefill: Prefill, pick: Pick, budget: int, scale: float) -> None:
        self._prefill = prefill
        self._pick = pick
        self._budget = budget
        self._scale = scale
        empty = prefill.keys[0, :, :0]
        self._keys = [empty] * prefill.keys.shape[0]  # of decoded tokens, [Hkv, t, D] a layer
        self._values = list(self._keys)
        self._mass = 0.0
        self._calls = 0

    def attend(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        self._keys[layer] = torch.cat([self._keys[layer], keys], 1)
        self._values[layer] = torch.cat([self._values[layer], values], 1)
        heads, _, head_dim = keys.shape
        q = self._scale * queries.reshape(heads, -1, head_dim)
        scores = torch.cat(
            [q @ part.mT for part in (self._prefill.keys[layer], self._keys[layer])], -1
        )
        weights = torch.softmax(scores, -1)
        attended = self._pick(weights, self._budget)
        near = weights * attended[:, None]
        mass = near.sum(-1, keepdim=True)
        self._mass += float(mass.mean())
        self._calls += 1
        near = near / mass
        length = self._prefill.length
        output = near[..., :length] @ self._prefill.values[layer]
        output = output + near[..., length:] @ self._values[layer]
        return output.reshape(queries.shape)

    def fork(self) -> OracleSession:
        other = copy.copy(self)
        other._keys, other._values = list(self._keys), list(self._values)
        return other

    def mass(self) -> float:
        return self._mass / max(1, self._calls)

    def close(self) -> None:
        self._keys, self._values = [], []
