"""The methods that the benchmarks compare, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from icecache.bench.decoder import Decoder
from icecache.bench.engine_session import EngineSession
from icecache.bench.oracles import OracleSession, Pick, pick_all, pick_recent, pick_top
from icecache.bench.prefill import Prefill
from icecache.bench.session import Session


@dataclass(frozen=True)
class Method:
    """A way to attend within a token budget: an oracle's pick, or the engine with these fields.

    Methods of one `name` are variants of each other; reports name a method by `label`.
    """

    name: str
    label: str
    pick: Pick | None = None
    engine_fields: Mapping[str, Any] | None = None

    def open(self, decoder: Decoder, prefill: Prefill, budget: int) -> Session:
        """Raises InvalidArgument where the budget is below what the method always attends to."""
        if self.pick is not None:
            return OracleSession(prefill, self.pick, budget, decoder.scale)
        return EngineSession(decoder, prefill, budget, self.engine_fields or {})

    def with_fields(self, fields: Mapping[str, Any]) -> Method:
        """The same with other engine fields; oracles have none and stay as they are."""
        if self.pick is not None:
            return self
        return replace(self, engine_fields={**(self.engine_fields or {}), **fields})


_PAGES = {"select": "page", "tail": "off"}

# `topk` is exact: no method that shares its picks in a group can attend to more mass. The paper's
# share of promoted keys is not given for such short contexts, so both values are run.
METHODS: tuple[Method, ...] = (
    Method("full", "full", pick_all),
    Method("icecache", "icecache", engine_fields={}),
    Method("topk", "exact top-B", pick_top),
    Method("paper", "paper p=.01", engine_fields={"index": "dci", "dci_promotion": 0.01, **_PAGES}),
    Method("paper", "paper p=.03", engine_fields={"index": "dci", "dci_promotion": 0.03, **_PAGES}),
    Method("quest", "quest", engine_fields={"index": "positional", **_PAGES}),
    Method("streaming", "streaming", pick_recent),
)
