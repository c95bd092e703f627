"""Lossless decoding writes what full attention writes, though its drafts are often wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hf_models
import icecache
import pytest
import torch
from hf_engines import FailingEngine
from hf_models import CONFIGS, MODES, SCARCE, Model
from icecache import InvalidArgument
from icecache.hf import IceCache, lossless
from icecache.hf.draft_length import DraftLength
from icecache.hf.support import CACHE
from transformers import DynamicCache, LogitsProcessor

SERVED = [mode for mode in MODES if mode not in ("beams", "prompt lookup", "assisted")]


class Always(DraftLength):
    """Drafts whether it pays or not; in models this small it does not."""

    def choose(self) -> int:
        return 5


@pytest.fixture(autouse=True)
def always_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lossless, "DraftLength", Always)


def enable(model: Model, **settings: Any) -> Model:
    return icecache.enable(model, **{**SCARCE, "lossless": True, **settings})


@pytest.fixture
def llama() -> Iterator[Model]:
    model = hf_models.model("llama")
    yield model
    icecache.disable(model)


def counted(model: Model) -> Any:
    found = icecache.stats(model).lossless
    assert found is not None
    return found


def write(model: Model, **settings: Any) -> Any:
    """40 tokens behind the prompt [45], whatever they are."""
    torch.manual_seed(3)
    given = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, **settings}
    ids = given.pop("input_ids", hf_models.prompt())
    return model.generate(ids, **given)


# Models that differ in how they take tokens back: all layers are the engine's, some have a sliding
# window, there are sinks, layers share tokens. The others differ in nothing that matters here.
APART = ("llama", "cohere2", "gpt_oss", "gemma4_text")


@pytest.mark.parametrize(
    ("architecture", "mode"),
    [(name, mode) for name in CONFIGS for mode in SERVED if name in APART or mode == SERVED[1]],
)
def test_tokens_and_logits_are_those_of_full_attention(architecture: str, mode: str) -> None:
    model = hf_models.model(architecture)
    expected = MODES[mode](model, architecture, lambda: DynamicCache(config=model.config))
    enable(model)
    try:
        got = MODES[mode](model, architecture, lambda: IceCache(model.config, **SCARCE))
        assert counted(model).verifications > 0
    finally:
        icecache.disable(model)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("sample", [False, True])
def test_drafts_are_wrong_at_times_and_right_at_times(llama: Model, sample: bool) -> None:
    expected = write(llama, do_sample=sample)
    enable(llama)
    assert torch.equal(write(llama, do_sample=sample), expected)
    found = counted(llama)
    assert 0 < found.kept < found.drafted
    assert found.verifications < 40
    assert found.draft_seconds > 0 and found.verify_seconds > 0


def test_a_budget_for_everything_has_every_draft_kept(llama: Model) -> None:
    expected = write(llama)
    enable(llama, token_budget=256, window_tokens=64, candidates=256)
    assert torch.equal(write(llama), expected)
    found = counted(llama)
    assert found.kept == found.drafted > 0


def test_samples_agree_as_often_as_drafts_do(llama: Model) -> None:
    """A draft uses the loop's random numbers: where it has full attention's logits, all is kept."""
    expected = write(llama, do_sample=True, temperature=2.0, num_return_sequences=3)
    enable(llama, token_budget=256, window_tokens=64, candidates=256)
    got = write(llama, do_sample=True, temperature=2.0, num_return_sequences=3)
    assert torch.equal(got, expected)
    assert counted(llama).kept == counted(llama).drafted > 0


def test_rows_that_end_are_padded_and_hold_no_other_row_up(llama: Model) -> None:
    batch = hf_models.padded(4)
    free = llama.generate(**batch, max_new_tokens=30, do_sample=False, eos_token_id=None)
    ends = [int(free[1, 45 + 3]), int(free[2, 45 + 9])]  # rows 1 and 2 end there, at the latest
    settings = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": ends}
    expected = llama.generate(**batch, **settings)
    enable(llama)
    assert torch.equal(llama.generate(**batch, **settings), expected)


def test_processors_are_followed_also_those_of_others(llama: Model) -> None:
    class Alternates(LogitsProcessor):
        calls = 0

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            self.calls += 1
            return scores.index_fill(1, torch.tensor([self.calls % 2]), 50.0)

    settings = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 5}
    expected = write(llama, **settings)
    odd = write(llama, logits_processor=[Alternates()])
    enable(llama)
    assert torch.equal(write(llama, **settings), expected)
    assert torch.equal(write(llama, logits_processor=[Alternates()]), odd)


class Collected:
    """A streamer; raises KeyboardInterrupt at one call."""

    def __init__(self, raises_at: int = -1) -> None:
        self.tokens: list[int] = []
        self.raises_at = raises_at
        self.calls = 0

    def put(self, value: torch.Tensor) -> None:
        if self.calls == self.raises_at:
            raise KeyboardInterrupt
        self.calls += 1
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.calls = -1


def test_streams_verified_tokens_only(llama: Model) -> None:
    expected = write(llama)[0].tolist()
    enable(llama)
    streamer = Collected()
    assert write(llama, streamer=streamer)[0].tolist() == expected == streamer.tokens
    assert streamer.calls == -1


def holds(cache: IceCache) -> int:
    """Tokens of the first row, which all layers agree about."""
    engine: Any = cache.handle.engine
    layers: list[Any] = cache.layers
    lengths = {layer.get_seq_length() for layer in layers} | {cache.rows.lengths[0]}
    lengths |= {engine.length(cache.rows.sequences[0], n) for n in range(engine.num_layers)}
    assert len(lengths) == 1
    return lengths.pop()


@pytest.mark.parametrize("architecture", ["llama", "cohere2"])
@pytest.mark.parametrize("at", [2, 3, 9, 14])
def test_an_interrupt_leaves_the_tokens_that_were_chosen(architecture: str, at: int) -> None:
    model = hf_models.model(architecture)
    expected = write(model)
    enable(model)
    try:
        cache = IceCache(model.config, handle=None, **SCARCE)
        with pytest.raises(KeyboardInterrupt):
            write(model, streamer=Collected(at), **{CACHE: cache})
        held = holds(cache)
        assert held == hf_models.PROMPT + at - 1
        ids = expected[:, : held + 1]
        got = write(model, input_ids=ids, max_new_tokens=85 - held - 1, **{CACHE: cache})
        assert torch.equal(got, expected)
    finally:
        icecache.disable(model)


def test_a_draft_without_pages_fails_and_leaves_the_verified_tokens(llama: Model) -> None:
    enable(llama, engine_class=FailingEngine)
    cache = IceCache(llama.config, engine_class=FailingEngine, **SCARCE)
    ids = hf_models.prompt(length=9)
    streamer = Collected()
    with pytest.raises(icecache.OutOfPages):
        write(llama, input_ids=ids, streamer=streamer, **{CACHE: cache})
    engine: Any = cache.handle.engine
    assert holds(cache) == len(streamer.tokens) - 1 > 9
    assert engine.memory().sequences == 1, "the fork of the draft is gone"


def test_the_cache_that_is_returned_holds_what_was_written(llama: Model) -> None:
    expected = write(llama, max_new_tokens=60)
    enable(llama)
    first = write(llama, max_new_tokens=23, return_dict_in_generate=True)
    cache = first[CACHE]
    assert cache.get_seq_length() == first.sequences.shape[1] - 1
    more = write(llama, input_ids=first.sequences, max_new_tokens=37, **{CACHE: cache})
    assert torch.equal(more, expected)


def test_plain_calls_of_the_model_are_exact(llama: Model) -> None:
    ids = hf_models.prompt(1, 60)

    def logits() -> torch.Tensor:
        with torch.inference_mode():
            past = llama(ids[:, :45])[CACHE]
            steps = [llama(one, **{CACHE: past}).logits for one in ids[:, 45:].split(1, dim=1)]
        return torch.cat(steps)

    expected = logits()
    icecache.enable(llama, **SCARCE)
    assert (logits() - expected).abs().max() > 0.1, "the budget is not scarce"
    enable(llama)
    torch.testing.assert_close(logits(), expected, rtol=0, atol=2e-3)


def test_scores_are_full_attentions(llama: Model) -> None:
    settings = {"output_scores": True, "return_dict_in_generate": True, "max_new_tokens": 12}
    expected = write(llama, **settings)
    enable(llama)
    got = write(llama, **settings)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(got.scores, expected.scores, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_beams": 2}, "greedy decoding or sampling"),
        ({"prompt_lookup_num_tokens": 3}, "greedy decoding or sampling"),
        ({"assistant_model": "other"}, "greedy decoding or sampling"),
        ({"use_cache": False}, "use_cache"),
        ({"custom_generate": lambda *args, **kwargs: None}, "custom_generate"),
        (
            {"output_hidden_states": True, "return_dict_in_generate": True},
            "output_hidden_states",
        ),
    ],
)
def test_what_is_refused(llama: Model, settings: dict[str, Any], match: str) -> None:
    if "assistant_model" in settings:
        settings = {"assistant_model": hf_models.assistant("llama")}
    enable(llama)
    with pytest.raises(InvalidArgument, match=match):
        write(llama, **settings)
    expected = write(llama)
    icecache.disable(llama)
    assert torch.equal(write(llama), expected)


def test_eight_bits_are_not_lossless(llama: Model) -> None:
    with pytest.raises(InvalidArgument, match="lossless: expected kv_dtype=auto, got int8"):
        icecache.enable(llama, lossless=True, kv_dtype="int8")


def test_refused_ahead_of_the_first_token() -> None:
    with pytest.raises(InvalidArgument, match="overwrites its state"):
        enable(hf_models.build("qwen3_next"))
    with pytest.raises(InvalidArgument, match="draft_tokens: expected at least 1, got 0"):
        enable(hf_models.build("llama"), draft_tokens=0)


@pytest.mark.parametrize("architecture", ["llama", "cohere2"])
def test_refreshed_tokens_are_exact(architecture: str) -> None:
    """Behind a refresh the cache is that of full attention over the text as it was written."""
    model = hf_models.model(architecture)
    icecache.enable(model, **SCARCE, refresh_every=8)
    try:
        ours = write(model, max_new_tokens=25, return_dict_in_generate=True, output_logits=True)
        refreshed = icecache.stats(model).total("dense_steps")
        plain = icecache.enable(model, **SCARCE).generate(
            hf_models.prompt(), max_new_tokens=25, do_sample=False, eos_token_id=None
        )
    finally:
        icecache.disable(model)
    assert refreshed > 0
    with torch.inference_mode():
        exact = model(ours.sequences).logits[0, hf_models.PROMPT - 1 :]
    off = [(got - want).abs().max() for got, want in zip(ours.logits, exact, strict=False)]
    assert max(off[1:8]) > 0.1, "the budget is not scarce"
    for n in (8, 16, 24):  # the calls that refreshed
        assert off[n] < 2e-3
    assert plain.shape == ours.sequences.shape


def test_refresh_takes_what_loops_take(llama: Model) -> None:
    with pytest.raises(InvalidArgument, match="at least 2"):
        icecache.enable(llama, refresh_every=1)
    with pytest.raises(InvalidArgument, match="nothing to refresh"):
        icecache.enable(llama, refresh_every=8, lossless=True)
    icecache.enable(llama, **SCARCE, refresh_every=8)
    with pytest.raises(InvalidArgument, match="greedy decoding or sampling with refresh_every"):
        write(llama, num_beams=2)
    batch = llama.generate(**hf_models.padded(3), max_new_tokens=20, do_sample=True)
    assert batch.shape[0] == 3


def test_disable_gives_generate_back(llama: Model) -> None:
    enable(llama)
    assert "generate" in llama.__dict__
    icecache.disable(llama)
    assert "generate" not in llama.__dict__


def test_the_length_of_drafts_follows_costs_and_what_is_kept() -> None:
    def settled(draft: float, base: float, slope: float, share: float) -> int:
        length = DraftLength(32)
        generator = torch.Generator().manual_seed(1)
        for _ in range(200):
            k = length.choose()
            length.saw_draft(k, k * draft)
            length.saw_verification(k, base + slope * k)
            if k:
                wrong = (torch.rand(k, generator=generator) > share).nonzero()
                length.saw_kept(int(wrong[0]) if len(wrong) else k, k)
        return length.choose()

    assert settled(1.0, 1.0, 0.0, 0.9) == 0, "a draft as dear as full attention never pays"
    assert settled(0.1, 10.0, 0.0, 0.99) >= 24
    assert 1 <= settled(0.2, 1.0, 0.05, 0.7) <= 4
    assert settled(0.2, 1.0, 0.05, 0.9) > settled(0.2, 1.0, 0.05, 0.6)
