"""Exact mode on a real model: greedy tokens of SmolLM2-135M-Instruct equal those of stock sdpa."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pydoc_data.topics import topics

import icecache
import icecache.models
import pytest
import torch
from hf_models import Model
from transformers import AutoModelForCausalLM, AutoTokenizer

NEW_TOKENS = 16
LENGTHS = (500, 640, 800, 1024, 1500, 1900, 2300, 4000)
# Each shows the same of another text: two by default.
TRIED = [n for n in range(len(LENGTHS)) if os.environ.get("ICECACHE_SMOLLM2_ALL") or n in (1, 3)]

pytestmark = [pytest.mark.model, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder() -> str:
    return str(icecache.models.smollm2())


@pytest.fixture(scope="module")
def model(folder: str) -> Iterator[Model]:
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # tests of tiny models leave it at 1
    loaded: Model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    yield loaded.eval()
    icecache.disable(loaded)
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text_ids(folder: str) -> torch.Tensor:
    """Python's own reference as token ids, one text of it behind the other."""
    text = "\n".join(topics[name] for name in sorted(topics))[: 8 * sum(LENGTHS)]
    ids: torch.Tensor = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    return ids[0]


def greedy(model: Model, ids: torch.Tensor) -> tuple[list[int], torch.Tensor]:
    """The new tokens and the logits [NEW_TOKENS, V] they were taken from."""
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output.sequences[0, ids.shape[1] :].tolist(), torch.cat(output.logits)


@pytest.mark.parametrize("index", TRIED, ids=[f"{LENGTHS[n]}-tokens" for n in TRIED])
def test_exact_mode_gives_stock_tokens(model: Model, text_ids: torch.Tensor, index: int) -> None:
    start, length = sum(LENGTHS[:index]), LENGTHS[index]
    prompt = text_ids[None, start : start + length]
    assert prompt.shape == (1, length)
    icecache.disable(model)
    expected, expected_logits = greedy(model, prompt)
    icecache.enable(model, token_budget=length + NEW_TOKENS)
    got, logits = greedy(model, prompt)
    stats = icecache.stats(model)
    heads = model.config.num_hidden_layers * model.config.num_key_value_heads
    assert stats.total("dense_steps") == (NEW_TOKENS - 1) * heads
    assert stats.total("steps") == 0
    assert stats.memory.sequences == 0
    assert got == expected
    torch.testing.assert_close(logits, expected_logits, rtol=1e-3, atol=1e-2)
