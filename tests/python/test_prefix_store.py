"""Prompts that begin alike are prefilled once, with the answers of a cold run."""

from __future__ import annotations

import random

import pytest
import torch
from icecache import Engine, InvalidArgument, Phase, PrefixStore
from icecache.prefix_store import PrefixTable

LAYERS, Q_HEADS, KV_HEADS, DIM, VOCABULARY = 2, 4, 2, 32, 50


def make_engine(**config: object) -> Engine:
    return Engine(
        num_layers=LAYERS,
        num_q_heads=Q_HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        dtype=torch.float32,
        **config,  # type: ignore[arg-type]
    )


def rows(tokens: list[int], heads: int, seed: int) -> torch.Tensor:
    """[1, heads, T, D], by token alone."""
    table = torch.randn(VOCABULARY, heads, DIM, generator=torch.Generator().manual_seed(seed))
    return table[torch.tensor(tokens)].transpose(0, 1)[None]


def feed(engine: Engine, seq: int, tokens: list[int], phase: Phase = Phase.AUTO) -> torch.Tensor:
    """The outputs of the last layer."""
    for layer in range(LAYERS):
        q, k, v = (
            rows(tokens, heads, 10 * layer + i)
            for i, heads in enumerate((Q_HEADS, KV_HEADS, KV_HEADS))
        )
        outputs = engine.step([seq], layer, q, k, v, phase)
    return outputs[0]


def some(generator: random.Random, count: int) -> list[int]:
    return [generator.randrange(VOCABULARY) for _ in range(count)]


def test_many_questions_on_one_document_get_the_answers_of_cold_runs() -> None:
    generator = random.Random(1)
    engine, cold = make_engine(exact=True), make_engine(exact=True)
    store = PrefixStore(engine)
    document = some(generator, 400)
    for number in range(5):
        prompt = [*document, number, *some(generator, 30)]
        seq, known = store.open(prompt)
        assert known == (400 if number else 0)
        got = feed(engine, seq, prompt[known:], Phase.PROMPT_END)
        alone = cold.new_sequence()
        expected = feed(cold, alone, prompt, Phase.PROMPT_END)[:, known:]
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
        answer = some(generator, 3)
        for token in answer:
            torch.testing.assert_close(
                feed(engine, seq, [token]), feed(cold, alone, [token]), atol=2e-5, rtol=2e-5
            )
        store.keep(seq, prompt + answer)
    assert len(store) == 5
    memory = engine.memory()
    assert memory.retained_bytes == memory.pool_bytes < 2.2 * 2 * LAYERS * KV_HEADS * DIM * 4 * 434
    store.clear()
    assert len(store) == 0 and engine.pool_bytes() == 0


def test_a_conversation_keeps_one_sequence() -> None:
    generator = random.Random(2)
    engine = make_engine()
    store = PrefixStore(engine)
    said: list[int] = []
    for turn in range(4):
        prompt = said + some(generator, 40)
        seq, known = store.open(prompt)
        assert known == len(said)
        feed(engine, seq, prompt[known:], Phase.PROMPT_END)
        answer = some(generator, 5)
        for token in answer:
            feed(engine, seq, [token])
        said = prompt + answer
        store.keep(seq, said)
        assert len(store) == 1 and engine.memory().sequences == 1, turn
    # The whole of it once more: the last token is computed anew.
    assert store.open(said)[1] == len(said) - 1


def test_texts_of_different_spaces_share_nothing() -> None:
    engine = make_engine()
    store = PrefixStore(engine)
    prompt = some(random.Random(3), 100)
    seq, _ = store.open(prompt, space="alice")
    feed(engine, seq, prompt)
    store.keep(seq, prompt, space="alice")
    assert store.open(prompt)[1] == store.open(prompt, space="bob")[1] == 0
    assert store.open(prompt, space="alice")[1] == 99


def test_what_the_engine_has_ended_is_computed_anew() -> None:
    engine = make_engine(host_memory=100 * 2 * 16 * DIM * 4)
    store = PrefixStore(engine)
    generator = random.Random(4)
    prompts = [some(generator, 150) for _ in range(6)]
    for prompt in prompts:
        seq, known = store.open(prompt)
        assert known == 0
        feed(engine, seq, prompt, Phase.PROMPT_END)
        store.keep(seq, prompt)
    assert engine.memory().evicted_sequences > 0
    assert store.open(prompts[-1])[1] == 149
    assert store.open(prompts[0])[1] == 0
    store.clear()


def test_refusals_change_nothing() -> None:
    engine = make_engine()
    store = PrefixStore(engine)
    prompt = some(random.Random(5), 50)
    seq, known = store.open([])
    assert known == 0
    feed(engine, seq, prompt)
    with pytest.raises(InvalidArgument, match=r"tokens: expected as many as .*\[50\].* got 49"):
        store.keep(seq, prompt[:-1])
    with pytest.raises(InvalidArgument, match="tokens must be numbers of 32 bits, got 4294967296"):
        store.keep(seq, [2**32] * 50)
    assert len(store) == 0
    assert engine.length(seq) == 50
    engine.release(seq)
    with pytest.raises(InvalidArgument, match="block_tokens must be at least 1, got 0"):
        PrefixStore(engine, block_tokens=0)
    with pytest.raises(TypeError, match="hashes must be bytes, got str"):
        PrefixTable(4).text([1], hashes=["a"])  # type: ignore[list-item]


def test_whole_blocks_are_shared_of_prompts_within_a_budget() -> None:
    generator = random.Random(5)
    document = some(generator, 300)
    for exact, common in ((False, 256), (True, 300)):
        engine = make_engine(token_budget=64, prefill_budget=48, prefill_chunk=128, exact=exact)
        store = PrefixStore(engine)
        for hit in (0, common):
            prompt = [*document, 1 + bool(hit), *some(generator, 20)]
            seq, known = store.open(prompt)
            assert known == hit
            feed(engine, seq, prompt[known:], Phase.PROMPT_END)
            store.keep(seq, prompt)
        assert store.open(document[:40])[1] == (39 if exact else 0)
