"""Layers that attend to what another one has appended, and soft-capped logits, on torch tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from icecache import Engine, InvalidArgument, Phase
from icecache.reference import ReferenceEngine, far_field, soft_cap, sparse_attention

Q_HEADS, KV_HEADS, DIM = 6, 2, 32
SHAPE: dict[str, Any] = {
    "num_layers": 1,
    "num_q_heads": Q_HEADS,
    "num_kv_heads": KV_HEADS,
    "head_dim": DIM,
    "dtype": torch.float32,
}


def random(*size: int, seed: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def packed(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [N, Hq, D], keys and values [N, Hkv, D]."""
    heads = (Q_HEADS, KV_HEADS, KV_HEADS)
    q, k, v = (random(tokens, h, DIM, seed=seed + i) for i, h in enumerate(heads))
    return q, k, v


@pytest.mark.parametrize("last", [Phase.PREFILL, Phase.PROMPT_END, Phase.VERIFY])
def test_packed_rows_without_keys_attend_only(last: Phase) -> None:
    """Whatever phase the call has that appends them."""
    made, reference = Engine(**SHAPE, token_budget=64), ReferenceEngine(**SHAPE)
    seqs = [made.new_sequence(), made.new_sequence()]
    other = [reference.new_sequence(), reference.new_sequence()]
    firsts, counts = [70, 0], [130, 70]
    q, k, v = packed(200, seed=1)
    out, lse = torch.zeros_like(q), torch.zeros(200, Q_HEADS)
    made.step_packed(seqs, 0, q, k, v, out, firsts, counts, [last] * 2)
    again, _, _ = packed(200, seed=9)
    made.step_packed(seqs, 0, again, None, None, out, firsts, counts, [Phase.PROMPT_END] * 2, lse)
    for seq, first, count in zip(other, firsts, counts, strict=True):
        rows = slice(first, first + count)
        key, value, query = (x[rows].transpose(0, 1)[None] for x in (k, v, again))
        want = torch.zeros(1, Q_HEADS, count)
        expected = reference.step([seq], 0, query, key, value, lse=want)[0]
        torch.testing.assert_close(out[rows].transpose(0, 1), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse[rows].T, want[0], rtol=1e-5, atol=1e-5)
    assert [made.length(seq) for seq in seqs] == [130, 70]
    made.check_integrity()


def test_steps_without_keys_are_within_the_budget() -> None:
    made = Engine(**SHAPE, token_budget=64)
    seq = made.new_sequence()
    q, k, v = packed(300, seed=1)
    out = torch.zeros_like(q)
    made.step_packed([seq], 0, q, k, v, out, [0], [300], [Phase.PREFILL])
    made.step_packed([seq], 0, q, None, None, out, [0], [300], [Phase.PROMPT_END])
    for step in range(3):
        q, k, v = packed(1, seed=10 + 10 * step)
        own, shared, called = (torch.zeros_like(q) for _ in range(3))
        one = [0], [1], [Phase.AUTO]
        made.step_packed([seq], 0, q, k, v, own, *one)
        made.step_packed([seq], 0, 2 * q, None, None, shared, *one)
        called = made.attend([seq], 0, (2 * q).transpose(0, 1)[None])[0, :, 0]
        assert torch.equal(shared[0], called)
        assert not torch.equal(shared, own)
    assert made.stats(0, 0).steps == 9
    assert made.stats(0, 0).dense_steps == 0


def test_keys_without_values_are_refused() -> None:
    made = Engine(**SHAPE)
    seq = made.new_sequence()
    q, k, v = packed(3, seed=1)
    rows = torch.zeros_like(q), [0], [3], [Phase.AUTO]
    for keys, values in ((k, None), (None, v)):
        with pytest.raises(InvalidArgument, match="keys and values must be two tensors, or None"):
            made.step_packed([seq], 0, q, keys, values, *rows)
    with pytest.raises(
        InvalidArgument, match=r"tokens already appended \(0 in sequence 0\), got 3"
    ):
        made.step_packed([seq], 0, q, None, None, *rows)


