"""DeviceCache with the calls of Engine that this front end makes: a model on a CUDA device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from icecache import InvalidArgument
from icecache.device import DeviceCache, rebuild_is_due
from icecache.engine import Phase

_NEW_TOKENS = 32768  # room behind a prompt where max_tokens is not given
# In place of sequences: a slot has none; what a fork copies is no longer what it was.
_FREE, _LOST = -1, -2
_ELSE = "or run the model on the CPU, or without IceCache"


@dataclass(frozen=True)
class DeviceHeadStats:
    """Counters of one layer and KV head. What the CPU's engine estimates besides is not: NaN."""

    steps: int
    hits: int
    misses: int
    bytes_moved: int
    mass: float = float("nan")
    worst_mass: float = float("nan")


@dataclass(frozen=True)
class DeviceMemoryStats:
    """Bytes held on the device and in pinned host memory, and sequences."""

    device_bytes: int
    pool_bytes: int
    sequences: int


@dataclass
class _Batch:
    """Sequences that entered together: slot i of the cache is sequences[i]."""

    cache: DeviceCache
    sequences: list[int]
    lengths: list[list[int]]  # [layers][B]
    built: list[list[int]]  # of the last build
    prompts: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def fork(self, slot: int, seq: int, source: int) -> None:
        """Makes the free `slot` a copy of the sequence `source`, named `seq`."""
        other = self.sequences.index(source)
        self.cache.fork(slot, other)
        self.sequences[slot] = seq
        for counts in (*self.lengths, *self.built):
            counts[slot] = counts[other]

    def shorten(self, slot: int, length: int | None) -> bool:
        """Leaves at most `length` tokens in every layer. Says whether there were more."""
        if length is None or all(lengths[slot] <= length for lengths in self.lengths):
            return False
        self.cache.truncate(slot, length)
        for counts in (*self.lengths, *self.built):
            counts[slot] = min(counts[slot], length)
        return True


@dataclass
class _Fork:
    """A sequence without a slot: what it copies, and how many tokens of that (None: all)."""

    source: int
    length: int | None = None

    def tokens(self) -> float:
        return float("inf") if self.length is None else self.length


