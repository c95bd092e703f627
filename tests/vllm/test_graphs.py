"""Decode steps as vLLM's full graphs replay them: captured once, after that without the layers.

Without a GPU: the operations of a dummy batch's forward on their tensors are recorded, as a capture
would, and run again, as a replay would, on the emulator.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from icecache import OutOfPages, Phase, device, lanes
from icecache.vllm import connector
from icecache.vllm.backend import IceCacheAttention, IceCacheMetadataBuilder
from icecache.vllm.metadata import IceCacheMetadata, ScheduledRow, StepMetadata
from icecache.vllm.names import (
    AttentionCGSupport,
    CUDAGraphMode,
)
from icecache.vllm.spec import IceCacheSpec
from icecache.vllm.store import Batch, Store
from icecache.vllm.worker import Worker
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.forward_context import get_forward_context, set_forward_context

sys.path.append(str(Path(__file__).resolve().parents[1] / "python"))
from device_engines import DIM, HEADS, KV_HEADS, make_engine
from emulated import emulate_device, require_emulator

LAYERS, SEATS = 2, 3
NAMES = [f"layer.{number}" for number in range(LAYERS)]
GRAPH_ROWS = 4  # one more than there are requests: padding


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    require_emulator()
    emulate_device(monkeypatch)
    monkeypatch.setattr(lanes, "rebuild_is_due", lambda length, built: length >= built + 6)


class Recorder(TorchDispatchMode):
    """Keeps what writes to tensors, with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not func.is_view:
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def replay(self) -> None:
        for func, args, kwargs in self.calls:
            func(*args, **kwargs)


