"""Sequences of a model under way: decoded by the model itself, or by methods."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache

from icecache.bench.cache_layers import (
    Attention,
    AttentionCall,
    FullLayer,
    TakenLayer,
    check_attended,
    routed,
)
from icecache.bench.dense_cache import DenseCache

if TYPE_CHECKING:
    from icecache.bench.decoder import Decoder

QUERIES = 256  # of a prompt's last tokens, which indexes learn from


class OwnRun:
    """One sequence that the model decodes by itself: its own attention in every layer.

    The model attends to views of what the full-attention layers hold.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.held = [DenseCache() for _ in decoder.layers]
        self.queries: list[torch.Tensor] = [torch.empty(0)] * decoder.num_layers
        self.step_s = 0.0  # seconds of calls with one token
        self.on_attention: Callable[[int, AttentionCall], None] | None = None  # sees every call
        self._decoder = decoder
        self._full = [_OwnLayer(self, index, 0) for index in range(decoder.num_layers)]
        self._stock = decoder.stock_layers()

    @property
    def length(self) -> int:
        """Tokens so far."""
        return self._full[0].seen

    def run(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [V] after `tokens` [T], which become part of the sequence.

        Queries of calls with more than one token are kept: the last 256, [Hq, n, D] a layer.
        """
        start = time.perf_counter()
        logits = self._forward(tokens, 1)
        if tokens.shape[0] == 1:
            self.step_s += time.perf_counter() - start
        return logits[0].clone()  # of a model that makes logits of all tokens, one

    def run_all(self, tokens: torch.Tensor) -> torch.Tensor:
        """As run(), but the logits [T, V] after each of the tokens."""
        return self._forward(tokens, tokens.shape[0])

    def _forward(self, tokens: torch.Tensor, keep: int) -> torch.Tensor:
        decoder = self._decoder
        with routed(decoder.config):
            cache = _cache(decoder, self._full, self._stock)
            logits = decoder.forward(tokens[None], cache, keep=keep)
        check_attended(self._full, decoder.layers)
        return logits[0]

    def fork(self) -> OwnRun:
        """A run with the same tokens."""
        other = copy.copy(self)
        other.held = [layer.fork() for layer in self.held]
        other.queries = list(self.queries)
        other._full = [_OwnLayer(other, layer.index, layer.seen) for layer in self._full]
        other._stock = self.stock_layers()
        return other

    def stock_layers(self) -> list[Any]:
        """Copies of transformers' own cache of the other layers, as in Decoder.stock_layers."""
        return _of_rows(self._stock, [0])


class _OwnLayer(FullLayer):
    """A layer of an OwnRun."""

    def __init__(self, run: OwnRun, index: int, seen: int) -> None:
        super().__init__(index, seen)
        self._run = run

    def keep(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        held = self._run.held[self.index]
        held.append(keys[0], values[0])
        return held.keys[None], held.values[None]

    def attend(self, call: AttentionCall) -> tuple[torch.Tensor, Any]:
        run = self._run
        if run.on_attention is not None:
            run.on_attention(self.index, call)
        if call.query.shape[2] > 1:
            seen = [run.queries[self.index]] if run.queries[self.index].numel() else []
            run.queries[self.index] = torch.cat([*seen, call.query[0]], 1)[:, -QUERIES:].clone()
        return call.result()


class Branch:
    """Rows that methods decode. What the methods hold is theirs: here is where the rows stand.

    `positions` [B]: of each row's next token. All are the same where `decoder.can_join` is False.
    """

    def __init__(
        self, decoder: Decoder, stock_layers: Sequence[Any], positions: torch.Tensor
    ) -> None:
        """`stock_layers`: as Decoder.stock_layers, with B rows. They become this branch's own."""
        self.positions = positions
        self._decoder = decoder
        self._stock = list(stock_layers)
        start = int(positions[0])
        self._full = [TakenLayer(index, start) for index in range(decoder.num_layers)]

    def run(self, tokens: torch.Tensor, attend: Attention) -> torch.Tensor:
        """Logits [B, V] of the last of T new tokens [B, T]; `attend` is full attention."""
        decoder = self._decoder
        for layer in self._full:
            layer.attention = attend
        new = torch.arange(tokens.shape[1])
        together = bool((self.positions == self.positions[0]).all())
        positions = None if together else self.positions[:, None] + new
        with routed(decoder.config):
            logits = decoder.forward(tokens, _cache(decoder, self._full, self._stock), positions)
        check_attended(self._full, decoder.layers)
        self.positions = self.positions + tokens.shape[1]
        return logits[:, -1]

    def start(self, first_logits: torch.Tensor) -> Start:
        """Of rows that go on from this branch, which has one; `first_logits` [V] are behind it."""
        return Start(int(self.positions), first_logits, _of_rows(self._stock, [0]))

    def fork(self, rows: Sequence[int]) -> Branch:
        """A branch of these rows of this one."""
        return Branch(
            self._decoder, _of_rows(self._stock, rows), self.positions[torch.tensor(rows)]
        )

    def joined(self, others: Iterable[Branch]) -> Branch:
        """One branch with the rows of all; only where `decoder.can_join`."""
        assert self._decoder.can_join
        positions = [self.positions, *(other.positions for other in others)]
        return Branch(self._decoder, self._stock, torch.cat(positions))


@dataclass(frozen=True)
class Start:
    """Where a row starts to decode: what the model made of a prompt, beside what a method holds."""

    length: int  # tokens of the prompt
    first_logits: torch.Tensor  # [V]: after the prompt
    stock_layers: Sequence[Any]  # as in Decoder.stock_layers, one row each


def start_rows(decoder: Decoder, starts: Sequence[Start]) -> Branch:
    """A branch with a row from each of `starts`, which are after prompts of one length."""
    first = starts[0]
    if all(start is first for start in starts):
        stock = _of_rows(first.stock_layers, [0] * len(starts))
    else:
        stock = [_joined(rows) for rows in zip(*(one.stock_layers for one in starts), strict=True)]
    return Branch(decoder, stock, torch.tensor([start.length for start in starts]))


def _cache(decoder: Decoder, full: Sequence[FullLayer], stock: Sequence[Any]) -> Cache:
    layers = list(stock)
    for at, layer in zip(decoder.layers, full, strict=True):
        layers[at] = layer
    return Cache(layers=layers)


def _of_rows(stock: Sequence[Any], rows: Sequence[int]) -> list[Any]:
    """Copies of transformers' layers with these of their rows."""
    index = torch.tensor(rows)
    copies = []
    for layer in stock:
        other = copy.deepcopy(layer)
        if other is not None:
            other.reorder_cache(index)
        copies.append(other)
    return copies


def _joined(rows: Sequence[Any]) -> Any:
    """A copy of transformers' layers, or of what they hold, that has the rows of all.

    They have seen as many tokens, so that they differ in tensors alone.
    """
    first = rows[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(list(rows)) if first.dim() > 1 else first.clone()
    if isinstance(first, dict):
        return {key: _joined([row[key] for row in rows]) for key in first}
    if isinstance(first, (list, tuple)):
        return type(first)(_joined(values) for values in zip(*rows, strict=True))
    if not hasattr(first, "get_seq_length"):
        return first
    made = copy.copy(first)
    vars(made).update(_joined([vars(row) for row in rows]))
    return made
