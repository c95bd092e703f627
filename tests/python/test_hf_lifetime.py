"""What a cache holds is given back: on release, reset, failure and garbage collection."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import hf_models
import icecache
import pytest
import torch
from hf_engines import CountingEngine, FailingEngine, engine, feed, new_cache
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


def test_reset_makes_the_cache_new(model: Model) -> None:
    cache = new_cache(model)
    first = feed(model, hf_models.prompt(2, 12), cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert engine(cache).memory().sequences == 0
    assert torch.equal(feed(model, hf_models.prompt(2, 12), cache), first)


def test_dropping_the_cache_releases_its_sequences(model: Model) -> None:
    gc.disable()  # reference counts alone must do it: pages are large
    try:
        cache = new_cache(model)
        feed(model, hf_models.prompt(2, 12), cache)
        used = engine(cache)
        assert used.memory().sequences == 2
        del cache
        assert used.memory().sequences == 0
    finally:
        gc.enable()


def test_a_cache_in_a_cycle_is_collected(model: Model) -> None:
    cache = new_cache(model)
    feed(model, hf_models.prompt(2, 12), cache)
    used = engine(cache)
    cache.itself = cache  # type: ignore[attr-defined]  # as an exception's traceback may hold it
    del cache
    gc.collect()
    assert used.memory().sequences == 0


def test_repeated_generation_leaks_nothing(model: Model) -> None:
    settings: list[dict[str, Any]] = [
        {},
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 4},
        {"do_sample": True, "num_return_sequences": 2},
    ]
    for setting in settings * 2:
        model.generate(hf_models.prompt(), max_new_tokens=6, **{"do_sample": False, **setting})
        memory = icecache.stats(model).memory
        assert (memory.sequences, memory.pool_bytes) == (0, 0)


def test_a_cache_serves_again_after_reset(model: Model) -> None:
    cache = new_cache(model)
    settings = {"max_new_tokens": 6, "do_sample": False, CACHE: cache}
    first = model.generate(hf_models.prompt(), **settings)
    cache.reset()
    other = model.generate(**hf_models.padded(), **settings)
    cache.reset()
    assert torch.equal(model.generate(hf_models.prompt(), **settings), first)
    assert other.shape[0] == 3


@pytest.mark.parametrize("architecture", ["llama", "cohere2"])
def test_a_failed_call_leaves_the_cache_as_it_was(architecture: str) -> None:
    model = hf_models.model(architecture)
    icecache.enable(model, engine_class=FailingEngine)
    try:
        cache = IceCache(model.config, engine_class=FailingEngine)
        ids = hf_models.prompt(2, 14)
        feed(model, ids, cache)
        token = hf_models.prompt(2, 2, seed=3)
        with pytest.raises(icecache.OutOfPages):
            feed(model, token, cache)
        assert cache.get_seq_length() == 14
        failing = engine(cache)
        assert isinstance(failing, FailingEngine)
        failing.is_full = False
        got = feed(model, token, cache)
        expected = feed(model, torch.cat([ids, token], 1), new_cache(model))[:, -2:]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    finally:
        icecache.disable(model)


def test_models_are_collected_with_their_engines() -> None:
    model = hf_models.build("llama")
    icecache.enable(model, engine_class=CountingEngine)
    model.generate(hf_models.prompt(), max_new_tokens=2)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
