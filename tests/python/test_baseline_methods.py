"""Each method of the benchmarks by what its paper says, and by kvpress where that has it."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from baselines import (
    BUDGET,
    DIM,
    GROUP,
    HEADS,
    LAYERS,
    LENGTH,
    SCALE,
    STEPS,
    decode,
    needle_prefill,
    open_by_name,
    prefill_of,
    random_prefill,
    random_tokens,
)
from icecache.bench.baselines.arkvale import ArkValeSession
from icecache.bench.baselines.budget import SINK, near_tokens, take_fitting
from icecache.bench.baselines.h2o import H2OSession
from icecache.bench.baselines.layer_reuse import LayerReuseSession, search_layers
from icecache.bench.baselines.magicpig import MagicPIGSession
from icecache.bench.baselines.omnikv import OmniKVSession, filter_layers
from icecache.bench.baselines.pqcache import PQCacheSession
from icecache.bench.baselines.retroinfer import RetroInferSession
from icecache.bench.baselines.snapkv import SnapKVSession
from icecache.bench.baselines.tensor_session import Selection, Step, TensorSession
from icecache.bench.oracles import FullSession, RecentSession, TopSession
from icecache.bench.prefill import Prefill


@pytest.mark.parametrize("session", [H2OSession, SnapKVSession])
def test_eviction_keeps_what_the_last_queries_looked_at(session: type[TensorSession]) -> None:
    prefill, asking = needle_prefill()
    looked_at = prefill_of(
        prefill.keys, prefill.values, asking[0][0][0].expand(LAYERS, -1, LENGTH, -1)
    )
    found = decode(session(looked_at, 60, SCALE), asking)
    torch.testing.assert_close(found, torch.full_like(found, 5.0), atol=0.05, rtol=0)
    looked_away = prefill_of(prefill.keys, prefill.values, -looked_at.queries)
    lost = decode(session(looked_away, 60, SCALE), asking)
    assert float(lost.abs().max()) < 1.0


def test_top_tokens_have_most_mass_and_heads_may_differ() -> None:
    prefill, tokens = random_prefill(), random_tokens()
    sessions = [
        RecentSession(prefill, BUDGET, SCALE),
        TopSession(prefill, BUDGET, SCALE),
        TopSession(prefill, BUDGET, SCALE, per_head=True),
    ]
    for session in sessions:
        decode(session, tokens)
    masses = [session.mass() for session in sessions]
    assert masses == sorted(masses)
    attended = sessions[2].attended[0]
    assert attended.shape == (HEADS, GROUP, LENGTH + STEPS)
    assert not torch.equal(attended[:, 0], attended[:, 1])


def causal_attention(prefill: Prefill, layer: int) -> torch.Tensor:
    """[Hq, L, L] of a prefill that keeps the queries of all its tokens."""
    keys = prefill.keys[layer].repeat_interleave(GROUP, 0)
    scores = SCALE * prefill.queries[layer] @ keys.mT
    later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return torch.softmax(scores.masked_fill(later, -torch.inf), -1)


def test_h2o_evicts_one_by_one_by_accumulated_attention() -> None:
    prefill, tokens, budget = random_prefill(), random_tokens(), 30
    session = H2OSession(prefill, budget, SCALE)
    received = causal_attention(prefill, 0).unflatten(0, (HEADS, GROUP)).sum((1, 2))
    kept: list[dict[int, float]] = [dict(enumerate(row)) for row in received.tolist()]
    keys = prefill.keys[0]
    for step in range(-1, STEPS):
        length = LENGTH + step + 1
        for head in range(HEADS):
            if step >= 0:
                kept[head][length - 1] = 0.0
            while len(kept[head]) > budget:
                old = [token for token in kept[head] if token < length - budget // 2]
                del kept[head][min(old, key=kept[head].__getitem__)]
        if step < 0:
            continue
        decode(session, [tokens[step]])
        queries, key, _ = tokens[step][0]
        keys = torch.cat([keys, key], 1)
        for head in range(HEADS):
            alive = sorted(kept[head])
            assert session.attended[0][head, 0].nonzero()[:, 0].tolist() == alive
            group = queries.unflatten(0, (HEADS, GROUP))[head, :, 0]
            weights = torch.softmax(SCALE * group @ keys[head, alive].T, -1).sum(0)
            for token, weight in zip(alive, weights.tolist(), strict=True):
                kept[head][token] += weight


def test_snapkv_keeps_the_votes_of_the_window() -> None:
    prefill, budget = random_prefill(), 50
    session = SnapKVSession(prefill, budget, SCALE)
    session.attend(0, *random_tokens(1)[0][0])
    seen = causal_attention(prefill, 0)[:, -32:, :-32].mean(1)
    around = torch.stack([seen[:, max(0, i - 3) : i + 4].amax(1) for i in range(LENGTH - 32)], 1)
    votes = around.unflatten(0, (HEADS, GROUP)).mean(1)
    attended = session.attended[0][:, 0]
    assert bool(attended[:, LENGTH - 32 :].all())
    chosen = attended[:, : LENGTH - 32]
    assert chosen.sum(-1).tolist() == [budget - 33] * HEADS
    for head in range(HEADS):
        left = votes[head, ~chosen[head]]
        assert float(votes[head, chosen[head]].min()) > float(left.max()) - 1e-6


def test_snapkv_evicts_votes_before_window_and_decoded_tokens() -> None:
    session = SnapKVSession(random_prefill(), 40, SCALE)
    decode(session, random_tokens(7))
    attended = session.attended[0]
    assert attended[:, 0, LENGTH - 32 :].all() and int(attended[:, 0, : LENGTH - 32].sum()) == HEADS
    decode(session, random_tokens(5))
    assert attended.shape[-1] == LENGTH + 7
    assert session.attended[0][:, 0, LENGTH + 12 - 40 :].all()


@pytest.fixture
def kvpress(monkeypatch: pytest.MonkeyPatch) -> Any:
    """kvpress, without what importing it does to the attention functions of transformers."""
    patch: Any = ModuleType("kvpress.attention_patch")
    patch.patch_attention_functions = lambda: None
    monkeypatch.setitem(sys.modules, patch.__name__, patch)
    return pytest.importorskip("kvpress", exc_type=ImportError)


def test_snapkv_keeps_the_tokens_that_kvpress_keeps(kvpress: Any) -> None:
    prefill, budget = random_prefill(), 60
    session = SnapKVSession(prefill, budget, SCALE, window=32, kernel=7, pooling="mean")
    decode(session, random_tokens(1))
    press = kvpress.SnapKVPress(window_size=32, kernel_size=7)
    for layer in range(LAYERS):
        scores = press_scores(press, prefill, causal_attention(prefill, layer), layer)
        assert_kept(scores, session.attended[layer][:, 0], budget)


def test_streaming_keeps_the_tokens_that_kvpress_keeps(kvpress: Any) -> None:
    prefill, budget = random_prefill(), 60
    session = RecentSession(prefill, budget, SCALE)
    decode(session, random_tokens(1))
    # A ratio a little below, so that the product is not rounded down to one token less.
    press = kvpress.StreamingLLMPress(1 - (budget - 1 + 0.01) / LENGTH, n_sink=SINK)
    scores = press_scores(press, prefill, None, 0)
    assert_kept(scores, session.attended[0][:, 0], budget)


def press_scores(
    press: Any, prefill: Prefill, attention: torch.Tensor | None, layer: int
) -> torch.Tensor:
    """[Hkv, L]; larger is kept."""
    config = SimpleNamespace(num_attention_heads=HEADS * GROUP, num_key_value_heads=HEADS)
    module = SimpleNamespace(config=config, head_dim=DIM)
    keys, values = prefill.keys[layer, None], prefill.values[layer, None]
    hidden = torch.empty(1, prefill.length, 1)
    seen = None if attention is None else attention[None]
    scores: torch.Tensor = press.score(module, hidden, keys, values, seen, {})
    return scores[0]


def assert_kept(scores: torch.Tensor, attended: torch.Tensor, budget: int) -> None:
    """`attended` [Hkv, L + 1] in the first step: the budget less one of the prompt, and itself."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept.scatter_(-1, scores.topk(budget - 1, -1).indices, True)
    assert torch.equal(attended[:, :-1], kept)


