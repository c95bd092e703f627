"""A Session over torch tensors with every token in sight: what oracles and baselines share."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypeVar

import torch

from icecache.bench.prefill import Prefill

_Self = TypeVar("_Self", bound="TensorSession")


@dataclass(frozen=True)
class Step:
    """Attention of one new token in one layer, its L-th; G query heads share a KV head."""

    layer: int
    queries: torch.Tensor  # [Hkv, G, D], times the scale
    scores: torch.Tensor  # [Hkv, G, L]
    weights: torch.Tensor  # [Hkv, G, L]: full attention's, the softmax of the scores

    @property
    def length(self) -> int:
        return self.scores.shape[-1]


@dataclass(frozen=True)
class FarField:
    """Groups of tokens that take part as if each were one token."""

    scores: torch.Tensor  # [Hkv, G, C]: log weights; -inf where a group takes no part
    values: torch.Tensor  # [Hkv, C, D]


@dataclass(frozen=True)
class Selection:
    """What a method attends to in one step."""

    attended: torch.Tensor  # [Hkv, 1 or G, L] bool: tokens whose key and value are used
    log_scale: torch.Tensor | None = None  # [Hkv, G, L]: added to the scores of attended tokens
    far: FarField | None = None
    bytes_read: int = 0  # of what the method keeps beside keys and values, of all KV heads


class TensorSession(ABC):
    """A Session. Keys and values of the prompt are the prefill's own tensors, not copies.

    What a subclass keeps of its own is in lists with one entry a layer; entries are replaced, never
    changed in place, so that forks share them.
    """

    def __init__(self, prefill: Prefill, budget: int, scale: float) -> None:
        """Subclasses raise InvalidArgument where `budget` is below what they always attend to."""
        self.prefill = prefill
        self.budget = budget
        self.scale = scale
        self.attended: list[torch.Tensor] = []  # in each layer's last step, [Hkv, 1 or G, L] bool
        layers = prefill.keys.shape[0]
        empty = prefill.keys[0, :, :0]
        self._keys = [empty] * layers  # of decoded tokens, [Hkv, t, D] a layer
        self._values = list(self._keys)
        self._mass = 0.0
        self._calls = 0
        self._bytes = 0

    @abstractmethod
    def select(self, step: Step) -> Selection:
        """What the new token attends to; called once for every layer and token."""

    def attend(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        self._keys[layer] = torch.cat([self._keys[layer], keys], 1)
        self._values[layer] = torch.cat([self._values[layer], values], 1)
        heads, _, head_dim = keys.shape
        q = self.scale * queries.reshape(heads, -1, head_dim)
        parts = (self.prefill.keys[layer], self._keys[layer])
        scores = torch.cat([q @ part.mT for part in parts], -1)
        step = Step(layer, q, scores, torch.softmax(scores, -1))
        selection = self.select(step)
        self._count(step, selection)
        return self._output(step, selection).reshape(queries.shape)

    def fork(self: _Self) -> _Self:
        other = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, list):
                setattr(other, name, list(value))
        return other

    def mass(self) -> float:
        return self._mass / max(1, self._calls)

    def bytes_read(self) -> int:
        """By this session's decode steps, as an engine of this method would have to read:

        sum over steps, layers and KV heads of 2 n D e + m, with n the tokens that any head of the
        group attends to exactly, e the size of an element, and m what `select` says that it reads
        of the method's own data.
        """
        return self._bytes

    def close(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, list):
                setattr(self, name, [])

    def span(self, layer: int, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [Hkv, end - start, D] of the tokens from `start` to before `end`."""
        length = self.prefill.length
        prompt, decoded = (
            slice(start, min(end, length)),
            slice(max(0, start - length), end - length),
        )
        if end <= length:
            return self.prefill.keys[layer, :, prompt], self.prefill.values[layer, :, prompt]
        return (
            torch.cat([self.prefill.keys[layer, :, prompt], self._keys[layer][:, decoded]], 1),
            torch.cat([self.prefill.values[layer, :, prompt], self._values[layer][:, decoded]], 1),
        )

    def bytes_of(self, vectors: torch.Tensor | int) -> int:
        """Of this many keys, or as many values."""
        return int(vectors) * self.prefill.keys.shape[-1] * self.prefill.keys.element_size()

    def _count(self, step: Step, selection: Selection) -> None:
        if step.layer == 0:
            self.attended = []
        self.attended.append(selection.attended)
        self._mass += float((step.weights * selection.attended).sum(-1).mean())
        self._calls += 1
        tokens = selection.attended.any(1).sum()
        self._bytes += 2 * self.bytes_of(tokens) + selection.bytes_read

    def _output(self, step: Step, selection: Selection) -> torch.Tensor:
        scores = step.scores
        if selection.log_scale is not None:
            scores = scores + selection.log_scale
        scores = scores.masked_fill(~selection.attended, -torch.inf)
        far = selection.far
        weights = torch.softmax(scores if far is None else torch.cat([scores, far.scores], -1), -1)
        prompt, length = self.prefill.length, step.length
        output = weights[..., :prompt] @ self.prefill.values[step.layer]
        output = output + weights[..., prompt:length] @ self._values[step.layer]
        return output if far is None else output + weights[..., length:] @ far.values
