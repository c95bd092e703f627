"""Enabling and disabling a model, its statistics, and layers that stay stock."""

from __future__ import annotations

from typing import Any

import hf_models
import icecache
import pytest
import torch
from hf_engines import CountingEngine, engine, feed, new_cache
from hf_models import Model
from icecache.hf import IceCache
from icecache.hf.support import CACHE
from transformers import DynamicCache


@pytest.fixture(params=["llama", "cohere2"])
def model(request: pytest.FixtureRequest) -> Any:
    """An enabled model; cohere2 has a stock sliding layer in front."""
    made = hf_models.model(request.param)
    icecache.enable(made, engine_class=CountingEngine)
    yield made
    icecache.disable(made)


def test_plain_forward_uses_icecache_and_returns_it(model: Model) -> None:
    with torch.inference_mode():
        output = model(hf_models.prompt())
    assert isinstance(output[CACHE], IceCache)
    assert output[CACHE].get_seq_length() == hf_models.PROMPT


def test_forward_without_cache_is_stock(model: Model) -> None:
    batch = hf_models.padded()
    with torch.inference_mode():
        got = model(**batch, use_cache=False).logits
        icecache.disable(model)
        expected = model(**batch, use_cache=False).logits
    assert torch.equal(got, expected)


def test_a_cache_of_its_own_needs_no_enable() -> None:
    model = hf_models.build("llama")
    ids = hf_models.prompt(1, 12)
    expected = feed(model, ids, DynamicCache(config=model.config))
    model.set_attn_implementation("icecache")
    cache = new_cache(model)
    assert torch.equal(feed(model, ids, cache), expected)
    assert engine(cache).memory().sequences == 1


def test_disable_restores_the_model() -> None:
    model = hf_models.build("llama")
    before = set(model.__dict__)
    icecache.enable(model, engine_class=CountingEngine)
    icecache.enable(model, 128, engine_class=CountingEngine)
    icecache.disable(model)
    assert model.config._attn_implementation == "sdpa"
    assert set(model.__dict__) == before
    assert not model._forward_pre_hooks
    icecache.disable(model)
    with torch.inference_mode():
        assert isinstance(model(hf_models.prompt())[CACHE], DynamicCache)


def test_stats_name_the_models_layers() -> None:
    model = hf_models.model("gemma3_text")
    icecache.enable(model, engine_class=CountingEngine)
    try:
        model.generate(hf_models.prompt(), max_new_tokens=5, eos_token_id=None)
        stats = icecache.stats(model)
        assert list(stats.layers) == [2]
        assert stats.total("dense_steps") == 4 * 2
        assert stats.worst_mass == 1.0
    finally:
        icecache.disable(model)


def test_a_cache_has_stats_of_its_own(model: Model) -> None:
    cache = new_cache(model)
    with pytest.raises(icecache.InvalidArgument, match="not used yet"):
        cache.stats()
    feed(model, hf_models.prompt(1, 12), cache)
    assert cache.stats().memory.sequences == 1
    assert icecache.stats(model).memory.sequences == 0  # an engine of its own


def test_both_models_of_assisted_decoding_may_be_enabled() -> None:
    model, assistant = hf_models.build("llama"), hf_models.build("llama", seed=1)
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(hf_models.prompt(), assistant_model=assistant, **settings)
    for enabled in (model, assistant):
        icecache.enable(enabled, engine_class=CountingEngine)
    got = model.generate(hf_models.prompt(), assistant_model=assistant, **settings)
    assert torch.equal(got, expected)
    for enabled in (model, assistant):
        stats = icecache.stats(enabled)
        assert stats.total("bytes_read") > 0
        assert stats.memory.sequences == 0


def test_linear_attention_layers_stay_stock() -> None:
    model = hf_models.build("qwen3_next")
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**hf_models.padded(), **settings)
    icecache.enable(model, engine_class=CountingEngine)
    assert torch.equal(model.generate(**hf_models.padded(), **settings), expected)
    assert list(icecache.stats(model).layers) == [1]


def test_dense_layers_count_in_layers_of_the_model() -> None:
    model = hf_models.model("cohere2")
    icecache.enable(model, engine_class=CountingEngine, dense_layers="2")
    try:
        cache = IceCache(model.config, engine_class=CountingEngine, dense_layers=[2])
        feed(model, hf_models.prompt(1, 12), cache)
        assert engine(cache).config.dense_layers == "1"
    finally:
        icecache.disable(model)
