"""What the plugin does not serve: each is refused at start, with what to do instead."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from icecache import Config, InvalidArgument
from icecache.device import STEP_TOKENS
from icecache.machine import usable_memory
from icecache.shape import CacheShape
from icecache.vllm.drafts import BY_LAYERS, IN_TEXT, drafts_by_layers
from icecache.vllm.engines import Layer
from icecache.vllm.host_memory import TREE, Room, slots_needed
from icecache.vllm.plugin import (
    CONNECTOR,
    END,
    FIRST,
    KEY,
    has_settings,
    installed_version,
    is_loaded,
    is_supported_version,
)
from icecache.vllm.prompts import check_prompts
from icecache.vllm.settings import (
    EIGHT_BITS,
    KV_TRANSFER,
    SCHEDULER,
    device_of,
    engine_config,
)

NAME = "IceCache"
INDEXES_OF_SEGMENTS = ("tree", "faiss")
_STOCK = "serve this model with stock vLLM"
_CACHE_DTYPES = ("auto", "float16", "bfloat16", "float32", *EIGHT_BITS)
_OTHER_DTYPES = "leave --kv-cache-dtype at auto, or set fp8, for which the engine has kv_dtype=int8"


def check_version() -> None:
    """Raises InvalidArgument for a vLLM that the plugin is not made for."""
    if not is_supported_version():
        raise InvalidArgument(
            f"{NAME} needs vLLM {FIRST[0]}.{FIRST[1]} or newer and below {END[0]}.{END[1]}, got "
            f"{installed_version()}; install one of those, or start without {NAME}"
        )


def check_config(vllm_config: Any) -> None:
    """Raises InvalidArgument where a server could not give right tokens, or not start."""
    check_version()
    if not is_loaded():
        _refuse(
            "its plugin not loaded by vLLM",
            "install icecache where vLLM runs, and where VLLM_PLUGINS is set name icecache in it",
        )
    engine_config(vllm_config)
    transfer = vllm_config.kv_transfer_config
    flags = f"--kv-transfer-config '{json.dumps(KV_TRANSFER)}'"
    if transfer is None or transfer.kv_connector is None:
        _refuse("no KV connector", f"add {flags}, or start with `icecache serve`")
    if transfer.kv_connector != CONNECTOR:
        _refuse(
            f"the KV connector {transfer.kv_connector}",
            f"{NAME} has its own and cannot share: add {flags}",
        )
    if vllm_config.scheduler_config.scheduler_cls != SCHEDULER:
        _refuse(
            f"the scheduler {vllm_config.scheduler_config.scheduler_cls or 'of vLLM alone'}",
            f"a request whose pages are lost must fail alone: add --scheduler-cls {SCHEDULER}",
        )
    if not has_settings(vllm_config):
        _refuse("no settings", f"add --additional-config '{{\"{KEY}\": {{}}}}'")
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    _check_cache_dtype(vllm_config)
    _check_drafts(vllm_config)
    check_prompts(vllm_config)
    if parallel.decode_context_parallel_size > 1:
        _refuse("decode context parallelism", "use --tensor-parallel-size")
    if cache.kv_sharing_fast_prefill:
        _refuse("--kv-sharing-fast-prefill", "start without it")
    _check_model(vllm_config)


def _check_cache_dtype(vllm_config: Any) -> None:
    """Raises InvalidArgument for a --kv-cache-dtype that says what the engine would not do."""
    cache = vllm_config.cache_config
    if cache.cache_dtype not in _CACHE_DTYPES:
        _refuse(f"--kv-cache-dtype {cache.cache_dtype}", _OTHER_DTYPES)
    if cache.cache_dtype not in EIGHT_BITS:
        return
    if device_of(vllm_config) is not None:
        _refuse(
            f"--kv-cache-dtype {cache.cache_dtype} on a CUDA device",
            "it keeps keys and values in the model's type there; leave it at auto",
        )
    others = [name for name in cache.kv_cache_dtype_skip_layers if name != "sliding_window"]
    if others:
        _refuse(
            f"--kv-cache-dtype-skip-layers {' '.join(others)}",
            "it keeps all layers in eight bits, or none; name sliding_window alone, or none",
        )


def _check_model(vllm_config: Any) -> None:
    """Raises InvalidArgument for a model whose attention is not causal, or of another kind."""
    model = vllm_config.model_config
    if model.is_encoder_decoder:
        _refuse("encoder-decoder models", "serve such models with stock vLLM")
    if model.use_mla:
        _refuse("multi-head latent attention", "serve such models with stock vLLM")
    if model.is_mm_prefix_lm:
        _refuse(
            "images or videos whose tokens attend to one another",
            "serve the model's text alone with --language-model-only, or with stock vLLM",
        )
    if getattr(vllm_config.attention_config, "use_non_causal", False):
        _refuse("attention that is not causal", "serve such models with stock vLLM")


def _check_drafts(vllm_config: Any) -> None:
    """Raises InvalidArgument for drafts whose tokens the engine could not take back."""
    speculative = vllm_config.speculative_config
    if speculative is None:
        return
    if device_of(vllm_config) is not None and speculative.method not in IN_TEXT:
        _refuse(
            f"speculative decoding by {speculative.method} on a CUDA device",
            f"use one of {', '.join(IN_TEXT)}, or start without --speculative-config",
        )
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        _refuse(
            "speculative decoding and pipeline parallelism",
            "vLLM's runner on CPUs drafts in one stage and fails in the others; use "
            "--tensor-parallel-size, or start without --speculative-config",
        )
    if speculative.method not in (*IN_TEXT, *BY_LAYERS):
        methods = ", ".join((*IN_TEXT, *BY_LAYERS))
        _refuse(
            f"speculative decoding by {speculative.method}",
            "its drafts are not known when a step is planned, or were not tried; use one of "
            f"{methods}, or start without --speculative-config",
        )
    if not drafts_by_layers(vllm_config):
        return
    if vllm_config.use_v2_model_runner:
        _refuse(
            f"speculative decoding by {speculative.method} in vLLM's V2 runner",
            "which blocks it gives to layers that draft was not tried; set "
            "VLLM_USE_V2_MODEL_RUNNER=0",
        )
    if vllm_config.scheduler_config.async_scheduling:
        _refuse(
            f"speculative decoding by {speculative.method} and asynchronous scheduling",
            "a step is then planned before it is known which drafts of the last one are right; "
            "add --no-async-scheduling",
        )


def check_draft_length(drafts: int, config: Config, on_device: bool) -> None:
    """Raises InvalidArgument where so many drafted tokens a step change what decoding answers, or
    are more than a step on a CUDA device takes.

    `config`: the engine's, resolved.
    """
    if on_device and 1 + drafts > STEP_TOKENS:
        raise InvalidArgument(
            f"num_speculative_tokens: expected at most {STEP_TOKENS - 1} on a CUDA device, got "
            f"{drafts}; lower it"
        )
    if config.exact:
        return
    if config.index not in INDEXES_OF_SEGMENTS:
        _refuse(
            f"speculative decoding and index={config.index}",
            "tokens that are taken back would change it; use index=tree, or exact",
        )
    most = min(config.window_tokens, config.decode_tokens)
    if 1 + drafts > most:
        raise InvalidArgument(
            f"num_speculative_tokens: expected at most {most - 1}, one less than window_tokens "
            f"({config.window_tokens}) and decode_tokens ({config.decode_tokens}), got {drafts}; "
            "lower it, or raise those two"
        )


def check_drafters(layers: Sequence[str], drafters: Sequence[str], are_alike: bool) -> None:
    """Raises InvalidArgument where layers draft that vLLM does not give blocks for all tokens.

    `layers`: all that the engines might serve, those that draft among them, as vLLM has made them.
    `are_alike`: all `drafters` have full attention, of one shape.
    """
    if not drafters or not are_alike:
        _refuse(
            f"drafts by layers without full attention, or of several shapes ({list(drafters)})",
            f"use another draft model, or one of the methods {', '.join(IN_TEXT)}",
        )
    if list(layers[-len(drafters) :]) != list(drafters):
        raise InvalidArgument(
            f"{NAME} takes the layers {list(drafters)} for those that draft, but vLLM has not made "
            f"them last ({list(layers)}): start without --speculative-config"
        )


def check_drafting_group(vllm_config: Any, group: int) -> None:
    """Raises InvalidArgument where layers that draft would read another one's keys and values.

    `group`: the number of vLLM's cache group that has theirs.
    """
    # In vLLM 0.32's runner (_build_attention_metadata) only other drafters look up their group.
    if vllm_config.speculative_config.method == "draft_model" and group != 0:
        _refuse(
            "a draft model beside layers with sliding windows or states",
            "vLLM's runner gives it the blocks of the first cache group, which is theirs; use "
            f"another method of --speculative-config, or {_STOCK}",
        )


def check_groups(served: Sequence[int], kinds: Sequence[str]) -> None:
    """Raises InvalidArgument where none of vLLM's cache groups, of these kinds, is served."""
    if not served:
        _refuse(
            "a model that has no layer for the engine, which computes causal attention to all "
            f"tokens (cache groups: {', '.join(kinds) or 'none'})",
            _STOCK,
        )


