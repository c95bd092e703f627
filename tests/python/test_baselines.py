"""What all methods of the benchmarks have in common."""

from __future__ import annotations

import sys

import pytest
import torch
from baselines import (
    BUDGET,
    DECODER,
    DIM,
    HEADS,
    LAYERS,
    LENGTH,
    SCALE,
    STEPS,
    decode,
    needle_prefill,
    open_by_name,
    random_prefill,
    random_tokens,
)
from icecache import InvalidArgument, Unavailable, build_info
from icecache.bench.baselines.arkvale import PAGE
from icecache.bench.baselines.budget import SINK, near_tokens
from icecache.bench.baselines.tensor_session import TensorSession
from icecache.bench.methods import METHODS, Method, find_methods
from icecache.bench.oracles import FullSession, RecentSession, TopSession

# Those that this build has.
# Those that prefill themselves need a model: test_bench_prefill.py.
HERE = [
    one
    for one in METHODS
    if (one.name != "faiss" or build_info().faiss)
    and "prefill_budget" not in (one.engine_fields or {})
]
NAMES = list(dict.fromkeys(method.name for method in HERE))
# Tokens that wait to be sealed into a segment are attended beside their budget.
SEGMENTED = ("icecache", "icecache-lossless", "faiss")
IN_TORCH = [method for method in METHODS if method.session is not None]
# Those that look for what the query needs, among all tokens.
BY_QUERY = ["topk", "topk_head", "quest", "arkvale", "omnikv", "pqcache", "magicpig", "retroinfer"]


@pytest.mark.parametrize("method", HERE, ids=lambda method: method.label)
@pytest.mark.parametrize("length", [50, LENGTH])
def test_a_budget_above_the_length_is_full_attention(method: Method, length: int) -> None:
    prefill, tokens = random_prefill(length), random_tokens()
    truth = decode(FullSession(prefill, 0, SCALE), tokens)
    session = method.open(DECODER, prefill, length + STEPS)
    torch.testing.assert_close(decode(session, tokens), truth, atol=1e-5, rtol=1e-5)
    assert session.mass() == pytest.approx(1.0, abs=1e-5)


def test_lossless_is_full_attention_at_any_budget() -> None:
    prefill, tokens = random_prefill(), random_tokens()
    truth = decode(FullSession(prefill, 0, SCALE), tokens)
    session = open_by_name("icecache-lossless", prefill, BUDGET)
    torch.testing.assert_close(decode(session, tokens), truth, atol=1e-5, rtol=1e-5)
    assert session.mass() == 1.0


def test_full_attention_is_torchs() -> None:
    prefill, tokens = random_prefill(), random_tokens(2)
    output = decode(FullSession(prefill, 0, SCALE), tokens)
    for layer in range(LAYERS):
        (_, k0, v0), (queries, k1, v1) = tokens[0][layer], tokens[1][layer]
        keys = torch.cat([prefill.keys[layer], k0, k1], 1)[None]
        values = torch.cat([prefill.values[layer], v0, v1], 1)[None]
        expected = torch.nn.functional.scaled_dot_product_attention(
            queries[None], keys, values, enable_gqa=True
        )
        torch.testing.assert_close(output[1, layer], expected[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", IN_TORCH, ids=lambda method: method.label)
@pytest.mark.parametrize("budget", [60, BUDGET])
def test_the_budget_is_kept_at_every_step(method: Method, budget: int) -> None:
    if method.name == "full":
        return
    session = method.open(DECODER, random_prefill(), budget)
    assert isinstance(session, TensorSession)
    for step, tokens in enumerate(random_tokens()):
        decode(session, [tokens])
        assert len(session.attended) == LAYERS
        for attended in session.attended:
            assert attended.shape[-1] == LENGTH + step + 1
            assert bool(attended[..., -1].all())
            counts = attended.sum(-1)
            assert int(counts.max()) <= budget
            if method.name == "arkvale":
                assert int(counts.min()) > budget - PAGE
            elif method.name not in ("paper_reuse", "magicpig", "retroinfer"):
                assert int(counts.min()) == budget
            if method.name not in ("h2o", "snapkv"):
                assert bool(attended[..., near_tokens(LENGTH + step + 1, 16)].all())


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SEGMENTED])
@pytest.mark.parametrize("length", [1, SINK, SINK + 1, 21, 22, 37])
def test_prompts_shorter_than_what_is_always_attended(name: str, length: int) -> None:
    prefill, tokens = random_prefill(length), random_tokens(40)
    outputs = decode(open_by_name(name, prefill, 60), tokens)
    assert bool(outputs.isfinite().all())
    truth = decode(FullSession(prefill, 0, SCALE), tokens)
    within = max(0, 60 - length)
    torch.testing.assert_close(outputs[:within], truth[:within], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "budget", "message"),
    [
        ("topk", 19, r"budget: expected at least sink \+ window = 4 \+ 16, got 19"),
        ("topk_head", 19, r"sink \+ window"),
        ("streaming", 19, r"sink \+ window"),
        ("omnikv", 19, r"sink \+ window"),
        ("pqcache", 19, r"sink \+ window"),
        ("magicpig", 19, r"sink \+ window"),
        ("retroinfer", 19, r"sink \+ window"),
        ("arkvale", 35, r"budget: expected at least sink \+ window \+ page = 4 \+ 16 \+ 16"),
        ("snapkv", 31, r"budget: expected at least the observation window = 32, got 31"),
        ("h2o", 1, r"budget: expected at least one recent token"),
        ("quest", 35, r"token_budget must be at least"),
    ],
)
def test_a_budget_below_the_fixed_parts_is_refused(name: str, budget: int, message: str) -> None:
    prefill = random_prefill()
    with pytest.raises(InvalidArgument, match=message):
        open_by_name(name, prefill, budget)
    decode(open_by_name(name, prefill, budget + 1), random_tokens(1))