class DeviceEngine:
    """Batches of sequences on one CUDA device, each batch in a DeviceCache of its own.

    A prompt enters whole (append, then observe). What follows, a turn of a conversation or one
    token, is taken token by token, each within the budget. A fork takes the slot of the next
    sequence of its batch that is released, as beams come and go, if what it copies has not gone on
    by then. Anything else is refused.
    """

    def __init__(self, *, device: torch.device, max_tokens: int | None, **settings: Any) -> None:
        self._device = device
        self._max_tokens = max_tokens
        self._settings = settings
        self._batches: list[_Batch] = []
        self._waiting: list[int] = []  # sequences without tokens
        self._forks: dict[int, _Fork] = {}
        self._past: dict[tuple[int, int], DeviceHeadStats] = {}  # of batches that are gone
        self._next = 0
        self._heads = int(settings["num_kv_heads"])
        self._layers = int(settings["num_layers"])
        self._make(1, 1024)  # refuses settings now and not at the first token

    def new_sequence(self) -> int:
        self._waiting.append(self._next)
        self._next += 1
        return self._next - 1

    def release(self, seq: int) -> None:
        if seq in self._waiting:
            self._waiting.remove(seq)
            return
        if self._forks.pop(seq, None) is not None:
            return
        batch, slot = self._place(seq)
        batch.sequences[slot] = _FREE
        heirs = sorted(
            (heir for heir, fork in self._forks.items() if fork.source == seq),
            key=lambda heir: self._forks[heir].tokens(),
        )
        if heirs:
            heir = heirs.pop()
            batch.sequences[slot] = heir
            for other in heirs:
                self._forks[other].source = heir
            batch.shorten(slot, self._forks.pop(heir).length)
            return
        for heir, fork in self._forks.items():
            if fork.source in batch.sequences:
                batch.fork(slot, heir, fork.source)
                del self._forks[heir]
                batch.shorten(slot, fork.length)
                return
        if any(other >= 0 for other in batch.sequences):
            batch.cache.release(slot)
        else:
            self._past = {
                (layer, head): self._sums([batch], layer, head)
                for layer in range(self._layers)
                for head in range(self._heads)
            }
            self._batches.remove(batch)

    def fork(self, seq: int) -> int:
        self._place(seq)
        self._forks[self._next] = _Fork(seq)
        self._next += 1
        return self._next - 1

    def truncate(self, seq: int, length: int) -> None:
        if seq in self._waiting:
            return
        if length == 0:
            self.release(seq)
            self._waiting.append(seq)
        elif seq in self._forks:
            fork = self._forks[seq]
            fork.length = int(min(fork.tokens(), length))
        else:
            batch, slot = self._place(seq)
            if batch.shorten(slot, length):
                for fork in self._forks.values():
                    if fork.source == seq and fork.tokens() > length:
                        fork.source = _LOST

    def append(self, seqs: Sequence[int], layer: int, keys: Any, values: Any) -> None:
        if all(seq in self._waiting for seq in seqs):
            longest = max(row.shape[1] for row in keys)
            room = self._max_tokens or longest + _NEW_TOKENS
            if longest > room:
                raise InvalidArgument(
                    f"max_tokens: the prompt has {longest} tokens, and there is room for {room}; "
                    "give icecache.enable a larger max_tokens"
                )
            cache = self._make(len(seqs), room)
            self._batches.append(
                _Batch(
                    cache,
                    list(seqs),
                    [[0] * len(seqs) for _ in range(self._layers)],
                    [[0] * len(seqs) for _ in range(self._layers)],
                )
            )
            self._waiting = [seq for seq in self._waiting if seq not in seqs]
        for seq, key, value in zip(seqs, keys, values, strict=True):
            batch, slot = self._place(seq)
            if batch.lengths[layer][slot]:
                self._refuse_chunks(key.shape[1])
            batch.prompts[layer, seq] = key, value

    def observe(self, seqs: Sequence[int], layer: int, queries: Any) -> None:
        for seq, query in zip(seqs, queries, strict=True):
            batch, slot = self._place(seq)
            key, value = batch.prompts.pop((layer, seq))
            batch.cache.reserve(slot, key.shape[1] + 1)
            batch.cache.prefill(layer, query, key, value, sequence=slot)
            batch.lengths[layer][slot] = batch.built[layer][slot] = key.shape[1]

    def attend(
        self, seqs: Sequence[int], layer: int, queries: Any, phase: Phase = Phase.AUTO
    ) -> Any:
        self._refuse_chunks(len(queries))

    def step(
        self,
        seqs: Sequence[int],
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        phase: Phase = Phase.AUTO,
    ) -> torch.Tensor:
        """Queries [A, Hq, T, D], keys and values [A, Hkv, T, D] of sequences of one batch."""
        if any(seq in self._forks for seq in seqs):
            raise InvalidArgument(
                "batch_size: on a CUDA device a batch keeps its number of sequences (contrastive "
                f"search and copies of a cache make more); {_ELSE}"
            )
        batch, _ = self._place(seqs[0])
        slots = [batch.sequences.index(seq) if seq in batch.sequences else -1 for seq in seqs]
        if -1 in slots:
            raise InvalidArgument(
                "past_key_values: on a CUDA device sequences that entered in different batches "
                f"cannot continue in one; {_ELSE}"
            )
        for fork in self._forks.values():
            if fork.source in seqs:
                fork.source = _LOST
        rows = None
        if slots != list(range(len(batch.sequences))):
            rows = batch.cache.rows_of(tuple((slot, row) for row, slot in enumerate(slots)))
        tokens = zip(queries.split(1, 2), keys.split(1, 2), values.split(1, 2), strict=True)
        outs = [
            self._token(batch, slots, layer, query, key, value, rows)
            for query, key, value in tokens
        ]
        return torch.cat(outs, dim=2)

    def _token(
        self,
        batch: _Batch,
        slots: list[int],
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rows: torch.Tensor | None,
    ) -> torch.Tensor:
        lengths, built = batch.lengths[layer], batch.built[layer]
        longest = max(lengths[slot] for slot in slots)
        if longest >= batch.cache.max_tokens:
            raise InvalidArgument(
                f"max_tokens: the sequence has {longest} tokens, and there is room for "
                f"{batch.cache.max_tokens}; give icecache.enable a larger max_tokens"
            )
        for slot in slots:
            if rebuild_is_due(lengths[slot], built[slot]):
                batch.cache.rebuild(layer, slot)
                built[slot] = lengths[slot]
            batch.cache.reserve(slot, lengths[slot] + 1)
        out = batch.cache.step(layer, query, key, value, rows)
        for slot in slots:
            lengths[slot] += 1
        return out

    def stats(self, layer: int, kv_head: int) -> DeviceHeadStats:
        return self._sums(self._batches, layer, kv_head)

    def _sums(self, batches: Sequence[_Batch], layer: int, kv_head: int) -> DeviceHeadStats:
        """Of `batches` and of those that are gone."""
        all_stats: list[Any] = [batch.cache.stats(layer, kv_head) for batch in batches]
        if (layer, kv_head) in self._past:
            all_stats.append(self._past[layer, kv_head])
        return DeviceHeadStats(
            steps=sum(s.steps for s in all_stats),
            hits=sum(s.hits for s in all_stats),
            misses=sum(s.misses for s in all_stats),
            bytes_moved=sum(s.bytes_moved for s in all_stats),
        )

    def memory(self) -> DeviceMemoryStats:
        held = [batch.cache.memory() for batch in self._batches]
        return DeviceMemoryStats(
            device_bytes=sum(m.device_bytes for m in held),
            pool_bytes=sum(m.host_bytes for m in held),
            sequences=len(self._waiting)
            + sum(seq >= 0 for batch in self._batches for seq in batch.sequences),
        )

    def _make(self, batch: int, max_tokens: int) -> DeviceCache:
        return DeviceCache(
            batch=batch, max_tokens=max_tokens, device=self._device, **self._settings
        )

    def _place(self, seq: int) -> tuple[_Batch, int]:
        """The batch that a sequence is in, and its slot."""
        for batch in self._batches:
            if seq in batch.sequences:
                return batch, batch.sequences.index(seq)
        raise InvalidArgument(f"sequence must be one of this engine's live sequences, got {seq}")

    def _refuse_chunks(self, tokens: int) -> None:
        raise InvalidArgument(
            "attention_mask: on a CUDA device tokens that follow a prompt have no padding, got "
            f"{tokens} for a cache that holds some; pass the whole prompt at once, {_ELSE}"
        )
