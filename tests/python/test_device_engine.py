"""DeviceEngine: the verbs of Engine on a GPU or the emulator of one.

tests/python/test_device_hf.py has those that a transformers model calls.
"""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from device_engines import DIM, KV_HEADS, make_engine, random_rows
from icecache import Engine, Error, InvalidArgument, OutOfPages, Phase
from icecache.device_engine import DeviceEngine
from icecache.reference import dense_attention


@pytest.fixture
def engine(any_device: torch.device) -> DeviceEngine:
    return make_engine()


def step(engine: DeviceEngine, counts: dict[int, int], *phases: Phase) -> torch.Tensor:
    """Of one layer; decode steps where no phases are given."""
    phases = phases or (Phase.AUTO,) * len(counts)
    total = sum(counts.values())
    queries, keys, values, outputs = random_rows(total)
    firsts = [sum(list(counts.values())[:i]) for i in range(len(counts))]
    for (seq, count), phase in zip(counts.items(), phases, strict=True):
        engine.prepare(seq, count, phase)
    rows = list(counts.values())
    engine.begin(list(counts), firsts, rows, phases)
    engine.step_packed(list(counts), 0, queries, keys, values, outputs, firsts, rows, phases)
    return outputs


def test_verbs_take_the_arguments_of_the_engine_on_the_cpu() -> None:
    names = "new_sequence fork truncate release length append attend step step_packed observe"
    for name in [*names.split(), "stats", "memory", "pool_bytes"]:
        ours, theirs = (
            inspect.signature(getattr(of, name)).parameters for of in (DeviceEngine, Engine)
        )
        assert list(ours)[: len(theirs)] == list(theirs), name


def test_lanes_run_out_and_come_back(engine: DeviceEngine) -> None:
    first, second = engine.new_sequence(), engine.new_sequence()
    with pytest.raises(InvalidArgument, match="lanes: all 2 lanes"):
        engine.new_sequence()
    engine.release(first)
    assert engine.new_sequence() not in (first, second)
    with pytest.raises(InvalidArgument, match="live sequences, got 0"):
        engine.length(first)


@pytest.mark.parametrize(
    ("host_memory", "missing"),
    [("1200K", "host_memory"), ("1M", "device memory: room for 1024 more tokens is wanted")],
)
@pytest.mark.usefixtures("any_device")
def test_a_prompt_that_finds_no_room_leaves_the_others(host_memory: str, missing: str) -> None:
    engine = make_engine(host_memory=host_memory)
    first, second = engine.new_sequence(), engine.new_sequence()
    step(engine, {first: 300}, Phase.PROMPT_END)
    with pytest.raises(Error, match=missing):
        step(engine, {first: 1, second: 500}, Phase.AUTO, Phase.PROMPT_END)
    assert engine.length(first) == 300
    assert step(engine, {first: 1}).isfinite().all()
    assert engine.length(first) == 301


@pytest.mark.usefixtures("any_device")
def test_batches_share_what_the_device_holds_whole() -> None:
    engine = make_engine(lanes=None, device_tokens=1024)
    for count in (1, 2, 2):  # resident sequences; a batch takes up to 768 tokens
        seq = engine.new_sequence()
        queries, keys, values, _ = (x.transpose(0, 1)[None] for x in random_rows(40))
        engine.append([seq], 0, keys, values)
        engine.observe([seq], 0, queries)
        assert engine.memory().resident_sequences == count
        query, key, value, _ = (x[None].transpose(1, 2) for x in random_rows(1))
        assert engine.step([seq], 0, query, key, value).isfinite().all()
    assert engine.memory().resident_bytes == 1024 * engine.shape.token_bytes


def test_more_tokens_than_a_step_takes_are_refused(engine: DeviceEngine) -> None:
    first = engine.new_sequence()
    step(engine, {first: 20}, Phase.PREFILL)
    step(engine, {first: 10}, Phase.PROMPT_END)
    with pytest.raises(InvalidArgument, match=r"up to 16 tokens .*got 17 tokens behind 30"):
        step(engine, {first: 17})
    assert engine.length(first) == 30