def check_layers(
    layers: Sequence[Layer],
    shapes: Sequence[CacheShape],
    device: torch.device | None,
    drafts: bool,
) -> None:
    """Raises InvalidArgument for layers that the engine of a CUDA device does not compute, or not
    with drafted tokens."""
    shares = any(layer.owner is not None for layer in layers)
    if drafts and shares:  # attending without appending begins at the last tokens, drafts included
        _refuse(
            "speculative decoding of layers that share keys and values",
            "start without --speculative-config",
        )
    if device is None:
        return
    on = f"on {device}"
    if len(shapes) > 1:
        different = "; ".join(str(shape) for shape in shapes)
        _refuse(f"full-attention layers that differ ({different}) {on}", _STOCK)
    if shares:
        _refuse(f"layers that share keys and values {on}", _STOCK)
    if any(layer.sinks is not None for layer in layers):
        _refuse(f"learned attention sinks {on}", _STOCK)
    if shapes[0].logit_softcap:
        _refuse(f"soft-capped attention logits {on}", _STOCK)


def check_head_dims(keys: int, values: int) -> None:
    """Raises InvalidArgument where values are longer or shorter than keys."""
    if keys != values:
        _refuse(f"head dim {values} of values and {keys} of keys", _STOCK)


def check_attention(*, alibi_slopes: Any, kv_cache_dtype: str, others: Mapping[str, Any]) -> None:
    """Raises InvalidArgument for full attention of a kind that the engine does not compute.

    `others`: what a backend besides takes, by name; refused unless it is off.
    """
    if alibi_slopes is not None:
        _refuse("ALiBi", _STOCK)
    if kv_cache_dtype not in _CACHE_DTYPES:
        _refuse(f"a KV cache in {kv_cache_dtype}", _OTHER_DTYPES)
    for name, value in others.items():
        if not (value is None or value is False or value == -1):
            _refuse(f"{name}={value}", _STOCK)


