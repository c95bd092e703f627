"""Methods with a prefill_budget run over the prompt themselves, and start from what comes of it."""

from __future__ import annotations

from typing import Any

import hf_models
import icecache
import pytest
import torch
from icecache.bench.compare import compare
from icecache.bench.decoder import Decoder
from icecache.bench.engine_session import EngineSession, start_of
from icecache.bench.free_text import write_freely
from icecache.bench.generation_plan import Checkpoints
from icecache.bench.growth import FullLogits, Text, grow
from icecache.bench.methods import Method, find_methods, with_settings
from icecache.bench.prefill import Prefill, prefill, prefill_with_answer
from icecache.bench.quality import Subject, decode_stats
from icecache.bench.runs import OwnRun
from icecache.bench.summary import results
from icecache.bench.writing import Manner, greedy

LENGTH, MOST, BUDGET = 600, 8, 64
WITHIN: dict[str, Any] = {"prefill_budget": 48, "prefill_chunk": 128}


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    """Without and with layers of transformers' own beside the full ones."""
    changes: dict[str, Any] = {"max_position_embeddings": 1024, "initializer_range": 0.1}
    return Decoder(hf_models.build(request.param, **changes))


@pytest.fixture(scope="module")
def made(decoder: Decoder) -> Prefill:
    return prefill_with_answer(decoder, hf_models.prompt(1, LENGTH)[0], MOST, lambda answer: False)


def methods(*names: str) -> list[Method]:
    return with_settings(find_methods(names), WITHIN)


def test_settings_go_to_the_row_that_is_compared() -> None:
    both = methods("full", "icecache", "icecache-prefill")
    assert [method.label for method in both] == ["full", "icecache", "icecache, prefill 48"]
    assert "prefill_budget" not in (both[1].engine_fields or {})
    (alone,) = methods("icecache")
    assert alone.label == "icecache, prefill 48"
    assert alone.with_fields({"prefill_budget": 0}).label == "icecache"
    (named,) = find_methods(["icecache-prefill"])
    assert named.label == "icecache, prefill 1024"


def test_a_session_is_what_the_engine_makes_of_the_prompt(decoder: Decoder, made: Prefill) -> None:
    """As an enabled model makes it."""
    sparse, exact = (
        method.open(decoder, made, BUDGET) for method in methods("icecache-prefill", "icecache")
    )
    assert isinstance(sparse, EngineSession)
    assert start_of(exact, made) is made.start
    icecache.enable(decoder.model, BUDGET, **WITHIN)
    with torch.inference_mode():
        expected = decoder.model(made.tokens[None], logits_to_keep=1).logits[0, -1]
    stats = icecache.stats(decoder.model)
    icecache.disable(decoder.model)
    torch.testing.assert_close(start_of(sparse, made).first_logits, expected, rtol=1e-4, atol=1e-4)
    heads = [sparse.engine.stats(0, head) for head in range(decoder.num_kv_heads)]
    tokens = sum(head.sparse_prompt_tokens for head in heads)
    assert tokens == sum(head.sparse_prompt_tokens for head in next(iter(stats.layers.values())))
    assert tokens > 0


def test_a_budget_above_the_length_changes_nothing(decoder: Decoder, made: Prefill) -> None:
    """Rows with a start of their own stand beside those that share one."""
    fields = {"prefill_budget": 1024}
    chosen = with_settings(find_methods(["icecache", "icecache-prefill"]), fields)
    full, *rows = compare(
        decoder, made, chosen, [2 * LENGTH], [3, 4, 5], MOST, lambda answer: False
    )
    for row in rows:
        assert max(row.kl) < 1e-6 and all(row.agrees) and row.answer == full.answer, row.method
        assert row.gold_nll == pytest.approx(full.gold_nll, abs=1e-5), row.method


def test_compared_methods_write_what_comes_of_their_own_prompt(
    decoder: Decoder, made: Prefill
) -> None:
    def end(answer: list[int]) -> bool:
        return False

    chosen = methods("icecache", "icecache-prefill")
    outcomes = {o.method: o for o in compare(decoder, made, chosen, [BUDGET], [5, 9], MOST, end)}
    sparse = outcomes["icecache, prefill 48"]
    assert 0 < sum(sparse.kl) / made.steps < 0.5
    assert sparse.gold_nll != outcomes["icecache"].gold_nll
    run = OwnRun(decoder)
    run.run(made.tokens)
    texts = write_freely(decoder, made, run, chosen, [BUDGET], Manner(MOST, end, greedy))
    by_method = {text.method: text.written for text in texts}
    for name, outcome in outcomes.items():
        assert by_method[name] == outcome.answer, name


def test_growth_begins_behind_the_methods_own_prompt(decoder: Decoder, made: Prefill) -> None:
    tokens = torch.cat([made.tokens, hf_models.prompt(1, 40, seed=3)[0]])
    run = OwnRun(decoder)
    run.run(made.tokens)
    text = Text(tokens, made, FullLogits(run, tokens))
    chosen = methods("icecache", "icecache-prefill")
    _, exact, sparse = grow(decoder, text, chosen, [BUDGET], Checkpoints(620, 8))
    assert sparse.method == "icecache, prefill 48" and len(sparse.kl) == 40
    assert sparse.kl != exact.kl
    (checkpoint,) = sparse.checkpoints
    assert checkpoint.exact > 0  # what the prompt cost is in the keys and values that are held


def test_quality_tells_them_apart(decoder: Decoder) -> None:
    held = prefill(decoder, hf_models.prompt(1, LENGTH)[0], MOST, end=None)
    stats = decode_stats(
        decoder, Subject("p", held), methods("full", "icecache", "icecache-prefill"), BUDGET
    )
    made: dict[str, Any] = {one.name: one for one in results(stats)}
    sparse = made[f"kl_icecache__prefill_48_{BUDGET}"]
    assert sparse.params["method"] == "icecache, prefill 48"
    assert sparse.value != made[f"kl_{BUDGET}"].value > 0
