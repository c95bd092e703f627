"""The methods that the demo puts side by side: those of the harness, each at one budget."""

from __future__ import annotations

from dataclasses import dataclass

from icecache.bench.decoder import Decoder
from icecache.bench.methods import Method, find_methods
from icecache.bench.prefill import Prefill
from icecache.bench.session import Session
from icecache.demo.streaming import StreamingSession

_STREAMING = Method("streaming", "streaming", StreamingSession)


@dataclass(frozen=True)
class Contender:
    """A method as the demo shows it."""

    name: str
    budget: int
    note: str
    method: Method

    def open(self, decoder: Decoder, prefill: Prefill) -> Session:
        return self.method.open(decoder, prefill, self.budget)


def compared(budgets: tuple[int, ...], other: int) -> list[Contender]:
    """IceCache at each budget, the others at `other` tokens."""
    ours, paper, quest = find_methods(["icecache", "paper", "quest"])
    note = "tokens picked, the rest summarised"
    return [
        *(Contender("IceCache", budget, note, ours) for budget in budgets),
        Contender("IceCache paper", other, "DCI pages, p = .03, the rest dropped", paper),
        Contender("Quest", other, "consecutive pages by min/max bounds", quest),
        Contender("StreamingLLM", other, "sinks and the most recent tokens", _STREAMING),
    ]
