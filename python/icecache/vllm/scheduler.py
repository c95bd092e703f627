"""The scheduler: vLLM's own, with the prefix store, and an end for requests that a worker lost.

vLLM's way for a connector to report lost blocks serves models with one kind of layers only, and
misses a request in its first step: its first token, made of nothing, would reach the user.
"""

from __future__ import annotations

import inspect
import time
from typing import Any

from icecache.vllm.metadata import ScheduledRow, StepMetadata
from icecache.vllm.names import (
    AsyncScheduler,
    EngineCoreOutput,
    EngineCoreOutputs,
    RequestStatus,
    Scheduler,
)
from icecache.vllm.prompts import whole_blocks
from icecache.vllm.settings import engine_config
from icecache.vllm.spec import HostMemoryManager

# Older schedulers cannot take back a request of which a step is under way.
_RESTARTS = "drop_stale_output" in inspect.signature(Scheduler._preempt_request).parameters


class _IceCache(Scheduler):  # type: ignore[misc]
    """The part that both of vLLM's schedulers take on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        ours = [manager for manager in managers if isinstance(manager, HostMemoryManager)]
        # vLLM may split the layers into groups. A request has a block of each, and memory once.
        self._prefixes = ours[0].prefixes
        for manager in ours:
            manager.prefixes = self._prefixes
        self.connector.use_prefixes(self._prefixes, self.hash_block_size)
        self._prompt_block = engine_config(self.vllm_config).prompt_block
        if self._prompt_block > 1:  # vLLM then asks how many tokens of a prompt a step may take
            self.need_mamba_block_aligned_split = True

    def _mamba_block_aligned_split(
        self,
        request: Any,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:
        """Where prompts have a budget, in place of vLLM's: tokens of a request that a step takes,
        up to the end of a block of them. Else vLLM's own.

        0 lets the request wait; the first one that waits so has room in the next step, which
        check_prompts() has made sure of.
        """
        known = num_new_local_computed_tokens + num_external_computed_tokens
        if self._prompt_block == 1:
            return int(
                super()._mamba_block_aligned_split(
                    request,
                    num_new_tokens,
                    num_new_local_computed_tokens,
                    num_external_computed_tokens,
                )
            )
        start = request.num_computed_tokens + known
        return whole_blocks(start, num_new_tokens, request.num_tokens, self._prompt_block)

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        """As vLLM's. What was computed is kept until somebody needs its memory."""
        self._prefixes.keep(request)
        super()._preempt_request(request, *args, **kwargs)

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """As vLLM's, which by default leaves out what a connector has."""
        done = bool(super().reset_prefix_cache(*args, **kwargs))
        self._prefixes.reset()
        return done

    def has_finished_requests(self) -> bool:
        """As vLLM's; also where sequences have ended of which the workers do not know yet."""
        return bool(super().has_finished_requests() or self._prefixes.changes.gone)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """As vLLM's. Requests that were lost get no token of this step, and finish_reason error.

        One whose workers did not have what it was to begin with begins anew, without that.
        """
        lost = []
        for row in _take_lost(scheduler_output, model_runner_output):
            if not self._prefixes.is_running(row.request, row.sequence):
                continue  # it has ended, or begun anew, since then
            if row.fork is None or not _RESTARTS:
                lost.append(row.request)
                continue
            request = self.requests[row.request]
            self._prefixes.start_cold(row.request, row.fork.owner)
            self.running.remove(request)
            self._preempt_request(request, time.monotonic(), drop_stale_output=True)
        ended = self.finish_requests(lost, RequestStatus.FINISHED_ERROR) if lost else []
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for request in ended:
            of_client = outputs.setdefault(request.client_index, EngineCoreOutputs(outputs=[]))
            of_client.outputs.append(
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=request.get_finished_reason(),
                    events=request.take_events(),
                    trace_headers=request.trace_headers,
                )
            )
        return outputs


class IceCacheScheduler(_IceCache):
    """vLLM's scheduler."""


class IceCacheAsyncScheduler(_IceCache, AsyncScheduler):  # type: ignore[misc]
    """vLLM's scheduler one step ahead."""


def make_scheduler(vllm_config: Any, **arguments: Any) -> Any:
    """Named by vLLM's `scheduler_cls`: the one that `async_scheduling` asks for."""
    ahead = vllm_config.scheduler_config.async_scheduling
    return (IceCacheAsyncScheduler if ahead else IceCacheScheduler)(
        vllm_config=vllm_config, **arguments
    )


def _take_lost(scheduler_output: Any, model_runner_output: Any) -> list[ScheduledRow]:
    """The rows whose blocks a worker reported as lost in this step; vLLM sees no report."""
    report = model_runner_output.kv_connector_output
    step = scheduler_output.kv_connector_metadata
    if report is None or not report.invalid_block_ids or not isinstance(step, StepMetadata):
        return []
    blocks, report.invalid_block_ids = report.invalid_block_ids, set()
    # By the rows of that very step: by now a block may belong to another request.
    return [row for row in step.rows if row.block in blocks]
