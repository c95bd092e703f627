"""Seats and metadata on vLLM's own classes, without an engine."""

from __future__ import annotations

import pytest
import torch
from icecache import Config, Phase
from icecache.shape import CacheShape
from icecache.vllm.backend import IceCacheMetadataBuilder
from icecache.vllm.host_memory import TREE, Room, room_of, slots_needed
from icecache.vllm.metadata import IceCacheMetadata, ScheduledRow, StepMetadata
from icecache.vllm.prefixes import AHEAD, Changes
from icecache.vllm.spec import IceCacheManager, IceCacheSpec
from icecache.vllm.worker import Worker
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.utils import AttentionGroup

BLOCK = 16


def spec(host_slots: int, room_step: int = 0, room: Room = TREE) -> IceCacheSpec:
    return IceCacheSpec(
        block_size=BLOCK,
        num_kv_heads=2,
        head_size=32,
        dtype=torch.float32,
        host_slots=host_slots,
        room_step=room_step,
        room=room,
    )


def manager(
    pool: BlockPool, host_slots: int, room_step: int = 0, room: Room = TREE
) -> IceCacheManager:
    return IceCacheManager(
        kv_cache_spec=spec(host_slots, room_step, room),
        block_pool=pool,
        enable_caching=False,
        kv_cache_group_id=0,
        scheduler_block_size=BLOCK,
    )


def needed(seats: IceCacheManager, request: str, tokens: int) -> int:
    return seats.get_num_blocks_to_allocate(request, tokens, [], 0, tokens)


def test_a_request_holds_one_block_for_life() -> None:
    pool = BlockPool(num_gpu_blocks=4, enable_caching=False, hash_block_size=BLOCK)
    seats = manager(pool, 10_000)
    free = pool.get_num_free_blocks()
    assert needed(seats, "a", 5000) == 1
    (block,) = seats.allocate_new_blocks("a", 5000)
    assert not block.is_null
    assert needed(seats, "a", 5001) == 0 and seats.allocate_new_blocks("a", 5001) == []
    assert pool.get_num_free_blocks() == free - 1
    seats.free("a")
    assert pool.get_num_free_blocks() == free and len(seats.prefixes.ledger) == 0


def test_seats_run_out() -> None:
    pool = BlockPool(num_gpu_blocks=3, enable_caching=False, hash_block_size=BLOCK)
    seats = manager(pool, 10_000)
    for request in ("a", "b"):
        assert needed(seats, request, 10) <= pool.get_num_free_blocks()
        seats.allocate_new_blocks(request, 10)
    assert needed(seats, "c", 10) > pool.get_num_free_blocks()


def test_host_memory_is_shared_by_all_and_never_denied_to_one_alone() -> None:
    pool = BlockPool(num_gpu_blocks=9, enable_caching=False, hash_block_size=BLOCK)
    seats = manager(pool, slots_needed(1000) + slots_needed(100))
    assert needed(seats, "a", 1000) == 1
    seats.allocate_new_blocks("a", 10)  # its first chunk; admitted for the whole prompt
    assert needed(seats, "b", 101) > pool.get_num_free_blocks()
    assert needed(seats, "b", 100) == 1
    seats.allocate_new_blocks("b", 100)
    assert needed(seats, "b", 101) > pool.get_num_free_blocks()  # b must wait for a, or a go
    seats.free("a")
    assert needed(seats, "b", 101) == 0
    assert needed(seats, "b", 1_000_000) == 0  # alone: that one longest request fits is checked


