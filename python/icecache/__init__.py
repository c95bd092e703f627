"""IceCache: the KV cache of long sequences in host memory, attention to what a query needs.

engine        Engine, Config: the cache and attention over torch tensors
prefix_store  PrefixStore: prompts that begin alike are prefilled once
device        DeviceCache: the cache of a model on a CUDA device
hf            enable(model), disable(model), stats(model), IceCache: transformers
models        small real models for demo and tests
ops           torch operators
reference     the engine's contract in plain torch
bench         harness that measures what a token budget costs in quality
cli           the `icecache` command
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from icecache.errors import (
    CudaError,
    Error,
    IntegrityError,
    InvalidArgument,
    OutOfPages,
    Unavailable,
)

try:
    from icecache._core import BuildInfo, HeadStats, MemoryStats, StepTrace, build_info, simd_level
except ImportError as error:
    raise ImportError(
        f"icecache's C++ extension is missing or does not load ({error}). In a checkout: "
        "make build, and PYTHONPATH=python; else: pip install --no-build-isolation --no-deps ."
    ) from error
from icecache.config import PREFILL_BLOCK, Config, config_fields

if TYPE_CHECKING:
    from icecache import models, ops
    from icecache.device import DeviceCache
    from icecache.engine import Engine, Phase
    from icecache.hf import IceCache, ModelStats, disable, enable, stats
    from icecache.prefix_store import PrefixStore

__version__ = build_info().version

# Imported when first used: torch and transformers take seconds.
_LAZY = {
    "DeviceCache": "icecache.device",
    "Engine": "icecache.engine",
    "IceCache": "icecache.hf",
    "ModelStats": "icecache.hf",
    "Phase": "icecache.engine",
    "PrefixStore": "icecache.prefix_store",
    "disable": "icecache.hf",
    "enable": "icecache.hf",
    "stats": "icecache.hf",
    "models": "",
    "ops": "",
}

__all__ = [
    "PREFILL_BLOCK",
    "BuildInfo",
    "Config",
    "CudaError",
    "DeviceCache",
    "Engine",
    "Error",
    "HeadStats",
    "IceCache",
    "IntegrityError",
    "InvalidArgument",
    "MemoryStats",
    "ModelStats",
    "OutOfPages",
    "Phase",
    "PrefixStore",
    "StepTrace",
    "Unavailable",
    "__version__",
    "build_info",
    "config_fields",
    "disable",
    "enable",
    "models",
    "ops",
    "simd_level",
    "stats",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'icecache' has no attribute {name!r}")
    if not _LAZY[name]:
        return importlib.import_module(f"icecache.{name}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
