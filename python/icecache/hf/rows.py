"""The engine sequences of one batch."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from icecache import InvalidArgument
from icecache.hf.engine_handle import EngineLike
from icecache.hf.mask import LazyMask
from icecache.hf.support import CACHE


@dataclass(frozen=True)
class Chunk:
    """The tokens of one forward call: columns `start .. start + length` of the batch.

    `earlier[b]` counts the real tokens of row b before the chunk. `real` is bool `[B, length]` on
    the CPU, or None where every token of the chunk is real.
    """

    start: int
    length: int
    earlier: tuple[int, ...]
    real: torch.Tensor | None

    def columns(self, row: int) -> torch.Tensor | None:
        """Chunk columns of the row's real tokens; None for all of them."""
        if self.real is None or bool(self.real[row].all()):
            return None
        return self.real[row].nonzero()[:, 0]


class Rows:
    """Row b of a batch is one engine sequence, without the row's padding.

    Invariants between forward calls: sequence b holds `lengths[b]` tokens in every layer;
    `real[b, c]` says whether column c of the batch is one of them; every sequence is released once,
    at the latest with this object.
    """

    def __init__(self) -> None:
        self.sequences: list[int] = []
        self.lengths: list[int] = []
        self.seen = 0  # columns, padding included
        self._real: torch.Tensor | None = None  # bool [B, seen]; None: no padding so far
        self._engine: EngineLike | None = None
        self._finalizer: weakref.finalize[..., Rows] | None = None
        self._mask: LazyMask | None = None
        self._chunk: Chunk | None = None

    def begin(self, engine: EngineLike, mask: LazyMask, batch_size: int) -> Chunk:
        """The chunk that `mask` describes; the first layer of a forward call advances the rows.

        Raises InvalidArgument, and leaves the rows as they were, where the mask does not continue
        the tokens seen so far.
        """
        if mask is self._mask and self._chunk is not None:
            return self._chunk
        if self.sequences and batch_size != len(self.sequences):
            raise InvalidArgument(
                f"input_ids: this cache holds {len(self.sequences)} rows, got a batch of "
                f"{batch_size}; use batch_repeat_interleave or batch_select_indices on the cache"
            )
        chunk = self._chunk
        if chunk is not None and (mask.q_offset, mask.q_length) == (chunk.start, chunk.length):
            return chunk  # the model built its mask twice in this forward call
        if mask.q_offset != self.seen:
            raise InvalidArgument(
                f"{CACHE}: layers of this cache disagree ({self.seen} and {mask.q_offset} "
                "tokens); an earlier forward call was interrupted. Call reset() and start again"
            )
        real = self._real_columns(mask, batch_size)
        if not self.sequences:
            self._open(engine, batch_size)
        new = mask.q_length
        chunk = Chunk(
            start=self.seen,
            length=new,
            earlier=tuple(self.lengths),
            real=None if real is None or bool(real[:, self.seen :].all()) else real[:, self.seen :],
        )
        added = [new] * batch_size if chunk.real is None else chunk.real.sum(1).tolist()
        self.lengths = [length + n for length, n in zip(self.lengths, added, strict=True)]
        self.seen += new
        self._real = None if real is None or bool(real.all()) else real
        self._mask, self._chunk = mask, chunk
        return chunk

    def undo(self, seen: int) -> bool:
        """Forgets the current chunk in every layer, where it ends at column `seen`.

        For a layer that failed after it had seen so many columns: where an earlier forward call
        ended before, nothing was appended and nothing is undone. Says whether something was.
        """
        chunk = self._chunk
        if chunk is None or self._engine is None or chunk.start + chunk.length != seen:
            return False
        self._mask = self._chunk = None
        for sequence, length in zip(self.sequences, chunk.earlier, strict=True):
            self._engine.truncate(sequence, length)
        self.lengths, self.seen = list(chunk.earlier), chunk.start
        self._real = None if self._real is None else self._real[:, : chunk.start]
        return True

    def check_crop(self, columns: int) -> None:
        """Raises InvalidArgument where there are fewer than `columns` columns."""
        if columns > self.seen:
            raise InvalidArgument(f"crop: the cache holds {self.seen} tokens, got {-columns}")

    def crop(self, columns: int) -> None:
        """Removes the last `columns` columns of the batch from every layer."""
        if not columns:
            return
        self.check_crop(columns)
        removed = [columns] * len(self.lengths)
        if self._real is not None:
            removed = self._real[:, self.seen - columns :].sum(1).tolist()
        left = [length - n for length, n in zip(self.lengths, removed, strict=True)]
        if self._engine is not None:
            for sequence, length in zip(self.sequences, left, strict=True):
                self._engine.truncate(sequence, length)
        self.lengths = left
        self.seen -= columns
        self._real = None if self._real is None else self._real[:, : self.seen]
        self._mask = self._chunk = None

    def arrange(self, order: Sequence[int]) -> None:
        """Row i becomes a continuation of old row `order[i]`.

        The first use of an old row keeps its sequence, further uses fork it; rows that are not
        used are released.
        """
        if self._engine is None or not self.sequences:
            return
        forked: list[int] = []
        kept: set[int] = set()
        sequences = []
        try:
            for old in order:
                if old in kept:
                    forked.append(self._engine.fork(self.sequences[old]))
                    sequences.append(forked[-1])
                else:
                    kept.add(old)
                    sequences.append(self.sequences[old])
        except Exception:
            for sequence in forked:
                self._engine.release(sequence)
            raise
        dropped = [s for old, s in enumerate(self.sequences) if old not in kept]
        # In place: the finalizer looks at the same list.
        self.sequences[:] = sequences
        for sequence in dropped:
            self._engine.release(sequence)
        self.lengths = [self.lengths[old] for old in order]
        if self._real is not None:
            self._real = self._real[torch.tensor(list(order), dtype=torch.long)]
        self._mask = self._chunk = None

    def copy(self) -> Rows:
        """Rows with the same tokens; pages are shared until one side writes."""
        other = Rows()
        other.seen = self.seen
        if self._engine is not None:
            other._attach(self._engine)
            for sequence in self.sequences:
                other.sequences.append(self._engine.fork(sequence))
            other.lengths = list(self.lengths)
            other._real = self._real
        return other

    def retain(self) -> None:
        """Keeps the rows for copies of them alone, until the engine needs their pages."""
        assert self._engine is not None
        for sequence in self.sequences:
            self._engine.retain(sequence)

    def is_held(self) -> bool:
        """False where the engine has ended a row that it was to retain."""
        engine = self._engine
        return engine is not None and all(map(engine.contains, self.sequences))

    def is_text(self) -> bool:
        """True for one row without padding."""
        return len(self.sequences) == 1 and self._real is None

    def clear(self) -> None:
        """Releases every sequence."""
        if self._engine is not None:
            _release(self._engine, self.sequences)
        self.lengths, self.seen, self._real = [], 0, None
        self._mask = self._chunk = None

    def _open(self, engine: EngineLike, batch_size: int) -> None:
        if self._engine is not engine:
            self._attach(engine)
        for _ in range(batch_size):
            self.sequences.append(engine.new_sequence())
        self.lengths = [0] * batch_size

    def _attach(self, engine: EngineLike) -> None:
        if self._finalizer is not None:
            self._finalizer.detach()
        self._engine = engine
        self._finalizer = weakref.finalize(self, _release, engine, self.sequences)
        self._finalizer.atexit = False

    def _real_columns(self, mask: LazyMask, batch_size: int) -> torch.Tensor | None:
        """bool [B, seen + q_length] on the CPU, or None where all tokens so far are real."""
        total = self.seen + mask.q_length
        if mask.padding is None:
            if self._real is None:
                return None
            real = torch.ones(batch_size, total, dtype=torch.bool)
        else:
            real = mask.padding[:, :total].to(device="cpu", dtype=torch.bool)
            if real.shape[1] < total:
                raise InvalidArgument(
                    f"attention_mask: expected {total} columns (earlier tokens included), got "
                    f"{real.shape[1]}"
                )
        seen = real[:, : self.seen]
        if not bool(seen.all() if self._real is None else torch.equal(seen, self._real)):
            raise InvalidArgument(
                "attention_mask: the columns of earlier tokens differ from those they were added "
                "with; pass the earlier mask with the new columns behind it (IceCache cannot hide "
                "or show tokens afterwards)"
            )
        return real


def _release(engine: EngineLike, sequences: list[int]) -> None:
    while sequences:
        sequence = sequences.pop()
        if engine.contains(sequence):
            engine.release(sequence)
