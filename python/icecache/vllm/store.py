"""The worker's engines: which sequence is whose, and one step over all requests of a batch.

One per worker process; each tensor-parallel rank has the KV heads that are its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from icecache import Error, InvalidArgument, Phase
from icecache.vllm.engines import Engines, Ids, Place
from icecache.vllm.metadata import ScheduledRow
from icecache.vllm.names import init_logger
from icecache.vllm.prefixes import Changes

logger = init_logger(f"vllm.{__name__}")  # others have no handler in vLLM


@dataclass(slots=True)  # not frozen: a step makes one for each request
class Row:
    """What a step computes of one request."""

    request: str
    key: int  # the scheduler's number of its sequence
    sequence: Ids  # of the engines
    first: int  # row of its first new token in the batch
    count: int  # new tokens
    phase: Phase


class Call:
    """The rows of one call of Engine.step_packed, each of another sequence."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        # As the engine takes them, once for all layers.
        self.sequences = [row.sequence for row in rows]
        self.firsts = [row.first for row in rows]
        self.counts = [row.count for row in rows]
        self.phases = [row.phase for row in rows]


class Batch:
    """The rows of one step. Those that fail leave."""

    def __init__(self, rows: Sequence[Row] = (), drafts: Sequence[Row] = ()) -> None:
        """`drafts`: tokens behind prompts that end in `rows`."""
        self._take([rows, drafts] if drafts else [rows])

    def _take(self, calls: Sequence[Sequence[Row]]) -> None:
        self.calls = [Call(rows) for rows in calls]  # one after another in each layer
        self.tokens = sum(sum(call.counts) for call in self.calls)

    def drop(self, keys: Collection[int]) -> None:
        """Without these sequences, by the scheduler's numbers."""
        self._take([[row for row in call.rows if row.key not in keys] for call in self.calls])


class Store:
    """Requests' sequences in the engines. Not thread-safe: a worker steps on one thread."""

    def __init__(self, engine: Engines) -> None:
        self.engine = engine
        self.layers: dict[str, Place] = {}  # that attend, by name; none before the first step
        # By the scheduler's numbers of sequences: the engines', and their lengths.
        self._sequence: dict[int, Ids] = {}
        self._length: dict[int, int] = {}
        self._kept: set[int] = set()  # of requests that are over
        self.failed: dict[int, str] = {}  # that this worker lost, and why
        self.requests_failed = 0  # since the start

    @property
    def requests(self) -> int:
        """Requests that hold pages."""
        return len(self._sequence) - len(self._kept)

    def change(self, changes: Changes) -> None:
        """What the scheduler says of sequences that are no request's any more."""
        self.release(changes.gone)
        for key in changes.kept:
            if key in self._sequence:  # else it failed meanwhile
                self.engine.retain(self._sequence[key])
                self._kept.add(key)

    def release(self, keys: Iterable[int]) -> None:
        """Ends sequences. Unknown ones are none of this worker's."""
        for key in keys:
            self.failed.pop(key, None)
            self._length.pop(key, None)
            sequence = self._sequence.pop(key, None)
            if sequence is not None:
                self.engine.release(sequence)
            self._kept.discard(key)

    def begin(self, scheduled: Iterable[tuple[int, ScheduledRow]]) -> Batch:
        """Before the forward of a step: every row's sequence at its position, and prepared.

        With each row comes that of its first new token in the batch. A request that cannot go on
        fails alone.
        """
        rows, drafts = [], []
        for first, row in scheduled:
            key = row.sequence
            if key in self.failed:
                continue
            try:
                if row.fork is not None or row.position != self._length.get(key):
                    self._place(row)
                self.engine.prepare(self._sequence[key], row.count, row.phase)
            except Error as error:
                self._fail(row.request, key, str(error))
                continue
            self._length[key] = row.position + row.count
            known = row.count - row.drafts
            rows.append(Row(row.request, key, self._sequence[key], first, known, row.phase))
            if row.drafts:
                behind = replace(rows[-1], first=first + known, count=row.drafts, phase=Phase.AUTO)
                drafts.append(behind)
        batch = Batch(rows, drafts)
        for call in batch.calls:
            self.engine.begin(call.sequences, call.firsts, call.counts, call.phases)
        return batch

    def _place(self, row: ScheduledRow) -> None:
        """The row's sequence holds all tokens up to its position. Raises Error where it cannot."""
        key = row.sequence
        if row.fork is not None:
            owner = self._sequence.get(row.fork.owner)
            if owner is None:
                raise InvalidArgument(f"no sequence {row.fork.owner} to begin with")
            self._sequence[key] = self.engine.fork(owner, row.fork.tokens)
            self._length[key] = row.fork.tokens
        elif row.position == 0:
            self.release([key])
            self._sequence[key] = self.engine.new_sequence()
            self._length[key] = 0
        length = self._length.get(key, 0)
        if row.position > length:
            raise InvalidArgument(f"holds {length} tokens, {row.position} were expected")
        if row.position < length:  # tokens that the scheduler took back
            self.engine.truncate(self._sequence[key], row.position)

    def attend(
        self,
        layer: str,
        queries: torch.Tensor,
        keys: torch.Tensor | None,
        values: torch.Tensor | None,
        outputs: torch.Tensor,
        batch: Batch,
        lse: torch.Tensor | None = None,
    ) -> None:
        """One layer of a step: queries, outputs [N, Hq, D], keys, values [N, Hkv, D], or None where
        an earlier layer has given them; `lse` [N, Hq] float32 as Engine.step_packed() fills it.

        A request whose keys or values are not finite, or that finds no page, fails alone: its rows
        come out as zeros in this and all later layers, and `failed` names it.
        """
        tensors = queries, keys, values, outputs
        place = self.layers[layer]
        for index in range(len(batch.calls)):
            call = batch.calls[index]
            try:
                self._step(place, tensors, call, lse)
                continue
            except Error:
                if not call.rows:
                    raise
            # All rows or none: find those that cannot.
            for row in call.rows:
                try:
                    self._step(place, tensors, Call([row]), lse)
                except Error as error:
                    self._fail(row.request, row.key, str(error))
            for row in (row for later in batch.calls[index:] for row in later.rows):
                if row.key in self.failed:
                    outputs[row.first : row.first + row.count] = 0
            batch.drop(self.failed.keys())

    def _step(
        self,
        place: Place,
        tensors: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor],
        call: Call,
        lse: torch.Tensor | None,
    ) -> None:
        self.engine.step_packed(
            call.sequences, place, *tensors, call.firsts, call.counts, call.phases, lse
        )

    def _fail(self, request: str, key: int, reason: str) -> None:
        """Frees its pages at once: others may be waiting for them."""
        logger.error("IceCache: request %s fails: %s", request, reason)
        self.release([key])
        self.failed[key] = reason
        self.requests_failed += 1
