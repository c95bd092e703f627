"""IceCache as a cache: rows are forked, cropped and selected as transformers asks."""

from __future__ import annotations

import copy
from typing import Any

import hf_models
import icecache
import pytest
import torch
from hf_engines import CountingEngine, engine, feed, new_cache
from hf_models import Model
from icecache.hf import IceCache
from icecache.hf.support import CACHE


@pytest.fixture(params=["llama", "cohere2"])
def model(request: pytest.FixtureRequest) -> Any:
    """An enabled model; cohere2 has a stock sliding layer in front."""
    made = hf_models.model(request.param)
    icecache.enable(made, engine_class=CountingEngine)
    yield made
    icecache.disable(made)


@pytest.mark.parametrize("removed", [-3, torch.tensor(-3)], ids=["int", "tensor"])
def test_crop_forgets_the_last_tokens(model: Model, removed: int) -> None:
    ids = hf_models.prompt(2, 14)
    cache = new_cache(model)
    cache.activate_past_recording()  # type: ignore[no-untyped-call]
    feed(model, ids, cache)
    feed(model, hf_models.prompt(2, 3, seed=5), cache)
    cache.crop(removed)  # transformers before 5.24 hands over a tensor
    assert cache.get_seq_length() == 14
    assert isinstance(cache.rows.seen, int)
    more = hf_models.prompt(2, 4, seed=6)
    expected = feed(model, torch.cat([ids, more], 1), new_cache(model))[:, -4:]
    torch.testing.assert_close(feed(model, more, cache), expected, rtol=1e-4, atol=1e-4)


def test_crop_counts_padding_per_row() -> None:
    model = hf_models.model("llama")
    icecache.enable(model, engine_class=CountingEngine)
    try:
        cache = new_cache(model)
        batch = hf_models.padded(3, side="right")
        with torch.inference_mode():
            model(**batch, **{CACHE: cache})
        length = hf_models.PROMPT
        assert cache.rows.lengths == [length, length - 6, length - 12]
        cache.crop(-8)
        assert cache.rows.lengths == [length - 8, length - 8, length - 12]
        assert [engine(cache).length(s) for s in cache.rows.sequences] == cache.rows.lengths
    finally:
        icecache.disable(model)


def test_crop_refuses_a_positive_count(model: Model) -> None:
    with pytest.raises(icecache.InvalidArgument, match="minus the number"):
        new_cache(model).crop(3)


def test_reorder_forks_only_rows_used_twice(model: Model) -> None:
    cache = new_cache(model)
    ids = hf_models.prompt(3, 12)
    feed(model, ids, cache)
    before = list(cache.rows.sequences)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    after = cache.rows.sequences
    assert after[:2] == [before[2], before[0]]
    assert engine(cache).forks == 1
    assert engine(cache).memory().sequences == 3
    token = hf_models.prompt(3, 1, seed=3)
    expected = feed(model, torch.cat([ids[[2, 0, 0]], token], 1), new_cache(model))[:, -1:]
    torch.testing.assert_close(feed(model, token, cache), expected, rtol=1e-4, atol=1e-4)


def test_reorder_in_place_moves_nothing(model: Model) -> None:
    cache = new_cache(model)
    feed(model, hf_models.prompt(3, 12), cache)
    cache.reorder_cache(torch.tensor([1, 0, 2]))
    assert engine(cache).forks == 0


def test_repeat_and_select_rows(model: Model) -> None:
    cache = new_cache(model)
    ids = hf_models.prompt(2, 12)
    feed(model, ids, cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2]))
    assert engine(cache).memory().sequences == 2
    token = hf_models.prompt(2, 1, seed=3)
    expected = feed(model, torch.cat([ids, token], 1), new_cache(model))[:, -1:]
    torch.testing.assert_close(feed(model, token, cache), expected, rtol=1e-4, atol=1e-4)


def test_deepcopy_shares_a_prefix(model: Model) -> None:
    prefix = new_cache(model)
    ids = hf_models.prompt(1, 20)
    feed(model, ids, prefix)
    for seed in (1, 2):
        suffix = hf_models.prompt(1, 3, seed=seed)
        got = feed(model, suffix, copy.deepcopy(prefix))
        expected = feed(model, torch.cat([ids, suffix], 1), new_cache(model))[:, -3:]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert prefix.get_seq_length() == 20
    assert engine(prefix).memory().sequences == 1  # the copies are gone


def test_generation_continues_a_shared_prefix(model: Model) -> None:
    """The recipe of transformers' documentation: one prefix, a copy of its cache per question."""
    prefix, cache = hf_models.prompt(1, 30), new_cache(model)
    feed(model, prefix, cache)
    for seed in (1, 2):
        ids = torch.cat([prefix, hf_models.prompt(1, 7, seed=seed)], 1)
        settings = {"max_new_tokens": 6, "do_sample": False}
        got = model.generate(ids, **{CACHE: copy.deepcopy(cache)}, **settings)
        assert torch.equal(got, model.generate(ids, **settings))
    assert engine(cache).memory().sequences == 1


def test_a_returned_cache_continues(model: Model) -> None:
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
    first = model.generate(
        hf_models.prompt(), max_new_tokens=5, return_dict_in_generate=True, **settings
    )
    assert isinstance(first[CACHE], IceCache)
    second = model.generate(first.sequences, **{CACHE: first[CACHE]}, max_new_tokens=5, **settings)
    assert torch.equal(second, model.generate(hf_models.prompt(), max_new_tokens=10, **settings))


def test_rejected_drafts_are_truncated(model: Model) -> None:
    handle_cache = new_cache(model)
    model.generate(
        hf_models.prompt(),
        **{CACHE: handle_cache},
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        prompt_lookup_num_tokens=5,
    )
    assert engine(handle_cache).truncations > 0
