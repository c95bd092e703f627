"""A transformers model on a CUDA device, or on the emulator of one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import hf_models
import icecache
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.usefixtures("any_device")


def make(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
        eos_token_id=None,
        pad_token_id=0,
        **changes,
    )
    made = LlamaForCausalLM(config)
    torch.nn.Module.to(made, torch.get_default_device())
    made.eval()
    return made


@pytest.fixture
def model(any_device: torch.device) -> Iterator[LlamaForCausalLM]:
    made = make()
    with torch.inference_mode():
        yield made


def words(batch: int, tokens: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randint(1, 512, (batch, tokens), generator=generator, device="cpu")
    return made.to(torch.get_default_device())


def logits(model: LlamaForCausalLM, prompt: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Of the last prompt token and of each step's token, teacher-forced."""
    output = model(prompt, use_cache=True)
    result = [output.logits[:, -1]]
    cache = output.cache if hasattr(output, "cache") else output.past_key_values
    for step in range(steps.shape[1]):
        output = model(steps[:, step : step + 1], past_key_values=cache)
        result.append(output.logits[:, -1])
    return torch.stack(result)


def test_full_budget_is_the_stock_model(model: LlamaForCausalLM) -> None:
    prompt, steps = words(2, 250), words(2, 30, seed=2)
    expected = logits(model, prompt, steps)
    icecache.enable(model, token_budget=400)
    torch.testing.assert_close(logits(model, prompt, steps), expected, atol=2e-4, rtol=2e-4)
    icecache.disable(model)
    torch.testing.assert_close(logits(model, prompt, steps), expected, atol=2e-4, rtol=2e-4)


def test_within_the_budget_is_close_and_repeats(model: LlamaForCausalLM) -> None:
    prompt, steps = words(1, 1200), words(1, 10, seed=2)
    expected = logits(model, prompt, steps).log_softmax(-1)
    icecache.enable(model, token_budget=128, window_tokens=16)
    first = logits(model, prompt, steps).log_softmax(-1)
    again = logits(model, prompt, steps).log_softmax(-1)
    assert torch.equal(first, again)
    apart = (expected.exp() * (expected - first)).sum(-1).mean()
    assert 0 <= apart < 1e-2
    stats = icecache.stats(model)
    assert stats.total("steps") > 0
    assert stats.memory.sequences == 0  # its caches are gone
    output = model(prompt, use_cache=True)
    assert output.past_key_values is not None
    assert icecache.stats(model).memory.device_bytes > 0


def test_residents_are_the_stock_model_until_the_longest_gives_way(
    model: LlamaForCausalLM,
) -> None:
    prompt, steps = words(2, 250), words(2, 20, seed=2)
    expected = logits(model, prompt, steps)
    settings: dict[str, Any] = {"token_budget": 48, "window_tokens": 16, "max_tokens": 400}
    icecache.enable(model, device_tokens=2048, **settings)
    torch.testing.assert_close(logits(model, prompt, steps), expected, atol=2e-4, rtol=2e-4)
    stats = icecache.stats(model)
    assert stats.total("steps") == 0 and stats.total("dense_steps") == 20 * 2 * 3 * 2
    # Three parts of 256 tokens: one sequence takes two of them at 257 tokens, the other cannot.
    icecache.enable(model, device_tokens=768, **settings)
    found = logits(model, prompt, steps)
    torch.testing.assert_close(found[:7], expected[:7], atol=2e-4, rtol=2e-4)
    exact = [torch.allclose(found[:, row], expected[:, row], atol=2e-4) for row in range(2)]
    assert sum(exact) == 1
    apart = expected.log_softmax(-1) - found.log_softmax(-1)
    assert (expected.softmax(-1) * apart).sum(-1).max() < 5e-2
    assert icecache.stats(model).total("steps") > 0


def test_residents_fork_and_are_cropped(model: LlamaForCausalLM) -> None:
    prompt, turn, steps = words(2, 150), words(2, 20, seed=2), words(2, 5, seed=3)
    kept = torch.cat([prompt, turn], dim=1)[:, :140]
    expected = model(torch.cat([kept, steps], dim=1)).logits[:, -5:]
    settings = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False}
    beams = model.generate(prompt, **settings)
    icecache.enable(model, token_budget=48, window_tokens=16, device_tokens=4096, max_tokens=200)
    cache = model(prompt, use_cache=True).past_key_values
    model(turn, past_key_values=cache)
    assert icecache.stats(model).memory.resident_sequences == 2
    cache.crop(-30)
    found = model(steps, past_key_values=cache).logits
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
    del cache
    assert torch.equal(model.generate(prompt, **settings), beams)


