"""DeviceCache: what it refuses anywhere, and what it does on a GPU or the emulator."""

from __future__ import annotations

from typing import Any

import icecache
import pytest
import torch
import torch.nn.functional as F

HEADS, KV_HEADS, DIM = 8, 2, 64
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def make(**changes: Any) -> icecache.DeviceCache:
    settings: dict[str, Any] = {
        "num_layers": 2,
        "num_q_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "head_dim": DIM,
        "dtype": torch.bfloat16,
        "batch": 2,
        "max_tokens": 4096,
        "host_memory": 1 << 30,
        "device": icecache.device.KIND,
    }
    return icecache.DeviceCache(**{**settings, **changes})


def test_refuses_what_is_not_a_cuda_device() -> None:
    with pytest.raises(icecache.InvalidArgument, match=r"device must be a CUDA device, got cpu"):
        make(device="cpu")
    with pytest.raises(icecache.InvalidArgument, match="dtype must be float32"):
        make(dtype=torch.float64)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_says_what_is_missing_without_a_device() -> None:
    with pytest.raises(icecache.Unavailable, match="device=cuda: "):
        make()


def tokens(count: int, heads: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2, heads, count, DIM, generator=generator, device="cpu")
    return rows.to(torch.get_default_device(), torch.bfloat16)


