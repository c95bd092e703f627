"""Exact mode is full attention, however small the budget: enabled models equal stock ones in every
decoding mode. So they do without it while a sequence is within the budget."""

from __future__ import annotations

from functools import cache
from typing import Any

import hf_models
import icecache
import pytest
import torch
from hf_engines import ForgetfulEngine
from transformers import DynamicCache

EXACT = {**hf_models.SCARCE, "exact": True}


@cache
def stock(architecture: str, mode: str) -> torch.Tensor:
    model = hf_models.model(architecture)
    return hf_models.MODES[mode](model, architecture, lambda: DynamicCache(config=model.config))


def enabled(architecture: str, mode: str, **settings: Any) -> torch.Tensor:
    model = hf_models.model(architecture)
    icecache.enable(model, **settings)
    try:
        result = hf_models.MODES[mode](
            model, architecture, lambda: icecache.IceCache(model.config, **settings)
        )
        stats = icecache.stats(model)
        assert stats.memory.sequences == 0  # every cache gave its rows back
        if mode != "multi-turn":  # which brings caches of its own
            assert stats.total("bytes_read") > 0
    finally:
        icecache.disable(model)
    return result


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("mode", hf_models.MODES)
@pytest.mark.parametrize("architecture", hf_models.CONFIGS)
def test_exact_mode_equals_stock(architecture: str, mode: str) -> None:
    assert_same(enabled(architecture, mode, **EXACT), stock(architecture, mode))


@pytest.mark.parametrize("architecture", hf_models.CONFIGS)
def test_a_sequence_within_the_budget_equals_stock(architecture: str) -> None:
    assert_same(enabled(architecture, "padded batch"), stock(architecture, "padded batch"))


@pytest.mark.parametrize("settings", [{**EXACT, "engine_class": ForgetfulEngine}, hf_models.SCARCE])
@pytest.mark.parametrize("architecture", hf_models.CONFIGS)
def test_a_token_that_is_lost_or_left_out_shows(
    architecture: str, settings: dict[str, Any]
) -> None:
    """The comparisons above would notice it in each architecture."""
    got = enabled(architecture, "single", **settings)
    with pytest.raises(AssertionError):
        assert_same(got, stock(architecture, "single"))
