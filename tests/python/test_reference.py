"""The torch oracle agrees with torch's own attention and with its own definition."""

from __future__ import annotations

from typing import Any

import icecache
import pytest
import torch
import torch.nn.functional as F
from hf_models import SCARCE
from icecache.reference import (
    ReferenceEngine,
    dense_attention,
    far_field,
    pick_tokens,
    query_metric,
    sketch_scores,
    sparse_attention,
    with_sinks,
)

HEAD_DIM = 16
SCALE = HEAD_DIM**-0.5


def engine(kv_heads: int = 2, groups: int = 2) -> ReferenceEngine:
    return ReferenceEngine(
        num_layers=2,
        num_q_heads=kv_heads * groups,
        num_kv_heads=kv_heads,
        head_dim=HEAD_DIM,
        dtype=torch.float32,
    )


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("groups", [1, 3, 4, 8])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 40])
def test_engine_equals_sdpa(groups: int, length: int) -> None:
    made = engine(groups=groups)
    seqs = [made.new_sequence() for _ in range(3)]
    keys, values = random(3, 2, length, HEAD_DIM), random(3, 2, length, HEAD_DIM, seed=1)
    queries = random(3, 2 * groups, length, HEAD_DIM, seed=2)
    made.append(seqs, 1, keys, values)
    expected = F.scaled_dot_product_attention(
        queries, keys, values, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(made.attend(seqs, 1, queries), expected)
    torch.testing.assert_close(made.attend(seqs, 1, queries[:, :, -1:]), expected[:, :, -1:])


def test_engine_takes_rows_of_different_length() -> None:
    made = engine()
    seqs = [made.new_sequence(), made.new_sequence()]
    keys = [random(2, 5, HEAD_DIM), random(2, 9, HEAD_DIM, seed=1)]
    queries = [random(4, 5, HEAD_DIM, seed=2), random(4, 2, HEAD_DIM, seed=3)]
    made.append(seqs, 0, keys, keys)
    outputs = made.attend(seqs, 0, queries)
    for key, query, output in zip(keys, queries, outputs, strict=True):
        torch.testing.assert_close(output, dense_attention(query, key, key, SCALE)[0])


def test_fork_and_truncate_do_not_touch_the_other_side() -> None:
    made = engine()
    keys = random(1, 2, 10, HEAD_DIM)
    seq = made.new_sequence()
    for layer in (0, 1):
        made.append([seq], layer, keys, keys)
    twin = made.fork(seq)
    made.truncate(seq, 4)
    made.append([seq], 0, keys[:, :, :2], keys[:, :, :2])
    assert (made.length(seq), made.length(seq, 1), made.length(twin)) == (6, 4, 10)
    assert torch.equal(made.gather(twin, 0)[0], keys[0])
    made.release(seq)
    assert made.memory().sequences == 1
    made.check_integrity()


def test_engine_refuses_and_changes_nothing() -> None:
    made = engine()
    seqs = [made.new_sequence(), made.new_sequence()]
    keys = random(2, 2, 3, HEAD_DIM)
    bad = keys.clone()
    bad[1, 1, 2, 0] = torch.inf
    with pytest.raises(icecache.InvalidArgument, match="sequence 1, head 1, position 2"):
        made.append(seqs, 0, bad, keys)
    assert made.length(seqs[0]) == 0
    with pytest.raises(icecache.InvalidArgument, match="expected 0 to 0"):
        made.truncate(seqs[0], 1)
    with pytest.raises(icecache.InvalidArgument, match="is not open"):
        made.release(77)
    with pytest.raises(icecache.InvalidArgument, match="at most 0"):
        made.attend(seqs, 0, random(2, 4, 1, HEAD_DIM))


def test_metric_is_the_root_of_the_second_moment() -> None:
    queries = random(3, 50, HEAD_DIM)
    metric = query_metric(queries)
    rows = queries.reshape(-1, HEAD_DIM).double()
    torch.testing.assert_close(metric @ metric, rows.T @ rows / 150)


def test_sketch_of_all_directions_and_many_bits_is_exact() -> None:
    keys, queries = random(60, HEAD_DIM), random(3, HEAD_DIM, seed=1)
    metric = query_metric(random(40, HEAD_DIM, seed=2))
    scores = sketch_scores(queries, keys, metric, rank=HEAD_DIM, bits=20)
    torch.testing.assert_close(scores, (queries @ keys.T).double(), rtol=1e-3, atol=1e-3)


def test_sketch_gets_closer_with_rank_and_bits() -> None:
    keys, queries = random(200, HEAD_DIM), random(4, HEAD_DIM, seed=1)
    metric = query_metric(random(100, HEAD_DIM, seed=2))
    exact = (queries @ keys.T).double()
    errors = [
        (sketch_scores(queries, keys, metric, rank=rank, bits=bits) - exact).norm()
        for rank, bits in [(4, 4), (8, 4), (HEAD_DIM, 4), (HEAD_DIM, 8)]
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * errors[0]


def test_sketch_keeps_the_basis_of_earlier_keys() -> None:
    keys, queries = random(50, HEAD_DIM), random(2, HEAD_DIM, seed=1)
    metric = query_metric(random(40, HEAD_DIM, seed=2))
    early = sketch_scores(queries, keys[:40], metric, rank=8)
    both = sketch_scores(queries, keys, metric, rank=8, basis_keys=keys[:40])
    torch.testing.assert_close(both[:, :40], early)


def test_pick_finds_the_tokens_of_largest_mass() -> None:
    keys, queries = random(100, HEAD_DIM), 2 * random(3, HEAD_DIM, seed=1)
    always = torch.zeros(100, dtype=torch.bool)
    always[:4] = always[-4:] = True
    exact = (queries @ keys.T).double()
    picked = pick_tokens(queries, keys, exact, always, count=10, candidates=30)
    mass = torch.softmax(exact, -1).sum(0).masked_fill(always, -1)
    assert set(picked.tolist()) == set(mass.topk(10).indices.tolist())
    assert picked.tolist() == sorted(picked.tolist())


def test_pick_rescores_candidates_with_exact_keys() -> None:
    keys, queries = random(40, HEAD_DIM), 2 * random(2, HEAD_DIM, seed=1)
    always = torch.zeros(40, dtype=torch.bool)
    misleading = random(2, 40, seed=3)
    picked = pick_tokens(queries, keys, misleading, always, count=5, candidates=40)
    mass = torch.softmax((queries @ keys.T).double(), -1).sum(0)
    assert set(picked.tolist()) == set(mass.topk(5).indices.tolist())


@pytest.mark.parametrize("count", [0, 3, 50])
def test_pick_is_bounded_by_what_there_is(count: int) -> None:
    keys, queries = random(20, HEAD_DIM), random(2, HEAD_DIM, seed=1)
    always = torch.zeros(20, dtype=torch.bool)
    always[:15] = True
    scores = (queries @ keys.T).double()
    picked = pick_tokens(queries, keys, scores, always, count=count, candidates=30)
    assert picked.numel() == min(count, 5)
    assert not always[picked].any()


def logits(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return queries.double() @ keys.double().T


def test_far_field_by_hand() -> None:
    """Weights 1 + 3 on values 2 and 6; weight 4 on 10 beside an attended token; one in no node."""
    log_weights = torch.tensor([[1.0, 3.0, 4.0, 50.0, 50.0]]).log()
    values = torch.tensor([[2.0], [6.0], [10.0], [99.0], [77.0]])
    nodes = torch.tensor([0, 0, 1, 1, -1])
    attended = torch.tensor([False, False, False, True, False])
    weights, means = far_field(log_weights, values, nodes, attended)
    torch.testing.assert_close(weights.exp(), torch.tensor([[4.0, 4.0]]).double())
    torch.testing.assert_close(means, torch.tensor([[4.0], [10.0]]).double())


def test_far_field_of_equal_tokens_is_exact() -> None:
    """Where a node's values are equal, its summary loses nothing, whatever the keys are."""
    nodes = torch.arange(40) // 10
    keys = random(40, HEAD_DIM)
    values, queries = random(4, HEAD_DIM, seed=1)[nodes], random(3, HEAD_DIM, seed=2)
    attended = torch.zeros(40, dtype=torch.bool)
    attended[[3, 17, 18]] = True
    far = far_field(logits(queries, keys), values, nodes, attended)
    everything = torch.ones(40, dtype=torch.bool)
    torch.testing.assert_close(
        sparse_attention(queries, keys, values, attended, far)[0],
        sparse_attention(queries, keys, values, everything)[0],
    )


def test_far_field_of_single_tokens_is_exact() -> None:
    keys, values = random(40, HEAD_DIM), random(40, HEAD_DIM, seed=1)
    query = random(1, HEAD_DIM, seed=2)
    attended = torch.zeros(40, dtype=torch.bool)
    far = far_field(logits(query, keys), values, torch.arange(40), attended)
    torch.testing.assert_close(
        sparse_attention(query, keys, values, attended, far)[0],
        dense_attention(query[:, None], keys[None], values[None], 1.0)[0][:, 0].double(),
        rtol=1e-5,
        atol=1e-6,
    )


def test_far_field_weighs_what_is_left() -> None:
    """Exact and far weights together are those of all tokens."""
    nodes = torch.arange(200) // 20
    keys, values = random(200, HEAD_DIM), random(200, HEAD_DIM, seed=1)
    queries = random(4, HEAD_DIM, seed=3)
    attended = random(200, seed=4) > 0.5
    exact = logits(queries, keys)
    far, _ = far_field(exact, values, nodes, attended)
    near = exact.masked_fill(~attended, -torch.inf)
    torch.testing.assert_close(torch.cat([near, far], 1).logsumexp(1), exact.logsumexp(1))


def test_far_field_helps_where_values_of_a_node_are_alike() -> None:
    nodes = torch.arange(200) // 20
    keys = random(200, HEAD_DIM)
    values = random(10, HEAD_DIM, seed=1)[nodes] + 0.3 * random(200, HEAD_DIM, seed=5)
    queries = random(4, HEAD_DIM, seed=3)
    attended = torch.arange(200) < 20
    far = far_field(logits(queries, keys), values, nodes, attended)
    exact, _ = sparse_attention(queries, keys, values, torch.ones(200, dtype=torch.bool))
    without = (sparse_attention(queries, keys, values, attended)[0] - exact).norm()
    with_far = (sparse_attention(queries, keys, values, attended, far)[0] - exact).norm()
    assert with_far < 0.2 * without


def test_far_field_of_fully_attended_nodes_is_empty() -> None:
    nodes = torch.tensor([-1, -1, 0, 0, 1, 1])
    keys, values = random(6, HEAD_DIM), random(6, HEAD_DIM, seed=1)
    queries = random(2, HEAD_DIM, seed=2)
    attended = torch.tensor([True, True, True, True, False, False])
    weights, means = far_field(logits(queries, keys), values, nodes, attended)
    assert torch.isneginf(weights[:, 0]).all()
    assert torch.isfinite(weights[:, 1]).all()
    assert torch.isfinite(means).all()
    output, lse = sparse_attention(queries, keys, values, attended, (weights, means))
    assert torch.isfinite(output).all() and torch.isfinite(lse).all()


def test_far_field_without_nodes_is_empty() -> None:
    attended = torch.ones(3, dtype=torch.bool)
    values = random(3, HEAD_DIM)
    weights, means = far_field(random(2, 3), values, torch.full((3,), -1), attended)
    assert weights.shape == (2, 0)
    assert means.shape == (0, HEAD_DIM)


def filled_engine(index: str, select: str) -> tuple[icecache.Engine, int]:
    """Two KV heads of three query heads over 400 tokens, and their sequence."""
    made = icecache.Engine(
        num_layers=1,
        num_q_heads=6,
        num_kv_heads=2,
        head_dim=HEAD_DIM,
        dtype=torch.float32,
        token_budget=64,
        index=index,
        select=select,
        telemetry="trace",
    )
    seq = made.new_sequence()
    made.append([seq], 0, 2 * random(1, 2, 400, HEAD_DIM), random(1, 2, 400, HEAD_DIM, seed=1))
    made.observe([seq], 0, 0.5 + random(1, 6, 400, HEAD_DIM, seed=2))
    return made, seq


@pytest.mark.parametrize("select", ["token", "page"])
@pytest.mark.parametrize("index", ["tree", "dci", "positional"])
def test_engine_computes_the_formulas_on_what_it_picked(index: str, select: str) -> None:
    """Near and far field of real decode steps: the tokens and nodes of the engine's own trace.

    What a node weighs is the engine's estimate, from sketches of 4 bits: it has to be near.
    """
    made, seq = filled_engine(index, select)
    errors: list[torch.Tensor] = []
    rest_errors: list[torch.Tensor] = []
    for step in range(12):
        new = random(3, 1, 2, 1, HEAD_DIM, seed=10 + step)
        query = 0.5 + random(1, 6, 1, HEAD_DIM, seed=40 + step)
        made.append([seq], 0, 2 * new[0], new[1])
        lse = torch.full((1, 6, 1), torch.nan)
        output = made.attend([seq], 0, query, lse=lse)[0, :, 0].view(2, 3, HEAD_DIM)
        keys, values = made.gather(seq, 0)
        for head in range(2):
            trace = made.trace(seq, 0, head)
            attended = torch.zeros(keys.shape[1], dtype=torch.bool)
            attended[trace.sink + trace.window + trace.selected] = True
            # Those that wait to be sealed are attended besides.
            besides = len(trace.window) - made.config.window_tokens if index == "tree" else 0
            assert int(attended.sum()) - max(besides, 0) <= 64
            nodes = torch.full((keys.shape[1],), -1)
            for page in trace.pages:
                nodes[page.positions] = page.node
            assert bool((attended | (nodes >= 0)).all())  # no token is left out
            scaled = SCALE * query[0].view(2, 3, HEAD_DIM)[head]
            exact, means = far_field(logits(scaled, keys[head]), values[head], nodes, attended)
            weights = torch.tensor([node.weight for node in trace.far_nodes]).T.double()
            assert torch.equal(weights.isneginf(), exact.isneginf())
            errors.append((weights - exact)[exact.isfinite()])
            rest_errors.append(weights.logsumexp(1) - exact.logsumexp(1))
            far = weights, means
            expected, total = sparse_attention(scaled, keys[head], values[head], attended, far)
            torch.testing.assert_close(output[head].double(), expected, rtol=1e-4, atol=1e-5)
            totals = lse.view(2, 3)[head]
            torch.testing.assert_close(totals.double(), total, rtol=1e-5, atol=1e-4)
            # A sink is one more token, with value 0.
            sinks = total + torch.tensor([-3.0, 0.0, 2.0])
            more = torch.cat([weights, sinks[:, None]], 1), torch.cat([means, means[:1] * 0])
            expected, _ = sparse_attention(scaled, keys[head], values[head], attended, more)
            got = with_sinks(output[head][:, None], totals[:, None], sinks)[:, 0]
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
            near = (scaled @ keys[head][attended].T).logsumexp(-1)
            torch.testing.assert_close(torch.tensor(trace.near_lse), near, rtol=1e-4, atol=1e-4)
    of_nodes, of_rest = torch.cat(errors).abs(), torch.cat(rest_errors).abs()
    # Measured: at most 0.70 and 0.33 nats, 0.10 and 0.06 on average; least where candidates are
    # many beside the tokens (index "tree": 0.005 and 0.001).
    assert float(of_nodes.max()) < 1.0 and float(of_nodes.mean()) < 0.15
    assert float(of_rest.max()) < 0.5 and float(of_rest.mean()) < 0.1


def test_engines_agree_in_exact_mode() -> None:
    """The same calls, forks and truncations on both engines, over two layers and ragged rows."""
    shape: dict[str, Any] = {
        "num_layers": 2,
        "num_q_heads": 4,
        "num_kv_heads": 2,
        "head_dim": HEAD_DIM,
    }
    engines = [
        kind(**shape, dtype=torch.float32, **SCARCE, exact=True)
        for kind in (icecache.Engine, ReferenceEngine)
    ]
    seqs = [[made.new_sequence() for _ in range(2)] for made in engines]
    for round_, lengths in enumerate([(40, 3), (1, 1), (17, 30), (1, 2)]):
        for layer in range(2):
            tokens = [random(6, n, HEAD_DIM, seed=8 * round_ + layer + n) for n in lengths]
            outputs = []
            for made, ids in zip(engines, seqs, strict=True):
                keys, values = [t[:2] for t in tokens], [t[2:4] for t in tokens]
                made.append(ids, layer, keys, values)
                outputs.append(made.attend(ids, layer, [t[2:] for t in tokens]))
            for got, expected in zip(*outputs, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        for made, ids in zip(engines, seqs, strict=True):
            twin = made.fork(ids[0])
            made.release(ids[1])
            ids[1] = twin
            made.truncate(ids[0], made.length(ids[0]) - 1)
    for layer in range(2):
        kept = [made.gather(ids[0], layer) for made, ids in zip(engines, seqs, strict=True)]
        assert torch.equal(kept[0][0], kept[1][0])
        assert torch.equal(kept[0][1], kept[1][1])
