"""A small trained model: exact mode gives exact tokens, a small budget stays close to full."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import icecache
import pytest
import stories_model
import torch
from hf_models import Model
from icecache.hf.support import CACHE
from transformers import DynamicCache

LENGTH = 512
PROMPT = 128

# What children's stories are made of; a model that was read wrongly writes none of it.
COMMON = frozenset(
    re.findall(
        r"\w+",
        """a all and as at big boy but day for friend from girl go had happy he her him his in is it
        like lily little loved mom named not of on once one park play said saw she so that the then
        there they time to toy up upon very wanted was went were with you""",
    )
)


@pytest.fixture(scope="module")
def model(shared_dir: Path) -> Model:
    return stories_model.load_model(shared_dir / "models" / "stories260K.bin")


@pytest.fixture(scope="module")
def story(model: Model) -> torch.Tensor:
    """Full attention's own continuation of the start token: ids [1, LENGTH]."""
    return greedy(model, torch.tensor([[stories_model.BOS]]))


def greedy(model: Model, ids: torch.Tensor) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(
        ids,
        max_new_tokens=LENGTH - ids.shape[1],
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return tokens


@torch.inference_mode()
def step_by_step(model: Model, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """Log probabilities behind each token from PROMPT on, which come one a step: [steps, V]."""
    logits = [model(ids[:, :PROMPT], **{CACHE: cache}).logits[0, -1]]
    for token in ids[0, PROMPT:]:
        logits.append(model(token.view(1, 1), **{CACHE: cache}).logits[0, -1])
    return torch.stack(logits).log_softmax(-1)


def test_stock_output_is_english(model: Model, story: torch.Tensor, shared_dir: Path) -> None:
    pieces = stories_model.load_pieces(
        shared_dir / "models" / "tok512.bin", model.config.vocab_size
    )
    text = b"".join(pieces[token] for token in story[0].tolist()).decode()
    assert "Once upon a time" in text
    words = re.findall(r"[a-z]+", text.lower())
    assert len(words) > 100
    assert sum(word in COMMON for word in words) / len(words) > 0.5, text


@pytest.mark.parametrize("settings", [{"token_budget": LENGTH}, {"exact": True}], ids=str)
@pytest.mark.parametrize("start", [1, PROMPT])
def test_exact_mode_gives_exact_tokens(
    model: Model, story: torch.Tensor, start: int, settings: dict[str, Any]
) -> None:
    icecache.enable(model, **settings)
    try:
        assert torch.equal(greedy(model, story[:, :start]), story)
        assert icecache.stats(model).total("steps") == 0
    finally:
        icecache.disable(model)


def test_small_budget_stays_close_to_full(model: Model, story: torch.Tensor) -> None:
    """Mean KL(full || icecache) along full attention's continuation, at 64 of 512 tokens."""
    full = step_by_step(model, story, DynamicCache(config=model.config))
    icecache.enable(model, token_budget=64)
    try:
        cache = icecache.IceCache(model.config, token_budget=64)
        sparse = step_by_step(model, story, cache)
    finally:
        icecache.disable(model)
    heads = model.config.num_hidden_layers * model.config.num_key_value_heads
    assert cache.stats().total("steps") == (LENGTH - PROMPT) * heads  # every step was sparse
    divergence = (full.exp() * (full - sparse)).sum(-1)
    assert 0 < divergence.mean() < 0.01