@pytest.mark.parametrize("room_step", [0, 64])
def test_a_step_costs_each_request_alike_whatever_the_others(
    monkeypatch: pytest.MonkeyPatch, room_step: int
) -> None:
    """By how often slots of a request are counted; the sum is that of all of them at any time."""
    counted = 0
    slots_of = IceCacheSpec.slots_of

    def counting(self: IceCacheSpec, tokens: int) -> int:
        nonlocal counted
        counted += 1
        return slots_of(self, tokens)

    steps = 2 * AHEAD
    costs = []
    for running in (256, 1024):
        pool = BlockPool(num_gpu_blocks=running + 1, enable_caching=False, hash_block_size=BLOCK)
        monkeypatch.setattr(IceCacheSpec, "slots_of", counting)
        seats = manager(pool, 10_000_000, room_step)
        for request in range(running):
            assert needed(seats, str(request), request + 1) == 1
            assert len(seats.allocate_new_blocks(str(request), request + 1)) == 1
        counted = 0
        for step in range(1, steps + 1):
            for request in range(running):
                assert needed(seats, str(request), request + 1 + step) == 0
                assert seats.allocate_new_blocks(str(request), request + 1 + step) == []
        costs.append(counted / running / steps)
        monkeypatch.setattr(IceCacheSpec, "slots_of", slots_of)
        # Each has asked for memory in its first step, and again when it had used what it got.
        held = [request + 1 + 2 * (1 + AHEAD) for request in range(running)]
        expected = [seats.kv_cache_spec.slots_of(tokens) for tokens in held]
        assert seats.prefixes.ledger.used == sum(expected)
        for request in range(0, running, 2):
            seats.free(str(request))
        assert seats.prefixes.ledger.used == sum(expected[1::2])
        for request in range(1, running, 2):
            seats.free(str(request))
        assert seats.prefixes.ledger.used == 0
    assert 0 < costs[0] == costs[1] < 0.2


def test_room_ahead_is_given_where_there_is_some_and_taken_from_nobody() -> None:
    pool = BlockPool(num_gpu_blocks=9, enable_caching=False, hash_block_size=BLOCK)
    seats = manager(pool, slots_needed(100) + slots_needed(101 + AHEAD))
    for request in ("a", "b"):
        assert needed(seats, request, 100) == 1
        seats.allocate_new_blocks(request, 100)
    assert needed(seats, "a", 101) == 0
    seats.allocate_new_blocks("a", 101)
    assert seats.prefixes.ledger.used == slots_needed(100) + slots_needed(101 + AHEAD)
    assert needed(seats, "b", 101) > pool.get_num_free_blocks()
    seats.free("a")
    seats = manager(pool, 2 * slots_needed(101))
    for tokens in (100, 101):
        for request in ("a", "b"):
            assert needed(seats, request, tokens) == int(tokens == 100)
            seats.allocate_new_blocks(request, tokens)
    assert seats.prefixes.ledger.used == 2 * slots_needed(101), "no room ahead"


def test_an_index_that_opens_more_pages_takes_more_room() -> None:
    assert slots_needed(1000) == slots_needed(1000, room=room_of(Config())) == 1314
    paper = room_of(Config(index="dci", page_size=32))
    assert 2.9 < paper.share < 3.0 and paper.ends == 128
    pool = BlockPool(num_gpu_blocks=9, enable_caching=False, hash_block_size=BLOCK)
    seats = manager(pool, slots_needed(1000, room=paper) + slots_needed(100), room=paper)
    seats.allocate_new_blocks("a", 1000)
    assert needed(seats, "b", 100) > pool.get_num_free_blocks()


def test_eight_bits_take_half_the_room_of_long_requests() -> None:
    shape = CacheShape(32, 32, 8, 128, torch.bfloat16)
    assert shape.stored_bytes("auto") == shape.token_bytes == 128 * 1024
    assert shape.stored_bytes("int8") == 66 * 1024
    given = {"dense_tokens": 1536, "segment_tokens": 512, "window_tokens": 32}
    assert room_of(Config(**given), [shape]) == room_of(Config(**given))
    room = room_of(Config(kv_dtype="int8", **given), [shape])
    # Up to dense_tokens a request is as the model makes it.
    short, long = (slots_needed(tokens, room=room) * 66 for tokens in (1536, 32768))
    assert slots_needed(1536) * 128 > short > 0.85 * slots_needed(1536) * 128
    assert long < 0.55 * slots_needed(32768) * 128


