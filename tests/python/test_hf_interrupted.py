"""A forward call that raises anywhere is undone, or the cache refuses to be used until reset."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import hf_models
import icecache
import pytest
import torch
from hf_engines import feed, new_cache
from hf_models import Model
from icecache import InvalidArgument
from icecache.hf.support import CACHE

PROMPT = hf_models.prompt(1, 20)
MORE = hf_models.prompt(1, 3, seed=5)
# Stock layers in front of the first full one: 2, 1, 1, 0; Qwen 3-Next's have a recurrent state.
ARCHITECTURES = ["gemma3_text", "gpt_oss", "cohere2", "llama"]


class Interruption(RuntimeError):
    pass


@contextmanager
def interrupted_in(model: Model, layer: int, error: type[BaseException]) -> Iterator[None]:
    """The next forward call raises between the attention of `layer` and the next layer."""

    def stop(*_: Any) -> None:
        raise error("stopped")

    hook = model.model.layers[layer].mlp.register_forward_pre_hook(stop)
    try:
        with pytest.raises(error, match="stopped"):
            yield
    finally:
        hook.remove()


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_enabled_model_undoes_it(architecture: str, layer: int) -> None:
    model = hf_models.model(architecture)
    icecache.enable(model)
    try:
        expected = feed(model, MORE, cache := new_cache_of(model))
        again = new_cache_of(model)
        with interrupted_in(model, layer, Interruption):
            feed(model, MORE, again)
        assert again.get_seq_length() == PROMPT.shape[1]
        assert torch.equal(feed(model, MORE, again), expected)
        assert again.get_seq_length() == cache.get_seq_length()
    finally:
        icecache.disable(model)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("enabled", [True, False])
def test_what_no_hook_sees_is_noticed_by_the_next_call(
    architecture: str, layer: int, enabled: bool
) -> None:
    """Ctrl-C passes torch's hooks by, and a cache of one's own has none."""
    model = hf_models.build(architecture)
    if enabled:
        icecache.enable(model)
    else:
        model.set_attn_implementation("icecache")
    make = new_cache_of if enabled else own_cache_of
    expected = feed(model, MORE, make(model))
    cache = make(model)
    with interrupted_in(model, layer, KeyboardInterrupt):
        feed(model, MORE, cache)
    with pytest.raises(InvalidArgument, match=r"was interrupted\. The cache is again as it was"):
        feed(model, MORE, cache)
    assert cache.get_seq_length() == PROMPT.shape[1]
    assert torch.equal(feed(model, MORE, cache), expected)


@pytest.mark.parametrize("use", ["crop", "reorder", "copy"])
def test_every_use_notices_it(use: str) -> None:
    model = hf_models.build("gemma3_text")
    model.set_attn_implementation("icecache")
    cache = own_cache_of(model)
    with interrupted_in(model, 0, Interruption):
        feed(model, MORE, cache)
    with pytest.raises(InvalidArgument, match="was interrupted"):
        if use == "crop":
            cache.crop(-2)
        elif use == "reorder":
            cache.reorder_cache(torch.tensor([0]))
        else:
            cache.__deepcopy__({})
    assert lengths(cache) == {PROMPT.shape[1]}


@pytest.mark.parametrize("error", [Interruption, KeyboardInterrupt])
@pytest.mark.parametrize("enabled", [True, False])
def test_a_recurrent_state_cannot_be_put_back(enabled: bool, error: type[BaseException]) -> None:
    model = hf_models.build("qwen3_next")
    if enabled:
        icecache.enable(model)
    else:
        model.set_attn_implementation("icecache")
    cache = (new_cache_of if enabled else own_cache_of)(model)
    with interrupted_in(model, 0, error):
        feed(model, MORE[:, :1], cache)
    for _ in range(2):
        with pytest.raises(InvalidArgument, match=r"could not be undone .* call reset\(\)"):
            feed(model, MORE, cache)
    fresh = (new_cache_of if enabled else own_cache_of)(model)
    with torch.inference_mode():
        cache.reset()
        fresh.reset()
    assert torch.equal(feed(model, PROMPT, cache), feed(model, PROMPT, fresh))


def test_a_crop_that_stock_layers_refuse_leaves_all_as_it_was() -> None:
    """They have dropped what lies behind their window, and can take no tokens back."""
    model = hf_models.build("gemma3_text")
    model.set_attn_implementation("icecache")
    expected = feed(model, MORE, own_cache_of(model))
    cache = own_cache_of(model)
    with pytest.raises(RuntimeError, match="sliding window"):
        cache.crop(-2)
    assert lengths(cache) == {PROMPT.shape[1]}
    assert torch.equal(feed(model, MORE, cache), expected)


def lengths(cache: Any) -> set[int]:
    return {layer.get_seq_length() for layer in cache.layers}


def new_cache_of(model: Model) -> Any:
    """The cache an enabled model makes, with PROMPT in it."""
    with torch.inference_mode():
        return model(PROMPT)[CACHE]


def own_cache_of(model: Model) -> Any:
    cache = new_cache(model)
    feed(model, PROMPT, cache)
    return cache