def fill(cache: icecache.DeviceCache, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    held = []
    for layer in range(cache.num_layers):
        keys, values = tokens(length, KV_HEADS, layer), tokens(length, KV_HEADS, 10 + layer)
        cache.prefill(layer, tokens(length, HEADS, 20 + layer), keys, values)
        held.append((keys, values))
    return held


Held = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values of each layer


def step_all(cache: icecache.DeviceCache, held: Held, layer: int, step: int) -> list[torch.Tensor]:
    """One token more for each sequence: what the cache answers, and full attention."""
    seed = 1000 + 10 * step + layer
    queries, key, value = (
        tokens(1, HEADS, seed),
        tokens(1, KV_HEADS, seed + 3000),
        tokens(1, KV_HEADS, seed + 6000),
    )
    out = cache.step(layer, queries, key, value)
    keys = torch.cat((held[layer][0], key), dim=2)
    values = torch.cat((held[layer][1], value), dim=2)
    held[layer] = keys, values
    return [out, F.scaled_dot_product_attention(queries, keys, values, enable_gqa=True)]


@pytest.mark.usefixtures("any_device")
def test_full_budget_is_full_attention() -> None:
    cache = make(token_budget=400, max_tokens=400)
    held = fill(cache, 200)
    for step in range(40):
        for layer in range(2):
            out, expected = step_all(cache, held, layer, step)
            torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
    assert cache.length(1, 1) == 240
    assert torch.equal(cache.gather(0, 1)[0], held[0][0][1])
    with pytest.raises(icecache.InvalidArgument, match="length must be from 0 to 240"):
        cache.truncate(1, 241)
    cache.truncate(1, 190)
    for rows, whole in zip(cache.gather(0, 1), held[0], strict=True):
        assert torch.equal(rows, whole[1, :, :190])


@pytest.mark.usefixtures("any_device")
def test_residents_attend_to_everything_until_they_give_way() -> None:
    cache = make(token_budget=48, window_tokens=16, device_tokens=1536, max_tokens=2000)
    held = fill(cache, 500)

    def expect(*resident: bool) -> None:
        before = cache.stats(1).dense_steps
        for layer in range(2):
            out, expected = step_all(cache, held, layer, held[layer][0].shape[2])
            for row, is_resident in enumerate(resident):
                apart = (out[row] - expected[row]).float().norm() / expected[row].float().norm()
                assert apart < (1e-2 if is_resident else 0.5)
        assert cache.stats(1).dense_steps - before == KV_HEADS * sum(resident)
        memory = cache.memory()
        assert memory.resident_sequences == sum(resident)
        assert memory.sparse_sequences == 2 - sum(resident)

    assert cache.memory().resident_bytes == 1536 * 2 * 2 * KV_HEADS * DIM * 2
    expect(True, True)
    cache.reserve(0, 700)
    cache.reserve(1, 1100)  # five parts of 256 tokens, of six
    expect(True, False)
    cache.truncate(1, 400)
    cache.truncate(0, 400)
    held[:] = [(keys[:, :, :400], values[:, :, :400]) for keys, values in held]
    expect(True, False)
    cache.fork(1, 0)
    held[:] = [(keys[:1].repeat(2, 1, 1, 1), rows[:1].repeat(2, 1, 1, 1)) for keys, rows in held]
    expect(True, True)
    cache.evict(0)
    expect(False, True)
    held[:] = fill(cache, 300)
    expect(True, True)
    cache.release(0)
    cache.release(1)
    assert cache.memory().resident_sequences == 0


@pytest.mark.usefixtures("any_device")
def test_refuses_device_tokens_that_cannot_be() -> None:
    for tokens_given in (-1, 2**30 + 1):
        with pytest.raises(icecache.InvalidArgument, match="device_tokens must be from 0 to"):
            make(device_tokens=tokens_given)
    with pytest.raises(icecache.InvalidArgument, match="sequence must be from 0 to 1, got 2"):
        make(device_tokens=1).evict(2)


@gpu
def test_a_captured_step_goes_on_when_residents_give_way() -> None:
    def steps(captured: bool) -> torch.Tensor:
        cache = make(device_tokens=8192)
        fill(cache, 3000)
        cache.synchronize()
        queries, key, value = tokens(1, HEADS, 1), tokens(1, KV_HEADS, 2), tokens(1, KV_HEADS, 3)
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                out = cache.step(0, queries, key, value)
        made = []
        for step in range(20):
            if step == 10:
                cache.evict(0)
            if captured:
                graph.replay()
            else:
                out = cache.step(0, queries, key, value)
            made.append(out.clone())
        assert cache.stats(0).dense_steps == (10 + 20) * KV_HEADS
        return torch.stack(made)

    with torch.device("cuda"):
        assert torch.equal(steps(captured=False), steps(captured=True))


@gpu
def test_a_captured_step_is_the_eager_one() -> None:
    """A capture refuses every synchronisation and allocation of CUDA's own: there is none."""

    def twenty_steps(captured: bool) -> torch.Tensor:
        cache = make()
        fill(cache, 3000)
        cache.synchronize()
        queries, key, value = tokens(1, HEADS, 1), tokens(1, KV_HEADS, 2), tokens(1, KV_HEADS, 3)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = cache.step(0, queries, key, value)
            steps = []
            for _ in range(20):
                graph.replay()
                steps.append(out.clone())
        else:
            steps = [cache.step(0, queries, key, value) for _ in range(20)]
        assert cache.length(0, 0) == 3020
        return torch.stack(steps)

    with torch.device("cuda"):
        assert torch.equal(twenty_steps(captured=False), twenty_steps(captured=True))


@pytest.mark.usefixtures("any_device")
def test_a_compiled_step_is_the_eager_one() -> None:
    caches = [make(), make()]
    for cache in caches:
        fill(cache, 1000)

    def attend(cache: icecache.DeviceCache, query: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(query)
        torch.ops.icecache.device_step(cache._number, 1, query, key, value, out, None)
        return 2 * out

    query, key, value = tokens(1, HEADS, 1), tokens(1, KV_HEADS, 2), tokens(1, KV_HEADS, 3)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        assert torch.equal(attend(caches[0], query), compiled(caches[1], query))


@pytest.mark.usefixtures("any_device")
def test_index_work_keeps_few_layers_waiting() -> None:
    cache = make(num_layers=12)
    for layer in range(12):
        keys = tokens(400, KV_HEADS, layer)
        cache.prefill(layer, tokens(400, HEADS, layer), keys, keys)
        assert len(cache._held) <= 6
    cache.synchronize()
    assert not cache._held


@pytest.mark.usefixtures("any_device")
def test_room_grows_by_steps() -> None:
    cache = make(batch=1)
    cache.limit_tokens(2 * icecache.device.ROOM_STEP)
    cache.reserve(0, 300)
    fill(cache, 300)
    small = cache.memory()
    cache.reserve(0, 1000)  # in the room that there is
    assert cache.memory().host_bytes == small.host_bytes
    cache.reserve(0, 2000)
    grown = cache.memory()
    assert grown.host_bytes == 2 * small.host_bytes
    assert grown.device_bytes == small.device_bytes
    with pytest.raises(icecache.OutOfPages, match="1024 more tokens is wanted, 0 of 2048 are"):
        cache.reserve(0, 3000)
    with pytest.raises(icecache.InvalidArgument, match="max_tokens = 4096 tokens, got 9000"):
        cache.reserve(0, 9000)
    inputs = [tokens(1, heads, 1)[:1] for heads in (HEADS, KV_HEADS, KV_HEADS)]
    assert cache.step(0, *inputs).isfinite().all()


@pytest.mark.usefixtures("any_device")
def test_full_sequences_answer_nan_and_stay() -> None:
    cache = make(max_tokens=100)
    fill(cache, 90)
    inputs = tokens(1, HEADS, 1), tokens(1, KV_HEADS, 2), tokens(1, KV_HEADS, 3)
    outs = [cache.step(0, *inputs) for _ in range(80)]
    assert outs[0].isfinite().all()
    assert outs[-1].isnan().all()
    assert 100 <= cache.length() < 170


@pytest.mark.usefixtures("any_device")
def test_forks_share_host_memory_and_go_their_own_ways() -> None:
    cache = make()
    keys = tokens(3000, KV_HEADS, 1)
    for layer in range(2):
        cache.prefill(layer, tokens(3000, HEADS, 2)[0], keys[0], keys[1], sequence=0)
    cache.synchronize()
    before = cache.memory().host_bytes
    cache.fork(1, 0)
    assert cache.memory().host_bytes < 1.7 * before
    query, key = tokens(1, HEADS, 3), tokens(1, KV_HEADS, 4)
    query[1], key[1] = query[0], key[0]
    out = cache.step(0, query, key, key)
    assert torch.equal(out[0], out[1])
    cache.release(0)
    assert torch.equal(cache.step(0, query, key, key)[0], torch.zeros_like(out[0]))


@pytest.mark.usefixtures("any_device")
def test_bad_tensors_are_refused_and_nothing_changes() -> None:
    cache = make()
    fill(cache, 500)
    query, key = tokens(1, HEADS, 3), tokens(1, KV_HEADS, 4)
    with pytest.raises(icecache.InvalidArgument, match=r"keys must be a contiguous \[2, 2"):
        cache.step(0, query, key[:1], key)
    with pytest.raises(icecache.InvalidArgument, match=r"queries must be torch\.bfloat16"):
        cache.step(0, query.float(), key, key)
    with pytest.raises(icecache.InvalidArgument, match="layer must be from 0 to 1, got 7"):
        cache.step(7, query, key, key)
    with pytest.raises(icecache.InvalidArgument, match="out must not share memory with queries"):
        cache._cache.step(0, query, key, key, query, None)
    rows = cache.gather(0, 0)[0]
    with pytest.raises(icecache.InvalidArgument, match="values must not share memory with keys"):
        cache._cache.gather(0, 0, rows, rows)
    with pytest.raises(icecache.InvalidArgument, match="a prompt must have at most"):
        long = tokens(9000, KV_HEADS, 1)
        cache.prefill(0, tokens(9000, HEADS, 1), long, long)
    assert cache.length(0, 0) == 500
    assert cache.step(0, query, key, key).isfinite().all()


def test_one_tensor_of_another_device_is_refused() -> None:
    rows = [torch.zeros(1, 2, 1, 64) for _ in range(3)]
    with pytest.raises(RuntimeError, match=r"values must be on the device of queries \(cpu\), got"):
        torch.ops.icecache.device_step(0, 0, *rows[:2], rows[2].to("meta"), rows[0].clone(), None)


@gpu
def test_a_cache_too_large_for_the_device_is_refused() -> None:
    with pytest.raises(icecache.OutOfPages, match="the device has no"):
        make(num_layers=512, batch=64, max_tokens=1 << 22)
    assert make().memory().device_bytes > 0


@pytest.mark.usefixtures("any_device")
def test_sequences_step_in_the_rows_they_are_given() -> None:
    together, apart = make(batch=3), make(batch=3)
    for cache in (together, apart):
        for sequence in range(3):
            seed, length = 100 * sequence, 300 + 200 * sequence
            keys = tokens(length, KV_HEADS, seed)
            for layer in range(2):
                queries = tokens(length, HEADS, seed + 1)[0]
                cache.prefill(layer, queries, keys[0], keys[1], sequence=sequence)
    generator = torch.Generator().manual_seed(5)
    query, key = (
        torch.randn(3, heads, 1, DIM, generator=generator, device="cpu").to(
            together.device, torch.bfloat16
        )
        for heads in (HEADS, KV_HEADS)
    )
    expected = together.step(0, query, key, key)
    # Sequence 1 sits out; a row of none lies between.
    rows = torch.tensor([2, -1, 0], dtype=torch.int32)
    out = apart.step(0, query[[2, 1, 0]], key[[2, 1, 0]], key[[2, 1, 0]], rows)
    assert torch.equal(out[[2, 0]], expected[[0, 2]])
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert [apart.length(0, sequence) for sequence in range(3)] == [301, 500, 701]
    with pytest.raises(
        icecache.InvalidArgument, match=r"rows must be torch\.int32, got torch\.int64"
    ):
        apart.step(0, query, key, key, rows.long())
