"""icecache.Engine over torch tensors, against the plain torch oracle."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest
import torch
from icecache import Engine, HeadStats, InvalidArgument, MemoryStats, OutOfPages, Phase, _core, ops
from icecache.reference import ReferenceEngine

LAYERS, Q_HEADS, KV_HEADS, DIM = 2, 6, 2, 32
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def shape(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {
        "num_layers": LAYERS,
        "num_q_heads": Q_HEADS,
        "num_kv_heads": KV_HEADS,
        "head_dim": DIM,
        "dtype": dtype,
    }


def tokens(count: int, heads: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[1, heads, count, D]"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, heads, count, DIM, generator=generator).to(dtype)


def feed(engine: Any, sequences: list[int], count: int, seed: int, dtype: torch.dtype) -> None:
    for layer in range(LAYERS):
        keys = tokens(count, KV_HEADS, seed + layer, dtype).expand(len(sequences), -1, -1, -1)
        values = tokens(count, KV_HEADS, seed + 50 + layer, dtype).expand_as(keys)
        engine.append(sequences, layer, keys, values)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_agrees_with_the_reference_within_the_budget_and_in_exact_mode(dtype: torch.dtype) -> None:
    reference = ReferenceEngine(**shape(dtype))
    engines = [
        Engine(**shape(dtype), token_budget=512),
        Engine(**shape(dtype), token_budget=64, exact=True),
    ]
    everyone: list[Any] = [reference, *engines]
    for engine in everyone:
        for _ in range(2):
            engine.new_sequence()
        feed(engine, [0, 1], 200, 1, dtype)
        feed(engine, [1], 3, 2, dtype)
    prompts = [tokens(200, Q_HEADS, 7, dtype)[0], tokens(3, Q_HEADS, 8, dtype)[0]]
    decoded = [tokens(1, Q_HEADS, seed, dtype)[0] for seed in (9, 10)]
    for layer, queries in itertools.product(range(LAYERS), (prompts, decoded)):
        expected = reference.attend([0, 1], layer, queries)
        for engine in everyone[1:]:
            for got, want in zip(engine.attend([0, 1], layer, queries), expected, strict=True):
                assert got.dtype == dtype
                torch.testing.assert_close(
                    got.float(), want.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
                )


def test_a_batch_tensor_and_a_list_give_the_same() -> None:
    engine = Engine(**shape(), token_budget=64)
    pair = [engine.new_sequence(), engine.new_sequence()]
    feed(engine, pair, 300, 1, torch.float32)
    queries = tokens(1, Q_HEADS, 3).repeat(2, 1, 1, 1)
    engine.attend(pair, 0, queries)  # starts the indexes
    whole = engine.attend(pair, 0, queries)
    assert whole.shape == (2, Q_HEADS, 1, DIM)
    parts = engine.attend(pair, 0, list(queries))
    assert torch.equal(torch.stack(parts), whole)
    assert torch.equal(whole[0], whole[1])


def test_tensors_may_be_views_of_any_stride() -> None:
    engine, twin = Engine(**shape()), Engine(**shape())
    keys, values = tokens(40, KV_HEADS, 1), tokens(40, KV_HEADS, 2)
    queries = tokens(40, Q_HEADS, 3)

    def strided(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    a, b = engine.new_sequence(), twin.new_sequence()
    engine.append([a], 0, keys, values)
    twin.append([b], 0, strided(keys), values.repeat_interleave(2, -1)[..., ::2])
    assert torch.equal(engine.attend([a], 0, queries), twin.attend([b], 0, strided(queries)))
    assert torch.equal(engine.gather(a, 0)[1], values[0])


def test_fork_truncate_release_and_length() -> None:
    engine = Engine(**shape(), token_budget=64)
    first = engine.new_sequence()
    feed(engine, [first], 300, 1, torch.float32)
    second = engine.fork(first)
    engine.truncate(second, 120)
    assert (engine.length(first), engine.length(second, 1)) == (300, 120)
    keys, _ = engine.gather(first, 0)
    assert torch.equal(engine.gather(second, 0)[0], keys[:, :120])
    assert engine.memory().sequences == 2
    engine.release(first)
    assert torch.equal(engine.gather(second, 0)[0], keys[:, :120])
    engine.release(second)
    assert engine.memory().pool_bytes == 0
    with pytest.raises(InvalidArgument, match=f"sequence must be .* got {first}"):
        engine.length(first)


def test_stats_trace_and_memory_tell_what_was_done() -> None:
    engine = Engine(**shape(), token_budget=64, telemetry="trace")
    sequence = engine.new_sequence()
    feed(engine, [sequence], 400, 1, torch.float32)
    engine.observe([sequence], 0, tokens(8, Q_HEADS, 5))
    feed(engine, [sequence], 1, 3, torch.float32)
    engine.attend([sequence], 0, tokens(1, Q_HEADS, 6))
    stats = engine.stats(0, 1)
    assert stats.steps == 1
    assert 0 < stats.worst_mass <= stats.mass <= 1
    assert stats.bytes_read > 0
    trace = engine.trace(sequence, 0, 1)
    assert trace.sink == list(range(4))
    assert trace.window == list(range(385, 401))
    assert len(trace.sink) + len(trace.window) + len(trace.selected) == 64
    held = sorted(position for page in trace.pages for position in page.positions)
    assert held == list(range(4, 385))
    assert engine.memory().index_bytes > 0
    engine.reset_stats()
    assert engine.stats(0, 1).steps == 0
    engine.check_integrity()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", ["keys", "values"])
def test_nan_and_inf_are_refused_and_nothing_is_lost(bad: float, which: str) -> None:
    engine = Engine(**shape())
    healthy, sick = engine.new_sequence(), engine.new_sequence()
    feed(engine, [healthy, sick], 50, 1, torch.float32)
    given = {"keys": tokens(4, KV_HEADS, 2), "values": tokens(4, KV_HEADS, 3)}
    given[which][0, 1, 2, 5] = bad
    with pytest.raises(InvalidArgument, match=f"{which} must be finite"):
        engine.append([sick], 0, given["keys"], given["values"])
    assert engine.length(sick) == engine.length(healthy) == 50
    queries = tokens(1, Q_HEADS, 4).repeat(2, 1, 1, 1)
    assert engine.attend([healthy, sick], 0, queries).isfinite().all()


def test_a_sequence_grown_past_the_pool_is_refused_and_the_others_go_on() -> None:
    engine = Engine(**shape(), token_budget=64, host_memory="700K")
    small, large = engine.new_sequence(), engine.new_sequence()
    feed(engine, [small], 100, 1, torch.float32)
    with pytest.raises(OutOfPages, match="host_memory"):
        for step in range(100):
            feed(engine, [large], 64, step, torch.float32)
    engine.synchronize()
    assert engine.attend([small], 0, tokens(1, Q_HEADS, 9)).isfinite().all()
    engine.release(large)
    feed(engine, [small], 100, 2, torch.float32)
    assert engine.length(small) == 200


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda e, s: e.attend([99], 0, tokens(1, Q_HEADS, 1)),
            "sequence must be .* live .*, got 99",
        ),
        (lambda e, s: e.attend([s], 5, tokens(1, Q_HEADS, 1)), "layer must be from 0 to 1, got 5"),
        (
            lambda e, s: e.attend([s, s], 0, tokens(1, Q_HEADS, 1)),
            r"queries .* per sequence \(2\), got 1",
        ),
        (lambda e, s: e.attend([s], 0, tokens(1, 4, 1)), r"queries must be \[6, T, 32\], got \[4,"),
        (
            lambda e, s: e.attend([s], 0, tokens(99, Q_HEADS, 1)),
            "queries must be of .* appended .*, got 99",
        ),
        (
            lambda e, s: e.attend([s], 0, tokens(1, Q_HEADS, 1)[..., :16]),
            r"queries must .*, got \[6, 1, 16\]",
        ),
        (lambda e, s: e.attend([s], 0, tokens(1, Q_HEADS, 1).double()), "queries.*float64"),
        (lambda e, s: e.attend([s], 0, torch.ones(3)), r"queries must be \[B, H, T, D\].*\[3\]"),
        (lambda e, s: e.attend([s], 0, ["x"]), r"queries\[0\] must be a tensor .*, got str"),
        (
            lambda e, s: e.append([s], 0, tokens(2, 2, 1), tokens(3, 2, 1)),
            r"values must .* as keys \(2\), got 3",
        ),
        (
            lambda e, s: e.attend([s], 0, tokens(1, Q_HEADS, 1).to("meta")),
            "queries must be on the CPU, got meta",
        ),
        (lambda e, s: e.truncate(s, 51), "length must be from 0 to 50 .*, got 51"),
        (lambda e, s: e.truncate(s, -1), "length must be from 0 to 50 .*, got -1"),
        (lambda e, s: e.stats(0, 2), "kv_head must be below 2 and 2, got 0 and 2"),
    ],
)
def test_wrong_arguments_are_named(call: Any, message: str) -> None:
    engine = Engine(**shape())
    sequence = engine.new_sequence()
    feed(engine, [sequence], 50, 1, torch.float32)
    with pytest.raises(InvalidArgument, match=message):
        call(engine, sequence)
    assert engine.length(sequence) == 50
    engine.check_integrity()


def test_any_number_of_threads_gives_bitwise_the_same() -> None:
    answers = []
    for threads in (1, 2, 5):
        engine = Engine(**shape(), token_budget=64, num_threads=threads, index_threads=threads)
        sequences = [engine.new_sequence() for _ in range(3)]
        feed(engine, sequences, 500, 1, torch.float32)
        answers.append(engine.attend(sequences, 1, tokens(1, Q_HEADS, 2).repeat(3, 1, 1, 1)))
    assert all(torch.equal(answers[0], answer) for answer in answers[1:])


def test_torchs_threads_and_own_threads_give_bitwise_the_same() -> None:
    answers = []
    try:
        for library in (None, ops.LIBRARY):
            _core.use_parallel_for(library)
            engine = Engine(**shape(), token_budget=64, num_threads=2)
            sequences = [engine.new_sequence() for _ in range(3)]
            feed(engine, sequences, 500, 1, torch.float32)
            queries = tokens(1, Q_HEADS, 2).repeat(3, 1, 1, 1)
            engine.attend(sequences, 1, queries)
            answers.append(engine.attend(sequences, 1, queries))
            sick = tokens(1, KV_HEADS, 3)
            sick[0, 0, 0, 0] = torch.nan
            with pytest.raises(InvalidArgument, match="keys must be finite"):
                engine.append(sequences[:1], 0, sick, sick)
    finally:
        _core.use_parallel_for(ops.LIBRARY)
    assert torch.equal(*answers)


def test_python_threads_may_share_an_engine() -> None:
    engine = Engine(**shape(), token_budget=64)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            sequence = engine.new_sequence()
            feed(engine, [sequence], 200, seed, torch.float32)
            for step in range(5):
                feed(engine, [sequence], 1, seed + step, torch.float32)
                for layer in range(LAYERS):
                    engine.attend([sequence], layer, tokens(1, Q_HEADS, step))
            assert engine.length(sequence) == 205
            engine.release(sequence)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert engine.memory().sequences == 0


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_step_is_append_and_attend(dtype: torch.dtype) -> None:
    engines = [Engine(**shape(dtype), token_budget=64) for _ in range(2)]
    for engine in engines:
        engine.new_sequence()
        engine.new_sequence()
        feed(engine, [0, 1], 200, 1, dtype)
    for position in range(40):
        # Rows of a larger tensor: strides are not those of a contiguous one.
        queries = tokens(2, Q_HEADS, 300 + position, dtype).permute(2, 1, 0, 3)
        keys = tokens(2, KV_HEADS, 400 + position, dtype).permute(2, 1, 0, 3)
        engines[0].append([0, 1], 1, keys, keys)
        expected = engines[0].attend([0, 1], 1, queries)
        assert torch.equal(engines[1].step([0, 1], 1, queries, keys, keys), expected)


def test_a_step_that_is_refused_changes_nothing() -> None:
    engine = Engine(**shape(), token_budget=64)
    engine.new_sequence()
    feed(engine, [0], 100, 1, torch.float32)
    query, key = tokens(1, Q_HEADS, 2), tokens(1, KV_HEADS, 3)
    refused: list[tuple[Any, str]] = [
        ((0, 0, query, key, tokens(1, KV_HEADS, 4) * torch.nan), "values must be finite"),
        ((7, 0, query, key, key), "sequence must be .*, got 7"),
        ((0, 0, query[0], key, key), r"queries must be a tensor \[B, H, T, D\]"),
        ((0, 0, query.double(), key, key), "queries must be .*, got torch.float64"),
        ((0, 0, key, key, key), r"queries must be \[6, T, 32\], got \[2,"),
    ]
    for (sequence, *arguments), message in refused:
        with pytest.raises(InvalidArgument, match=message):
            engine.step([sequence], *arguments)
        assert engine.length(0, 0) == 100


# --- step_packed: sequences with unequal numbers of tokens, prompts in chunks


def packed(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values [count, H, D]."""
    return tuple(  # type: ignore[return-value]
        tokens(count, heads, seed + index)[0].transpose(0, 1).contiguous()
        for index, heads in enumerate((Q_HEADS, KV_HEADS, KV_HEADS))
    )


