"""Below full budget: rows do not depend on each other, forks agree, counters tell what happened."""

from __future__ import annotations

import copy
from typing import Any

import hf_models
import icecache
import pytest
import torch
from hf_models import Model
from icecache.hf.support import CACHE

BUDGET = 64
LENGTH = 200
NEW_TOKENS = 12
INDEXES = ("tree", "dci", "positional")


# Of each layer whose tokens others share, how many layers attend to them.
SHARING = {"gemma3n_text": {0: 3}, "gemma4_text": {1: 3}}


@pytest.fixture(scope="module", params=["llama", "gemma2", "gemma3_text", "gpt_oss", *SHARING])
def model(request: pytest.FixtureRequest) -> Any:
    """An enabled model; all but llama have stock layers, gemma2 has a soft cap, gpt_oss sinks."""
    made = icecache.enable(hf_models.build(request.param), BUDGET)
    yield made
    icecache.disable(made)


def generate(model: Model, ids: torch.Tensor, **settings: Any) -> Any:
    return model.generate(
        ids,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=None,
        return_dict_in_generate=True,
        **{"do_sample": False, "output_logits": True, **settings},
    )


def test_counters(model: Model) -> None:
    before = icecache.stats(model).total("steps")
    generate(model, hf_models.prompt(2, LENGTH))
    stats = icecache.stats(model)
    sharing = SHARING.get(model.config.model_type, {})
    heads = sum(sharing.get(layer, 1) * len(heads) for layer, heads in stats.layers.items())
    assert stats.total("steps") - before == 2 * (NEW_TOKENS - 1) * heads
    assert 0 < stats.worst_mass < 1
    assert stats.total("tokens_selected") <= stats.total("steps") * BUDGET
    assert stats.memory.sequences == 0


@pytest.mark.parametrize("exact", [False, True])
def test_eight_bits_are_near_the_models_type(exact: bool) -> None:
    ids = hf_models.prompt(1, LENGTH)
    made = []
    for kv_dtype in ("auto", "int8"):
        model = icecache.enable(hf_models.build("llama"), BUDGET, exact=exact, kv_dtype=kv_dtype)
        made.append(torch.stack(generate(model, ids).logits))
        icecache.disable(model)
    difference = (made[0] - made[1]).abs().max()
    assert 0 < difference < 0.15 * made[0].std()


def test_rows_do_not_depend_on_their_company(model: Model) -> None:
    ids = hf_models.prompt(3, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, :37] = 0
    together = generate(model, ids.masked_fill(mask == 0, 0), attention_mask=mask)
    for row, start in enumerate([0, 37, 0]):
        alone = generate(model, ids[row : row + 1, start:])
        got, expected = (torch.stack(run.logits) for run in (together, alone))
        torch.testing.assert_close(got[:, row], expected[:, 0], rtol=1e-3, atol=1e-3)


def test_prompts_in_chunks_are_exact(model: Model) -> None:
    """Also where a layer has indexed its tokens by the time others attend to them."""
    ids = hf_models.prompt(2, LENGTH)
    icecache.disable(model)
    with torch.inference_mode():
        expected = model(ids).logits
        icecache.enable(model, BUDGET)
        cache: Any = None
        got = []
        for chunk in ids.split(50, dim=1):
            output = model(chunk, **{CACHE: cache})
            cache = output[CACHE]
            got.append(output.logits)
    torch.testing.assert_close(torch.cat(got, 1), expected, rtol=1e-4, atol=2e-4)


def test_copies_continue_alike(model: Model) -> None:
    ids = hf_models.prompt(2, LENGTH)
    with torch.inference_mode():
        cache = model(ids)[CACHE]
        twin = copy.deepcopy(cache)
        for seed in range(NEW_TOKENS):
            token = hf_models.prompt(2, 1, seed=seed)
            runs = [model(token, **{CACHE: c}).logits for c in (cache, twin)]
            assert torch.equal(*runs)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3, "output_logits": False},
        {"prompt_lookup_num_tokens": 4},
        {"prefill_chunk_size": 48},
        {"do_sample": True, "num_return_sequences": 2},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_the_same_call_gives_the_same_tokens(model: Model, settings: dict[str, Any]) -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        runs.append(generate(model, hf_models.prompt(1, LENGTH), **settings).sequences)
    assert torch.equal(*runs)
    assert icecache.stats(model).memory.sequences == 0


@pytest.mark.parametrize(
    ("architecture", "index", "select"),
    [
        *(("llama", index, select) for index in INDEXES for select in ("token", "page")),
        *(("gemma2", index, "token") for index in INDEXES),
        ("gpt_oss", "tree", "token"),
        ("gemma3n_text", "tree", "token"),
        ("gemma4_text", "tree", "token"),
    ],
)
def test_indexes_stay_close_to_full(architecture: str, index: str, select: str) -> None:
    """A budget of three quarters of the sequence: top tokens mostly agree with stock attention."""
    made = hf_models.build(architecture, initializer_range=0.06)
    ids = hf_models.prompt(2, LENGTH)
    expected = torch.stack(generate(made, ids).logits)
    icecache.enable(made, 160, index=index, select=select)
    tokens = generate(made, ids)
    got = torch.stack(tokens.logits)
    assert icecache.stats(made).total("steps") > 0
    assert not torch.equal(got, expected)
    full, sparse = expected[:2].log_softmax(-1), got[:2].log_softmax(-1)
    assert (full.exp() * (full - sparse)).sum(-1).mean() < 0.02


def test_dense_layers_attend_to_everything() -> None:
    made = hf_models.build("llama")
    ids = hf_models.prompt(1, LENGTH)
    expected = torch.stack(generate(made, ids).logits)
    icecache.enable(made, BUDGET, dense_layers=[0, 1, 2])
    got = torch.stack(generate(made, ids).logits)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_exact_mode(dtype: torch.dtype) -> None:
    made = hf_models.build("llama", initializer_range=0.06).to(dtype)
    ids = hf_models.prompt(2, LENGTH)
    expected = torch.stack(generate(made, ids).logits)
    icecache.enable(made, BUDGET, exact=True)
    got = torch.stack(generate(made, ids).logits)
    tolerance = 0.05 if dtype is torch.bfloat16 else 0.01
    torch.testing.assert_close(got[:2], expected[:2], rtol=tolerance, atol=tolerance)