def test_generate_with_left_padding(model: LlamaForCausalLM) -> None:
    prompt = words(2, 200)
    mask = torch.ones_like(prompt)
    mask[1, :60] = 0
    settings = {"max_new_tokens": 24, "do_sample": False}
    expected = model.generate(prompt, attention_mask=mask, **settings)
    icecache.enable(model, token_budget=400, max_tokens=256)
    found = model.generate(prompt, attention_mask=mask, **settings)
    # Random weights make near ties: most of the tokens, not all.
    assert (found == expected).float().mean() > 0.95
    longer = torch.nn.functional.pad(mask, (0, 50), value=1)
    with pytest.raises(icecache.InvalidArgument, match="max_tokens: the sequence has 256 tokens"):
        model.generate(words(2, 250), attention_mask=longer, **settings)
    assert icecache.stats(model).memory.sequences == 0


def test_a_turn_of_a_conversation_is_taken_token_by_token(model: LlamaForCausalLM) -> None:
    prompt, turn, steps = words(2, 150), words(2, 6, seed=2), words(2, 4, seed=3)
    expected = model(torch.cat([prompt, turn, steps], dim=1)).logits
    icecache.enable(model, token_budget=400)
    output = model(prompt, use_cache=True)
    cache = output.cache if hasattr(output, "cache") else output.past_key_values
    found = [output.logits]
    found += [model(more, past_key_values=cache).logits for more in (turn, steps)]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=2e-4, rtol=2e-4)


def test_a_long_turn_attends_to_everything(model: LlamaForCausalLM) -> None:
    prompt, turn = words(2, 150), words(2, 40, seed=2)
    expected = model(torch.cat([prompt, turn], dim=1)).logits[:, -40:]
    icecache.enable(model, token_budget=48, window_tokens=16)
    cache = model(prompt, use_cache=True).past_key_values
    found = model(turn, past_key_values=cache).logits
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
    assert icecache.stats(model).total("steps") == 0
    assert model(words(2, 1), past_key_values=cache).logits.isfinite().all()


