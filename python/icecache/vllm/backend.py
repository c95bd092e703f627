"""The attention backends: full attention by the engine, all other layers as they were.

vLLM's platform chooses a backend by its name. Ours takes the place of each that it may choose,
inherits from it, and hands back the stock parts wherever IceCache was not asked for.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from icecache.vllm.metadata import IceCacheMetadata
from icecache.vllm.names import (
    AttentionBackendEnum,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionSpec,
    FullAttentionSpec,
    get_current_vllm_config,
    register_backend,
    resolve_obj_by_qualname,
)
from icecache.vllm.settings import device_of, is_wanted
from icecache.vllm.spec import IceCacheSpec
from icecache.vllm.support import check_attention
from icecache.vllm.worker import Shape, current_worker, worker_for


class IceCacheAttention(AttentionImpl):  # type: ignore[misc]
    """Full attention of one layer: every token goes to the engine, which keeps and attends them."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **others: Any,  # which only some backends know: use_alibi_sqrt, chunk_lookback, ...
    ) -> None:
        self.worker = worker_for(get_current_vllm_config())
        check_attention(
            alibi_slopes=alibi_slopes,
            logits_soft_cap=logits_soft_cap,
            attn_type=str(getattr(attn_type, "value", attn_type)),
            kv_sharing_target_layer_name=kv_sharing_target_layer_name,
            sinks=sinks,
            kv_cache_dtype=kv_cache_dtype,
            others=others,
        )
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_size, self.scale = head_size, float(scale)
        self.kv_cache_dtype = kv_cache_dtype
        self.worker.add_layer(Shape(num_heads, num_kv_heads, head_size, self.scale))

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: IceCacheMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Query, output [N, Hq, D], key, value [N, Hkv, D]; `kv_cache` is not read.

        Rows beyond those of the batch's requests come out as zeros. A batch of none is a dummy, or
        what a full graph is captured with: what is done here is then all tensors, and a replay
        does it for the step that began before it.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(
                "IceCache does not quantise the output of attention: start without a compilation "
                "pass that fuses the two"
            )
        store, batch = self.worker.store, self.worker.batch
        # So vLLM measures: without metadata, and before the layers have their numbers.
        if attn_metadata is None or store is None or not store.layers:
            return output.zero_()
        if batch.tokens < output.shape[0]:
            output.zero_()
        store.attend(layer.layer_name, query, key, value, output, batch)
        return output

    def do_kv_cache_update(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: forward() hands the tokens to the engine."""


class IceCacheMetadataBuilder(AttentionMetadataBuilder[IceCacheMetadata]):  # type: ignore[misc]
    """Reads the form of a batch."""

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Steps of one token a request, where the cache is on a CUDA device.

        vLLM's V2 runner takes the last token of a prompt in chunks for such a step, too, and a
        prompt's attention is not in the graph. In the V1 runner the connector sees to that.
        """
        chunks = vllm_config.scheduler_config.enable_chunked_prefill
        if device_of(vllm_config) is None or (vllm_config.use_v2_model_runner and chunks):
            return AttentionCGSupport.NEVER
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: Any,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.worker = worker_for(vllm_config)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> IceCacheMetadata:
        """Of a batch in whatever order the runner has its rows."""
        rows = common_attn_metadata.num_reqs
        starts = common_attn_metadata.query_start_loc_cpu[: rows + 1].tolist()
        blocks = common_attn_metadata.block_table_tensor[:rows, 0].tolist()
        self.worker.metadata = IceCacheMetadata(starts, blocks)
        return self.worker.metadata


@cache
def _in_place_of(name: str) -> type:
    """The backend that takes the place of vLLM's of this name."""
    stock: Any = resolve_obj_by_qualname(AttentionBackendEnum[name].value)
    stock_impl: Any = stock.get_impl_cls()
    stock_builder: Any = stock.get_builder_cls()

    class Impl(stock_impl):  # type: ignore[misc]
        """What vLLM calls to make a layer's implementation: ours or the stock one."""

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            window = args[5] if len(args) > 5 else kwargs.get("sliding_window")
            if is_wanted(get_current_vllm_config()) and window is None:
                return IceCacheAttention(*args, **kwargs)
            return stock_impl(*args, **kwargs)

    class Builder(stock_builder):  # type: ignore[misc]
        """What vLLM calls to make a group's metadata builder: ours or the stock one."""

        def __new__(cls, kv_cache_spec: AttentionSpec, *args: Any, **kwargs: Any) -> Any:
            if isinstance(kv_cache_spec, IceCacheSpec):
                return IceCacheMetadataBuilder(kv_cache_spec, *args, **kwargs)
            return stock_builder(kv_cache_spec, *args, **kwargs)

        @classmethod
        def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
            """vLLM's V1 runner asks this class, the V2 runner the builder that it made."""
            ours = isinstance(kv_cache_spec, IceCacheSpec)
            builder = IceCacheMetadataBuilder if ours else stock_builder
            return builder.get_cudagraph_support(vllm_config, kv_cache_spec)

    class Backend(stock):  # type: ignore[misc]
        @staticmethod
        def get_impl_cls() -> Any:
            """As in vLLM's backend where IceCache was not asked for."""
            return Impl

        @staticmethod
        def get_builder_cls() -> Any:
            """As get_impl_cls()."""
            return Builder

        @classmethod
        def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
            """One block a request, for the layers that the engine serves."""
            worker = current_worker()
            if worker is None or not worker.shapes or type(spec) is not FullAttentionSpec:
                return spec
            return worker.spec_of(spec)

    # vLLM hands classes on by their names.
    Backend.__module__, Backend.__name__, Backend.__qualname__ = __name__, name, name
    return Backend


# Those that vLLM's platforms choose for full attention on a CPU and on CUDA devices.
BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")


def __getattr__(name: str) -> Any:
    if name in BACKENDS:
        return _in_place_of(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register_backends() -> None:
    """Takes the places of vLLM's backends; each is imported when its platform chooses it."""
    for name in BACKENDS:
        register_backend(AttentionBackendEnum[name], f"{__name__}.{name}")
