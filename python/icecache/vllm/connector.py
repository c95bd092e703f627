"""The KV connector: request ids, lifecycle, failures and statistics, between scheduler and workers.

It moves no keys or values: those go from the attention layers to the engine of the same process.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from icecache import Phase
from icecache.vllm.metadata import ScheduledRow, StepMetadata
from icecache.vllm.metrics import Meter, PrefixMeter, PrometheusMetrics, Stats, StoreMeter
from icecache.vllm.names import (
    HOST_MEMORY,
    CUDAGraphMode,
    KVConnectorBase_V1,
    KVConnectorRole,
    SupportsHMA,
    get_forward_context,
    init_logger,
    is_forward_context_available,
)
from icecache.vllm.prefixes import Prefixes
from icecache.vllm.settings import engine_config
from icecache.vllm.spec import DraftingSpec, HostMemorySpec
from icecache.vllm.support import check_config, check_drafting_group, check_groups
from icecache.vllm.worker import current_worker

logger = init_logger(f"vllm.{__name__}")  # others have no handler in vLLM


@dataclass(slots=True)
class _Seat:
    """What the scheduler's side knows of a request that runs."""

    key: int  # of its sequence
    block: int  # of vLLM's pool
    given: int  # tokens of its prompt
    prompt: int  # those, and what it had made when it was preempted


class IceCacheConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Named by `kv_connector` in vLLM's kv_transfer_config. Both roles are in this class."""

    requires_kv_delivery = False
    _cache_hit_source = HOST_MEMORY

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        """Raises InvalidArgument where vLLM's configuration cannot be served."""
        check_config(vllm_config)
        super().__init__(vllm_config, role, kv_cache_config)
        groups = kv_cache_config.kv_cache_groups
        served = [i for i, g in enumerate(groups) if isinstance(g.kv_cache_spec, HostMemorySpec)]
        check_groups(served, [type(group.kv_cache_spec).__name__ for group in groups])
        self._group = served[0]
        self._spec = spec = groups[self._group].kv_cache_spec
        if isinstance(spec, DraftingSpec):
            check_drafting_group(vllm_config, self._group)
        # Of layers with sliding windows, or that draft, vLLM would have to keep the blocks as long
        # as the engines keep a sequence.
        self._may_share = len(groups) == 1 and not isinstance(spec, DraftingSpec)
        self._seats: dict[str, _Seat] = {}  # scheduler's side, by request
        self._prefixes: Prefixes | None = None
        self._store = None
        self._meter: Meter | None = None
        if role == KVConnectorRole.WORKER:
            worker = current_worker()
            assert worker is not None, "layers are made before the connector"
            self._worker = worker
            self._store = worker.connect([groups[index].layer_names for index in served])
            self._meter = StoreMeter(self._store)
        else:
            longest = vllm_config.model_config.max_model_len
            if isinstance(spec, DraftingSpec) and vllm_config.cache_config.enable_prefix_caching:
                logger.info("IceCache: layers draft; prompts that begin alike are not shared")
            logger.info(
                "IceCache: %s %s tokens, %.1f requests of %s tokens at once",
                "host and device memory hold" if spec.room_step else "host memory holds",
                f"{spec.host_slots:,}",
                spec.host_slots / spec.slots_of(longest),
                f"{longest:,}",
            )

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: Any) -> bool:
        """True: of vLLM's cache, which goes and comes back elsewhere, nothing is read (0.33)."""
        return True

    # --- scheduler's side

    def use_prefixes(self, prefixes: Prefixes, block_tokens: int) -> None:
        """The scheduler's, before its first step. They are shared where vLLM caches prefixes."""
        self._prefixes = prefixes
        config, spec = self._vllm_config, self._spec
        events = config.kv_events_config
        if config.cache_config.enable_prefix_caching and self._may_share and not spec.room_step:
            longest = config.model_config.max_model_len
            with_events = events is not None and events.enable_kv_cache_events
            whole = engine_config(config).prompt_block
            prefixes.turn_on(block_tokens, longest, with_events, whole)
            self._meter = PrefixMeter(prefixes, spec.slot_bytes)

    @property
    def prefixes(self) -> Prefixes:
        """Of the scheduler."""
        assert self._prefixes is not None, "the scheduler hands them over when it is made"
        return self._prefixes

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens that the workers have of another request; None: they will have them soon."""
        return self.prefixes.match(request), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """The request begins, or resumes."""
        self.prefixes.admit(request, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        """Every row of the step with the phase that it is in."""
        output = scheduler_output
        for request in output.finished_req_ids:
            self.prefixes.finished(request)
            self._seats.pop(request, None)
        counts, rows, begins = output.num_scheduled_tokens, [], []
        for new in output.scheduled_new_reqs:
            # The V2 runner sends resumed requests as new ones, with all their tokens.
            tokens = new.prefill_token_ids or new.prompt_token_ids
            given = len(tokens if tokens is not None else new.prompt_embeds)
            block = new.block_ids[self._group][0]
            self._seats[new.req_id] = _Seat(self.prefixes.key(new.req_id), block, given, given)
            begins.append((new.req_id, new.num_computed_tokens))
        cached = output.scheduled_cached_reqs
        for index, request in enumerate(cached.req_ids if cached.resumed_req_ids else ()):
            if request in cached.resumed_req_ids:
                seat = self._seats[request]
                seat.key = self.prefixes.key(request)
                seat.block = cached.new_block_ids[index][self._group][0]
                seat.prompt = seat.given + cached.num_output_tokens[index]
        seats, auto = self._seats, Phase.AUTO
        # Nearly all rows of nearly all steps decode: no more is done for each of them than this.
        for request, first in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            seat = seats[request]
            if first < seat.prompt:
                begins.append((request, first))
            else:
                rows.append(
                    ScheduledRow(request, seat.key, seat.block, first, counts[request], auto)
                )
        rows += [self._row_of_prompt(request, first, counts[request]) for request, first in begins]
        return StepMetadata(rows=rows, changes=self.prefixes.end_of_scheduling())

    def _row_of_prompt(self, request: str, first: int, count: int) -> ScheduledRow:
        """Of a request that reads its prompt; with drafts, where the row goes beyond its end."""
        seat = self._seats[request]
        behind = first + count - seat.prompt
        phase = Phase.PROMPT_END if behind >= 0 else Phase.PREFILL
        fork = self.prefixes.take_fork(request)
        drafts = max(0, behind)
        return ScheduledRow(request, seat.key, seat.block, first, count, phase, drafts, fork)

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The block is free at once; the next step tells the workers. The sequence may be kept."""
        self.prefixes.keep(request)
        return False, None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """As request_finished()."""
        return self.request_finished(request, block_ids[self._group])

    def reset_cache(self) -> bool:
        """Nothing that was computed is shared with requests to come."""
        self.prefixes.reset()
        return True

    def take_events(self) -> Iterable[Any]:
        """Blocks that can be shared from now on, or no more."""
        events, taken = self.prefixes.events, []
        if events:
            taken, self.prefixes.events = events, []
        return taken

    # --- worker's side

    def bind_connector_metadata(self, connector_metadata: StepMetadata) -> None:
        """The step begins: vLLM's runners have built its batch's metadata, and its forward, or a
        replay of it, is next. Called in every step, also in one without tokens."""
        super().bind_connector_metadata(connector_metadata)
        self._worker.begin(connector_metadata)
        if any(row.phase != Phase.AUTO for row in connector_metadata.rows):
            _keep_out_of_full_graphs()

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks of requests that were lost: our scheduler ends those."""
        assert self._store is not None
        return {row.block for row in self._worker.step.rows if row.sequence in self._store.failed}

    def clear_connector_metadata(self) -> None:
        """The step is over: a dummy batch that follows is none of its rows."""
        super().clear_connector_metadata()
        if self._store is not None:
            self._worker.end()

    def get_kv_connector_stats(self) -> Stats | None:
        """What happened since the last call, on the side that asks."""
        return self._meter.since_last() if self._meter is not None else None

    def shutdown(self) -> None:
        """Frees all pages."""
        if self._store is not None:
            self._worker.store = self._store = None

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing to load."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to load."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kw: Any) -> None:
        """The layer's attention has done it."""

    def wait_for_save(self) -> None:
        """Nothing is under way."""

    # --- logger's side

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Stats:
        """Stats from what a worker sent."""
        return Stats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any
    ) -> PrometheusMetrics:
        """For vLLM's /metrics."""
        return PrometheusMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


def _keep_out_of_full_graphs() -> None:
    """For a step with prompts, which a replay would not serve.

    vLLM's V1 runner takes a step for one of decodes where every request has one token, be it a
    prompt's. The V2 runner does not, but where prompts come in chunks: full graphs are not offered
    to it there.
    """
    if not is_forward_context_available():  # as only where the V2 runner replays a full graph
        raise RuntimeError(
            "IceCache: vLLM took a step with prompts for one of decodes; start with "
            '--compilation-config \'{"cudagraph_mode": "PIECEWISE"}\''
        )
    context = get_forward_context()
    if context.cudagraph_runtime_mode == CUDAGraphMode.FULL:
        context.cudagraph_runtime_mode = CUDAGraphMode.NONE
