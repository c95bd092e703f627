"""Decode steps as vLLM's full graphs replay them: captured once, after that without the layers.

Without a GPU: the operations of a dummy batch's forward on their tensors are recorded, as a capture
would, and run again, as a replay would, on the emulator. Steps go through what vLLM's runners call:
the metadata builder, the connector, the layers.
"""

from __future__ import annotations

import copy
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from icecache import DeviceCache, OutOfPages, Phase, device, device_engine, lanes
from icecache.shape import CacheShape
from icecache.vllm import engine_args
from icecache.vllm.backend import IceCacheAttention, IceCacheMetadataBuilder
from icecache.vllm.connector import IceCacheConnector
from icecache.vllm.engines import Layer
from icecache.vllm.metadata import IceCacheMetadata, ScheduledRow, StepMetadata
from icecache.vllm.names import (
    AttentionCGSupport,
    CUDAGraphMode,
    FullAttentionSpec,
    KVConnectorRole,
    get_forward_context,
)
from icecache.vllm.plugin import KEY
from icecache.vllm.prefixes import Changes
from icecache.vllm.spec import IceCacheSpec
from icecache.vllm.worker import worker_for
from test_refusals import config
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.config import CompilationConfig
from vllm.forward_context import set_forward_context

sys.path.append(str(Path(__file__).resolve().parents[1] / "python"))
from device_engines import DIM, HEADS, KV_HEADS
from emulated import emulate_device, require_emulator

LAYERS, SEATS = 2, 3
NAMES = [f"layer.{number}" for number in range(LAYERS)]
REBUILD_AFTER = 6  # tokens
GRAPH_ROWS = 4  # one more than there are requests: padding


class WatchedCache(DeviceCache):
    """Notes its rebuilds, and fails where it is told to. Lanes of the cache are its sequences."""

    newest: WatchedCache

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.rebuilds: list[tuple[int, int]] = []  # layer and sequence of each
        self.no_rebuild: int | None = None  # a sequence that finds no pages
        self.no_index: tuple[int, int] | None = None  # a layer, and a sequence that it loses
        WatchedCache.newest = self

    def rebuild(self, layer: int, sequence: int) -> None:
        if sequence == self.no_rebuild:
            raise OutOfPages("no room")
        self.rebuilds.append((layer, sequence))
        super().rebuild(layer, sequence)

    def wait(self, layer: int) -> None:
        super().wait(layer)
        if self.no_index is not None and layer == self.no_index[0]:
            sequence, self.no_index = self.no_index[1], None
            self.release(sequence)
            raise OutOfPages("no room for an index")


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    require_emulator()
    emulate_device(monkeypatch)
    monkeypatch.setattr(
        lanes, "rebuild_is_due", lambda length, built: length >= built + REBUILD_AFTER
    )
    monkeypatch.setattr(device_engine, "DeviceCache", WatchedCache)


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = models.tiny_llama(tmp_path_factory.mktemp("llama"), HEADS, KV_HEADS, DIM)
    settings = engine_args(host_memory="8M", token_budget=64, window_tokens=16)
    return config(model, max_model_len=700, max_num_seqs=SEATS, **settings)


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
    """What vLLM makes for one model, driven as vLLM's runners drive it."""

    def __init__(self, vllm_config: Any) -> None:
        self.vllm_config = copy.copy(vllm_config)
        self.vllm_config.compilation_config = CompilationConfig()  # a server of its own
        self.worker = worker_for(self.vllm_config)
        stock = FullAttentionSpec(
            block_size=16, num_kv_heads=KV_HEADS, head_size=DIM, dtype=torch.float32
        )
        shape = CacheShape(1, HEADS, KV_HEADS, DIM, scale=DIM**-0.5)
        layers = [Layer(name, shape) for name in NAMES]
        for layer in layers:
            self.worker.add_layer(layer, stock)
        self.layers = [IceCacheAttention(self.worker, layer, "auto") for layer in layers]
        spec = self.worker.spec_of(stock)
        group = SimpleNamespace(kv_cache_spec=spec, layer_names=NAMES)
        self.builder = IceCacheMetadataBuilder(spec, NAMES, self.vllm_config, torch.device("cpu"))
        self.connector = IceCacheConnector(
            self.vllm_config, KVConnectorRole.WORKER, SimpleNamespace(kv_cache_groups=[group])
        )
        assert self.worker.store is not None
        self.store, self.cache = self.worker.store, WatchedCache.newest

    def build(self, starts: list[int], blocks: list[int]) -> IceCacheMetadata:
        """The metadata of a batch: `starts` are its rows' first tokens and the end."""
        common = SimpleNamespace(
            num_reqs=len(blocks),
            query_start_loc_cpu=torch.tensor(starts),
            block_table_tensor=torch.tensor(blocks).reshape(-1, 1),
        )
        return self.builder.build(0, common)

    def forward(self, metadata: IceCacheMetadata, tensors: list[list[torch.Tensor]]) -> None:
        for name, impl, given in zip(NAMES, self.layers, tensors, strict=True):
            query, key, value, output = given
            layer = SimpleNamespace(layer_name=name)
            impl.forward(layer, query, key, value, query, metadata, output)

    def capture(self, rows: int = GRAPH_ROWS) -> None:
        """A full graph of a dummy batch."""
        self.static = [inputs(rows) for _ in NAMES]
        metadata = self.build([*range(rows + 1)], [0] * rows)
        self.graph = Recorder()
        with self.graph:
            self.forward(metadata, self.static)

    def step(self, step: Step, replayed: bool = False) -> list[torch.Tensor]:
        """Outputs of all layers."""
        count = sum(row.count for row in step.rows)
        starts = [sum(row.count for row in step.rows[:n]) for n in range(len(step.rows) + 1)]
        metadata = self.build(starts, [row.block for row in step.rows])
        with set_forward_context(metadata, self.vllm_config):
            gone = {int(request[1:]) for request in step.gone}
            self.connector.bind_connector_metadata(StepMetadata(step.rows, Changes(gone)))
        tensors = self.static if replayed else [inputs(count) for _ in NAMES]
        for layer, given in zip(tensors, step.given, strict=True):
            for mine, theirs in zip(layer[:3], given, strict=True):
                mine[:count] = theirs
            layer[3].fill_(7)
        if replayed:
            self.graph.replay()
        else:
            self.forward(metadata, tensors)
        self.connector.clear_connector_metadata()
        assert all((layer[3][count:] == 0).all() for layer in tensors)
        return [layer[3][:count].clone() for layer in tensors]

    def lengths(self) -> list[list[int]]:
        return [
            [self.cache.length(layer, seat) for seat in range(SEATS)] for layer in range(LAYERS)
        ]