@pytest.mark.parametrize("device_tokens", [0, 512])
@pytest.mark.usefixtures("any_device")
def test_drafts_are_taken_in_one_step_and_taken_back(device_tokens: int) -> None:
    drafting, plain = (make_engine(host_memory="4M", device_tokens=device_tokens) for _ in range(2))
    for engine in (drafting, plain):
        torch.manual_seed(1)
        seqs = [engine.new_sequence() for _ in range(2)]
        step(engine, {seqs[0]: 250, seqs[1]: 30}, Phase.PROMPT_END, Phase.PROMPT_END)
    for counts, kept in (((4, 1), (2, 1)), ((1, 16), (1, 9)), ((7, 3), (7, 1))):
        queries, keys, values, outputs = random_rows(sum(counts))
        firsts = [0, counts[0]]
        for seq, count in zip(seqs, counts, strict=True):
            drafting.prepare(seq, count, Phase.AUTO)
        phases = [Phase.AUTO] * 2
        drafting.begin(seqs, firsts, counts, phases)
        drafting.step_packed(seqs, 0, queries, keys, values, outputs, firsts, counts, phases)
        for seq, first, count, stays in zip(seqs, firsts, counts, kept, strict=True):
            lanes, lane = plain._place(seq)
            lanes.cache.reserve(lane, plain.length(seq) + count)  # gives way as early
            for row in range(first, first + count):
                q, k, v = (x[row : row + 1] for x in (queries, keys, values))
                out = torch.empty_like(q)
                plain.prepare(seq, 1, Phase.AUTO)
                plain.step_packed([seq], 0, q, k, v, out, [0], [1], [Phase.AUTO])
                assert torch.equal(out[0], outputs[row]), f"row {row} of {counts}"
            for engine in (drafting, plain):
                engine.truncate(seq, engine.length(seq) - count + stays)
    stats = [engine.stats(0, 0) for engine in (drafting, plain)]
    assert stats[0].steps == stats[1].steps and stats[0].dense_steps == stats[1].dense_steps
    assert (stats[0].steps > 0, stats[0].dense_steps > 0) == (True, device_tokens > 0)


@pytest.mark.parametrize("device_tokens", [0, 1024])
@pytest.mark.usefixtures("any_device")
def test_the_suffix_of_a_fork_attends_to_everything(device_tokens: int) -> None:
    """In chunks, over pages that both hold, and leaves the one that it is forked from."""
    engine = make_engine(host_memory="4M", device_tokens=device_tokens)
    first, total = engine.new_sequence(), 300
    queries, keys, values, outputs = random_rows(total)
    q, k, v = (x.transpose(0, 1) for x in (queries, keys, values))
    expected = dense_attention(q, k, v, DIM**-0.5)[0].transpose(0, 1)

    def take(seq: int, begin: int, end: int, phase: Phase) -> None:
        engine.prepare(seq, end - begin, phase)
        place = [begin], [end - begin], [phase]
        engine.step_packed([seq], 0, queries, keys, values, outputs, *place)

    take(first, 0, 210, Phase.PROMPT_END)
    second = engine.fork(first)
    step(engine, {first: 15})
    used = engine.pool_bytes()
    outputs.zero_()
    take(second, 210, 250, Phase.PREFILL)
    take(second, 250, 300, Phase.PROMPT_END)
    torch.testing.assert_close(outputs[210:], expected[210:], rtol=1e-4, atol=1e-4)
    assert engine.length(second) == 300 and engine.pool_bytes() == used
    assert engine.length(first) == 225
    lanes, lane = engine._place(second)
    held_keys, held_values = lanes.cache.gather(0, lane)
    assert torch.equal(held_keys, k) and torch.equal(held_values, v)
    assert step(engine, {first: 1, second: 3}).isfinite().all()


@pytest.mark.usefixtures("any_device")
def test_what_is_verified_attends_to_everything() -> None:
    engine = make_engine(host_memory="4M")
    seqs = [engine.new_sequence() for _ in range(2)]
    queries, keys, values, _ = (x.transpose(0, 1) for x in random_rows(200))
    for seq in seqs:
        engine.append([seq], 0, keys[None, :, :190], values[None, :, :190])
        engine.observe([seq], 0, queries[None, :, :190])
    q, k, v = (x[:, 190:].expand(2, -1, -1, -1) for x in (queries, keys, values))
    attend, calls = engine._attend_prompt, 0

    def fails_at_the_second(*tensors: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OutOfPages("no room")
        attend(*tensors)

    engine._attend_prompt = fails_at_the_second
    with pytest.raises(OutOfPages):
        engine.step(seqs, 0, q, k, v, Phase.VERIFY)
    assert [engine.length(seq) for seq in seqs] == [190, 190]  # none is taken
    found = engine.step(seqs, 0, q, k, v, Phase.VERIFY)
    expected = dense_attention(queries, keys, values, DIM**-0.5)[0][:, 190:]
    torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-4, atol=1e-4)
    assert [engine.length(seq) for seq in seqs] == [200, 200]


