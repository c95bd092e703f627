"""The engine as a method: a sequence of an engine of its own, filled from a prefill.

With `prefill_budget` the engine attends to the prompt itself: the model runs over it once more, and
keys, values and what comes behind them are this method's own.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from icecache import Engine, HeadStats, Phase
from icecache.bench.decoder import Decoder
from icecache.bench.prefill import CHUNK, Prefill
from icecache.bench.runs import Branch, Start, start_rows
from icecache.bench.session import Session
from icecache.hf.engine_handle import EngineHandle
from icecache.hf.softmax import Softmax


class EngineSession:
    """A Session. Forks share the engine and with it the statistics."""

    _phase = Phase.AUTO  # of every step

    def __init__(
        self, decoder: Decoder, prefill: Prefill, budget: int, fields: Mapping[str, Any]
    ) -> None:
        """`fields` are those of icecache.Config; `dense_layers` counts in layers of the model.

        Raises the engine's errors.
        """
        sinks = prefill.sinks if prefill.sinks.numel() else [None] * decoder.num_layers
        self._softmax = [Softmax(decoder.scale, sinks=one) for one in sinks]
        handle = EngineHandle(decoder.layers, {"token_budget": budget, **fields}, None)
        engine = handle.bind(decoder.shape)
        assert isinstance(engine, Engine)
        self.engine = engine
        self._heads = [*itertools.product(range(decoder.num_layers), range(decoder.num_kv_heads))]
        self.sequence = self.engine.new_sequence()
        self.start: Start | None = None  # of its own, with prefill_budget
        if handle.attends_prompts:
            self.start = self._run(decoder, prefill.tokens)
        else:
            self._fill(prefill)
        self.engine.synchronize()

    def _fill(self, prefill: Prefill) -> None:
        for layer in range(self.engine.num_layers):
            keys, values = prefill.keys[layer, None], prefill.values[layer, None]
            self.engine.append([self.sequence], layer, keys, values)
            self.engine.observe([self.sequence], layer, prefill.queries[layer, None])

    def _run(self, decoder: Decoder, tokens: torch.Tensor) -> Start:
        """The model over a prompt [L] whose attention is the engine's."""
        branch, phase = decoder.begin(), Phase.PREFILL

        def attend(
            layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
        ) -> torch.Tensor:
            softmax = self._softmax[layer]
            asked = softmax.asks(queries)
            output = self.engine.step([self.sequence], layer, queries, keys, values, phase, **asked)
            return softmax.with_sinks(output, asked.get("lse"))

        *before, last = tokens.split(CHUNK)
        for part in before:
            branch.run(part[None], attend)
        phase = Phase.PROMPT_END
        return branch.start(branch.run(last[None], attend)[0].clone())

    def attend(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        self.engine.append([self.sequence], layer, keys[None], values[None])
        softmax = self._softmax[layer]
        asked = softmax.asks(queries[None])
        output: torch.Tensor = self.engine.attend(
            [self.sequence], layer, queries[None], self._phase, **asked
        )
        return softmax.with_sinks(output, asked.get("lse"))[0]

    def fork(self) -> EngineSession:
        other = copy.copy(self)
        other.sequence = self.engine.fork(self.sequence)
        return other

    def mass(self) -> float:
        """As the engine estimates it: against its far field, or its scan where that is off."""
        heads = self._stats()
        dense = sum(head.dense_steps for head in heads)
        steps = sum(head.steps for head in heads) + dense
        mass = sum(head.mass for head in heads)
        return (mass + dense) / max(1, steps)

    def bytes_read(self) -> int:
        """By the decode steps of all forks: sketches, summaries, candidates, attended K and V."""
        return sum(head.bytes_read for head in self._stats())

    def held(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all tokens as the model made them, [Hkv, L, D]."""
        return self.engine.gather(self.sequence, layer)

    def changes(self) -> list[int]:
        """How often the indexes of all heads were sealed, and merged, so far."""
        heads = self._stats()
        return [sum(head.seals for head in heads), sum(head.merges for head in heads)]

    def close(self) -> None:
        self.engine.release(self.sequence)

    def _stats(self) -> list[HeadStats]:
        return [self.engine.stats(layer, head) for layer, head in self._heads]


class LosslessSession(EngineSession):
    """What lossless decoding answers with: each step verified, over the same pages and index."""

    _phase = Phase.VERIFY

    def mass(self) -> float:
        """All of it, at every step."""
        return 1.0


def start_of(session: Session, prefill: Prefill) -> Start:
    """Where a session starts to decode: where it has run over the prompt itself, or `prefill`."""
    own = session.start if isinstance(session, EngineSession) else None
    return own or prefill.start


def branch_of(decoder: Decoder, prefill: Prefill, sessions: Sequence[Session]) -> Branch:
    """A row for each session, at its start."""
    return start_rows(decoder, [start_of(session, prefill) for session in sessions])