@dataclass
class Step:
    rows: list[ScheduledRow]
    gone: set[str]
    given: list[list[torch.Tensor]]  # queries, keys, values of each layer

    @property
    def decodes(self) -> bool:
        return all(row.phase == Phase.AUTO for row in self.rows)


def traffic(count: int, drafts: int = 0) -> list[Step]:
    """Requests come with prompts in one piece or two, decode, sit out and go. With `drafts` they
    decode up to so many tokens more, of which some are taken back."""
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
            kept = tokens
            if left <= 0 and drafts:
                tokens += generator.randint(0, drafts)
                kept = generator.randint(1, tokens)
            if left > 0:
                phase = Phase.PROMPT_END if tokens == left else Phase.PREFILL
            number_of = int(request[1:])
            rows.append(ScheduledRow(request, number_of, 1 + number_of, first, tokens, phase))
            position[request] += kept
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


def both_answer(plain: Server, graphed: Server, step: Step) -> None:
    """A step of forwards, and its replay where it is one, have the same answers."""
    one, other = plain.step(step), graphed.step(step, replayed=step.decodes)
    for mine, theirs in zip(one, other, strict=True):
        assert torch.equal(mine, theirs) and mine.isfinite().all()


def with_device_tokens(vllm_config: Any, tokens: int) -> Any:
    made = copy.copy(vllm_config)
    made.additional_config = copy.deepcopy(vllm_config.additional_config)
    made.additional_config[KEY]["device_tokens"] = tokens
    return made


def test_a_capture_is_nothing_but_work_for_the_device(vllm_config: Any) -> None:
    server = Server(vllm_config)
    server.capture()
    names = [func.name() for func, _, _ in server.graph.calls]
    assert names == ["aten::zero_", "icecache::device_step"] * LAYERS
    assert server.lengths() == [[0] * SEATS] * LAYERS


def test_replays_give_what_forwards_give(vllm_config: Any) -> None:
    plain, graphed = Server(vllm_config), Server(vllm_config)
    graphed.capture()
    replays = 0
    for step in traffic(40):
        replays += step.decodes
        both_answer(plain, graphed, step)
        assert plain.lengths() == graphed.lengths()
    assert replays > 20 and not plain.store.failed
    assert plain.cache.rebuilds == graphed.cache.rebuilds
    assert len(plain.cache.rebuilds) > 5 * LAYERS


def test_replays_go_on_when_residents_give_way(vllm_config: Any) -> None:
    holding = with_device_tokens(vllm_config, 512)  # two requests of three
    plain, graphed = Server(holding), Server(holding)
    graphed.capture()
    kinds = set()
    for number, step in enumerate(traffic(40)):
        if number % 5 == 4:
            for server in (plain, graphed):
                server.cache.evict(number % SEATS)
        both_answer(plain, graphed, step)
        held = plain.cache.memory()
        kinds.add((held.resident_sequences, held.sparse_sequences))
    # Both kinds in one batch, and each alone.
    assert {(1, 0), (0, 1), (1, 1), (2, 1), (1, 2)} <= kinds
    stats = [plain.cache.stats(0), graphed.cache.stats(0)]
    assert stats[0].dense_steps == stats[1].dense_steps > 0
    assert stats[0].steps == stats[1].steps > 0


