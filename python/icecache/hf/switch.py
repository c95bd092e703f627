"""Switches a transformers model to IceCache and back."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
from transformers import PreTrainedModel

from icecache import InvalidArgument, device
from icecache.device_engine import DeviceEngine
from icecache.hf.attention import IMPLEMENTATION
from icecache.hf.cache import IceCache
from icecache.hf.decoding_loop import Decoding
from icecache.hf.engine_handle import EngineFactory, EngineHandle
from icecache.hf.forward_hooks import after_forward, before_forward, check_cache
from icecache.hf.lossless import Lossless
from icecache.hf.model_stats import ModelStats, collect
from icecache.hf.placement import compute_device, wrapped_model
from icecache.hf.prompt_chunks import feed_prompt
from icecache.hf.refresh import Refresh
from icecache.hf.reuse import Reuse
from icecache.hf.support import (
    CACHE,
    check_forward,
    check_generation,
    check_model,
    check_prefill_budget,
    full_attention_layers,
    logit_softcap,
)
from icecache.shape import CacheShape

ModelT = TypeVar("ModelT")

_PREPARE_CACHE = "_prepare_cache_for_generation"
_PREFILL = "_prefill"
_CONTINUOUS_BATCHING = (
    "generate_batch",
    "init_continuous_batching",
    "continuous_batching_context_manager",
)


@dataclass
class _Enabled:
    """What `enable` changed on a model, for `disable`."""

    handle: EngineHandle
    attention: str | dict[str, str]
    hooks: tuple[torch.utils.hooks.RemovableHandle, ...]
    methods: tuple[str, ...]
    decoding: Decoding | None


_enabled: weakref.WeakKeyDictionary[PreTrainedModel, _Enabled] = weakref.WeakKeyDictionary()


def enable(
    model: ModelT,
    token_budget: int = 256,
    *,
    engine_class: EngineFactory | None = None,
    max_tokens: int | None = None,
    lossless: bool = False,
    draft_tokens: int = 16,
    refresh_every: int = 0,
    reuse_prefixes: bool = False,
    **config_fields: Any,
) -> ModelT:
    """Lets `model.generate` and plain forward calls of `model` use IceCache. Returns `model`.

    `model` is a transformers model, or one within torch.compile's or PEFT's wrapper.
    `token_budget` counts the tokens attended exactly per KV head and step; `config_fields` are the
    other fields of `icecache.Config`. `dense_layers` counts in layers of the model. `engine_class`
    stands in for `icecache.Engine` (a subclass that observes it, or the ReferenceEngine). All
    caches of the model share one engine, hence one bound on host memory. Enabling again starts
    afresh with the new settings. Raises InvalidArgument for models and settings that are not
    supported; the model is then as it was.

    With `lossless`, attention is exact, and `generate` writes what it would write with full
    attention, greedy or sampled: steps within the token budget draft up to `draft_tokens` tokens,
    as many as pay, and one exact call verifies them. With `refresh_every` n, `generate` computes
    every n tokens once more, exactly, so that what the budget costs does not add up; the text stays
    as it is. Neither is there on a CUDA device, or for models with recurrent layers; `lossless` not
    with kv_dtype="int8", whose text is not full attention's.

    With `reuse_prefixes`, `generate` goes on from what earlier calls of this model had in common
    with the prompt, token by token: one row of text, not with beams. What is kept goes where the
    engine needs its pages. All callers share it: the texts of one user then serve another. Not on a
    CUDA device, not for models with sliding or recurrent layers, not with lossless or
    refresh_every.

    With `prefill_budget` the prompt, too, attends within a budget: of what is before their own
    chunk, 64 of its tokens together pick so many per KV head, and the rest takes part through
    summaries. `generate` feeds long prompts in calls of `GenerationConfig.prefill_chunk_size`
    tokens, or 2,048: the text does not depend on it. Not on a CUDA device, not with lossless.

    On a CUDA device the cache of a batch is made when its prompt comes, and grows up to
    `max_tokens`, prompt included, or 32,768 tokens behind the prompt. With `device_tokens` the
    device holds so many tokens whole besides: sequences attend to everything while they fit, and
    the longest goes on within the budget when another wants its memory.
    """
    if lossless and refresh_every:
        raise InvalidArgument(
            f"refresh_every: nothing to refresh with lossless=True, got {refresh_every}"
        )
    decoding: Decoding | None = None
    if lossless:
        _check_lossless(config_fields)
        decoding = Lossless(draft_tokens)
    elif refresh_every:
        decoding = Refresh(refresh_every)
    if reuse_prefixes and decoding is not None:
        raise InvalidArgument(f"reuse_prefixes: expected False with {decoding.setting}, got True")
    _enable(
        wrapped_model(model),
        token_budget,
        engine_class,
        max_tokens,
        decoding,
        reuse_prefixes,
        config_fields,
    )
    return model


def _check_lossless(config_fields: dict[str, Any]) -> None:
    """Raises InvalidArgument for settings with which the text is not full attention's."""
    kv_dtype = config_fields.get("kv_dtype", "auto")
    if kv_dtype != "auto":
        raise InvalidArgument(
            f"lossless: expected kv_dtype=auto, got {kv_dtype}: the text is to be that of keys and "
            "values as the model makes them. Leave out one of the two"
        )
    prefill_budget = config_fields.get("prefill_budget", 0)
    if prefill_budget not in (0, "0"):
        raise InvalidArgument(
            f"lossless: expected prefill_budget=0, got {prefill_budget}: the text is to be that of "
            "a prompt that attends to all of itself. Leave out one of the two"
        )


