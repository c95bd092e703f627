"""Many methods on one prefill: what comes out is what each gives alone."""

from __future__ import annotations

import math

import hf_models
import pytest
import torch
from icecache import InvalidArgument
from icecache.bench.compare import Outcome, compare
from icecache.bench.decoder import Decoder
from icecache.bench.methods import Method, find_methods
from icecache.bench.prefill import Prefill, prefill_with_answer
from icecache.bench.quality import row_by_row

LENGTH, MOST = 300, 12


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(hf_models.model("llama"))


@pytest.fixture(scope="module")
def made(decoder: Decoder) -> Prefill:
    return prefill_with_answer(decoder, hf_models.prompt(1, LENGTH)[0], MOST, lambda answer: False)


def outcomes(
    decoder: Decoder, made: Prefill, methods: list[Method], budget: int, gold: list[int]
) -> dict[str, Outcome]:
    every = compare(decoder, made, methods, [budget], gold, MOST, lambda answer: False)
    return {one.method: one for one in every}


def test_a_prefill_ends_where_its_answer_does(decoder: Decoder, made: Prefill) -> None:
    tokens = hf_models.prompt(1, LENGTH)[0]
    end = made.continuation.tolist()[4]
    shorter = prefill_with_answer(decoder, tokens, MOST, lambda answer: answer[-1] == end)
    first = made.continuation.tolist().index(end)
    assert shorter.continuation.tolist() == made.continuation.tolist()[: first + 1]
    assert shorter.steps == first
    torch.testing.assert_close(shorter.first_logits, made.first_logits)
    one = prefill_with_answer(decoder, tokens, 1, lambda answer: False)
    assert one.steps == 0 and one.continuation.tolist() == made.continuation.tolist()[:1]


def test_a_budget_above_the_length_is_full_attention(decoder: Decoder, made: Prefill) -> None:
    methods = find_methods(["icecache", "topk", "streaming", "quest"])
    by_method = outcomes(decoder, made, methods, 2 * LENGTH, [3, 4, 5])
    full = by_method.pop("full")
    assert full.answer == made.continuation.tolist() and full.budget == 0
    for name, one in by_method.items():
        assert len(one.kl) == made.steps and max(one.kl) < 1e-6, name
        assert all(one.agrees) and one.answer == full.answer, name
        assert one.gold_nll == pytest.approx(full.gold_nll, abs=1e-5), name
        assert torch.tensor(one.output_error).max() < 1e-4, name
        assert one.bytes_read > 0 and one.step_s > 0, name


def test_the_likelihood_of_the_right_answer_is_the_models(decoder: Decoder, made: Prefill) -> None:
    gold = [9, 4, 7, 7]
    full = outcomes(decoder, made, [], 64, gold)["full"]
    with torch.inference_mode():
        tokens = torch.cat([made.tokens, torch.tensor(gold)])
        logits = decoder.model(tokens[None]).logits[0, LENGTH - 1 : -1]
    wanted = torch.nn.functional.cross_entropy(logits.float(), torch.tensor(gold))
    assert full.gold_nll == pytest.approx(float(wanted), abs=1e-4)


def test_a_method_that_differs_writes_its_own_answer(decoder: Decoder, made: Prefill) -> None:
    (method,) = find_methods(["streaming"])
    one = outcomes(decoder, made, [method], 24, [])["streaming"]
    session = method.open(decoder, made, 24)
    answer = made.continuation.tolist()[:1]
    branch = made.branch(decoder, 1)
    for _ in range(MOST - 1):
        logits = branch.run(torch.tensor([answer[-1:]]), row_by_row([session]))
        answer.append(int(logits.argmax()))
    assert one.answer == answer
    assert len(one.kl) == made.steps and all(math.isfinite(kl) for kl in one.kl)
    assert one.gold_nll is None
    assert answer != made.continuation.tolist(), "choose a budget at which it differs"


def test_a_budget_below_what_a_method_needs(decoder: Decoder, made: Prefill) -> None:
    with pytest.raises(InvalidArgument, match="budget"):
        outcomes(decoder, made, find_methods(["streaming"]), 4, [])
