"""The IceCache paper's index with its layer reuse, "IceCache(r)" (Mao et al. 2026, ICLR)."""

from __future__ import annotations

import torch

from icecache.bench.baselines.tensor_session import Selection, Step, TensorSession
from icecache.bench.prefill import Prefill
from icecache.engine import Engine

REUSE = 4  # layers that share a search; the paper does not say how many

_FIRST = 2  # layers before this one search for themselves


def search_layers(layers: int, reuse: int) -> list[int]:
    """0, 1, and from layer 2 on every `reuse`-th."""
    return [layer for layer in range(layers) if layer < _FIRST or (layer - _FIRST) % reuse == 0]


class LayerReuseSession(TensorSession):
    """Some layers search the paper's index; the layers that follow attend to the same tokens.

    Each KV head hands on what it picked. The engine has an index of the search layers alone.
    Bytes beside keys and values attended to: in search layers what the index reads.
    """

    def __init__(self, prefill: Prefill, budget: int, scale: float, *, reuse: int = REUSE) -> None:
        """Raises the engine's errors."""
        super().__init__(prefill, budget, scale)
        layers, self._heads, _, head_dim = prefill.keys.shape
        searching = search_layers(layers, reuse)
        self._index_of = {layer: index for index, layer in enumerate(searching)}
        self._engine = Engine(
            num_layers=len(searching),
            num_q_heads=prefill.queries.shape[1],
            num_kv_heads=self._heads,
            head_dim=head_dim,
            dtype=prefill.keys.dtype,
            scale=1.0,  # a step's queries are scaled
            token_budget=budget,
            index="dci",
            select="page",
            tail="off",
            telemetry="trace",
        )
        self._sequence = self._engine.new_sequence()
        for layer, index in self._index_of.items():
            self._append(index, prefill.keys[layer], prefill.values[layer])
            queries = scale * prefill.queries[layer]
            self._engine.observe([self._sequence], index, queries[None])
        self._engine.synchronize()
        self._picks: list[torch.Tensor] = []  # of the last search layer: [Hkv, 1, L] bool

    def select(self, step: Step) -> Selection:
        index = self._index_of.get(step.layer)
        if index is None:
            return Selection(self._picks[0])
        self._append(index, *self.span(step.layer, step.length - 1, step.length))
        before = self._bytes_read(index)
        self._engine.attend(
            [self._sequence], index, step.queries.reshape(1, -1, 1, step.queries.shape[-1])
        )
        picks = torch.ones(self._heads, 1, step.length, dtype=torch.bool)
        for head in range(self._heads):
            trace = self._engine.trace(self._sequence, index, head)
            if trace.window:  # none where the engine attends to everything
                picks[head] = False
                picks[head, 0, [*trace.sink, *trace.selected, *trace.window]] = True
        self._picks = [picks]
        attended = 2 * self.bytes_of(picks.sum())
        return Selection(picks, bytes_read=max(0, self._bytes_read(index) - before - attended))

    def fork(self) -> LayerReuseSession:
        other = super().fork()
        other._sequence = self._engine.fork(self._sequence)
        return other

    def close(self) -> None:
        self._engine.release(self._sequence)
        super().close()

    def _append(self, index: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._engine.append([self._sequence], index, keys[None], values[None])

    def _bytes_read(self, index: int) -> int:
        return sum(self._engine.stats(index, head).bytes_read for head in range(self._heads))
