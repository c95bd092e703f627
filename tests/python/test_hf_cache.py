"""IceCache as a cache: rows are forked, cropped, selected and released as transformers asks."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import hf_models
import icecache
import pytest
import torch
from hf_models import Model
from icecache.hf import IceCache
from transformers import DynamicCache


class CountingEngine(icecache.Engine):
    """Counts what the front end asks for."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.forks = 0
        self.truncations = 0

    def fork(self, seq: int) -> int:
        self.forks += 1
        return super().fork(seq)

    def truncate(self, seq: int, length: int) -> None:
        self.truncations += 1
        super().truncate(seq, length)


@pytest.fixture(params=["llama", "cohere2"])
def model(request: pytest.FixtureRequest) -> Any:
    """An enabled model; cohere2 has a stock sliding layer in front."""
    made = hf_models.model(request.param)
    icecache.enable(made, engine_class=CountingEngine)
    yield made
    icecache.disable(made)


def new_cache(model: Model) -> IceCache:
    return IceCache(model.config, engine_class=CountingEngine)


@torch.inference_mode()
def feed(model: Model, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    logits: torch.Tensor = model(ids, past_key_values=cache).logits
    return logits


def engine(cache: IceCache) -> CountingEngine:
    found = cache.handle.engine
    assert isinstance(found, CountingEngine)
    return found


def test_plain_forward_uses_icecache_and_returns_it(model: Model) -> None:
    with torch.inference_mode():
        output = model(hf_models.prompt())
    assert isinstance(output.past_key_values, IceCache)
    assert output.past_key_values.get_seq_length() == hf_models.PROMPT


def test_forward_without_cache_is_stock(model: Model) -> None:
    batch = hf_models.padded()
    with torch.inference_mode():
        got = model(**batch, use_cache=False).logits
        icecache.disable(model)
        expected = model(**batch, use_cache=False).logits
    assert torch.equal(got, expected)


def test_crop_forgets_the_last_tokens(model: Model) -> None:
    ids = hf_models.prompt(2, 14)
    cache = new_cache(model)
    cache.activate_past_recording()  # type: ignore[no-untyped-call]
    feed(model, ids, cache)
    feed(model, hf_models.prompt(2, 3, seed=5), cache)
    cache.crop(-3)
    assert cache.get_seq_length() == 14
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
            model(**batch, past_key_values=cache)
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
    settings = {"max_new_tokens": 6, "do_sample": False, "past_key_values": cache}
    first = model.generate(hf_models.prompt(), **settings)
    cache.reset()
    other = model.generate(**hf_models.padded(), **settings)
    cache.reset()
    assert torch.equal(model.generate(hf_models.prompt(), **settings), first)
    assert other.shape[0] == 3


def test_generation_continues_a_shared_prefix(model: Model) -> None:
    """The recipe of transformers' documentation: one prefix, a copy of its cache per question."""
    prefix, cache = hf_models.prompt(1, 30), new_cache(model)
    feed(model, prefix, cache)
    for seed in (1, 2):
        ids = torch.cat([prefix, hf_models.prompt(1, 7, seed=seed)], 1)
        settings = {"max_new_tokens": 6, "do_sample": False}
        got = model.generate(ids, past_key_values=copy.deepcopy(cache), **settings)
        assert torch.equal(got, model.generate(ids, **settings))
    assert engine(cache).memory().sequences == 1


def test_a_returned_cache_continues(model: Model) -> None:
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
    first = model.generate(
        hf_models.prompt(), max_new_tokens=5, return_dict_in_generate=True, **settings
    )
    assert isinstance(first.past_key_values, IceCache)
    second = model.generate(
        first.sequences, past_key_values=first.past_key_values, max_new_tokens=5, **settings
    )
    assert torch.equal(second, model.generate(hf_models.prompt(), max_new_tokens=10, **settings))


def test_rejected_drafts_are_truncated(model: Model) -> None:
    handle_cache = new_cache(model)
    model.generate(
        hf_models.prompt(),
        past_key_values=handle_cache,
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        prompt_lookup_num_tokens=5,
    )
    assert engine(handle_cache).truncations > 0


class FailingEngine(CountingEngine):
    """Runs out of pages at the second layer once 14 tokens are there."""

    is_full = True

    def append(self, seqs: Any, layer: int, keys: Any, values: Any) -> None:
        if self.is_full and layer == 1 and self.length(seqs[0], layer) >= 14:
            raise icecache.OutOfPages("host_memory: the page pool is full")
        super().append(seqs, layer, keys, values)


def test_a_failed_call_leaves_the_cache_as_it_was() -> None:
    model = hf_models.model("llama")
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


def test_a_failed_call_with_stock_layers_asks_for_reset() -> None:
    model = hf_models.model("cohere2")
    icecache.enable(model, engine_class=FailingEngine)
    try:
        cache = IceCache(model.config, engine_class=FailingEngine)
        feed(model, hf_models.prompt(2, 14), cache)
        with pytest.raises(icecache.OutOfPages):
            feed(model, hf_models.prompt(2, 2, seed=3), cache)
        with pytest.raises(icecache.InvalidArgument, match=r"call reset\(\)"):
            feed(model, hf_models.prompt(2, 2, seed=3), cache)
        cache.reset()
        feed(model, hf_models.prompt(2, 5), cache)
    finally:
        icecache.disable(model)


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
        assert isinstance(model(hf_models.prompt()).past_key_values, DynamicCache)


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


def test_models_are_collected_with_their_engines() -> None:
    model = hf_models.build("llama")
    icecache.enable(model, engine_class=CountingEngine)
    model.generate(hf_models.prompt(), max_new_tokens=2)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_dense_layers_count_in_layers_of_the_model() -> None:
    model = hf_models.model("cohere2")
    icecache.enable(model, engine_class=CountingEngine, dense_layers="2")
    try:
        cache = IceCache(model.config, engine_class=CountingEngine, dense_layers=[2])
        feed(model, hf_models.prompt(1, 12), cache)
        assert engine(cache).config.dense_layers == "1"
    finally:
        icecache.disable(model)


def test_an_interrupted_call_is_noticed() -> None:
    """An error outside attention leaves some layers ahead of the others."""
    model = hf_models.build("llama")
    icecache.enable(model, engine_class=CountingEngine)
    cache = new_cache(model)
    feed(model, hf_models.prompt(1, 12), cache)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        feed(model, hf_models.prompt(1, 1), cache)
    handle.remove()
    for _ in range(2):
        with pytest.raises(icecache.InvalidArgument, match=r"[Cc]all reset\(\)"):
            feed(model, hf_models.prompt(1, 1), cache)
    cache.reset()
    feed(model, hf_models.prompt(1, 12), cache)