def test_what_only_the_cpu_computes_is_refused(engine: DeviceEngine) -> None:
    seq = engine.new_sequence()
    queries, keys, values, outputs = random_rows(9)
    engine.prepare(seq, 9, Phase.PROMPT_END)
    end = [0], [9], [Phase.PROMPT_END]
    with pytest.raises(InvalidArgument, match=r"lse: expected None, .* run the model on the CPU"):
        engine.step_packed([seq], 0, queries, keys, values, outputs, *end, queries[..., 0])
    with pytest.raises(InvalidArgument, match=r"keys, values: .* run the model on the CPU"):
        engine.step_packed([seq], 0, queries, None, None, outputs, *end)
    with pytest.raises(InvalidArgument, match=r"phase: .* whole prompts, got PREFILL"):
        engine.observe([seq], 0, queries[None], Phase.PREFILL)
    engine.step_packed([seq], 0, queries, keys, values, outputs, *end)
    assert step(engine, {seq: 1}).isfinite().all()


def test_tokens_are_taken_back(engine: DeviceEngine) -> None:
    first = engine.new_sequence()
    step(engine, {first: 300}, Phase.PROMPT_END)
    step(engine, {first: 1})
    for length in (300, 280):  # what came after the prompt, and some of that
        engine.truncate(first, length)
        assert step(engine, {first: 1}).isfinite().all()
        assert engine.length(first) == length + 1
    engine.truncate(first, 0)
    assert step(engine, {first: 400}, Phase.PROMPT_END).isfinite().all()
    assert step(engine, {first: 1}).isfinite().all()
    assert engine.length(first) == 401


@pytest.mark.usefixtures("any_device")
def test_a_fork_takes_a_free_lane_or_the_next_one() -> None:
    engine = make_engine(lanes=3, host_memory="16M")
    first, other = engine.new_sequence(), engine.new_sequence()
    step(engine, {first: 300, other: 40}, Phase.PROMPT_END, Phase.PROMPT_END)
    twin = engine.fork(first)
    torch.manual_seed(0)
    expected = step(engine, {first: 1})
    torch.manual_seed(0)
    assert torch.equal(step(engine, {twin: 1}), expected)
    late = engine.fork(twin, 295)
    with pytest.raises(InvalidArgument, match="a batch keeps its number of sequences"):
        step(engine, {late: 1})
    engine.truncate(late, 290)
    engine.release(other)
    assert [engine.length(seq) for seq in (first, twin, late)] == [301, 301, 290]
    assert step(engine, {late: 1, first: 1}).isfinite().all()


def test_a_prompt_in_chunks_is_attended_as_a_whole(engine: DeviceEngine) -> None:
    seq, first, total = engine.new_sequence(), 0, 100
    queries, keys, values, outputs = random_rows(total)
    chunks = ((60, Phase.PREFILL), (39, Phase.PREFILL), (55, Phase.PREFILL), (1, Phase.PROMPT_END))
    for count, phase in chunks:
        if count == 55:  # in place of all but the first 44
            first = 44
            engine.truncate(seq, first)
        engine.prepare(seq, count, phase)
        engine.step_packed([seq], 0, queries, keys, values, outputs, [first], [count], [phase])
        first += count
    q, k, v = (x.transpose(0, 1) for x in (queries, keys, values))
    expected = dense_attention(q, k, v, DIM**-0.5)[0].transpose(0, 1)
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-4)
    assert engine.length(seq) == total


def test_statistics_are_those_of_the_engine_on_the_cpu(engine: DeviceEngine) -> None:
    seq = engine.new_sequence()
    step(engine, {seq: 300}, Phase.PROMPT_END)
    step(engine, {seq: 1})
    first, second = (engine.stats(0, head) for head in range(KV_HEADS))
    assert first.steps == second.steps == 1
    assert first.hits + first.misses > 0 and first.bytes_moved > 0
    assert math.isnan(first.mass) and math.isnan(first.worst_mass)
    both = first + second
    assert (both.steps, both.hits) == (2, first.hits + second.hits)
    assert both.bytes_moved == first.bytes_moved + second.bytes_moved
    engine.release(seq)
    assert engine.stats(0, 0).misses == first.misses