def _enable(
    model: PreTrainedModel,
    token_budget: int,
    engine_class: EngineFactory | None,
    max_tokens: int | None,
    decoding: Decoding | None,
    reuse_prefixes: bool,
    config_fields: dict[str, Any],
) -> None:
    check_model(model)
    place = compute_device(model)
    on_device = place.type == device.KIND
    if reuse_prefixes and on_device:
        raise InvalidArgument(
            f"reuse_prefixes: expected a model on the CPU, got one on {place}, where a sequence "
            "that is kept would take the place of another"
        )
    if decoding is not None and on_device:
        raise InvalidArgument(
            f"lossless, refresh_every: expected a model on the CPU, got one on {place}: the exact "
            "call would read all keys and values from host memory, which is not built yet. Leave "
            "them out there"
        )
    if max_tokens is not None and (not on_device or max_tokens < 1):
        raise InvalidArgument(
            "max_tokens: expected a positive number, for a model on a CUDA device, got "
            f"{max_tokens} for one on {place}"
        )
    if engine_class is None and on_device:
        engine_class = functools.partial(DeviceEngine, device=place, max_tokens=max_tokens)
    text_config = model.config.get_text_config(decoder=True)
    handle = EngineHandle(
        full_attention_layers(text_config),
        {"token_budget": token_budget, **config_fields},
        engine_class,
    )
    handle.is_lossless = isinstance(decoding, Lossless)
    if handle.attends_prompts:
        check_prefill_budget(text_config)
    if decoding is not None:
        IceCache(model.config, handle=handle).savepoint()  # refuses layers that take no tokens back
    reuse = Reuse(model.config, handle) if reuse_prefixes else None
    handle.bind(_expected_shape(model))  # refuses settings now and not at the first token
    disable(model)

    before = text_config._attn_implementation or "sdpa"
    part = _text_part(model)
    model.set_attn_implementation(IMPLEMENTATION if part is None else {part: IMPLEMENTATION})
    restore: str | dict[str, str] = before
    if part is not None:
        restore = {part: before}
    hooks = (
        model.register_forward_pre_hook(
            functools.partial(before_forward, handle), with_kwargs=True
        ),
        model.register_forward_hook(after_forward, with_kwargs=True, always_call=True),
    )
    methods = _methods(model, handle, decoding or reuse)
    for name, method in methods.items():
        model.__dict__[name] = method
    handle.is_enabled = True
    _enabled[model] = _Enabled(handle, restore, hooks, tuple(methods), decoding)


def _methods(
    model: PreTrainedModel, handle: EngineHandle, stand_in: Decoding | Reuse | None
) -> dict[str, Callable[..., Any]]:
    """What stands in for methods of `model`, by name. They do not keep it alive."""
    this = weakref.ref(model)
    methods: dict[str, Callable[..., Any]] = {
        _PREPARE_CACHE: functools.partial(_prepare_cache, this, handle)
    }
    methods |= {
        name: functools.partial(_refuse_continuous_batching, name)
        for name in _CONTINUOUS_BATCHING
        if hasattr(model, name)
    }
    if handle.attends_prompts:
        methods[_PREFILL] = functools.partial(_feed_prompt, this)
    if stand_in is not None:
        methods["generate"] = functools.partial(_generate, this, stand_in)
    return methods


