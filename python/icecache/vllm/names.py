"""Every name of vLLM that the plugin touches; tests check each against the installed version.

One source serves the versions below: what moves between them is settled here and nowhere else.
"""

from __future__ import annotations

from icecache.vllm.plugin import is_supported_version

# What cannot be imported but on a CUDA device.
FLASH_ATTENTION = "vllm.vllm_flash_attn.flash_attn_varlen_func"

if is_supported_version():
    from vllm.config import CUDAGraphMode, VllmConfig, get_current_vllm_config
    from vllm.distributed.kv_events import MEDIUM_CPU, BlockRemoved, BlockStored
    from vllm.distributed.kv_transfer.kv_connector.v1.base import (
        KVConnectorBase_V1,
        KVConnectorMetadata,
        KVConnectorRole,
        SupportsHMA,
    )
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
        KVConnectorPromMetrics,
        KVConnectorStats,
    )
    from vllm.forward_context import get_forward_context, is_forward_context_available
    from vllm.logger import init_logger
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.attention.backend import (
        AttentionCGSupport,
        AttentionImpl,
        AttentionMetadata,
        AttentionMetadataBuilder,
    )
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.core.single_type_kv_cache_manager import (
        FullAttentionManager,
        SingleTypeKVCacheManager,
    )
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
    from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
    from vllm.v1.request import RequestStatus

    try:
        from vllm.v1.metrics.cache_hit_source import CacheHitSource

        HOST_MEMORY = CacheHitSource.HOST
    except ModuleNotFoundError:  # before 0.32 nobody asks
        HOST_MEMORY = "host"

__all__ = [
    "HOST_MEMORY",
    "MEDIUM_CPU",
    "AsyncScheduler",
    "AttentionCGSupport",
    "AttentionImpl",
    "AttentionMetadata",
    "AttentionMetadataBuilder",
    "AttentionSpec",
    "BlockRemoved",
    "BlockStored",
    "CUDAGraphMode",
    "EngineCoreOutput",
    "EngineCoreOutputs",
    "FullAttentionManager",
    "FullAttentionSpec",
    "KVCacheSpecRegistry",
    "KVConnectorBase_V1",
    "KVConnectorMetadata",
    "KVConnectorPromMetrics",
    "KVConnectorRole",
    "KVConnectorStats",
    "RequestStatus",
    "Scheduler",
    "SingleTypeKVCacheManager",
    "SupportsHMA",
    "VllmConfig",
    "get_current_vllm_config",
    "get_flash_attn_version",
    "get_forward_context",
    "init_logger",
    "is_forward_context_available",
    "resolve_obj_by_qualname",
]