def prefill_in_chunks(engine: Engine, sequence: int, length: int, chunk: int) -> torch.Tensor:
    """Outputs [length, Hq, D] of the last layer."""
    outputs = torch.empty(length, Q_HEADS, DIM)
    for first in range(0, length, chunk):
        count = min(chunk, length - first)
        phase = Phase.PROMPT_END if first + count == length else Phase.PREFILL
        for layer in range(LAYERS):
            queries, keys, values = packed(length, 10 * layer)
            engine.step_packed(
                [sequence], layer, queries, keys, values, outputs, [first], [count], [phase]
            )
    return outputs


@pytest.mark.parametrize("chunk", [1, 7, 64, 100, 299])
def test_a_prompt_in_chunks_is_exact_and_has_the_index_of_one_chunk(chunk: int) -> None:
    whole, chunked = (Engine(**shape(), token_budget=64, telemetry="trace") for _ in range(2))
    reference = ReferenceEngine(**shape())
    for engine in (whole, chunked, reference):
        engine.new_sequence()
    length = 300
    got = prefill_in_chunks(chunked, 0, length, chunk)
    prefill_in_chunks(whole, 0, length, length)
    queries, keys, values = (t.transpose(0, 1)[None] for t in packed(length, 10))
    reference.append([0], 1, keys, values)
    want = reference.attend([0], 1, queries)[0].transpose(0, 1)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    for step in range(3):  # within the budget from here on
        queries, keys, values = packed(1, 1000 + step)
        outputs = [torch.empty(1, Q_HEADS, DIM) for _ in range(2)]
        for engine, output in zip((whole, chunked), outputs, strict=True):
            for layer in range(LAYERS):
                engine.step_packed(
                    [0], layer, queries, keys, values, output, [0], [1], [Phase.AUTO]
                )
        assert torch.equal(outputs[0], outputs[1])
    traces = [engine.trace(0, 0, 0) for engine in (whole, chunked)]
    assert traces[0].selected and traces[0].selected == traces[1].selected
    assert [page.positions for page in traces[0].pages] == [
        page.positions for page in traces[1].pages
    ]
    chunked.check_integrity()