def disable(model: Any) -> None:
    """Gives `model` its former attention back; no effect where it is not enabled.

    Caches made by the model until now cannot be used with it any more.
    """
    model = wrapped_model(model)
    state = _enabled.pop(model, None) if isinstance(model, PreTrainedModel) else None
    if state is None:
        return
    for hook in state.hooks:
        hook.remove()
    for name in state.methods:
        model.__dict__.pop(name, None)
    model.set_attn_implementation(state.attention)


def stats(model: Any) -> ModelStats:
    """What the engine of an enabled model did since `enable`. Raises InvalidArgument else."""
    model = wrapped_model(model)
    state = _enabled.get(model) if isinstance(model, PreTrainedModel) else None
    found = None
    if state is not None:
        lossless = state.decoding.stats if isinstance(state.decoding, Lossless) else None
        found = collect(state.handle, lossless)
    if found is None:
        raise InvalidArgument("model: IceCache is not enabled on it; call icecache.enable(model)")
    return found


def _prepare_cache(
    model_ref: weakref.ref[PreTrainedModel],
    handle: EngineHandle,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> None:
    """Stands in for the model's own step of `generate` that makes the cache."""
    model = _alive(model_ref)
    check_generation(generation_config)
    check_forward(model, {})
    cache = model_kwargs.get(CACHE)
    if cache is not None:
        check_cache(cache)
        cache._is_user_defined = True
    elif generation_config.use_cache is not False:
        cache = IceCache(model.config, handle=handle)
        if generation_config.is_assistant:
            cache.activate_past_recording()  # type: ignore[no-untyped-call]
        model_kwargs[CACHE] = cache


def _generate(
    model_ref: weakref.ref[PreTrainedModel],
    stand_in: Decoding | Reuse,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Stands in for the model's `generate`."""
    model: Any = _alive(model_ref)
    return stand_in.generate(functools.partial(type(model).generate, model), *args, **kwargs)


def _feed_prompt(model_ref: weakref.ref[PreTrainedModel], *args: Any, **kwargs: Any) -> Any:
    """Stands in for the model's step of `generate` that feeds the prompt."""
    model: Any = _alive(model_ref)
    return feed_prompt(functools.partial(type(model)._prefill, model), *args, **kwargs)


def _alive(model_ref: weakref.ref[PreTrainedModel]) -> PreTrainedModel:
    model = model_ref()
    if model is None:  # the bound method outlived its model
        raise InvalidArgument("model: it is gone")
    return model


def _refuse_continuous_batching(name: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise InvalidArgument(
        f"{name}: continuous batching brings its own paged cache and is not supported with "
        "IceCache; use model.generate on a padded batch, or call icecache.disable(model)"
    )


def _text_part(model: PreTrainedModel) -> str | None:
    """Name of the sub-config that describes the language model; None where it is the whole."""
    text_config = model.config.get_text_config(decoder=True)
    if text_config is model.config:
        return None
    for name in map(str, model.config.sub_configs):
        if getattr(model.config, name, None) is text_config:
            return name
    raise InvalidArgument(
        f"model: cannot find the language model within {type(model).__name__}; pass the language "
        "model itself"
    )


def _expected_shape(model: PreTrainedModel) -> CacheShape:
    """The attention shape the configuration promises; the first forward call corrects it."""
    config = model.config.get_text_config(decoder=True)
    layers = full_attention_layers(config)
    config = getattr(config, "per_layer_config", {layers[0]: config})[layers[0]]
    num_q_heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_q_heads
    scales = [
        scaling
        for module in model.modules()
        if hasattr(module, "layer_idx")
        and isinstance(scaling := getattr(module, "scaling", None), float)
    ]
    return CacheShape(
        num_layers=len(layers),
        num_q_heads=num_q_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or num_q_heads,
        head_dim=head_dim,
        dtype=model.dtype,
        scale=scales[0] if scales else head_dim**-0.5,
        logit_softcap=logit_softcap(config),
    )