def worker() -> Worker:
    made = Worker.__new__(Worker)
    made.step, made.metadata = StepMetadata(), IceCacheMetadata([0], [])
    made.seat_layer = "layer.0"
    return made


def builder(worker: Worker) -> IceCacheMetadataBuilder:
    made = IceCacheMetadataBuilder.__new__(IceCacheMetadataBuilder)
    made.worker, made.layer_names = worker, ["layer.0", "layer.1"]
    return made


def batch_of_three() -> dict[str, object]:
    """Two decoding rows and a chunk of 5, as a runner has them in its padded buffers."""
    starts = torch.tensor([0, 1, 2, 7], dtype=torch.int32)
    table = torch.zeros(4, 8, dtype=torch.int32)
    table[:3, 0] = torch.tensor([5, 2, 7])
    return {
        "query_start_loc_cpu": starts,
        "seq_lens": torch.tensor([30, 900, 5], dtype=torch.int32),
        "num_reqs": 3,
        "max_query_len": 5,
        "max_seq_len": 900,
        "slot_mapping": torch.zeros(7, dtype=torch.int64),
        "table": table,
    }


def test_metadata_as_the_v1_runner_builds_it() -> None:
    made, batch = worker(), batch_of_three()
    table, starts = batch.pop("table"), batch["query_start_loc_cpu"]
    common = CommonAttentionMetadata(
        **batch,  # type: ignore[arg-type]
        query_start_loc=starts,
        num_actual_tokens=7,
        block_table_tensor=table,
    )
    metadata = builder(made).build(0, common)
    assert made.metadata is metadata == IceCacheMetadata([0, 1, 2, 7], [5, 2, 7])


def test_metadata_as_the_v2_runner_builds_it() -> None:
    made, batch = worker(), batch_of_three()
    group = AttentionGroup(
        backend=object,  # type: ignore[arg-type]
        layer_names=["layer.0", "layer.1"],
        kv_cache_spec=spec(100),
        kv_cache_group_id=0,
        metadata_builders=[builder(made)],
    )

    class Groups:
        kv_cache_groups = (group,)

    metadata = build_attn_metadata(
        attn_groups=[[group]],
        num_reqs=3,
        num_tokens=7,
        query_start_loc_gpu=batch["query_start_loc_cpu"],
        query_start_loc_cpu=batch["query_start_loc_cpu"],
        max_query_len=5,
        seq_lens=batch["seq_lens"],
        max_seq_len=900,
        block_tables=[batch["table"]],
        slot_mappings=[batch["slot_mapping"]],
        kv_cache_config=Groups,
    )
    assert metadata["layer.0"] is metadata["layer.1"]
    assert made.metadata is metadata["layer.0"] == IceCacheMetadata([0, 1, 2, 7], [5, 2, 7])


class SomeStore:
    """Has no requests."""

    def change(self, changes: Changes) -> None:
        assert changes.gone == {7}


def test_a_batch_that_is_not_the_schedulers_is_an_error() -> None:
    made = worker()
    made.store = SomeStore()  # type: ignore[assignment]
    row = ScheduledRow("a", 1, block=3, position=0, count=4, phase=Phase.PREFILL)
    other = ScheduledRow("b", 2, block=4, position=9, count=1, phase=Phase.AUTO)
    for starts, blocks in (([0, 4], [2]), ([0, 5], [3])):
        made.metadata = IceCacheMetadata(starts, blocks)
        with pytest.raises(RuntimeError, match="not what the scheduler announced"):
            made.begin(StepMetadata([row], Changes({7})))
    made.metadata = IceCacheMetadata([0, 4], [3])
    with pytest.raises(RuntimeError, match=r"rows that are not in the batch.*'b'"):
        made.begin(StepMetadata([row, other], Changes({7})))
