"""Statistics of the workers' engines, for vLLM's log and for Prometheus."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import isnan
from typing import Any

from prometheus_client import Counter, Gauge

from icecache.vllm.names import KVConnectorPromMetrics, KVConnectorStats
from icecache.vllm.prefixes import Prefixes
from icecache.vllm.store import Store

_INTERVAL = 1.0  # seconds between two looks at the engine


@dataclass(frozen=True)
class Metric:
    """One number that a worker reports."""

    name: str
    help: str
    is_gauge: bool = False  # else a counter: a worker reports what was added
    # The field of HeadStats whose sum over layers and KV heads it is, where it is a number: a
    # device does not estimate mass.
    of_heads: str = ""


METRICS = (
    Metric(
        "steps",
        "Decode queries answered within the token budget, per layer and KV head",
        of_heads="steps",
    ),
    Metric(
        "dense_steps",
        "Decode queries that attended to everything, per layer and KV head",
        of_heads="dense_steps",
    ),
    Metric(
        "prompt_tokens",
        "Tokens of prompts that attended, per layer and KV head",
        of_heads="prompt_tokens",
    ),
    Metric(
        "sparse_prompt_tokens",
        "Tokens of prompts that attended within prefill_budget, per layer and KV head",
        of_heads="sparse_prompt_tokens",
    ),
    Metric("tokens_selected", "Tokens picked by the index", of_heads="tokens_selected"),
    Metric("pages_selected", "Pages that picked tokens came from", of_heads="pages_selected"),
    Metric("page_hits", "Picked pages that the device had", of_heads="hits"),
    Metric("page_misses", "Picked pages that had to be moved to the device", of_heads="misses"),
    Metric(
        "read_bytes", "Bytes of sketches, summaries, keys and values read", of_heads="bytes_read"
    ),
    Metric("moved_bytes", "Bytes moved from host to device", of_heads="bytes_moved"),
    Metric(
        "attention_mass", "Sum over steps of the share of attention that was exact", of_heads="mass"
    ),
    Metric(
        "select_seconds",
        "Time spent selecting tokens, summed over threads",
        of_heads="select_seconds",
    ),
    Metric(
        "attend_seconds",
        "Time spent attending, selection included, summed over threads",
        of_heads="attend_seconds",
    ),
    Metric(
        "index_seconds",
        "Time spent building and extending indexes, summed over threads",
        of_heads="index_seconds",
    ),
    Metric("failed_requests", "Requests that failed alone"),
    Metric("host_bytes", "Bytes of pages in use", is_gauge=True),
    Metric("host_capacity_bytes", "Bytes of pages that host_memory holds", is_gauge=True),
    Metric("requests", "Requests that hold pages", is_gauge=True),
    Metric("resident_requests", "Requests that a device holds whole", is_gauge=True),
    Metric("resident_bytes", "Bytes of the device for such requests", is_gauge=True),
    Metric("prefixes", "Ended requests that are kept for those that begin alike", is_gauge=True),
    Metric("prefix_bytes", "Bytes of pages, by estimate, that are free when asked", is_gauge=True),
    Metric("prefix_evictions", "Kept requests that went for want of host memory"),
)
_COUNTERS = [metric.name for metric in METRICS if not metric.is_gauge]
_OF_WORKERS = [name for name in _COUNTERS if name != "prefix_evictions"]


class Stats(KVConnectorStats):  # type: ignore[misc]
    """One number for each of METRICS, over an interval; empty where nothing was decoded."""

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> Stats:
        """Counters add up; of gauges the later ones count."""
        for name, value in other.data.items():
            if name in _COUNTERS:
                self.data[name] = self.data.get(name, 0) + value
            else:
                self.data[name] = value
        return self

    def reduce(self) -> dict[str, int | float]:
        """For the log: what an operator looks at."""
        steps = self.data.get("steps", 0)
        pages = self.data.get("page_hits", 0) + self.data.get("page_misses", 0)
        line: dict[str, int | float] = {
            "IceCache host GiB": round(self.data.get("host_bytes", 0) / 2**30, 3),
            "requests": self.data.get("requests", 0),
        }
        if self.data.get("resident_bytes"):
            line["resident requests"] = self.data["resident_requests"]
        if self.data.get("prefixes"):
            line["prefixes"] = self.data["prefixes"]
        if steps and self.data["attention_mass"]:  # which a device does not estimate
            line["exact attention mass"] = round(self.data["attention_mass"] / steps, 4)
            line["select us per head"] = round(self.data["select_seconds"] / steps * 1e6, 1)
        if self.data.get("sparse_prompt_tokens"):
            share = self.data["sparse_prompt_tokens"] / self.data["prompt_tokens"]
            line["prompt within budget"] = round(share, 3)
        if pages:
            line["page hit rate"] = round(self.data["page_hits"] / pages, 3)
        return line

    def is_empty(self) -> bool:
        return not self.data


class Meter(ABC):
    """What happened since the last look."""

    _next = 0.0

    def since_last(self) -> Stats | None:
        """None within a second of the last look."""
        now = time.monotonic()
        if now < self._next:
            return None
        self._next = now + _INTERVAL
        return Stats(data=self._look())

    @abstractmethod
    def _look(self) -> dict[str, Any]:
        """Gauges, and what was added to counters."""


class StoreMeter(Meter):
    """Turns the engine's sums into what was added."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._last = dict.fromkeys(_OF_WORKERS, 0.0)

    def _look(self) -> dict[str, Any]:
        totals = sums(self._store)
        data = {name: totals[name] - self._last[name] for name in _OF_WORKERS}
        self._last = totals
        engine = self._store.engine
        data["host_bytes"] = engine.pool_bytes()
        data["host_capacity_bytes"] = engine.host_memory
        data["requests"] = self._store.requests
        data["resident_requests"], data["resident_bytes"] = engine.residents()
        return data