def test_copies_and_cuts_around_the_switch(model: LlamaForCausalLM) -> None:
    """Within a budget of everything: what is not exact is wrong."""
    prompt, turn, steps = words(1, 250), words(1, 20, seed=2), words(1, 12, seed=3)
    kept = torch.cat([prompt, turn], dim=1)[:, :252]
    icecache.enable(model, token_budget=400, device_tokens=256, max_tokens=300)
    cache = model(prompt, use_cache=True).past_key_values
    parts = turn[:, :6], turn[:, 6:]  # the second outgrows what is held
    found = torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1)
    stats = icecache.stats(model)
    assert stats.total("dense_steps") == 6 * 3 * 2 and stats.total("steps") == 14 * 3 * 2
    cache.crop(-18)  # before the switch
    again = model(steps[:, :2], past_key_values=cache).logits
    twin = copy.deepcopy(cache)  # before the switch, and goes on beyond it
    twin.crop(-1)
    cache.reset()
    last = model(steps[:, 1:], past_key_values=twin).logits
    icecache.disable(model)
    expected = model(torch.cat([prompt, turn], dim=1)).logits[:, -20:]
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
    expected = model(torch.cat([kept, steps], dim=1)).logits[:, -12:]
    torch.testing.assert_close(again, expected[:, :2], atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(last, expected[:, 1:], atol=2e-4, rtol=2e-4)


def test_beams_come_and_go(model: LlamaForCausalLM) -> None:
    prompt = words(2, 120)
    settings = {"num_beams": 3, "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(prompt, **settings)
    icecache.enable(model, token_budget=400, max_tokens=200)
    found = model.generate(prompt, **settings)
    assert torch.equal(found, expected)
    assert icecache.stats(model).memory.sequences == 0


def test_a_copy_takes_the_place_of_what_it_copies(model: LlamaForCausalLM) -> None:
    prompt, steps = words(2, 100), words(2, 3, seed=2)
    expected = model(torch.cat([prompt, steps], dim=1)).logits[:, -1:]
    icecache.enable(model, token_budget=400)
    cache = model(prompt, use_cache=True).past_key_values
    twin = copy.deepcopy(cache)
    cache.reset()
    found = model(steps, past_key_values=twin).logits[:, -1:]
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
    late = copy.deepcopy(twin)
    model(words(2, 1), past_key_values=twin)
    twin.reset()
    with pytest.raises(icecache.InvalidArgument, match="a batch keeps its number of sequences"):
        model(words(2, 1), past_key_values=late)


@pytest.mark.parametrize("cut", [3, 20, 60])  # of a turn, all that came after the prompt, and more
def test_cropped_tokens_make_room_for_others(model: LlamaForCausalLM, cut: int) -> None:
    prompt, turn, steps = words(2, 150), words(2, 20, seed=2), words(2, 5, seed=3)
    kept = torch.cat([prompt, turn], dim=1)[:, : 170 - cut]
    expected = model(torch.cat([kept, steps], dim=1)).logits[:, -5:]
    icecache.enable(model, token_budget=400)
    cache = model(prompt, use_cache=True).past_key_values
    model(turn, past_key_values=cache)
    twin = copy.deepcopy(cache)
    cache.crop(-cut)
    assert cache.get_seq_length() == 170 - cut
    found = model(steps, past_key_values=cache).logits
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
    cache.reset()
    with pytest.raises(icecache.InvalidArgument, match="a batch keeps its number of sequences"):
        model(steps, past_key_values=twin)  # what it copied is no longer there


def test_a_copy_is_cropped_before_it_has_a_place(model: LlamaForCausalLM) -> None:
    prompt, steps = words(2, 150), words(2, 5, seed=3)
    expected = model(torch.cat([prompt[:, :130], steps], dim=1)).logits[:, -5:]
    icecache.enable(model, token_budget=400)
    cache = model(prompt, use_cache=True).past_key_values
    twin = copy.deepcopy(cache)
    twin.crop(-20)
    cache.crop(-10)  # which the copy does not need
    cache.reset()
    found = model(steps, past_key_values=twin).logits
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


def test_assisted_generation_is_greedy_generation(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = words(1, 40).repeat(1, 4)  # so that its own n-grams are drafts
    settings = {"max_new_tokens": 24, "do_sample": False}
    icecache.enable(model, token_budget=400, max_tokens=256)
    expected = model.generate(prompt, **settings)
    rejected = []
    take_back = icecache.DeviceCache.take_back

    def counted(self: icecache.DeviceCache, sequence: int, length: int) -> None:
        rejected.append(length)
        take_back(self, sequence, length)

    monkeypatch.setattr(icecache.DeviceCache, "take_back", counted)
    found = model.generate(prompt, prompt_lookup_num_tokens=5, **settings)
    assert torch.equal(found, expected)
    assert rejected
    assert icecache.stats(model).memory.sequences == 0


@pytest.mark.parametrize(
    ("architecture", "named"),
    [
        ("gemma2", "logit_softcap must be 0"),
        ("gpt_oss", "learned attention sinks"),
        ("gemma3n_text", "attends to the tokens of layer 0"),
    ],
)
@torch.inference_mode()
def test_what_only_the_cpu_computes_is_refused(architecture: str, named: str) -> None:
    made = hf_models.build(architecture, head_dim=64)
    torch.nn.Module.to(made, torch.get_default_device())
    with pytest.raises(icecache.InvalidArgument, match=f"{named}.*on the CPU"):
        icecache.enable(made)
        made(words(1, 40).clamp(max=hf_models.VOCABULARY - 1))


def test_refusals_name_the_way_out(model: LlamaForCausalLM) -> None:
    with pytest.raises(icecache.InvalidArgument, match="index must be tree, got dci"):
        icecache.enable(model, index="dci")
    with pytest.raises(icecache.InvalidArgument, match="device_tokens must be from 0 to"):
        icecache.enable(model, device_tokens=-1)
    with pytest.raises(icecache.InvalidArgument, match="max_tokens: expected a positive number"):
        icecache.enable(model, max_tokens=-1)
    icecache.enable(model)
    prompt = words(1, 100)
    output = model(prompt, use_cache=True)
    cache = output.cache if hasattr(output, "cache") else output.past_key_values
    with pytest.raises(icecache.InvalidArgument, match="a batch keeps its number of sequences"):
        model(words(1, 1), past_key_values=copy.deepcopy(cache))
    assert model.generate(prompt, max_new_tokens=4, do_sample=False).shape == (1, 104)
