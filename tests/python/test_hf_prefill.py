"""Prompts within `prefill_budget`: near full attention, however they are cut, whoever is there."""

from __future__ import annotations

from typing import Any

import hf_models
import icecache
import pytest
import torch
from hf_models import Model
from icecache.hf import prompt_chunks
from icecache.hf.prompt_chunks import call_ends

BLOCK = icecache.PREFILL_BLOCK
LENGTH = 11 * BLOCK + 9
# So small that most of the prompt is beyond what its last tokens attend to exactly.
WITHIN: dict[str, Any] = {"token_budget": 64, "prefill_budget": 48, "prefill_chunk": 2 * BLOCK}


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "gpt_oss"])
def model(request: pytest.FixtureRequest) -> Any:
    """With full layers alone, with sliding ones, with sinks."""
    made = hf_models.build(request.param, max_position_embeddings=1024, initializer_range=0.06)
    yield icecache.enable(made, **WITHIN)
    icecache.disable(made)


@pytest.fixture(scope="module")
def whole(model: Model) -> torch.Tensor:
    """Logits [8, 1, V] of a prompt that is fed in one call."""
    return logits(model, hf_models.prompt(1, LENGTH))


def logits(model: Model, ids: torch.Tensor, **settings: Any) -> torch.Tensor:
    """[T, B, V] behind the prompt and behind each token that is written."""
    output = model.generate(
        ids,
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )
    return torch.stack(output.logits)


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Of two ways to compute a prompt. Where rounding decides between two tokens, decode steps
    pick another one."""
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=2e-4)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-3)


def test_prompts_attend_within_the_budget(model: Model, whole: torch.Tensor) -> None:
    stats = icecache.stats(model)
    assert 0.2 < stats.sparse_prompt < 1
    assert stats.total("prompt_tokens") > 0 and stats.total("sparse_prompt_tokens") > 0
    icecache.disable(model)
    expected = logits(model, hf_models.prompt(1, LENGTH))
    icecache.enable(model, **WITHIN)
    full, sparse = expected[0].log_softmax(-1), whole[0].log_softmax(-1)
    kl = (full.exp() * (full - sparse)).sum(-1).mean()
    assert 0 < kl < 0.02


@pytest.mark.parametrize("chunk", [BLOCK, 3 * BLOCK + 10, 11 * BLOCK])
def test_how_a_prompt_is_cut_changes_nothing(model: Model, whole: torch.Tensor, chunk: int) -> None:
    assert_same(logits(model, hf_models.prompt(1, LENGTH), prefill_chunk_size=chunk), whole)
    assert icecache.stats(model).memory.sequences == 0


def test_cuts_elsewhere_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    made = hf_models.build("llama", max_position_embeddings=1024, initializer_range=0.06)
    icecache.enable(made, **WITHIN)
    whole = logits(made, hf_models.prompt(1, LENGTH))
    monkeypatch.setattr(prompt_chunks, "PREFILL_BLOCK", 1)
    got = logits(made, hf_models.prompt(1, LENGTH), prefill_chunk_size=100)
    with pytest.raises(AssertionError):
        assert_same(got, whole)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_do_not_depend_on_their_company(model: Model, side: str) -> None:
    ids = hf_models.prompt(3, LENGTH)
    mask = torch.ones_like(ids)
    padding = slice(0, 37) if side == "left" else slice(LENGTH - 237, LENGTH)
    mask[1, padding] = 0
    ids = ids.masked_fill(mask == 0, 0)
    together = logits(model, ids, attention_mask=mask, prefill_chunk_size=4 * BLOCK)
    for row in (0, 1) if side == "left" else (0, 2):  # behind padding a row predicts other tokens
        alone = logits(model, ids[row : row + 1, mask[row] == 1])
        assert_same(together[:, row], alone[:, 0])
    assert_same(together, logits(model, ids, attention_mask=mask, prefill_chunk_size=LENGTH))


def test_exact_mode_equals_stock(model: Model) -> None:
    ids = hf_models.prompt(1, LENGTH)
    icecache.disable(model)
    expected = logits(model, ids)
    icecache.enable(model, **WITHIN, exact=True)
    got = logits(model, ids, prefill_chunk_size=4 * BLOCK)
    assert icecache.stats(model).sparse_prompt == 0
    icecache.enable(model, **WITHIN)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-4)


def test_a_prefix_is_reused_in_whole_blocks() -> None:
    made = hf_models.build("llama", max_position_embeddings=1024, initializer_range=0.06)
    ids = hf_models.prompt(1, LENGTH)
    icecache.enable(made, **WITHIN)
    cold = logits(made, ids)
    icecache.enable(made, **WITHIN, reuse_prefixes=True)
    logits(made, ids[:, : 5 * BLOCK + 7])
    before = icecache.stats(made).total("prompt_tokens")
    warm = logits(made, ids)
    heads = sum(len(heads) for heads in icecache.stats(made).layers.values())
    assert icecache.stats(made).total("prompt_tokens") - before == heads * (LENGTH - 5 * BLOCK)
    full, other = cold[0].log_softmax(-1), warm[0].log_softmax(-1)
    assert (full.exp() * (full - other)).sum(-1).mean() < 0.01  # other segments, other summaries


def test_what_is_not_supported_is_refused() -> None:
    made = hf_models.model("llama")
    with pytest.raises(icecache.InvalidArgument, match="lossless: expected prefill_budget=0"):
        icecache.enable(made, lossless=True, prefill_budget=64)
    with pytest.raises(icecache.InvalidArgument, match=r"prefill_budget.*index=tree"):
        icecache.enable(made, index="dci", prefill_budget=64)
    with pytest.raises(icecache.InvalidArgument, match="prefill_budget"):
        icecache.enable(made, prefill_budget="many")
    shares = hf_models.model("gemma3n_text")
    with pytest.raises(icecache.InvalidArgument, match=r"prefill_budget.*share keys and values"):
        icecache.enable(shares, prefill_budget=64)
    with pytest.raises(icecache.InvalidArgument, match=r"prefill_budget.*share keys and values"):
        icecache.IceCache(shares.config, prefill_budget=64)


def test_calls_end_at_whole_blocks_of_each_row() -> None:
    real = torch.ones(2, 10 * BLOCK, dtype=torch.bool)
    every = [*range(2 * BLOCK, 10 * BLOCK + 1, 2 * BLOCK)]
    assert call_ends(real, 0, 2 * BLOCK) == every
    assert call_ends(real, 0, 2 * BLOCK + 63) == every
    # A cache that ends within a block, and a chunk below one.
    assert call_ends(real, 10, 2 * BLOCK) == every
    assert call_ends(real[:, : 2 * BLOCK], 10, 5) == [BLOCK, 2 * BLOCK]
    # Padding of a multiple of the block, of something else, and behind a row's end.
    real[1, :BLOCK] = False
    assert call_ends(real, 0, 2 * BLOCK) == every
    real[1, : BLOCK + 1] = False
    assert call_ends(real, 0, 2 * BLOCK)[0] == BLOCK and len(call_ends(real, 0, 2 * BLOCK)) == 2
    real[1], real[1, 5 * BLOCK + 3 :] = True, False
    assert call_ends(real, 0, 2 * BLOCK) == every
