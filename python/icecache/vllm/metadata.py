"""What a step is: as the scheduler tells the workers, and as a runner has it in its batch."""

from __future__ import annotations

from dataclasses import dataclass, field

from icecache import Phase
from icecache.vllm.names import AttentionMetadata, KVConnectorMetadata


@dataclass(frozen=True)
class ScheduledRow:
    """What a step is to compute of one request."""

    request: str
    block: int  # of vLLM's pool, the request's own
    position: int  # of the first new token
    count: int  # new tokens
    phase: Phase


@dataclass
class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """One step of all requests."""

    rows: list[ScheduledRow] = field(default_factory=list)
    gone: set[str] = field(default_factory=set)  # finished, aborted or preempted: to be released


@dataclass(frozen=True)
class IceCacheMetadata(AttentionMetadata):  # type: ignore[misc]
    """The form of a batch. Which requests it is of is found when the step begins."""

    starts: list[int]  # [B + 1] where each row's new tokens begin
    blocks: list[int]  # [B] each row's block of vLLM's pool
