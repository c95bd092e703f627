"""The methods that the demo puts side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from icecache.bench.decoder import Decoder
from icecache.bench.engine_session import EngineSession
from icecache.bench.prefill import Prefill
from icecache.bench.session import Session
from icecache.demo.streaming import StreamingSession

_PAGES = {"select": "page", "tail": "off"}


@dataclass(frozen=True)
class Method:
    """`engine` are fields of Config; None stands for StreamingLLM."""

    name: str
    budget: int
    note: str
    engine: Mapping[str, Any] | None = field(default_factory=dict)

    def open(self, decoder: Decoder, prefill: Prefill, **fields: Any) -> Session:
        if self.engine is None:
            return StreamingSession(prefill, self.budget)
        return EngineSession(decoder, prefill, self.budget, {**self.engine, **fields})


def compared(budgets: tuple[int, ...], other: int) -> list[Method]:
    """IceCache at each budget, the others at `other` tokens."""
    ours = [Method("IceCache", budget, "tokens picked, the rest summarised") for budget in budgets]
    paper = {"index": "dci", **_PAGES}
    quest = {"index": "positional", **_PAGES}
    return [
        *ours,
        Method("IceCache paper", other, "DCI pages, p = .03, the rest dropped", paper),
        Method("Quest", other, "consecutive pages by min/max bounds", quest),
        Method("StreamingLLM", other, "sinks and the most recent tokens", None),
    ]