def test_groups_are_taken_while_they_fit() -> None:
    worth = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    sizes = torch.tensor([[9, 5, 9, 4], [9, 5, 9, 1]])
    taken = take_fitting(worth, sizes, 13).tolist()
    assert taken == [[True, False, False, True], [False, False, True, True]]
    assert not take_fitting(worth, sizes, 0).any()


def test_arkvale_digests_of_decoded_tokens_are_those_of_a_longer_prompt() -> None:
    tokens = random_tokens(40)
    long = random_prefill()
    added = [
        torch.stack([torch.cat([t[i] for t in row], 1) for row in zip(*tokens, strict=True)])
        for i in (1, 2)
    ]
    short = ArkValeSession(long, BUDGET, SCALE)
    decode(short, tokens)
    longer = prefill_of(
        torch.cat([long.keys, added[0]], 2), torch.cat([long.values, added[1]], 2), long.queries
    )
    following = random_tokens(1, seed=9)
    other = ArkValeSession(longer, BUDGET, SCALE)
    torch.testing.assert_close(decode(short, following), decode(other, following))
    assert torch.equal(torch.stack(short.attended), torch.stack(other.attended))


def test_omnikv_filters_pick_for_the_layers_that_follow() -> None:
    assert filter_layers(32) == {0, 1, 2, 8, 18}
    assert filter_layers(30) == {0, 1, 2, 8, 17}
    assert filter_layers(1) == {0}
    layers = 12  # filters: 0 and 1, 3, 7
    assert filter_layers(layers) == {0, 1, 3, 7}
    prefill, tokens = random_prefill(layers=layers), random_tokens(2, layers=layers)
    session = OmniKVSession(prefill, BUDGET, SCALE)
    decode(session, tokens)
    picks = session.attended
    assert all(torch.equal(one[0], one[1]) for one in picks)
    for filter_layer, following in ((1, (2,)), (3, (4, 5, 6)), (7, (8, 9, 10, 11))):
        assert not torch.equal(picks[filter_layer - 1], picks[filter_layer])
        assert all(torch.equal(picks[layer], picks[filter_layer]) for layer in following)
    dense = OmniKVSession(prefill, BUDGET, SCALE, dense_filters=True)
    decode(dense, tokens)
    counts = [int(one.sum()) // HEADS for one in dense.attended]
    assert counts == [LENGTH + 2 if layer in (0, 1, 3, 7) else BUDGET for layer in range(layers)]


def test_layer_reuse_hands_on_what_a_layer_picked() -> None:
    assert search_layers(12, 4) == [0, 1, 2, 6, 10]
    assert search_layers(2, 4) == [0, 1]
    prefill, tokens = random_prefill(layers=7), random_tokens(2, layers=7)
    session = LayerReuseSession(prefill, BUDGET, SCALE)
    decode(session, tokens)
    picks = session.attended
    for before, layer in ((0, 1), (1, 2), (2, 6)):
        assert not torch.equal(picks[before], picks[layer])
    assert all(torch.equal(picks[layer], picks[2]) for layer in (3, 4, 5))
    assert int(torch.stack(picks).sum(-1).max()) <= BUDGET
    session.close()


def test_layer_reuse_with_a_search_in_every_layer_is_the_papers_index() -> None:
    prefill, tokens = random_prefill(), random_tokens()
    sessions = [
        LayerReuseSession(prefill, BUDGET, SCALE, reuse=1),
        open_by_name("paper", prefill, BUDGET),
    ]
    output, truth = (decode(session, tokens) for session in sessions)
    torch.testing.assert_close(output, truth, atol=1e-5, rtol=1e-5)
    assert sessions[0].bytes_read() == sessions[1].bytes_read()
    for session in sessions:
        session.close()


def test_pqcache_with_a_centroid_for_every_key_is_exact() -> None:
    prefill, tokens = random_prefill(SINK + 64), random_tokens(1)
    exact, approximate = TopSession(prefill, 40, SCALE), PQCacheSession(prefill, 40, SCALE)
    decode(exact, tokens)
    decode(approximate, tokens)
    # The softmax that it sums leaves out sink and window, so that groups may weigh heads otherwise.
    both = torch.stack(exact.attended) & torch.stack(approximate.attended)
    assert int(both.sum()) >= 0.9 * 40 * HEADS * LAYERS


class RecordedMagicPIG(MagicPIGSession):
    """Keeps what it last selected."""

    def select(self, step: Step) -> Selection:
        self.selection = super().select(step)
        return self.selection


def test_magicpig_samples_with_the_probability_that_it_divides_by() -> None:
    prefill, tokens, seeds = random_prefill(layers=1), random_tokens(1, layers=1), 300
    sampled = torch.zeros(HEADS, GROUP, LENGTH + 1)
    for seed in range(seeds):
        session = RecordedMagicPIG(prefill, LENGTH - 1, SCALE, bits=3, tables=6, seed=seed)
        decode(session, tokens)
        sampled += session.selection.attended
    log_scale = session.selection.log_scale
    assert log_scale is not None
    probability = (-log_scale).exp()
    far = ~near_tokens(LENGTH + 1, 32)
    error = (sampled / seeds - probability)[..., far]
    deviation = (probability * (1 - probability) / seeds).sqrt()[..., far]
    assert float((error / deviation).abs().max()) < 5
    assert float(error.mean().abs()) < 0.005
    assert float(probability[..., far].max()) > 2 * float(probability[..., far].min())


def test_magicpig_is_unbiased_where_equal_weights_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    prefill, tokens, seeds = random_prefill(layers=1), random_tokens(1, layers=1), 200
    truth = decode(FullSession(prefill, 0, SCALE), tokens)

    def mean_error() -> tuple[float, float]:
        outputs = torch.stack(
            [
                decode(MagicPIGSession(prefill, 70, SCALE, bits=4, seed=s), tokens)
                for s in range(seeds)
            ]
        )
        single = (outputs - truth).flatten(1).norm(dim=1).mean()
        return float((outputs.mean(0) - truth).norm() / truth.norm()), float(single / truth.norm())

    bias, single = mean_error()
    assert bias < 0.35 * single
    monkeypatch.setattr(
        MagicPIGSession, "_log_probability", lambda _, step, used: torch.zeros_like(step.scores)
    )
    assert mean_error()[0] > 2 * bias


def test_retroinfer_estimates_equal_members_exactly() -> None:
    prefill, tokens = random_prefill(), random_tokens(1)
    keys, values = prefill.keys.clone(), prefill.values.clone()
    far = slice(SINK, LENGTH - 15)  # all that has left the window at the first step
    kinds = 8 * torch.eye(DIM)[torch.arange(LENGTH) % 3][far]
    keys[:, :, far], values[:, :, far] = kinds, kinds.flip(-1)
    same = prefill_of(keys, values, prefill.queries)
    session = RetroInferSession(same, 40, SCALE)
    truth = decode(FullSession(same, 0, SCALE), tokens)
    torch.testing.assert_close(decode(session, tokens), truth, atol=1e-4, rtol=1e-4)
    assert session.mass() < 0.9


def test_retroinfer_counts_every_token_once_while_the_window_moves() -> None:
    prefill, tokens = random_prefill(), random_tokens(30)
    session = RetroInferSession(prefill, 60, SCALE)
    error = decode(session, tokens) - decode(FullSession(prefill, 0, SCALE), tokens)
    dropped = decode(RecentSession(prefill, 60, SCALE), tokens)
    dropped = dropped - decode(FullSession(prefill, 0, SCALE), tokens)
    assert float(error.norm()) < float(dropped.norm())
    queries = torch.zeros(HEADS * GROUP, 1, DIM)
    # Queries of zero weigh all tokens alike, however they are clustered.
    zero = [(queries, token[1], token[2]) for token in tokens[-1]]
    mean = decode(FullSession(prefill, 0, SCALE), [*tokens, zero])[-1]
    torch.testing.assert_close(decode(session, [zero])[0], mean, atol=1e-5, rtol=1e-5)
