"""The engine on torch tensors: the KV cache of one model for many sequences, and attention over it.

Dimension letters: B sequences, T new tokens of one call, L tokens of a sequence, Hq query heads,
Hkv KV heads, D head dim.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch

from icecache import _core
from icecache.config import Config, Value, wrap
from icecache.errors import InvalidArgument
from icecache.shape import CacheShape

# torch's threads go on spinning after each of its loops, on the cores that the engine's own would
# need: the engine runs on them. `icecache doctor` tells why where the operators do not load.
with contextlib.suppress(OSError):
    from icecache import ops

    _core.use_parallel_for(ops.LIBRARY)

# [B, H, T, D], or one [H, T_b, D] for each sequence.
Tensors = torch.Tensor | Sequence[torch.Tensor]

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class Phase(IntEnum):
    """How Engine.attend(), step() and step_packed() treat the tokens of a sequence."""

    AUTO = 0  # as append() and attend() do
    # A chunk of a prompt, more to come: exact, or within prefill_budget. No step finds it yet.
    PREFILL = 1
    PROMPT_END = 2  # the last chunk of a prompt: likewise, then indexed behind the caller
    # Drafted tokens that are checked: exact, and else as decoding, whatever their number. Those
    # that truncate() takes back before more are appended leave nothing in index or metric.
    VERIFY = 3


def core_settings(
    shape: CacheShape, config: Config | None, fields: dict[str, Value]
) -> tuple[int, int, int, int, str, float, float, _core.Config]:
    """What a cache is made with, as C++ takes it; `fields` take precedence over `config`."""
    if shape.dtype not in _DTYPES:
        raise InvalidArgument(f"dtype must be float32, bfloat16 or float16, got {shape.dtype}")
    if shape.scale is not None and not shape.scale > 0:
        raise InvalidArgument(f"scale must be above 0, got {shape.scale}")
    if not shape.logit_softcap >= 0:
        raise InvalidArgument(
            f"logit_softcap must be above 0, or 0 for none, got {shape.logit_softcap}"
        )
    chosen = Config(**{**(config.to_dict() if config else {}), **fields})
    return (
        shape.num_layers,
        shape.num_q_heads,
        shape.num_kv_heads,
        shape.head_dim,
        _DTYPES[shape.dtype],
        shape.scale or 0.0,
        shape.logit_softcap,
        chosen._values,
    )


class Engine:
    """KV cache of one model for many sequences, and attention over it within a token budget.

    Tensors are plain ones on the CPU, in `dtype`; those that come back are new, and take no part in
    autograd. Queries and keys are post-RoPE. Thread-safe: calls are serialised, and run without the
    GIL. Index work runs on the engine's own threads behind the caller; the same calls give bitwise
    the same results with any number of threads.

    A call that raises leaves every sequence as it was before the call, also where what it raises
    comes from a signal (Ctrl-C) that arrived while it ran: its tokens are taken back. Only a signal
    that arrives after that, before the caller has the result, finds the tokens taken, as after any
    call in Python: length() tells. An engine that is dropped waits for index work that has begun,
    without the GIL, and no other. After os.fork() the child may use it unless a call or index work
    was under way: calls raise Error then.

    Errors: InvalidArgument for unknown sequences, layers, shapes, dtypes and for NaN or Inf in
    keys and values (with their position); TypeError for what is no number or no list; OutOfPages
    where `host_memory` is exhausted.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        scale: float | None = None,
        logit_softcap: float = 0.0,
        config: Config | None = None,
        **config_fields: Value,
    ) -> None:
        """A cache for `num_layers` layers of Hq query and Hkv KV heads of D dims.

        `dtype`: float32, bfloat16 or float16. `scale` multiplies q.k before the softmax (None:
        1 / sqrt(D)); a `logit_softcap` c makes c tanh(logit / c) of each logit (Gemma 2), also of
        what the index estimates. `config_fields` are fields of Config, and take precedence over
        `config`. Raises InvalidArgument for what is not supported or contradicts itself.
        """
        self.shape = CacheShape(
            num_layers, num_q_heads, num_kv_heads, head_dim, dtype, scale, logit_softcap
        )
        self._engine = _core.Engine(*core_settings(self.shape, config, config_fields))
        self.num_layers = num_layers
        self.num_q_heads = num_q_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.dtype = dtype

    @property
    def config(self) -> Config:
        """The parameters in use: a copy, with every derived value filled in."""
        return wrap(self._engine.config())

    @property
    def scale(self) -> float:
        """What multiplies q.k before the softmax."""
        return self._engine.scale()

    def new_sequence(self) -> int:
        """An empty sequence; its number is never used again."""
        return self._engine.new_sequence()

    def fork(self, seq: int, length: int | None = None) -> int:
        """A sequence with the same tokens, or the first `length` of them.

        Segments and pages are shared until one side writes.
        """
        return self._engine.fork(seq) if length is None else self._engine.fork(seq, length)

    def retain(self, seq: int) -> None:
        """Keeps a sequence for forks of it alone, as long as nobody wants its memory.

        Where a call needs pages, retained sequences end, the least recently used first; retaining
        and forking use one. It takes no more tokens (InvalidArgument). See PrefixStore.
        """
        self._engine.retain(seq)

    def contains(self, seq: int) -> bool:
        """False for what was released, or was retained and has ended."""
        return self._engine.contains(seq)

    def truncate(self, seq: int, length: int) -> None:
        """Keeps the first `length` tokens of every layer."""
        self._engine.truncate(seq, length)

    def release(self, seq: int) -> None:
        """Ends a sequence and frees its pages."""
        self._engine.release(seq)

    def length(self, seq: int, layer: int = 0) -> int:
        """Tokens of a sequence in one layer."""
        return self._engine.length(seq, layer)

    def append(self, seqs: Sequence[int], layer: int, keys: Tensors, values: Tensors) -> None:
        """Appends T tokens to each sequence: keys, values [B, Hkv, T, D] or B of [Hkv, T_b, D]."""
        self._engine.append(seqs, layer, keys, values)

    def attend(
        self,
        seqs: Sequence[int],
        layer: int,
        queries: Tensors,
        phase: Phase = Phase.AUTO,
        lse: Tensors | None = None,
    ) -> Any:
        """Causal attention of the last T tokens of each sequence, which were appended before.

        Queries [B, Hq, T, D] or B of [Hq, T_b, D]; the result has the same form. Within the token
        budget where T <= decode_tokens and the sequence has outgrown the budget, exact else; with
        another `phase`, exact.

        `lse`, float32 [B, Hq, T] or B of [Hq, T_b], is filled with the log of the sum of exp(logit)
        over the tokens that each row of the result is the mean of: all that the query sees, and
        within the budget those attended exactly and the estimated weight of the summaries. So an
        attention sink of logit s [Hq, 1] makes result * sigmoid(lse - s)[..., None] of the result.
        It is infinite where logits leave the range of float32, and NaN for a query with NaN or Inf.
        """
        return self._engine.attend(seqs, layer, queries, phase, lse)

    def step(
        self,
        seqs: Sequence[int],
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        phase: Phase = Phase.AUTO,
        lse: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """append() and then attend() for the same T tokens of each sequence, in one call.

        Queries [B, Hq, T, D], keys and values [B, Hkv, T, D], `lse` [B, Hq, T] as in attend(); the
        result is [B, Hq, T, D]. What a decode step calls: for one token it takes less time than the
        two calls. Both are done or neither.
        """
        return self._engine.step(seqs, layer, queries, keys, values, phase, lse)

    def step_packed(
        self,
        seqs: Sequence[int],
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor | None,
        values: torch.Tensor | None,
        outputs: torch.Tensor,
        firsts: Sequence[int],
        counts: Sequence[int],
        phases: Sequence[Phase],
        lse: torch.Tensor | None = None,
    ) -> None:
        """append() and then attend(), for sequences with unequal numbers of tokens.

        Queries and outputs [N, Hq, D], keys and values [N, Hkv, D], `lse` [N, Hq] as in attend();
        rows firsts[b] up to firsts[b] + counts[b] are those of seqs[b]. `outputs` and `lse` share
        memory with no other tensor, nor their rows with one another; other rows of them stay as
        they are. A prompt in chunks of PREFILL and one of PROMPT_END has the index that it would
        have in one chunk, however it is cut. All sequences take their tokens or none does.

        Without keys and values (None both) it only attends: for a layer that shares those of
        another, which has appended them as `layer`. Each such layer selects for itself; the queries
        of all shape the metric. Of the layers that attend to a prompt the last one gives
        PROMPT_END and the others PREFILL, or else a call waits for the index.
        """
        self._engine.step_packed(
            seqs, layer, queries, keys, values, outputs, firsts, counts, phases, lse
        )

    def observe(
        self, seqs: Sequence[int], layer: int, queries: Tensors, phase: Phase = Phase.AUTO
    ) -> None:
        """Shows the engine the queries of tokens whose attention the caller computed itself.

        The last ones shape the metric in which keys are clustered; clustering starts on the
        engine's threads, but not with PREFILL. Form as in attend().
        """
        self._engine.observe(seqs, layer, queries, phase)

    def gather(self, seq: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all tokens in order of position: two of [Hkv, L, D]."""
        shape = (self.num_kv_heads, self.length(seq, layer), self.head_dim)
        keys = torch.empty(shape, dtype=self.dtype, device="cpu")
        values = torch.empty(shape, dtype=self.dtype, device="cpu")
        self._engine.gather(seq, layer, keys, values)
        return keys, values

    def synchronize(self) -> None:
        """Waits for all background work."""
        self._engine.synchronize()

    def stats(self, layer: int, kv_head: int) -> _core.HeadStats:
        """Sums since the start or reset_stats(), over all sequences.

        Steps of all layers of the model that attend to this layer's tokens count.
        """
        return self._engine.stats(layer, kv_head)

    def reset_stats(self) -> None:
        """Sets all statistics back to zero."""
        self._engine.reset_stats()

    def memory(self) -> _core.MemoryStats:
        """Bytes held; waits for background work."""
        return self._engine.memory()

    def pool_bytes(self) -> int:
        """Bytes of pages in use, of `host_memory`; waits for nothing."""
        return self._engine.pool_bytes()

    def trace(self, seq: int, layer: int, kv_head: int) -> _core.StepTrace:
        """What the last decode step looked at; empty unless telemetry is "trace"."""
        return self._engine.trace(seq, layer, kv_head)

    def check_integrity(self) -> None:
        """Recomputes every sum and checks every page. Raises IntegrityError."""
        self._engine.check_integrity()

    def __repr__(self) -> str:
        return f"Engine({self.num_layers} layers, {self.shape}, {self.config!r})"