def test_observed_queries_of_a_chunk_index_nothing() -> None:
    made = Engine(**SHAPE, token_budget=64)
    seq = made.new_sequence()
    q, k, v = (x.transpose(0, 1)[None] for x in packed(300, seed=1))
    made.append([seq], 0, k, v)
    made.observe([seq], 0, q, Phase.PREFILL)
    assert made.memory().index_bytes == 0
    assert made.memory().query_bytes > 0
    made.observe([seq], 0, q)
    assert made.memory().index_bytes > 0


@pytest.mark.parametrize("softcap", [0.5, 4.0, 50.0])
@pytest.mark.parametrize("scale", [1.0, 1e4, 1e20])  # of queries: logits beyond float, too
def test_a_soft_cap_in_exact_attention(softcap: float, scale: float) -> None:
    engines: list[Any] = [
        Engine(**SHAPE, exact=True, logit_softcap=softcap),
        ReferenceEngine(**SHAPE, logit_softcap=softcap),
    ]
    found = []
    for one in engines:
        seq = one.new_sequence()
        results = []
        for tokens in (1, 70, 1, 5):
            q, k, v = (x.transpose(0, 1)[None] for x in packed(tokens, seed=tokens))
            lse = torch.zeros(1, Q_HEADS, tokens)
            large = 1e20 if scale == 1e20 else 1.0  # products that are no floats
            output = one.step([seq], 0, scale * q, large * k, v, lse=lse)
            results += [output, lse]
        found.append(results)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("index", ["tree", "dci", "positional"])
@pytest.mark.parametrize("select", ["token", "page"])
def test_a_soft_cap_within_the_budget(index: str, select: str) -> None:
    softcap = 3.0
    made = Engine(
        **SHAPE,
        logit_softcap=softcap,
        token_budget=64,
        index=index,
        select=select,
        telemetry="trace",
    )
    seq = made.new_sequence()
    made.append([seq], 0, *(2 * random(1, KV_HEADS, 400, DIM, seed=i) for i in (1, 2)))
    made.observe([seq], 0, random(1, Q_HEADS, 400, DIM, seed=3))
    for step in range(8):
        k, v = (2 * random(1, KV_HEADS, 1, DIM, seed=10 + 3 * step + i) for i in range(2))
        q = 4 * random(1, Q_HEADS, 1, DIM, seed=12 + 3 * step)
        output = made.step([seq], 0, q, k, v)[0, :, 0].view(KV_HEADS, -1, DIM)
        keys, values = made.gather(seq, 0)
        for head in range(KV_HEADS):
            trace = made.trace(seq, 0, head)
            attended = torch.zeros(keys.shape[1], dtype=torch.bool)
            attended[trace.sink + trace.window + trace.selected] = True
            nodes = torch.full((keys.shape[1],), -1)
            for page in trace.pages:
                nodes[page.positions] = page.node
            query = made.scale * q[0, :, 0].view(KV_HEADS, -1, DIM)[head].double()
            logits = soft_cap(query @ keys[head].double().T, softcap)
            exact, means = far_field(logits, values[head], nodes, attended)
            weights = torch.tensor([node.weight for node in trace.far_nodes]).T.double()
            assert float((weights.logsumexp(1) - exact.logsumexp(1)).abs().max()) < 0.2
            expected, _ = sparse_attention(
                query, keys[head], values[head], attended, (weights, means), softcap
            )
            torch.testing.assert_close(output[head].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("softcap", [-1.0, float("nan"), float("inf"), 1e-60])
def test_a_soft_cap_that_is_none_is_refused(softcap: float) -> None:
    with pytest.raises(InvalidArgument, match="logit_softcap must be"):
        Engine(**SHAPE, logit_softcap=softcap)