class PrefixMeter(Meter):
    """What the scheduler knows of its prefix store."""

    def __init__(self, prefixes: Prefixes, slot_bytes: int) -> None:
        """`slot_bytes`: of a token in all layers and KV heads of a worker."""
        self._prefixes, self._slot_bytes = prefixes, slot_bytes
        self._evictions = 0  # that were reported

    def _look(self) -> dict[str, Any]:
        more = self._prefixes.evictions - self._evictions
        self._evictions += more
        return {
            "prefixes": self._prefixes.kept,
            "prefix_bytes": self._prefixes.kept_slots * self._slot_bytes,
            "prefix_evictions": more,
        }


def sums(store: Store) -> dict[str, float]:
    """Every counter since the start."""
    parts = store.engine.all_stats()
    total: dict[str, float] = {
        metric.name: sum(
            value for part in parts if not isnan(value := getattr(part, metric.of_heads))
        )
        for metric in METRICS
        if metric.of_heads
    }
    total["failed_requests"] = store.requests_failed
    return total


class PrometheusMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """`icecache:NAME` for each of METRICS, with vLLM's own labels."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Mapping[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._metrics: dict[str, dict[int, Any]] = {}
        for metric in METRICS:
            options: dict[str, Any] = {}
            if metric.is_gauge:
                options["multiprocess_mode"] = "mostrecent"
            made = metric_types[Gauge if metric.is_gauge else Counter](
                name=f"icecache:{metric.name}",
                documentation=metric.help,
                labelnames=labelnames,
                **options,
            )
            self._metrics[metric.name] = {
                engine: made.labels(*values) for engine, values in per_engine_labelvalues.items()
            }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Adds what a worker reported."""
        for metric in METRICS:
            value = transfer_stats_data.get(metric.name)
            if value is None:
                continue
            series = self._metrics[metric.name][engine_idx]
            if metric.is_gauge:
                series.set(value)
            else:
                series.inc(value)
