"""What a step is: as the scheduler tells the workers, and as a runner has it in its batch."""

from __future__ import annotations

from dataclasses import dataclass, field

from icecache import Phase
from icecache.vllm.names import AttentionMetadata, KVConnectorMetadata
from icecache.vllm.prefixes import Changes, Fork


@dataclass(slots=True)  # not frozen: a step makes one for each request
class ScheduledRow:
    """What a step is to compute of one request."""

    request: str
    sequence: int  # the request's own, by a number of Prefixes
    block: int  # of vLLM's pool, the request's own
    position: int  # of the first new token
    count: int  # new tokens
    phase: Phase  # of those that are a prompt's, where the row goes beyond its end
    drafts: int = 0  # of `count`, tokens behind a prompt that ends in this row
    fork: Fork | None = None  # in the first step of a sequence: what it begins with


@dataclass
class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """One step of all requests."""

    rows: list[ScheduledRow] = field(default_factory=list)
    # Of sequences that no request has any more: what to release, and what to retain.
    changes: Changes = field(default_factory=Changes)


@dataclass(frozen=True)
class IceCacheMetadata(AttentionMetadata):  # type: ignore[misc]
    """The form of a batch. Which requests it is of is found when the step begins."""

    starts: list[int]  # [B + 1] where each row's new tokens begin
    blocks: list[int]  # [B] each row's block of vLLM's pool
