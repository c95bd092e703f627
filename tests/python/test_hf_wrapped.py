"""Models whose forward is wrapped, replaced, compiled or given weights only for its call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hf_models
import icecache
import pytest
import tokenizers
import torch
from hf_models import Model
from icecache import InvalidArgument
from icecache.hf import IceCache
from icecache.hf.support import CACHE
from transformers import PreTrainedTokenizerFast, pipeline

SETTINGS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


@functools.cache
def expected() -> torch.Tensor:
    tokens: torch.Tensor = hf_models.model("llama").generate(hf_models.prompt(), **SETTINGS)
    return tokens


def lambda_around(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *a, **k: forward(*a, **k)


def partial_of(forward: Callable[..., Any]) -> Callable[..., Any]:
    return functools.partial(forward, return_dict=True)


def monitor_around(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def timed(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return timed


def compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(forward, backend="eager")


WRAPPERS = [lambda_around, partial_of, monitor_around]


@pytest.fixture
def model() -> Iterator[Model]:
    made = hf_models.build("llama")
    yield made
    icecache.disable(made)


@pytest.mark.parametrize("wrapper", [*WRAPPERS, compiled])
@pytest.mark.parametrize("wrapped_first", [True, False])
def test_a_wrapped_forward_keeps_its_context(
    model: Model, wrapper: Callable[..., Any], wrapped_first: bool
) -> None:
    if not wrapped_first:
        icecache.enable(model)
    model.forward = wrapper(model.forward)
    if wrapped_first:
        icecache.enable(model)
    assert torch.equal(model.generate(hf_models.prompt(), **SETTINGS), expected())
    # One sequence each step: nobody was given a cache of its own.
    assert icecache.stats(model).total("dense_steps") > 0


def test_a_forward_wrapped_in_the_class_keeps_its_context(model: Model) -> None:
    original = type(model).forward

    class Watched(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return original(self, *args, **kwargs)

    model.__class__ = Watched
    icecache.enable(model)
    with torch.inference_mode():
        cache = model(hf_models.prompt())[CACHE]
        by_position = (hf_models.prompt(1, 1), None, None, cache)
        assert model(*by_position)[CACHE] is cache
    assert cache.get_seq_length() == hf_models.PROMPT + 1


@torch.inference_mode()
def test_a_cache_given_by_position_is_used(model: Model) -> None:
    icecache.enable(model)
    model.forward = lambda_around(model.forward)
    cache = model(hf_models.prompt(), None, None, None)[CACHE]
    assert isinstance(cache, IceCache)
    model(hf_models.prompt(1, 2), None, None, cache)
    assert cache.get_seq_length() == hf_models.PROMPT + 2


@torch.inference_mode()
def test_refuses_a_forward_that_takes_no_cache(model: Model) -> None:
    icecache.enable(model)
    forward = model.forward
    model.forward = lambda input_ids: forward(input_ids)
    with pytest.raises(InvalidArgument, match=r"pass on \*\*kwargs"):
        model(hf_models.prompt())


def test_a_compiled_model_is_enabled(model: Model) -> None:
    wrapper: Any = torch.compile(model, backend="eager")
    assert icecache.enable(wrapper) is wrapper
    assert torch.equal(wrapper.generate(hf_models.prompt(), **SETTINGS), expected())
    assert icecache.stats(wrapper).total("bytes_read") > 0
    icecache.disable(wrapper)
    assert model.config._attn_implementation == "sdpa"


class Adapted(torch.nn.Module):
    """What PEFT's models are for us: no transformers model, but they tell their base."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.inner = model

    def get_base_model(self) -> Model:
        return self.inner


def test_an_adapted_model_is_enabled(model: Model) -> None:
    adapted = icecache.enable(Adapted(model))
    assert torch.equal(adapted.inner.generate(hf_models.prompt(), **SETTINGS), expected())
    assert icecache.stats(adapted).total("bytes_read") > 0
    icecache.disable(adapted)
    with pytest.raises(InvalidArgument, match="not enabled"):
        icecache.stats(adapted)


def test_an_adapter_of_peft_is_enabled(model: Model) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM")).eval()
    stock = adapted.generate(input_ids=hf_models.prompt(), **SETTINGS)
    icecache.enable(adapted)
    assert torch.equal(adapted.generate(input_ids=hf_models.prompt(), **SETTINGS), stock)
    assert icecache.stats(adapted).total("bytes_read") > 0


@pytest.mark.parametrize("to_disk", [False, True])
@pytest.mark.parametrize("enabled_first", [False, True])
def test_offloaded_weights_are_served(
    model: Model, to_disk: bool, enabled_first: bool, tmp_path: Path
) -> None:
    accelerate = pytest.importorskip("accelerate")
    if enabled_first:
        icecache.enable(model)
    if to_disk:
        accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    else:
        accelerate.cpu_offload(model, execution_device="cpu")
    assert any(parameter.is_meta for parameter in model.parameters())
    if not enabled_first:
        icecache.enable(model)
    assert torch.equal(model.generate(hf_models.prompt(), **SETTINGS), expected())
    assert icecache.stats(model).total("bytes_read") > 0


def test_a_pipeline_keeps_the_context(model: Model) -> None:
    words = {f"w{token}": token for token in range(hf_models.VOCABULARY)}
    splitter = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w3"))
    splitter.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=splitter, pad_token="w0")
    icecache.enable(model)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = " ".join(f"w{token}" for token in hf_models.prompt()[0].tolist())
    answer = generate(text, return_full_text=False, **SETTINGS)[0]["generated_text"]
    assert answer.split() == [f"w{token}" for token in expected()[0, hf_models.PROMPT :].tolist()]
    assert icecache.stats(model).total("bytes_read") > 0
