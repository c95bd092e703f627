"""What a user sets, and the vLLM arguments that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from icecache import Config, InvalidArgument, device
from icecache.machine import usable_memory
from icecache.vllm.plugin import CONNECTOR, KEY, has_settings

KV_TRANSFER = {
    "kv_connector": CONNECTOR,
    "kv_connector_module_path": "icecache.vllm.connector",
    "kv_role": "kv_both",
}
# Short contexts, of which a server has many: exact, and no slower.
DENSE_TOKENS = 1536
# Of vLLM's --kv-cache-dtype: those of eight bits, in whose place the engine has its own.
EIGHT_BITS = ("fp8", "fp8_e4m3", "fp8_e5m2", "int8_per_token_head", "fp8_per_token_head")
SCHEDULER = "icecache.vllm.scheduler.make_scheduler"


def engine_args(**settings: Any) -> dict[str, Any]:
    """Keyword arguments of `vllm.LLM` or `EngineArgs` that turn IceCache on.

    `settings` are fields of `icecache.Config` (`token_budget`, `host_memory`, `exact`, ...).
    Raises InvalidArgument for an unknown or bad one.
    """
    Config(**settings)
    return {
        "additional_config": {KEY: settings},
        "kv_transfer_config": dict(KV_TRANSFER),
        "scheduler_cls": SCHEDULER,
        "disable_hybrid_kv_cache_manager": False,
    }


def device_of(vllm_config: Any) -> torch.device | None:
    """The CUDA device that holds the cache; None where the engine on the CPU does."""
    kind = vllm_config.device_config.device_type
    return torch.device(kind) if kind == device.KIND else None


def engine_config(vllm_config: Any) -> Config:
    """The engine's parameters. Raises InvalidArgument for those it does not know or take.

    A --kv-cache-dtype of eight bits means kv_dtype=int8.
    """
    settings = vllm_config.additional_config[KEY] if has_settings(vllm_config) else {}
    if not isinstance(settings, Mapping):
        raise InvalidArgument(
            f"additional_config: expected {{{KEY!r}: {{NAME: VALUE}}}}, got {settings!r}"
        )
    given = Config(**settings)
    derived: dict[str, Any] = {}
    if given.dense_tokens == 0 and device_of(vllm_config) is None:
        derived["dense_tokens"] = max(DENSE_TOKENS, given.token_budget)
    if vllm_config.cache_config.cache_dtype in EIGHT_BITS:
        derived["kv_dtype"] = "int8"
    parallel = vllm_config.parallel_config
    workers = parallel.world_size * parallel.data_parallel_size
    if given.host_memory == 0 and workers > 1:
        # They share a machine: half of its memory is for all of them.
        derived["host_memory"] = usable_memory() // 2 // workers
    return Config(**{**settings, **derived})