@pytest.mark.parametrize("name", NAMES)
def test_forks_are_independent_and_runs_are_the_same(name: str) -> None:
    prefill, tokens = random_prefill(), random_tokens(8)
    alone = open_by_name(name, prefill, BUDGET)
    expected = decode(alone, tokens)
    session = open_by_name(name, prefill, BUDGET)
    before = decode(session, tokens[:3])
    fork, twin = session.fork(), session.fork()
    decode(fork, random_tokens(5, seed=7))
    after = decode(session, tokens[3:])
    assert torch.equal(torch.cat([before, after]), expected)
    assert torch.equal(decode(twin, tokens[3:]), expected[3:])
    if isinstance(session, TensorSession):
        assert session.mass() == alone.mass()
        assert session.bytes_read() == alone.bytes_read()
    for one in (fork, twin):
        one.close()
    session.close()


@pytest.mark.parametrize("name", BY_QUERY)
def test_what_the_query_matches_is_found(name: str) -> None:
    prefill, asking = needle_prefill()
    output = decode(open_by_name(name, prefill, 60), asking)
    torch.testing.assert_close(output, torch.full_like(output, 5.0), atol=0.05, rtol=0)


def test_what_has_left_the_window_is_not_seen_by_streaming() -> None:
    prefill, asking = needle_prefill()
    output = decode(RecentSession(prefill, 60, SCALE), asking)
    assert float(output.abs().max()) < 1.0


def test_bytes_are_those_of_the_formulas() -> None:
    prefill, tokens = random_prefill(), random_tokens(1)
    length, row = LENGTH + 1, 4 * DIM
    read = {}
    for method in HERE:
        session = method.open(DECODER, prefill, BUDGET)
        assert session.bytes_read() == 0 or method.session is None
        decode(session, tokens)
        read[method.label] = session.bytes_read() / (LAYERS * HEADS)
    kept = 2 * BUDGET * row
    assert read["full"] == 2 * length * row
    assert read["streaming"] == read["snapkv"] == kept
    assert read["h2o"] == kept + 4 * BUDGET
    assert read["exact top-B"] == kept + (length - BUDGET) * row
    assert read["pqcache"] == kept + (length - SINK - 32) * 2 * 6 // 8 + 64 * row
    assert read["omnikv"] == read["exact top-B"]  # of 3 layers all are filters
    pages = -(-(length - SINK - 32) // PAGE)
    assert 0 <= kept + 2 * pages * row - read["arkvale"] < 2 * PAGE * row
    assert read["exact top-B per head"] > read["exact top-B"]


def test_the_prompts_tensors_are_not_copied() -> None:
    prefill = random_prefill()
    session = TopSession(prefill, BUDGET, SCALE)
    decode(session, random_tokens(2))
    keys, _ = session.span(1, 3, 50)
    assert keys.data_ptr() == prefill.keys[1, :, 3:].data_ptr()
    keys, values = session.span(1, LENGTH - 2, LENGTH + 2)
    assert torch.equal(keys[:, :2], prefill.keys[1, :, -2:])
    assert torch.equal(values[:, 2:], torch.cat([step[1][2] for step in random_tokens(2)], 1))
    assert torch.equal(session.span(1, LENGTH + 1, LENGTH + 2)[0], keys[:, 3:])


def test_mass_is_of_every_fourth_step() -> None:
    session = TopSession(random_prefill(), BUDGET, SCALE)
    seen = []
    for step in random_tokens(9):
        decode(session, [step])
        seen.append(session.mass())
    assert seen[:4] == [seen[0]] * 4
    assert seen[4:8] == [seen[4]] * 4
    assert len({*seen}) == 3


def test_methods_are_found_by_name() -> None:
    assert [method.label for method in find_methods(["quest", "paper"])] == ["quest", "paper"]
    assert find_methods([]) == list(METHODS)
    assert len({method.label for method in METHODS}) == len(METHODS)
    with pytest.raises(InvalidArgument, match=r"method: no method is called 'qest'; .*\bquest"):
        find_methods(["full", "qest"])
    with pytest.raises(InvalidArgument, match=r"'xyz'; known: full, icecache, topk, paper, quest"):
        find_methods(["xyz"])


@pytest.mark.parametrize("name", ["pqcache", "retroinfer"])
def test_without_faiss_it_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(Unavailable, match=r"pip install 'icecache\[bench\]'"):
        open_by_name(name, random_prefill(), BUDGET)
