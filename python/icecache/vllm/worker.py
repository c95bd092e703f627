"""What one worker process knows: the layers it serves, its store, and the step under way.

vLLM makes layers, specs, metadata builders and the connector each by themselves and hands none of
them to another; they meet here. One model at a time: the newest is the one in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from icecache import InvalidArgument, OutOfPages
from icecache.device import STEP_TOKENS
from icecache.device_engine import DeviceEngine
from icecache.shape import CacheShape
from icecache.vllm.engines import Engines, HostEngine, Layer, Place, place_layers, split_config
from icecache.vllm.host_memory import room_of
from icecache.vllm.metadata import IceCacheMetadata, ScheduledRow, StepMetadata
from icecache.vllm.names import AttentionSpec, VllmConfig
from icecache.vllm.prompt_attention import PromptAttention
from icecache.vllm.prompts import check_prompt_layers
from icecache.vllm.settings import device_of, engine_config
from icecache.vllm.spec import DraftingSpec, HostMemorySpec, IceCacheSpec
from icecache.vllm.store import Batch, Store
from icecache.vllm.support import (
    check_config,
    check_draft_length,
    check_layers,
    check_memory,
)


class Worker:
    """Not thread-safe: a worker loads and steps on one thread."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        check_config(vllm_config)
        self.vllm_config = vllm_config
        # All layers of the model, by name.
        self.registered = vllm_config.compilation_config.static_forward_context
        self.config = engine_config(vllm_config)
        self.offers: dict[Any, Any] = {}  # by implementations that the engines may replace
        self.layers: list[Layer] = []  # that the engines serve, in the model's order
        self.drafters: list[str] = []  # layers that draft, by vLLM's own attention
        # The stock spec of the first drafter, or else of the first layer: that of a request's seat.
        self.seat: AttentionSpec | None = None
        self.seat_layer = ""  # of the group whose blocks name the requests
        self.places: dict[str, Place] = {}  # of these layers, once the engines are made
        self.store: Store | None = None
        self.metadata = IceCacheMetadata([0], [])  # that the builder made last
        self.step = StepMetadata()
        self.batch = Batch()  # its requests

    def add_layer(self, layer: Layer, spec: AttentionSpec) -> None:
        """A layer whose attention the engines compute, and its stock spec."""
        self.layers.append(layer)
        self.seat = self.seat or spec

    def open_store(self) -> Store:
        """The engines, once all layers are known.

        Raises InvalidArgument for layers that they do not compute, and where host memory does not
        hold one longest request.
        """
        if self.store is None:
            engines = self._make_engines()
            longest = self.vllm_config.model_config.max_model_len
            room = room_of(engines.config, engines.shapes)
            check_memory(engines.host_memory, engines.token_bytes, longest, engines.room_step, room)
            if self.vllm_config.speculative_config is not None:
                drafts = self.vllm_config.speculative_config.num_speculative_tokens
                on_device = device_of(self.vllm_config) is not None
                check_draft_length(drafts, engines.config, on_device)
            self.store = Store(engines)
        return self.store

    def connect(self, groups: Sequence[Sequence[str]]) -> Store:
        """The store, from now on with its layers. `groups`: names of layers, as vLLM has grouped
        them, without those that share another one's cache; the blocks of the first group name
        requests."""
        store = self.open_store()
        store.layers = self.places
        # Where layers draft, the served ones share the cache of the first of these.
        shared = self.drafters[0] if self.drafters else None
        self.seat_layer = self.layers[0].name if shared else groups[0][0]
        named = {name for group in groups for name in group}
        owners = (shared or layer.owner or layer.name for layer in self.layers)
        missing = [name for name in owners if name not in named]
        if missing:
            raise InvalidArgument(f"IceCache: vLLM has no cache group for {missing}")
        return store

    def _make_engines(self) -> Engines:
        device = device_of(self.vllm_config)
        shapes, self.places = place_layers(self.layers)
        drafts = self.vllm_config.speculative_config is not None
        check_layers(self.layers, shapes, device, drafts)
        check_prompt_layers(self.layers, self.config)
        if device is not None:
            return Engines([self._on_device(device, shapes[0])])
        own = [self.places[layer.name] for layer in self.layers if layer.owner is None]
        configs = split_config(self.config, shapes, own)
        pairs = zip(shapes, configs, strict=True)
        return Engines([HostEngine(**vars(shape), config=config) for shape, config in pairs])

    def _on_device(self, device: torch.device, shape: CacheShape) -> DeviceEngine:
        lanes = self.vllm_config.scheduler_config.max_num_seqs
        longest = self.vllm_config.model_config.max_model_len
        share = self.vllm_config.cache_config.gpu_memory_utilization
        drafts = self.vllm_config.speculative_config
        step_tokens = 1 if drafts is None else 1 + drafts.num_speculative_tokens
        try:
            return DeviceEngine(
                **vars(shape),
                config=self.config,
                device=device,
                lanes=lanes,
                max_tokens=longest,
                device_share=share,
                attend_prompt=PromptAttention(shape, device),
                step_tokens=min(step_tokens, STEP_TOKENS),  # more are refused by then, by name
            )
        except OutOfPages as error:
            raise InvalidArgument(
                f"max_num_seqs: {device} has no memory for {lanes} requests of which one has "
                f"{longest:,} tokens ({error}); lower --max-num-seqs, --max-model-len or "
                "device_tokens, or raise --gpu-memory-utilization"
            ) from error

    def spec_of(self, spec: AttentionSpec) -> HostMemorySpec:
        """In place of a stock spec, whose block size it has. Opens the store.

        The same for all layers: one that differed would be a group of its own.
        """
        assert self.seat is not None
        engines = self.open_store().engine
        of_seat: type[HostMemorySpec] = DraftingSpec if self.drafters else IceCacheSpec
        made: HostMemorySpec = of_seat.of(
            replace(self.seat, block_size=spec.block_size),
            host_slots=engines.tokens,
            slot_bytes=engines.token_bytes,
            room_step=engines.room_step,
            room=room_of(engines.config, engines.shapes),
        )
        return made

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
