"""Hooks around the forward calls of an enabled model: they supply, check and mend its cache."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from icecache import InvalidArgument
from icecache.hf.attention import IMPLEMENTATION
from icecache.hf.cache import IceCache
from icecache.hf.eager import outside_graphs
from icecache.hf.engine_handle import EngineHandle
from icecache.hf.support import CACHE, CACHE_NAMES, check_forward


@outside_graphs
def before_forward(
    handle: EngineHandle, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: refuses what cannot be served, and supplies a cache where none is given."""
    names = _positional_names(type(model).forward)
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    check_forward(model, arguments)
    _check_attention_implementation(model)
    cache = _given_cache(arguments, args)
    if cache is not None:
        check_cache(cache)
        cache.check_usable()
        return args, kwargs
    use_cache = arguments.get("use_cache")
    text_config = model.config.get_text_config(decoder=True)
    if not (getattr(text_config, "use_cache", True) if use_cache is None else use_cache):
        return args, kwargs
    _check_forward_takes_caches(model)
    cache = IceCache(model.config, handle=handle)
    if CACHE in names[: len(args)]:  # None was given by position
        place = names.index(CACHE)
        return (*args[:place], cache, *args[place + 1 :]), kwargs
    return args, {**kwargs, CACHE: cache}


@outside_graphs
def after_forward(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """Forward hook: undoes a call that raised; torch calls it with no output then."""
    names = _positional_names(type(model).forward)
    cache = _given_cache({**dict(zip(names, args, strict=False)), **kwargs}, args)
    if not isinstance(cache, IceCache):
        return
    if output is None:
        cache.take_back(str(sys.exc_info()[1]))
    cache.call.forget()


@functools.cache
def _positional_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Parameters of a class's own `forward` that may be given by position.

    A model's `forward` attribute is no guide: accelerate, monitors and users wrap it, and most
    wrappers take anything (`*args, **kwargs`).
    """
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    return tuple(parameter.name for parameter in parameters if parameter.kind in kinds)


def _given_cache(arguments: Mapping[str, Any], args: tuple[Any, ...]) -> Any:
    """The cache among the arguments of a forward call: by its name, or any cache by position."""
    named = next((arguments[n] for n in CACHE_NAMES if arguments.get(n) is not None), None)
    if named is not None:
        return named
    return next((value for value in args if isinstance(value, Cache)), None)


def _check_forward_takes_caches(model: PreTrainedModel) -> None:
    """Refuses a `forward` that was replaced by a function to which no cache can be given."""
    own = model.__dict__.get("forward")
    if own is None:
        return
    try:
        parameters = inspect.signature(own).parameters
    except (TypeError, ValueError):  # no signature: it is called, and tells
        return
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if not takes_any and CACHE not in parameters:
        raise InvalidArgument(
            f"model: its forward was replaced by a function without the parameter {CACHE}, so "
            "that no cache can be given to it; let that function take and pass on **kwargs"
        )


def check_cache(cache: Any) -> None:
    if not isinstance(cache, IceCache):
        raise InvalidArgument(
            f"{CACHE}: expected an IceCache or none on an enabled model, got "
            f"{type(cache).__name__}; leave it out, or call icecache.disable(model)"
        )


def _check_attention_implementation(model: PreTrainedModel) -> None:
    text_config = model.config.get_text_config(decoder=True)
    if text_config._attn_implementation != IMPLEMENTATION:
        raise InvalidArgument(
            f"attn_implementation: {text_config._attn_implementation!r} was set after "
            "icecache.enable(model); call icecache.enable again, or icecache.disable first"
        )