def test_replays_with_drafts_give_what_forwards_give(vllm_config: Any) -> None:
    """One graph serves steps of any number of drafts, with residents and without."""
    drafting = with_device_tokens(vllm_config, 512)
    drafting.speculative_config = SimpleNamespace(method="ngram", num_speculative_tokens=3)
    plain, graphed = Server(drafting), Server(drafting)
    graphed.capture(4 * GRAPH_ROWS)
    numbers = set()
    for number, step in enumerate(traffic(30, drafts=3)):
        if number % 7 == 6:
            for server in (plain, graphed):
                server.cache.evict(number % SEATS)
        both_answer(plain, graphed, step)
        assert plain.lengths() == graphed.lengths()
        numbers |= {row.count for row in step.rows if row.phase == Phase.AUTO}
    assert numbers == {1, 2, 3, 4} and not plain.store.failed
    stats = [server.cache.stats(0) for server in (plain, graphed)]
    assert stats[0].dense_steps == stats[1].dense_steps > 0
    assert stats[0].steps == stats[1].steps > 0


def test_a_dummy_batch_between_steps_leaves_all_as_they_are(vllm_config: Any) -> None:
    server = Server(vllm_config)
    server.capture()
    for step in traffic(20):
        server.step(step, replayed=step.decodes)
        before = server.lengths()
        server.graph.replay()
        assert server.lengths() == before
        assert all((layer[3] == 0).all() for layer in server.static)


def prompts_of_three(vllm_config: Any, steps: int = 0) -> tuple[Server, list[ScheduledRow]]:
    """Three requests of 40 tokens and `steps` more, and their rows of the next step."""
    server = Server(vllm_config)
    server.capture()
    rows = [ScheduledRow(f"r{n}", n, n + 1, 0, 40, Phase.PROMPT_END) for n in range(SEATS)]
    server.step(Step(rows, set(), random_given(120)))
    for position in range(40, 40 + steps):
        server.step(Step(decoding(position), set(), random_given(SEATS)), replayed=True)
    return server, decoding(40 + steps)


def decoding(position: int) -> list[ScheduledRow]:
    return [ScheduledRow(f"r{n}", n, n + 1, position, 1, Phase.AUTO) for n in range(SEATS)]


def random_given(rows: int) -> list[list[torch.Tensor]]:
    return [[torch.randn_like(tensor) for tensor in inputs(rows)[:3]] for _ in NAMES]


def test_a_request_that_cannot_go_on_fails_alone_in_a_replay(vllm_config: Any) -> None:
    server, rows = prompts_of_three(vllm_config, REBUILD_AFTER)
    server.cache.no_rebuild = 1
    outputs = server.step(Step(rows, set(), random_given(SEATS)), replayed=True)
    assert server.store.failed == {1: "no room"}
    assert server.lengths() == [[40 + REBUILD_AFTER + 1, 0, 40 + REBUILD_AFTER + 1]] * LAYERS
    for output in outputs:
        assert (output[1] == 0).all() and (output[[0, 2]] != 0).any()


def test_indexes_that_could_not_be_built_fail_their_own_requests(vllm_config: Any) -> None:
    server, rows = prompts_of_three(vllm_config)
    server.cache.no_index = (1, 2)
    server.step(Step(rows, set(), random_given(SEATS)), replayed=True)
    assert server.store.failed == {2: "no room for an index"}
    assert server.lengths() == [[41, 41, 0]] * LAYERS


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize("drafts", [None, SimpleNamespace()])
def test_full_graphs_are_offered_where_every_step_in_them_decodes(
    monkeypatch: pytest.MonkeyPatch, kind: str, v2: bool, chunks: bool, drafts: Any
) -> None:
    monkeypatch.setattr(device, "KIND", "cuda")
    config: Any = SimpleNamespace(
        device_config=SimpleNamespace(device_type=kind),
        scheduler_config=SimpleNamespace(enable_chunked_prefill=chunks),
        use_v2_model_runner=v2,
        speculative_config=drafts,
    )
    expected = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    if drafts is not None:
        expected = AttentionCGSupport.UNIFORM_BATCH
    if kind == "cpu" or (v2 and chunks):
        expected = AttentionCGSupport.NEVER
    shape: dict[str, Any] = {"block_size": 16, "num_kv_heads": 2, "head_size": DIM}
    ours = IceCacheSpec(**shape, dtype=torch.float32)
    assert IceCacheMetadataBuilder.get_cudagraph_support(config, ours) == expected


def test_a_step_with_prompts_is_kept_out_of_full_graphs(vllm_config: Any) -> None:
    server = Server(vllm_config)
    prompt = StepMetadata([ScheduledRow("r0", 0, 1, 0, 1, Phase.PROMPT_END)])
    for mode, then in (
        (CUDAGraphMode.FULL, CUDAGraphMode.NONE),
        (CUDAGraphMode.PIECEWISE, CUDAGraphMode.PIECEWISE),
    ):
        metadata = server.build([0, 1], [1])
        with set_forward_context(metadata, server.vllm_config, cudagraph_runtime_mode=mode):
            server.connector.bind_connector_metadata(prompt)
            assert get_forward_context().cudagraph_runtime_mode == then
    with pytest.raises(RuntimeError, match="took a step with prompts for one of decodes"):
        server.connector.bind_connector_metadata(prompt)
