"""What the scheduler tells the workers with every step."""

from __future__ import annotations

from dataclasses import dataclass, field

from icecache import Phase
from icecache.vllm.names import KVConnectorMetadata


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