def test_prefill_and_decoding_in_one_call_touch_only_their_rows() -> None:
    together, alone = (Engine(**shape(), token_budget=64) for _ in range(2))
    for engine in (together, alone):
        for _ in range(2):
            prefill_in_chunks(engine, engine.new_sequence(), 200, 200)
    queries, keys, values = packed(40, 77)
    outputs = torch.full((40, Q_HEADS, DIM), 5.0)
    rows = [(0, 3, 1, Phase.AUTO), (1, 10, 25, Phase.PREFILL)]
    together.step_packed(
        [row[0] for row in rows],
        0,
        queries,
        keys,
        values,
        outputs,
        [row[1] for row in rows],
        [row[2] for row in rows],
        [row[3] for row in rows],
    )
    for sequence, first, count, phase in rows:
        output = torch.empty(40, Q_HEADS, DIM)
        alone.step_packed([sequence], 0, queries, keys, values, output, [first], [count], [phase])
        assert torch.equal(outputs[first : first + count], output[first : first + count])
    untouched = torch.ones(40, dtype=torch.bool)
    untouched[3] = untouched[10:35] = False
    assert (outputs[untouched] == 5.0).all()
    assert together.length(0) == 201 and together.length(1) == 225


def test_step_packed_refuses_what_does_not_fit_and_changes_nothing() -> None:
    engine = Engine(**shape())
    engine.new_sequence()
    queries, keys, values = packed(4, 1)
    outputs = torch.empty_like(queries)

    def step(**changed: Any) -> None:
        given: dict[str, Any] = {
            "queries": queries,
            "keys": keys,
            "values": values,
            "outputs": outputs,
        }
        given |= {"firsts": [0], "counts": [4], "phases": [Phase.AUTO]} | changed
        engine.step_packed([0], 0, **given)

    broken = keys.clone()
    broken[2, 1, 0] = float("nan")
    with pytest.raises(InvalidArgument, match=r"keys must be finite.*position 2"):
        step(keys=broken)
    with pytest.raises(InvalidArgument, match=r"float32 as the cache, got torch\.bfloat16"):
        step(values=values.bfloat16())
    with pytest.raises(InvalidArgument, match="must hold 5 rows from row 0"):
        step(counts=[5])
    with pytest.raises(ValueError):
        step(phases=[])
    assert engine.length(0) == 0
    step()
    assert engine.length(0) == 4


def test_records_of_statistics_are_made_by_name_and_add_up() -> None:
    both = HeadStats.of(steps=3, mass=1.5, worst_mass=0.5) + HeadStats.of(steps=1, worst_mass=0.9)
    assert (both.steps, both.mass, both.worst_mass, both.bytes_read) == (4, 1.5, 0.5, 0)
    assert MemoryStats.of(sequences=2).sequences == 2
    with pytest.raises(TypeError, match="MemoryStats has no field steps"):
        MemoryStats.of(steps=1)
    with pytest.raises(TypeError, match="sequences must be"):
        MemoryStats.of(sequences="2")  # type: ignore[arg-type]
