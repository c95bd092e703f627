"""Pure torch oracle: exact attention behind the engine's API, and the formulas of a sparse step.

Everything here is computed plainly, in double precision, to be read and compared with; nothing is
fast. `ReferenceEngine` attends to every token. `sketch_scores`, `pick_tokens`, `far_field` and
`sparse_attention` are the steps of one decode query of one KV head with `index="tree"` on explicit
tensors; node and page assignments are given and not made here.

Letters: G query heads that share a KV head, N tokens of a sequence, C far-field nodes, D head_dim,
R sketch rank. Queries of these functions are already multiplied by the attention scale.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from icecache import HeadStats, InvalidArgument, MemoryStats

Tensors = torch.Tensor | list[torch.Tensor]


@dataclass
class _Sequence:
    """Keys and values per layer, each [Hkv, L, D]. Tensors are never written to: forks share."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    observed: list[int] = field(default_factory=list)


class ReferenceEngine:
    """`icecache.Engine` with exact attention in double precision, in torch alone.

    The configuration is kept and not used: whatever the budget, every token is attended.
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
        config: Any = None,
        **config_fields: Any,
    ) -> None:
        self.num_layers = num_layers
        self.num_q_heads = num_q_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.dtype = dtype
        self.scale = head_dim**-0.5 if scale is None else scale
        self.logit_softcap = logit_softcap
        self.config = config
        self.config_fields = config_fields
        self._sequences: dict[int, _Sequence] = {}
        self._ids = itertools.count()
        self._stats: list[HeadStats] = []
        self.reset_stats()

    def new_sequence(self) -> int:
        empty = torch.zeros(self.num_kv_heads, 0, self.head_dim, dtype=self.dtype)
        sequence = _Sequence(keys=[empty] * self.num_layers, values=[empty] * self.num_layers)
        return self._add(sequence)

    def fork(self, seq: int) -> int:
        """A sequence with the same tokens."""
        source = self._get(seq)
        return self._add(_Sequence(list(source.keys), list(source.values)))

    def retain(self, seq: int) -> None:
        """Nothing: memory is not bounded here."""
        self._get(seq)

    def contains(self, seq: int) -> bool:
        """False for what was released."""
        return seq in self._sequences

    def truncate(self, seq: int, length: int) -> None:
        """Keeps the first `length` tokens of every layer."""
        sequence = self._get(seq)
        longest = max(keys.shape[1] for keys in sequence.keys)
        if not 0 <= length <= longest:
            raise InvalidArgument(
                f"length: expected 0 to {longest} (tokens of sequence {seq}), got {length}"
            )
        sequence.keys = [keys[:, :length] for keys in sequence.keys]
        sequence.values = [values[:, :length] for values in sequence.values]

    def release(self, seq: int) -> None:
        self._get(seq)
        del self._sequences[seq]

    def length(self, seq: int, layer: int = 0) -> int:
        return self._get(seq).keys[layer].shape[1]

    def append(self, seqs: Sequence[int], layer: int, keys: Tensors, values: Tensors) -> None:
        """Tensor [B, Hkv, T, D] or a list of [Hkv, T_b, D]; changes nothing where it raises."""
        form = (self.num_kv_heads, self.head_dim)
        key_rows, value_rows = self._rows(seqs, keys, form), self._rows(seqs, values, form)
        for seq, key, value in zip(seqs, key_rows, value_rows, strict=True):
            if key.shape != value.shape:
                raise InvalidArgument(
                    f"values: expected the shape of keys {tuple(key.shape)}, got "
                    f"{tuple(value.shape)}"
                )
            finite = torch.isfinite(key).all(-1) & torch.isfinite(value).all(-1)
            if not bool(finite.all()):
                head, token = (~finite).nonzero()[0].tolist()
                position = self.length(seq, layer) + token
                raise InvalidArgument(
                    f"keys: NaN or Inf in sequence {seq}, head {head}, position {position}"
                )
        for seq, key, value in zip(seqs, key_rows, value_rows, strict=True):
            sequence = self._get(seq)
            sequence.keys[layer] = torch.cat([sequence.keys[layer], key], 1)
            sequence.values[layer] = torch.cat([sequence.values[layer], value], 1)

    def attend(
        self,
        seqs: Sequence[int],
        layer: int,
        queries: Tensors,
        phase: int = 0,
        lse: Tensors | None = None,
    ) -> Any:
        """Causal attention of the last T tokens, exact in every phase; in the form of `queries`.

        Fills `lse`, [B, Hq, T] or a list of [Hq, T_b].
        """
        rows = self._rows(seqs, queries, (self.num_q_heads, self.head_dim))
        outputs = []
        for b, (seq, query) in enumerate(zip(seqs, rows, strict=True)):
            keys, values = self._get(seq).keys[layer], self._get(seq).values[layer]
            if query.shape[1] > keys.shape[1]:
                raise InvalidArgument(
                    f"queries: expected at most {keys.shape[1]} (tokens of sequence {seq}), got "
                    f"{query.shape[1]}"
                )
            output, log_weights = dense_attention(
                query, keys, values, self.scale, self.logit_softcap
            )
            outputs.append(output)
            if lse is not None:
                lse[b][...] = log_weights
            for head in range(self.num_kv_heads):
                self._stats[layer * self.num_kv_heads + head] += HeadStats.of(
                    dense_steps=query.shape[1],
                    bytes_read=2 * keys[0].numel() * keys.element_size(),
                )
        if isinstance(queries, torch.Tensor):
            return torch.stack(outputs) if outputs else torch.empty_like(queries)
        return outputs

    def step(
        self,
        seqs: Sequence[int],
        layer: int,
        queries: Tensors,
        keys: Tensors,
        values: Tensors,
        phase: int = 0,
        lse: torch.Tensor | None = None,
    ) -> Any:
        """append() and attend() of the same tokens."""
        self.append(seqs, layer, keys, values)
        return self.attend(seqs, layer, queries, phase, lse)

    def observe(self, seqs: Sequence[int], layer: int, queries: Tensors, phase: int = 0) -> None:
        """Checks the form; exact attention needs no metric."""
        rows = self._rows(seqs, queries, (self.num_q_heads, self.head_dim))
        for seq, query in zip(seqs, rows, strict=True):
            self._get(seq).observed.append(query.shape[1])

    def gather(self, seq: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [Hkv, L, D]."""
        sequence = self._get(seq)
        return sequence.keys[layer].clone(), sequence.values[layer].clone()

    def stats(self, layer: int, kv_head: int) -> HeadStats:
        return self._stats[layer * self.num_kv_heads + kv_head]

    def reset_stats(self) -> None:
        self._stats = [HeadStats.of() for _ in range(self.num_layers * self.num_kv_heads)]

    def memory(self) -> MemoryStats:
        tensors = [t for s in self._sequences.values() for t in (*s.keys, *s.values)]
        used = sum(t.numel() * t.element_size() for t in tensors)
        return MemoryStats.of(pool_bytes=used, device_bytes=used, sequences=len(self._sequences))

    def synchronize(self) -> None:
        """Nothing runs in the background."""

    def check_integrity(self) -> None:
        """Raises AssertionError where keys and values of a layer differ in length."""
        for sequence in self._sequences.values():
            for keys, values in zip(sequence.keys, sequence.values, strict=True):
                assert keys.shape == values.shape

    def _add(self, sequence: _Sequence) -> int:
        seq = next(self._ids)
        self._sequences[seq] = sequence
        return seq

    def _get(self, seq: int) -> _Sequence:
        if seq not in self._sequences:
            raise InvalidArgument(f"sequence: {seq} is not open")
        return self._sequences[seq]

    def _rows(
        self, seqs: Sequence[int], tensors: Tensors, form: tuple[int, int]
    ) -> list[torch.Tensor]:
        rows = list(tensors)
        if len(rows) != len(seqs):
            raise InvalidArgument(f"sequences: expected {len(rows)} (one a row), got {len(seqs)}")
        heads, head_dim = form
        for seq, row in zip(seqs, rows, strict=True):
            self._get(seq)
            if row.ndim != 3 or row.shape[0] != heads or row.shape[2] != head_dim:
                raise InvalidArgument(
                    f"tensor: expected [{heads}, T, {head_dim}] a row, got {tuple(row.shape)}"
                )
            if row.dtype != self.dtype:
                raise InvalidArgument(f"tensor: expected {self.dtype}, got {row.dtype}")
        return rows


