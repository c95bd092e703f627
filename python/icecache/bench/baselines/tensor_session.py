"""A Session over torch tensors with every token in sight: what oracles and baselines share."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
import torch.nn.functional as F

from icecache.bench.dense_cache import DenseCache
from icecache.bench.prefill import Prefill

_MASS_EVERY = 4  # steps; mass asks for full attention's weights, most of a step's time

_Self = TypeVar("_Self", bound="TensorSession")


@dataclass(frozen=True)
class Step:
    """Attention of one new token in one layer, its L-th; G query heads share a KV head."""

    layer: int
    queries: torch.Tensor  # [Hkv, G, D], times the scale
    keys: tuple[torch.Tensor, torch.Tensor]  # [Hkv, L, D] in two parts: of the prompt, decoded
    sinks: torch.Tensor | None = None  # [Hkv, G, 1]: a logit that takes part and adds nothing

    @property
    def heads(self) -> int:
        return self.queries.shape[0]

    @property
    def length(self) -> int:
        return sum(part.shape[1] for part in self.keys)

    @cached_property
    def scores(self) -> torch.Tensor:
        """[Hkv, G, L]"""
        return torch.cat([self.queries @ part.mT for part in self.keys], -1)

    @cached_property
    def weights(self) -> torch.Tensor:
        """[Hkv, G, L]: full attention's, the softmax of the scores."""
        return self.softmax(self.scores)

    def softmax(self, scores: torch.Tensor) -> torch.Tensor:
        """Weights of `scores` [Hkv, G, n]; with a sink their sum is below 1."""
        return softmax(scores, self.sinks)

    def scores_at(self, picks: torch.Tensor) -> torch.Tensor:
        """[Hkv, G, n] of the tokens `picks` [Hkv, n]; makes the scores of no others."""
        if "scores" in vars(self):
            return _at(self.scores, picks)
        return self.queries @ _rows_at(self.keys, picks).mT


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


def sinks_of(prefill: Prefill, layer: int) -> torch.Tensor | None:
    """Learned sinks of a layer, [Hkv, G, 1]; None where the model has none."""
    if not prefill.sinks.numel():
        return None
    return prefill.sinks[layer].reshape(prefill.keys.shape[1], -1, 1)


def softmax(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Over the last dimension of [Hkv, G, n], where `sinks` [Hkv, G, 1] take part beside them."""
    if sinks is None:
        return torch.softmax(scores, -1)
    return torch.softmax(torch.cat([scores, sinks.to(scores.dtype)], -1), -1)[..., :-1]


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
        self._decoded = [DenseCache(prefill.keys[0]) for _ in range(layers)]
        self._steps = 0
        self._mass = 0.0  # sum of so many
        self._masses = 0
        self._bytes = 0

    @abstractmethod
    def select(self, step: Step) -> Selection:
        """What the new token attends to; called once for every layer and token."""

    def attend(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        self._decoded[layer].append(keys, values)
        heads, _, head_dim = keys.shape
        q = self.scale * queries.reshape(heads, -1, head_dim)
        sinks = sinks_of(self.prefill, layer)
        step = Step(layer, q, (self.prefill.keys[layer], self._decoded[layer].keys), sinks)
        selection = self.select(step)
        union = selection.attended.any(1)
        picks = _picks(union)
        if layer == 0:
            self.attended = []
            self._steps += 1
        self.attended.append(selection.attended)
        if self._steps % _MASS_EVERY == 1:
            self._mass += _attended_mass(step, selection, picks)
            self._masses += 1
        self._bytes += 2 * self.bytes_of(union.sum()) + selection.bytes_read
        return self._output(step, selection, picks).reshape(queries.shape)

    def fork(self: _Self) -> _Self:
        other = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, list):
                setattr(other, name, list(value))
        other._decoded = [one.fork() for one in self._decoded]
        return other

    def mass(self) -> float:
        """Of every fourth step, the first included."""
        return self._mass / max(1, self._masses)

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
        held = self._decoded[layer]
        return (
            torch.cat([self.prefill.keys[layer, :, prompt], held.keys[:, decoded]], 1),
            torch.cat([self.prefill.values[layer, :, prompt], held.values[:, decoded]], 1),
        )

    def bytes_of(self, vectors: torch.Tensor | int) -> int:
        """Of this many keys, or as many values."""
        return int(vectors) * self.prefill.keys.shape[-1] * self.prefill.keys.element_size()

    def _output(self, step: Step, selection: Selection, picks: torch.Tensor | None) -> torch.Tensor:
        attended, scale = selection.attended, selection.log_scale
        if picks is None:
            scores = step.scores
        else:
            scores = step.scores_at(picks)
            attended = _at(attended, picks)
            scale = None if scale is None else _at(scale, picks)
        if scale is not None:
            scores = scores + scale
        scores = scores.masked_fill(~attended, -torch.inf)
        far = selection.far
        weights = step.softmax(scores if far is None else torch.cat([scores, far.scores], -1))
        near = scores.shape[-1]
        values = (self.prefill.values[step.layer], self._decoded[step.layer].values)
        if picks is not None:
            output = weights[..., :near] @ _rows_at(values, picks)
        else:
            prompt = self.prefill.length
            output = weights[..., :prompt] @ values[0] + weights[..., prompt:near] @ values[1]
        return output if far is None else output + weights[..., near:] @ far.values


def _picks(attended: torch.Tensor) -> torch.Tensor | None:
    """Where `attended` [Hkv, L] holds, [Hkv, n]; None unless that is the same n and a small part.

    Reading only these values is most of a step's time where few tokens are attended to.
    """
    heads, length = attended.shape
    counts = attended.sum(-1).tolist()
    if len({*counts}) > 1 or 4 * counts[0] > length:
        return None
    return attended.nonzero()[:, 1].reshape(heads, counts[0])


def _rows_at(parts: tuple[torch.Tensor, torch.Tensor], picks: torch.Tensor) -> torch.Tensor:
    """[Hkv, n, D] of the tokens `picks` [Hkv, n]; parts [Hkv, L, D] as in Step.keys."""
    prompt, decoded = parts
    heads, length, head_dim = prompt.shape
    firsts = length * torch.arange(heads)[:, None]
    rows = F.embedding(picks.clamp(max=length - 1) + firsts, prompt.reshape(-1, head_dim))
    late = (picks >= length).nonzero(as_tuple=True)
    if late[0].numel():
        rows[late] = decoded[late[0], picks[late] - length]
    return rows


def _at(rows: torch.Tensor, picks: torch.Tensor) -> torch.Tensor:
    """[Hkv, G, L] at `picks` [Hkv, n] -> [Hkv, G, n]"""
    return rows.gather(-1, picks[:, None].expand(-1, rows.shape[1], -1))


def _attended_mass(step: Step, selection: Selection, picks: torch.Tensor | None) -> float:
    """A learned sink, which every method gets, counts as attended."""
    weights, attended = step.weights, selection.attended
    sink = 0.0 if step.sinks is None else float((1 - weights.sum(-1)).mean())
    if picks is not None:
        weights, attended = _at(weights, picks), _at(attended, picks)
    return float((weights * attended).sum(-1).mean()) + sink
