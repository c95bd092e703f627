"""`generate` goes on from what earlier calls left, and writes what a cold call would."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from functools import cache
from typing import Any

import hf_models
import icecache
import pytest
import torch
from hf_engines import CountingEngine, engine, feed, new_cache
from hf_models import Model
from icecache.hf.support import CACHE

NEW = 6


def test_layers_that_share_tokens_are_no_hindrance() -> None:
    made = hf_models.build(
        "gemma4_text",
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=["full_attention"] * 4,
    )
    ids = hf_models.prompt(1, 60)
    longer = torch.cat([ids, hf_models.prompt(1, 9, seed=3)], 1)
    expected = write(made, longer)
    icecache.enable(made, exact=True, reuse_prefixes=True)
    write(made, ids)
    assert torch.equal(write(made, longer), expected)
    assert icecache.stats(made).memory.retained_sequences == 2


@pytest.fixture
def model() -> Iterator[Any]:
    made = hf_models.model("llama")
    stock()  # copied before it is enabled
    icecache.enable(made, engine_class=CountingEngine, exact=True, reuse_prefixes=True)
    yield made
    icecache.disable(made)


def write(model: Model, ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
    with torch.inference_mode():
        written = model.generate(
            ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **arguments
        )
    assert isinstance(written, torch.Tensor)
    return written


def cold(ids: torch.Tensor) -> torch.Tensor:
    """What the model writes without IceCache."""
    return write(stock(), ids)


@cache
def stock() -> Model:
    made: Model = copy.deepcopy(hf_models.model("llama"))
    icecache.disable(made)
    return made


def reused(model: Model) -> int:
    return int(model.__dict__["generate"].args[1].tokens_reused)


def test_a_conversation_and_many_questions_write_what_cold_calls_do(model: Model) -> None:
    document = hf_models.prompt(1, 60)
    said = document
    for turn in range(3):
        said = torch.cat([said, hf_models.prompt(1, 7, seed=20 + turn)], 1)
        before = reused(model)
        written = write(model, said)
        assert torch.equal(written, cold(said))
        known = reused(model) - before
        # The last token that was written has not been computed.
        assert known == (0 if turn == 0 else said.shape[1] - 7 - 1)
        said = written
    for question in range(3):
        asked = torch.cat([document, hf_models.prompt(1, 5, seed=40 + question)], 1)
        before = reused(model)
        assert torch.equal(write(model, asked), cold(asked))
        assert reused(model) - before >= 60
    # The same prompt once more: only its last token is computed.
    before = reused(model)
    assert torch.equal(write(model, document), cold(document))
    assert reused(model) - before == 59


def test_batches_beams_padding_and_given_caches_are_as_they_were(model: Model) -> None:
    ids = hf_models.prompt(1, 40)
    write(model, ids)
    before = reused(model)
    for arguments in (
        {"num_beams": 2},
        {CACHE: new_cache(model)},
        {"attention_mask": torch.tensor([[0] * 8 + [1] * 32])},
        {"use_cache": False},
    ):
        write(model, ids, **arguments)
    write(model, hf_models.prompt(2, 40))
    assert reused(model) == before


def test_what_is_kept_goes_where_pages_are_wanted(model: Model) -> None:
    pages = 60 * 2 * 2  # of two layers and two heads
    icecache.enable(model, exact=True, reuse_prefixes=True, host_memory=pages * 16 * 2 * 16 * 4 * 2)
    prompts = [hf_models.prompt(1, 300, seed=seed) for seed in range(8)]
    for ids in prompts:
        write(model, ids)
    assert icecache.stats(model).memory.evicted_sequences > 0
    assert torch.equal(write(model, prompts[0]), cold(prompts[0]))
    before = reused(model)
    assert torch.equal(write(model, prompts[0]), cold(prompts[0]))
    assert reused(model) - before == 299


def test_disable_releases_what_is_kept(model: Model) -> None:
    write(model, hf_models.prompt(1, 40))
    memory = icecache.stats(model).memory
    assert memory.retained_sequences == memory.sequences == 1
    with torch.inference_mode():
        own = model(hf_models.prompt(1, 5))[CACHE]
    shared = engine(own)
    assert shared.memory().sequences == 2
    icecache.disable(model)
    gc.collect()
    assert shared.memory().sequences == 1


def test_a_cache_forks_at_any_token(model: Model) -> None:
    ids, more = hf_models.prompt(2, 30), hf_models.prompt(2, 4, seed=9)
    whole = new_cache(model)
    feed(model, ids, whole)
    fork = whole.fork(20)
    assert (whole.get_seq_length(), fork.get_seq_length()) == (30, 20)
    expected = feed(model, torch.cat([ids[:, :20], more], 1), new_cache(model))[:, -4:]
    torch.testing.assert_close(feed(model, more, fork), expected, rtol=1e-4, atol=1e-4)
    assert whole.fork().get_seq_length() == 30
    with pytest.raises(icecache.InvalidArgument, match="tokens: expected 0 to 30, got 31"):
        whole.fork(31)


def test_refusals_leave_the_model_as_it_was() -> None:
    for name, settings, message in (
        ("cohere2", {}, "layers all have full attention"),
        ("llama", {"lossless": True}, "expected False with lossless"),
        ("llama", {"refresh_every": 8}, "expected False with refresh_every"),
    ):
        model = hf_models.model(name)
        with pytest.raises(icecache.InvalidArgument, match=message):
            icecache.enable(model, reuse_prefixes=True, **settings)
        assert "generate" not in model.__dict__
