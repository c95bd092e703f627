"""The methods that the benchmarks compare, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from icecache.bench.baselines.arkvale import ArkValeSession
from icecache.bench.baselines.h2o import H2OSession
from icecache.bench.baselines.layer_reuse import LayerReuseSession
from icecache.bench.baselines.magicpig import MagicPIGSession
from icecache.bench.baselines.omnikv import OmniKVSession
from icecache.bench.baselines.pqcache import PQCacheSession
from icecache.bench.baselines.retroinfer import RetroInferSession
from icecache.bench.baselines.snapkv import SnapKVSession
from icecache.bench.decoder import Decoder
from icecache.bench.engine_session import EngineSession, LosslessSession
from icecache.bench.names import unknown
from icecache.bench.oracles import FullSession, RecentSession, TopSession
from icecache.bench.prefill import Prefill
from icecache.bench.session import Session
from icecache.config import Config

# From a prefill, the token budget and the scale of scores.
OpenSession = Callable[[Prefill, int, float], Session]


_PREFILL = ", prefill "  # in a label, before the prefill_budget


@dataclass(frozen=True)
class Method:
    """A way to attend within a token budget: a session in torch, or the engine with these fields.

    Methods of one `name` are variants of each other; reports name a method by `label`.
    """

    name: str
    label: str
    session: OpenSession | None = None
    engine_fields: Mapping[str, Any] | None = None
    engine_session: type[EngineSession] = EngineSession

    def open(self, decoder: Decoder, prefill: Prefill, budget: int) -> Session:
        """Raises InvalidArgument where the budget is below what the method always attends to.

        Unavailable where the method needs FAISS and it is not installed.
        """
        if self.session is not None:
            return self.session(prefill, budget, decoder.scale)
        return self.engine_session(decoder, prefill, budget, self.engine_fields or {})

    def with_fields(self, fields: Mapping[str, Any]) -> Method:
        """The same with other engine fields; sessions in torch have none and stay as they are.

        The label tells the prefill_budget, if there is one.
        """
        if self.session is not None:
            return self
        own = {**(self.engine_fields or {}), **fields}
        label, _, _ = self.label.partition(_PREFILL)
        if budget := Config(prefill_budget=own.get("prefill_budget", 0)).prefill_budget:
            label += f"{_PREFILL}{budget}"
        return replace(self, label=label, engine_fields=own)


_PAGES = {"select": "page", "tail": "off"}
_OF_PROMPTS = ("prefill_budget", "prefill_chunk")

# `topk` is exact: no method that shares its picks in a group can attend to more mass. The paper
# does not give its share of promoted keys for contexts of some thousand tokens: of those tried on
# LongBench (.01 and .03, SmolLM2-135M, n = 40) the engine's default is the nearer one to full
# attention.
METHODS: tuple[Method, ...] = (
    Method("full", "full", FullSession),
    Method("icecache", "icecache", engine_fields={}),
    Method("topk", "exact top-B", TopSession),
    Method("paper", "paper", engine_fields={"index": "dci", **_PAGES}),
    Method("quest", "quest", engine_fields={"index": "positional", **_PAGES}),
    Method("streaming", "streaming", RecentSession),
    Method(
        "icecache-lossless", "icecache, lossless", engine_fields={}, engine_session=LosslessSession
    ),
    Method("icecache-prefill", "icecache").with_fields({"prefill_budget": 1024}),
    Method("faiss", "icecache, faiss", engine_fields={"index": "faiss"}),
    Method("topk_head", "exact top-B per head", partial(TopSession, per_head=True)),
    Method("paper_reuse", "paper, layer reuse", LayerReuseSession),
    Method("h2o", "h2o", H2OSession),
    Method("snapkv", "snapkv", SnapKVSession),
    Method("arkvale", "arkvale", ArkValeSession),
    Method("omnikv", "omnikv", OmniKVSession),
    Method("pqcache", "pqcache", PQCacheSession),
    Method("magicpig", "magicpig", MagicPIGSession),
    Method("retroinfer", "retroinfer", RetroInferSession),
)


def find_methods(names: Sequence[str]) -> list[Method]:
    """The methods of these names with all their variants, in order; all where `names` is empty.

    InvalidArgument for a name that no method has.
    """
    by_name: dict[str, list[Method]] = {}
    for method in METHODS:
        by_name.setdefault(method.name, []).append(method)
    for name in names:
        if name not in by_name:
            raise unknown("method", name, by_name)
    return [method for name in names or by_name for method in by_name[name]]


def with_settings(methods: Sequence[Method], fields: Mapping[str, Any]) -> list[Method]:
    """The same, IceCache's own with engine fields that a user sets; those of others stay.

    Fields that say how prompts are attended are those of "icecache-prefill", if it is among them.
    """
    others = {name: value for name, value in fields.items() if name not in _OF_PROMPTS}
    compared = any(method.name == "icecache-prefill" for method in methods)
    own = {"icecache": others if compared else fields, "icecache-prefill": fields}
    return [
        method.with_fields(own[method.name]) if method.name in own else method for method in methods
    ]
