"""Exact mode is full attention: enabled models equal stock ones in every decoding mode."""

from __future__ import annotations

from functools import cache
from typing import Any

import hf_models
import icecache
import pytest
import torch
from hf_engines import ForgetfulEngine
from transformers import DynamicCache


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
    assert_same(enabled(architecture, mode), stock(architecture, mode))


@pytest.mark.parametrize("architecture", hf_models.CONFIGS)
def test_one_lost_token_shows(architecture: str) -> None:
    """The comparison above would notice a single corrupted token in each architecture."""
    got = enabled(architecture, "single", engine_class=ForgetfulEngine)
    with pytest.raises(AssertionError):
        assert_same(got, stock(architecture, "single"))