def soft_cap(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """cap tanh(logits / cap); cap 0: the logits."""
    return cap * torch.tanh(logits / cap) if cap else logits


def dense_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    logit_softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of the last T tokens, and the log of the sum of the weights.

    [Hq, T, D], [Hkv, L, D] -> [Hq, T, D], [Hq, T] in double.
    """
    groups = queries.shape[0] // keys.shape[0]
    new, length = queries.shape[1], keys.shape[1]
    k = keys.double().repeat_interleave(groups, 0)
    v = values.double().repeat_interleave(groups, 0)
    scores = soft_cap(scale * queries.double() @ k.transpose(1, 2), logit_softcap)
    visible = torch.ones(new, length, dtype=torch.bool).tril(length - new)
    scores = scores.masked_fill(~visible, -torch.inf)
    return (torch.softmax(scores, -1) @ v).to(queries.dtype), scores.logsumexp(-1)


def query_metric(queries: torch.Tensor) -> torch.Tensor:
    """M = E[q q^T]^(1/2) of queries [..., D] (not scaled): the symmetric root, [D, D]."""
    rows = queries.reshape(-1, queries.shape[-1]).double()
    eigenvalues, vectors = torch.linalg.eigh(rows.T @ rows / rows.shape[0])
    root: torch.Tensor = vectors @ torch.diag(eigenvalues.clamp_min(1e-6).sqrt()) @ vectors.T
    return root


def sketch_scores(
    queries: torch.Tensor,
    keys: torch.Tensor,
    metric: torch.Tensor,
    *,
    rank: int = 32,
    bits: int = 4,
    basis_keys: torch.Tensor | None = None,
) -> torch.Tensor:
    """Estimates of q.k from the sketch of every key. [G, D], [N, D], M [D, D] -> [G, N].

    The basis holds the `rank` leading directions U of (K - mean) M. A key is stored as
    y = (k - mean) M U, rounded to `bits` bits between the least and greatest coordinate in each
    direction; a query meets it as q M^-1 U, and q.mean is added. `basis_keys` are the keys that
    basis and ranges are taken from (the prompt's; default all); later keys are clamped to them.
    """
    k, m = keys.double(), metric.double()
    basis = k if basis_keys is None else basis_keys.double()
    mean = basis.mean(0)
    centred = (basis - mean) @ m
    directions = torch.linalg.eigh(centred.T @ centred)[1].flip(1)[:, :rank]
    project = m @ directions
    reference = (basis - mean) @ project
    low, levels = reference.amin(0), 2**bits - 1
    step = (reference.amax(0) - low).clamp_min(1e-9) / levels
    codes = (((k - mean) @ project - low) / step).round().clamp(0, levels)
    q = queries.double()
    from_sketch: torch.Tensor = (q @ torch.linalg.inv(m).T @ directions) @ (codes * step + low).T
    return from_sketch + (q @ mean)[:, None]


def pick_tokens(
    queries: torch.Tensor,
    keys: torch.Tensor,
    scores: torch.Tensor,
    always: torch.Tensor,
    *,
    count: int,
    candidates: int,
) -> torch.Tensor:
    """Tokens to attend besides those of `always`. Positions in ascending order, at most `count`.

    queries [G, D], keys [N, D], scores [G, N] (sketch), always [N] bool (sink and window).
    The `candidates` tokens of largest estimated mass are rescored with their exact keys; the mass
    of a token is its softmax weight per head (over `always`, exact, and the other tokens in
    question), summed over the group.
    """
    exact = queries.double() @ keys.double().T
    weights = torch.softmax(torch.where(always, exact, scores.double()), -1).sum(0)
    weights = weights.masked_fill(always, -1.0)
    free = int((~always).sum())
    found = torch.topk(weights, min(candidates, free)).indices
    if found.numel() > count:
        seen = always.clone()
        seen[found] = True
        rescored = torch.softmax(exact.masked_fill(~seen, -torch.inf), -1).sum(0)
        found = found[torch.topk(rescored[found], count).indices]
    return found.sort().values


def far_field(
    log_weights: torch.Tensor, values: torch.Tensor, nodes: torch.Tensor, attended: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the tokens that are not attended weigh together, by node.

    log_weights [G, N] of the tokens (sketch scores, or exact logits), values [N, D], nodes [N]
    int64 (-1: in no node), attended [N] bool. Returns log weights [G, C] (-inf for a node with
    nothing left) and values [C, D]: a node weighs the sum of the weights of its tokens that are not
    attended, and stands for them with the plain mean of their values.
    """
    weights, v = log_weights.double(), values.double()
    size = int(nodes.max()) + 1 if nodes.numel() else 0
    left = (nodes[:, None] == torch.arange(size)) & ~attended[:, None]  # [N, C]
    members = weights[:, :, None].masked_fill(~left, -torch.inf)
    share = left.double() / left.sum(0).clamp_min(1)
    return members.logsumexp(1), share.T @ v


def sparse_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    attended: torch.Tensor,
    far: tuple[torch.Tensor, torch.Tensor] | None = None,
    logit_softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact attention over `attended` [N] bool with a far field, and the log of all weights.

    [G, D], [N, D] -> [G, D], [G].
    """
    q, k, v = queries.double(), keys.double(), values.double()
    logits = soft_cap(q @ k.T, logit_softcap).masked_fill(~attended, -torch.inf)
    if far is not None:
        logits = torch.cat([logits, far[0]], 1)
        v = torch.cat([v, far[1]], 0)
    return torch.softmax(logits, -1) @ v, logits.logsumexp(-1)


def with_sinks(outputs: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """What attention [Hq, T, D] with log weights [Hq, T] becomes where one more logit `sinks` [Hq],
    of a token with value 0, takes part in each softmax."""
    return outputs * torch.sigmoid(lse - sinks[:, None])[..., None].to(outputs.dtype)
