"""What one worker process knows: the layers it serves, its store, and the step under way.

vLLM makes layers, specs, metadata builders and the connector each by themselves and hands none of
them to another; they meet here. One model at a time: the newest is the one in use.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from icecache import InvalidArgument, OutOfPages
from icecache.device_engine import DeviceEngine
from icecache.shape import CacheShape
from icecache.vllm.host_memory import room_of
from icecache.vllm.metadata import IceCacheMetadata, ScheduledRow, StepMetadata
from icecache.vllm.names import AttentionSpec, VllmConfig
from icecache.vllm.prompt_attention import PromptAttention
from icecache.vllm.settings import device_of, engine_config
from icecache.vllm.spec import IceCacheSpec
from icecache.vllm.store import Batch, HostEngine, Store
from icecache.vllm.support import check_config, check_draft_length, check_memory


class Worker:
    """Not thread-safe: a worker loads and steps on one thread."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        check_config(vllm_config)
        self.vllm_config = vllm_config
        # All layers of the model, by name.
        self.registered = vllm_config.compilation_config.static_forward_context
        self.config = engine_config(vllm_config)
        # Shapes of one layer, without its dtype, of the heads that are this worker's own.
        self.offers: dict[Any, CacheShape] = {}  # implementations that the engine may replace
        self.shapes: list[CacheShape] = []  # one for each layer that the engine serves
        self.store: Store | None = None
        self.metadata = IceCacheMetadata([0], [])  # that the builder made last
        self.step = StepMetadata()
        self.batch = Batch()  # its requests

    def add_layer(self, shape: CacheShape) -> None:
        """A layer whose attention the engine computes. All must be alike."""
        if self.shapes and shape != self.shapes[0]:
            raise InvalidArgument(
                f"IceCache does not serve full-attention layers that differ: expected "
                f"{self.shapes[0]}, got {shape}; serve this model with stock vLLM"
            )
        self.shapes.append(shape)

    def open_store(self, dtype: torch.dtype) -> Store:
        """The engine, once all layers are known.

        Raises InvalidArgument where host memory does not hold one longest request.
        """
        if self.store is None:
            shape = replace(self.shapes[0], num_layers=len(self.shapes), dtype=dtype)
            device = device_of(self.vllm_config)
            engine = (
                HostEngine(**vars(shape), config=self.config)
                if device is None
                else self._on_device(device, shape)
            )
            store = Store(engine)
            longest = self.vllm_config.model_config.max_model_len
            room = room_of(engine.config)
            check_memory(store.host_memory, store.slot_bytes, longest, engine.room_step, room)
            if self.vllm_config.speculative_config is not None:
                drafts = self.vllm_config.speculative_config.num_speculative_tokens
                check_draft_length(drafts, engine.config)
            self.store = store
        return self.store

    def _on_device(self, device: torch.device, shape: CacheShape) -> DeviceEngine:
        lanes = self.vllm_config.scheduler_config.max_num_seqs
        longest = self.vllm_config.model_config.max_model_len
        share = self.vllm_config.cache_config.gpu_memory_utilization
        try:
            return DeviceEngine(
                **vars(shape),
                config=self.config,
                device=device,
                lanes=lanes,
                max_tokens=longest,
                device_share=share,
                attend_prompt=PromptAttention(shape, device),
            )
        except OutOfPages as error:
            raise InvalidArgument(
                f"max_num_seqs: {device} has no memory for {lanes} requests of which one has "
                f"{longest:,} tokens ({error}); lower --max-num-seqs or --max-model-len, or raise "
                "--gpu-memory-utilization"
            ) from error

    def spec_of(self, spec: AttentionSpec) -> IceCacheSpec:
        """In place of a stock spec. Opens the store."""
        engine = self.open_store(spec.dtype).engine
        return IceCacheSpec.of(spec, engine.tokens, engine.room_step, room_of(engine.config))

    def begin(self, step: StepMetadata) -> None:
        """Before the forward of a step, or the replay of a graph of it.

        Raises RuntimeError where the batch is not what the scheduler announced.
        """
        assert self.store is not None
        self.store.change(step.changes)
        self.step = step
        rows = self._rows() if step.rows else []
        self.batch = self.store.begin(rows)

    def end(self) -> None:
        """The step is over: a dummy batch that follows is none of its rows."""
        self.begin(StepMetadata())

    def _rows(self) -> list[tuple[int, ScheduledRow]]:
        """The step's rows, each with that of its first token in the batch. Others are padding."""
        starts, blocks = self.metadata.starts, self.metadata.blocks
        by_block = {row.block: row for row in self.step.rows}
        rows = []
        for index, block in enumerate(blocks):
            count = starts[index + 1] - starts[index]
            if count == 0:
                continue
            row = by_block.pop(block, None)
            if row is None or row.count != count:
                raise RuntimeError(
                    f"IceCache: row {index} of the batch has {count} tokens and block {block}, "
                    f"which is not what the scheduler announced: {self.step.rows}"
                )
            rows.append((starts[index], row))
        if by_block:
            raise RuntimeError(f"IceCache: rows that are not in the batch: {[*by_block.values()]}")
        return rows


_current: Worker | None = None


def worker_for(vllm_config: VllmConfig) -> Worker:
    """This process's worker; a new one for another model. Raises as check_config().

    vLLM makes parts of a model, the decoder behind a vision tower, with a copy of its config. What
    the layers of all parts are registered in is one and the same.
    """
    global _current
    registered = vllm_config.compilation_config.static_forward_context
    if _current is None or _current.registered is not registered:
        _current = Worker(vllm_config)
    return _current


def current_worker() -> Worker | None:
    """The worker of the model loaded last; None where no layer is served."""
    return _current
