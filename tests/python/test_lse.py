"""The log-sum-exp that attention gives on request, and the attention sinks that it serves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from icecache import Engine, InvalidArgument, Phase
from icecache.reference import ReferenceEngine, with_sinks

Q_HEADS, KV_HEADS, DIM = 6, 2, 32
SHAPE: dict[str, Any] = {
    "num_layers": 1,
    "num_q_heads": Q_HEADS,
    "num_kv_heads": KV_HEADS,
    "head_dim": DIM,
}


def random(*size: int, seed: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def rows(batch: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [B, Hq, T, D], keys and values [B, Hkv, T, D]."""
    return (
        random(batch, Q_HEADS, tokens, DIM, seed=seed),
        random(batch, KV_HEADS, tokens, DIM, seed=seed + 1),
        random(batch, KV_HEADS, tokens, DIM, seed=seed + 2),
    )


def engine(**settings: Any) -> Engine:
    return Engine(**SHAPE, **{"dtype": torch.float32, "token_budget": 64, **settings})


def nothing(*size: int) -> torch.Tensor:
    return torch.full(size, torch.nan)


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_attention_gives_that_of_all_tokens(tokens: int, dtype: torch.dtype) -> None:
    made, reference = engine(exact=True, dtype=dtype), ReferenceEngine(**SHAPE, dtype=dtype)
    found = []
    for one in (made, reference):
        seqs = [one.new_sequence(), one.new_sequence()]
        lse = nothing(2, Q_HEADS, tokens)
        q, k, v = (x.to(dtype) for x in rows(2, tokens, seed=1))
        one.step(seqs, 0, q, k, v, Phase.AUTO, lse)
        later = nothing(2, Q_HEADS, 1)
        q, k, v = (x.to(dtype) for x in rows(2, 1, seed=5))
        one.step(seqs, 0, q, k, v, lse=later)
        again = [nothing(Q_HEADS, 1) for _ in seqs]
        one.attend(seqs, 0, list(q), lse=again)
        torch.testing.assert_close(torch.stack(again), later)
        found.append((lse, later))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_what_is_attended_does_not_depend_on_it() -> None:
    outputs = []
    for asks in (False, True):
        made = engine()
        seq = made.new_sequence()
        for tokens, seed in ((300, 1), (1, 5), (4, 9)):
            lse = nothing(1, Q_HEADS, tokens) if asks else None
            outputs.append(made.step([seq], 0, *rows(1, tokens, seed), lse=lse))
            assert lse is None or bool(lse.isfinite().all())
    assert all(torch.equal(a, b) for a, b in zip(outputs[:3], outputs[3:], strict=True))


def test_packed_rows_have_it_in_place_and_others_stay() -> None:
    made, twin = engine(), engine()
    seqs = [made.new_sequence(), made.new_sequence()]
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in rows(1, 9, seed=1))
    outputs, lse = torch.zeros_like(q), nothing(Q_HEADS, 9).T  # strided
    phases = [Phase.PREFILL, Phase.PROMPT_END]
    made.step_packed(seqs, 0, q, k, v, outputs, [5, 1], [4, 3], phases, lse)
    for first, count in ((5, 4), (1, 3)):
        x, y, z = (r[first : first + count].transpose(0, 1)[None] for r in (q, k, v))
        expected = nothing(1, Q_HEADS, count)
        twin.step([twin.new_sequence()], 0, x, y, z, lse=expected)
        assert torch.equal(lse[first : first + count].T, expected[0])
    assert bool(lse[[0, 4]].isnan().all())


def test_sinks_take_part_in_the_one_softmax() -> None:
    """Against an engine in which each sink is a token of value 0."""
    sinks = torch.tensor([-2.0, 0.0, 1.0, 3.0, 6.0, 9.0])
    made = engine(exact=True)
    wide = Engine(
        **{**SHAPE, "head_dim": DIM + 8},
        dtype=torch.float32,
        scale=made.scale,
        exact=True,
    )

    def widen(x: torch.Tensor, last: torch.Tensor | float) -> torch.Tensor:
        padded = torch.nn.functional.pad(x, (0, 8))
        padded[..., DIM] = last
        return padded

    seq, other = made.new_sequence(), wide.new_sequence()
    token = widen(torch.zeros(1, KV_HEADS, 1, DIM), 1.0)
    wide.append([other], 0, token, torch.zeros_like(token))
    for tokens, seed in ((64, 1), (1, 5)):
        q, k, v = rows(1, tokens, seed)
        lse = nothing(1, Q_HEADS, tokens)
        output = with_sinks(made.step([seq], 0, q, k, v, lse=lse)[0], lse[0], sinks)
        wide.append([other], 0, widen(k, 0.0), widen(v, 0.0))
        logits = (sinks / made.scale)[None, :, None]
        expected = wide.attend([other], 0, widen(q, logits))[0, ..., :DIM]
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_numbers_beyond_float_and_no_numbers() -> None:
    made = engine(exact=True)
    seq = made.new_sequence()
    q, k, v = rows(1, 3, seed=1)
    q[0, 0], q[0, 1], q[0, 2, 1, 4] = 3e38, 1e30, torch.nan
    k[:] = 2e38 * k.sign()
    lse = nothing(1, Q_HEADS, 3)
    output = made.step([seq], 0, q, k, v, lse=lse)
    assert bool(lse[0, :2].isinf().all()) and bool(output[0, :2].isfinite().all())
    assert lse[0, 2].isnan().tolist() == [False, True, False]
    assert output[0, 2, :, 0].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("lse", "named"),
    [
        (nothing(1, Q_HEADS, 2), r"lse must be \[6, 3, 1\] as queries, got \[6, 2, 1\]"),
        (nothing(1, Q_HEADS - 1, 3), r"lse must be \[6, 3, 1\] as queries, got \[5, 3, 1\]"),
        (nothing(Q_HEADS, 3), r"lse must be .*\[B, H, T\]"),
        (nothing(2, Q_HEADS, 3), r"lse must have one entry per sequence \(1\), got 2"),
        (nothing(1, Q_HEADS, 3).double(), r"lse must be torch\.float32, got torch\.float64"),
        (nothing(1, Q_HEADS, 1).expand(1, Q_HEADS, 3), "lse must have memory of its own"),
        (7, "lse must be .*got int"),
    ],
)
def test_refuses_what_it_cannot_write_and_changes_nothing(lse: Any, named: str) -> None:
    made = engine()
    seq = made.new_sequence()
    q, k, v = rows(1, 3, seed=1)
    with pytest.raises(InvalidArgument, match=named):
        made.step([seq], 0, q, k, v, lse=lse)
    assert made.length(seq) == 0


def test_refuses_memory_of_an_input() -> None:
    made = engine()
    seq = made.new_sequence()
    q, k, v = rows(1, 3, seed=1)
    with pytest.raises(InvalidArgument, match="lse must not share memory with queries"):
        made.step([seq], 0, q, k, v, lse=q[..., 0])
