"""The scheduler: vLLM's own, which also ends the requests that a worker lost, and them alone.

vLLM's way for a connector to report lost blocks serves models with one kind of layers only, and
misses a request in its first step: its first token, made of nothing, would reach the user.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from icecache.vllm.metadata import StepMetadata
from icecache.vllm.names import (
    AsyncScheduler,
    EngineCoreOutput,
    EngineCoreOutputs,
    RequestStatus,
    Scheduler,
)


class _EndsTheLost(Scheduler):  # type: ignore[misc]
    """The part that both of vLLM's schedulers take on."""

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """As vLLM's. Requests that were lost get no token of this step, and finish_reason error."""
        lost = _take_lost(scheduler_output, model_runner_output)
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


class IceCacheScheduler(_EndsTheLost):
    """vLLM's scheduler."""


class IceCacheAsyncScheduler(_EndsTheLost, AsyncScheduler):  # type: ignore[misc]
    """vLLM's scheduler one step ahead."""


def make_scheduler(vllm_config: Any, **arguments: Any) -> Any:
    """Named by vLLM's `scheduler_cls`: the one that `async_scheduling` asks for."""
    ahead = vllm_config.scheduler_config.async_scheduling
    return (IceCacheAsyncScheduler if ahead else IceCacheScheduler)(
        vllm_config=vllm_config, **arguments
    )


def _take_lost(scheduler_output: Any, model_runner_output: Any) -> Iterable[str]:
    """The requests whose blocks a worker reported as lost in this step; vLLM sees no report."""
    report = model_runner_output.kv_connector_output
    step = scheduler_output.kv_connector_metadata
    if report is None or not report.invalid_block_ids or not isinstance(step, StepMetadata):
        return []
    blocks, report.invalid_block_ids = report.invalid_block_ids, set()
    # By the rows of that very step: by now a block may belong to another request.
    return [row.request for row in step.rows if row.block in blocks]