def check_stock_layer(name: str, kv_cache_dtype: str, supported: Sequence[str]) -> None:
    """Raises InvalidArgument for a layer that stays vLLM's, and whose cache would be in eight bits
    that vLLM's backend does not compute with. `supported`: those that it does."""
    if kv_cache_dtype in EIGHT_BITS and kv_cache_dtype not in supported:
        _refuse(
            f"--kv-cache-dtype {kv_cache_dtype}, which vLLM's own layers ({name}) do not take here",
            "leave it at auto and set kv_dtype=int8 among IceCache's settings, or use one of "
            + ", ".join(dtype for dtype in supported if dtype != kv_cache_dtype),
        )


def check_memory(
    host_memory: int, slot_bytes: int, max_model_len: int, step: int = 0, room: Room = TREE
) -> None:
    """Raises InvalidArgument where `host_memory` (bytes) does not hold one longest request.

    `slot_bytes`: of one token in all layers and KV heads of this worker. `step`, `room`: as
    slots_needed().
    """
    needed = slots_needed(max_model_len, step, room) * slot_bytes
    if host_memory < needed:
        raise InvalidArgument(
            f"host_memory: expected at least {needed / 2**30:.3f} GiB, room for one request of "
            f"{max_model_len:,} tokens (--max-model-len), got {host_memory / 2**30:.3f} GiB; raise "
            "host_memory or lower --max-model-len"
        )
    available = usable_memory()
    if host_memory > available:
        raise InvalidArgument(
            f"host_memory: expected at most this machine's {available / 2**30:.1f} GiB, got "
            f"{host_memory / 2**30:.1f} GiB"
        )


def _refuse(what: str, remedy: str) -> None:
    raise InvalidArgument(f"{NAME} does not serve with {what}: {remedy}")