def inputs(rows: int) -> list[torch.Tensor]:
    return [torch.zeros(rows, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]


class Server:
    """A worker and its layers, driven as vLLM's runners drive them."""

    def __init__(self) -> None:
        engine = make_engine(LAYERS, SEATS, "8M")
        self.store, self.lanes = Store(engine), engine._batches[0]
        self.store.name_layers(NAMES)
        self.worker = Worker.__new__(Worker)
        self.worker.store = self.store
        self.worker.metadata, self.worker.batch = IceCacheMetadata([0], []), Batch()
        self.layer = IceCacheAttention.__new__(IceCacheAttention)
        self.layer.worker = self.worker

    def forward(self, tensors: list[list[torch.Tensor]]) -> None:
        for name, (query, key, value, output) in zip(NAMES, tensors, strict=True):
            layer = SimpleNamespace(layer_name=name)
            self.layer.forward(layer, query, key, value, query, self.worker.metadata, output)

    def capture(self) -> None:
        """A full graph of a dummy batch."""
        self.static = [inputs(GRAPH_ROWS) for _ in NAMES]
        self.worker.metadata = IceCacheMetadata([*range(GRAPH_ROWS + 1)], [0] * GRAPH_ROWS)
        self.graph = Recorder()
        with self.graph:
            self.forward(self.static)

    def step(self, step: Step, replayed: bool = False) -> list[torch.Tensor]:
        """Outputs of all layers."""
        count = sum(row.count for row in step.rows)
        starts = [sum(row.count for row in step.rows[:n]) for n in range(len(step.rows) + 1)]
        self.worker.metadata = IceCacheMetadata(starts, [row.block for row in step.rows])
        self.worker.begin(StepMetadata(step.rows, step.gone))
        tensors = self.static if replayed else [inputs(count) for _ in NAMES]
        for layer, given in zip(tensors, step.given, strict=True):
            for mine, theirs in zip(layer[:3], given, strict=True):
                mine[:count] = theirs
            layer[3].fill_(7)
        if replayed:
            self.graph.replay()
        else:
            self.forward(tensors)
        self.worker.end()
        assert all((layer[3][count:] == 0).all() for layer in tensors)
        return [layer[3][:count].clone() for layer in tensors]

    def lengths(self) -> list[list[int]]:
        cache = self.lanes.cache
        return [[cache.length(layer, seat) for seat in range(SEATS)] for layer in range(LAYERS)]


@dataclass
class Step:
    rows: list[ScheduledRow]
    gone: set[str]
    given: list[list[torch.Tensor]]  # queries, keys, values of each layer

    @property
    def decodes(self) -> bool:
        return all(row.phase == Phase.AUTO for row in self.rows)


def traffic(count: int) -> list[Step]:
    """Requests come with prompts in one piece or two, decode, sit out and go."""
    generator, made = random.Random(3), torch.Generator().manual_seed(3)
    position: dict[str, int] = {}
    prompt: dict[str, int] = {}
    steps, number = [], 0
    for _ in range(count):
        gone: set[str] = set()
        if position and generator.random() < 0.1:
            gone = {generator.choice(sorted(position))}
        for request in gone:
            del position[request]
        while len(position) < SEATS and generator.random() < 0.3:
            number += 1
            position[f"r{number}"], prompt[f"r{number}"] = 0, generator.choice([1, 30, 90, 150])
        rows = []
        for request in generator.sample(sorted(position), len(position)):
            first, left = position[request], prompt[request] - position[request]
            if left <= 0 and generator.random() < 0.25:
                continue
            tokens = max(1, left if generator.random() < 0.7 else left // 2)
            phase = Phase.AUTO
            if left > 0:
                phase = Phase.PROMPT_END if tokens == left else Phase.PREFILL
            rows.append(ScheduledRow(request, 1 + int(request[1:]), first, tokens, phase))
            position[request] += tokens
        total = sum(row.count for row in rows)
        given = [
            [
                torch.randn(total, heads, DIM, generator=made)
                for heads in (HEADS, KV_HEADS, KV_HEADS)
            ]
            for _ in NAMES
        ]
        steps.append(Step(rows, gone, given))
    return steps


def counted(server: Server) -> list[tuple[int, int]]:
    """The rebuilds of a server's cache from here on."""
    seen: list[tuple[int, int]] = []
    cache: Any = server.lanes.cache
    rebuild: Callable[[int, int], None] = cache.rebuild

    def record(layer: int, sequence: int) -> None:
        seen.append((layer, sequence))
        rebuild(layer, sequence)

    cache.rebuild = record
    return seen


def test_a_capture_is_nothing_but_work_for_the_device() -> None:
    server = Server()
    server.capture()
    names = [func.name() for func, _, _ in server.graph.calls]
    assert names == ["aten::zero_", "icecache::device_step"] * LAYERS
    assert server.lengths() == [[0] * SEATS] * LAYERS


def test_replays_give_what_forwards_give() -> None:
    plain, graphed = Server(), Server()
    graphed.capture()
    rebuilds = counted(plain), counted(graphed)
    replays = 0
    for step in traffic(40):
        replays += step.decodes
        one, other = plain.step(step), graphed.step(step, replayed=step.decodes)
        for mine, theirs in zip(one, other, strict=True):
            assert torch.equal(mine, theirs) and mine.isfinite().all()
        assert plain.lengths() == graphed.lengths()
    assert replays > 20 and not plain.store.failed
    assert rebuilds[0] == rebuilds[1] and len(rebuilds[0]) > 5 * LAYERS


def test_a_dummy_batch_between_steps_leaves_all_as_they_are() -> None:
    server = Server()
    server.capture()
    for step in traffic(20):
        server.step(step, replayed=step.decodes)
        before = server.lengths()
        server.graph.replay()
        assert server.lengths() == before
        assert all((layer[3] == 0).all() for layer in server.static)


def prompts_of_three() -> tuple[Server, list[ScheduledRow]]:
    """Three requests behind their prompts, and their rows of the next step."""
    server = Server()
    server.capture()
    rows = [ScheduledRow(f"r{n}", n + 1, 0, 40, Phase.PROMPT_END) for n in range(SEATS)]
    server.step(Step(rows, set(), random_given(120)))
    return server, [ScheduledRow(f"r{n}", n + 1, 40, 1, Phase.AUTO) for n in range(SEATS)]


def random_given(rows: int) -> list[list[torch.Tensor]]:
    return [[torch.randn_like(tensor) for tensor in inputs(rows)[:3]] for _ in NAMES]


def test_a_request_that_cannot_go_on_fails_alone_in_a_replay() -> None:
    server, rows = prompts_of_three()
    server.lanes.built = [[34] * SEATS for _ in NAMES]  # rebuilds are due
    cache: Any = server.lanes.cache

    def rebuild(layer: int, sequence: int) -> None:
        if sequence == 1:
            raise OutOfPages("no room")

    cache.rebuild = rebuild
    outputs = server.step(Step(rows, set(), random_given(SEATS)), replayed=True)
    assert server.store.failed == {"r1": "no room"}
    assert server.lengths() == [[41, 0, 41]] * LAYERS
    for output in outputs:
        assert (output[1] == 0).all() and (output[[0, 2]] != 0).any()


def test_indexes_that_could_not_be_built_fail_their_own_requests() -> None:
    server, rows = prompts_of_three()
    cache: Any = server.lanes.cache
    wait = cache.wait

    def lost(layer: int) -> None:
        wait(layer)
        if layer == 1:
            cache.wait = wait
            cache.release(2)
            raise OutOfPages("no room for an index")

    cache.wait = lost
    server.step(Step(rows, set(), random_given(SEATS)), replayed=True)
    assert server.store.failed == {"r2": "no room for an index"}
    assert server.lengths() == [[41, 41, 0]] * LAYERS


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("chunks", [False, True])
def test_full_graphs_are_offered_where_every_step_in_them_decodes(
    monkeypatch: pytest.MonkeyPatch, kind: str, v2: bool, chunks: bool
) -> None:
    monkeypatch.setattr(device, "KIND", "cuda")
    config: Any = SimpleNamespace(
        device_config=SimpleNamespace(device_type=kind),
        scheduler_config=SimpleNamespace(enable_chunked_prefill=chunks),
        use_v2_model_runner=v2,
    )
    expected = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    if kind == "cpu" or (v2 and chunks):
        expected = AttentionCGSupport.NEVER
    shape: dict[str, Any] = {"block_size": 16, "num_kv_heads": 2, "head_size": DIM}
    ours = IceCacheSpec(**shape, dtype=torch.float32)
    assert IceCacheMetadataBuilder.get_cudagraph_support(config, ours) == expected


def test_a_step_with_prompts_is_kept_out_of_full_graphs() -> None:
    with pytest.raises(RuntimeError, match="took a step with prompts for one of decodes"):
        connector._keep_out_of_full_graphs()
    for mode, then in (
        (CUDAGraphMode.FULL, CUDAGraphMode.NONE),
        (CUDAGraphMode.PIECEWISE, CUDAGraphMode.PIECEWISE),
    ):
        config: Any = SimpleNamespace(
            parallel_config=SimpleNamespace(
                data_parallel_size=1, is_moe_model=False, use_sequence_parallel_moe=False
            ),
            compilation_config=SimpleNamespace(
                static_forward_context={}, static_all_moe_layers=[], fast_moe_cold_start=False
            ),
        )
        with set_forward_context(None, config, cudagraph_runtime_mode=mode):
            connector._keep_out_of_full_graphs()
            assert get_forward_context().cudagraph_runtime_mode == then
