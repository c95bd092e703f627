"""An engine among threads, forks and signals: nothing hangs, and nothing is half done."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from icecache import Engine, Error, InvalidArgument, Phase, _core, ops

Q_HEADS, KV_HEADS, DIM = 8, 8, 64
LONG = 4000  # tokens whose exact attention takes some tenths of a second


def tokens(count: int, heads: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, heads, count, DIM, generator=generator)


def make(layers: int = 1, **fields: Any) -> Engine:
    engine = Engine(
        num_layers=layers,
        num_q_heads=Q_HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        dtype=torch.float32,
        **dict[str, Any](token_budget=64, num_threads=1, index_threads=1, host_memory="1G")
        | fields,
    )
    engine.new_sequence()
    return engine


def step(engine: Engine, count: int, layer: int = 0) -> torch.Tensor:
    queries, rows = tokens(count, Q_HEADS), tokens(count, KV_HEADS, 1)
    return engine.step([0], layer, queries, rows, rows)


def in_child(work: Callable[[], None], limit: float = 120) -> str:
    """What `work` raised in a forked child, "" if nothing; fails where the child hangs or dies."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = ""
        try:
            work()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    deadline = time.monotonic() + limit
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            pytest.fail(f"the child hung for {limit} s")
        time.sleep(0.005)
    with os.fdopen(reader) as pipe:
        return pipe.read()


# --- destruction


def indexing(layers: int, length: int) -> Engine:
    """An engine whose index threads have begun to build the indexes of `layers` prompts."""
    engine = make(layers=layers)
    for layer in range(layers):
        rows = tokens(length, KV_HEADS, layer)
        engine.append([0], layer, rows, rows)
        engine.observe([0], layer, tokens(64, Q_HEADS))
    return engine


def test_destruction_drops_work_that_has_not_begun() -> None:
    started = time.monotonic()
    engine = indexing(layers=12, length=LONG // 2)
    engine.length(0, 0)  # waits for the first layer's builds alone
    built = time.monotonic() - started
    started = time.monotonic()
    del engine
    took = time.monotonic() - started
    # One head's build at most was under way, of 8 a layer.
    assert took < built, f"destruction took {took:.2f} s, the build of one layer {built:.2f} s"


def test_destruction_lets_other_threads_run() -> None:
    engine = indexing(
        layers=1, length=10 * LONG
    )  # the build under way takes some tenths of a second
    ticks, stop = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not stop.wait(0.001):
            ticks += 1

    other = threading.Thread(target=tick)
    other.start()
    before = ticks
    del engine
    while_dropped = ticks - before
    stop.set()
    other.join()
    assert while_dropped > 2  # at most one while the GIL is held


# --- fork


def test_a_child_uses_an_engine_that_was_at_rest() -> None:
    engine = make(num_threads=2)
    step(engine, 300)
    engine.synchronize()
    twin = make(num_threads=2)
    step(twin, 300)
    want = step(twin, 1)

    def work() -> None:
        torch.set_num_threads(1)  # torch itself would wait for threads that are gone
        assert torch.equal(step(engine, 1), want)
        engine.check_integrity()
        other = make(num_threads=2)  # with threads of its own
        assert step(other, 300).isfinite().all()

    assert in_child(work) == ""
    assert torch.equal(step(engine, 1), want)


def test_a_child_is_told_that_a_call_was_under_way_in_another_thread() -> None:
    engine = make()
    caller = threading.Thread(target=step, args=(engine, LONG))
    caller.start()
    while engine.pool_bytes() == 0:  # until the call has taken the tokens
        time.sleep(0.001)

    def work() -> None:
        torch.set_num_threads(1)
        for refused in (lambda: engine.length(0), lambda: step(engine, 1), engine.synchronize):
            with pytest.raises(Error, match="when the process was forked"):
                refused()
        other = make()
        assert step(other, 1).isfinite().all()
        raise LookupError("all as it should be")

    assert in_child(work) == "LookupError: all as it should be"
    caller.join()
    assert engine.length(0) == LONG


def test_a_child_is_told_that_index_work_was_under_way_and_may_drop_the_engine() -> None:
    engine = make()
    step(engine, LONG // 2)  # leaves its index to a thread
    before = engine.pool_bytes()
    while engine.pool_bytes() == before:  # until the thread takes pages for it
        time.sleep(0.001)

    def work() -> None:
        nonlocal engine
        with pytest.raises(Error, match="when the process was forked"):
            engine.length(0)
        del engine
        gc.collect()

    assert in_child(work) == ""
    engine.check_integrity()


# --- signals


@pytest.fixture
def _interrupts() -> Iterator[None]:
    """SIGINT raises, also in a process that was started with it ignored (as in the background)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interrupts")
@pytest.mark.parametrize("verb", ["step", "step_packed", "append"])
def test_a_call_that_is_interrupted_takes_no_tokens(verb: str) -> None:
    engine = make()
    rows, queries = tokens(LONG, KV_HEADS, 1), tokens(LONG, Q_HEADS)
    q, k = (x[0].transpose(0, 1) for x in (queries, rows))
    outputs = torch.zeros(LONG, Q_HEADS, DIM)
    calls: dict[str, Callable[[], Any]] = {
        "step": lambda: engine.step([0], 0, queries, rows, rows),
        "step_packed": lambda: engine.step_packed(
            [0], 0, q, k, k, outputs, [0], [LONG], [Phase.AUTO]
        ),
        "append": lambda: engine.append([0], 0, rows, rows),
    }
    main = threading.main_thread().ident
    assert main is not None
    for delay in (0.002, 0.02):
        has_ended = False
        with pytest.raises(KeyboardInterrupt):
            threading.Timer(delay, signal.pthread_kill, (main, signal.SIGINT)).start()
            calls[verb]()
            has_ended = True  # append() may end ahead of its signal
            time.sleep(10)
        assert engine.length(0) == (LONG if has_ended else 0)
        assert verb == "append" or not has_ended
        engine.truncate(0, 0)
    assert step(engine, 1).isfinite().all()
    engine.check_integrity()


def test_a_handler_that_does_not_raise_changes_nothing() -> None:
    engine, twin = make(), make()
    queries, rows = tokens(LONG, Q_HEADS), tokens(LONG, KV_HEADS, 1)
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        got = engine.step([0], 0, queries, rows, rows)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [signal.SIGUSR1]
    assert torch.equal(got, twin.step([0], 0, queries, rows, rows))


# --- who lends threads


@pytest.mark.parametrize(
    "library", ["", "/nowhere.so", "libc.so.6", __file__, "a\0b", "\U0010ffff"]
)
def test_threads_come_from_a_loaded_library_that_lends_them(library: str) -> None:
    with pytest.raises(InvalidArgument, match="library must be the path of a loaded library"):
        _core.use_parallel_for(library)
    for wild in (0, 1, -1, 2**64, b"x", 1.5):
        with pytest.raises(TypeError, match="library must be a str"):
            _core.use_parallel_for(wild)  # type: ignore[arg-type]
    engine = make(num_threads=2)
    assert step(engine, 200).isfinite().all()
    assert ops.LIBRARY.endswith(".so")
