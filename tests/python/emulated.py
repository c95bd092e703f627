"""icecache.DeviceCache without a device: its own sources and kernels, on the emulator, on a CPU.

Tensors and models stay on the CPU. Slow: a fibre for each CUDA thread.
"""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path

import pytest
from absence import absent
from icecache import _core, device

_FOLDER = Path(__file__).resolve().parents[2] / "build" / "release" / "tests"
_MODULE = _FOLDER / f"_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"


def require_emulator() -> None:
    """Skips where the module was not built; fails there with ICECACHE_REQUIRE_SHARED=1."""
    if not _MODULE.exists():
        absent(f"{_MODULE} is absent", "make build-test makes it")


def emulate_device(patch: pytest.MonkeyPatch) -> None:
    """Until the patch is undone, CPU tensors stand for those of a CUDA device."""
    spec = importlib.util.spec_from_file_location("_emulated", _MODULE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    patch.setattr(_core, "DeviceCache", module.DeviceCache)
    patch.setattr(device, "KIND", "cpu")
