"""The attention backends: full attention by the engine, all other layers as they were.

vLLM makes every layer with one of its own backends: stock implementation, stock metadata builder.
When all layers are made it asks each backend for the KV-cache spec of its layers. That is when the
plugin takes over those that the engine serves; the others never differ from stock.

1. A model that is configured for IceCache gets an `offering` backend where it would get a stock one
   (plugin.py). It makes stock implementations, and offers those of full attention to the Worker.
2. The first `customize_spec` calls `take_over`: a layer that was offered, and whose spec is full
   attention's, gets IceCacheAttention and a `serving` backend. All others get the stock backend.
   Layers that draft get it, too, but for the spec: their blocks name the requests.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from icecache import InvalidArgument
from icecache.shape import CacheShape
from icecache.vllm.drafts import drafts_by_layers, is_draft_layer
from icecache.vllm.engines import Layer
from icecache.vllm.metadata import IceCacheMetadata
from icecache.vllm.names import (
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionSpec,
    FullAttentionSpec,
    get_current_vllm_config,
)
from icecache.vllm.plugin import BACKENDS, is_wanted, stock_backend
from icecache.vllm.settings import EIGHT_BITS, device_of
from icecache.vllm.support import (
    check_attention,
    check_drafters,
    check_head_dims,
    check_stock_layer,
)
from icecache.vllm.worker import Worker, current_worker, worker_for


class IceCacheAttention(AttentionImpl):  # type: ignore[misc]
    """Full attention of one layer: every token goes to the engines, which keep and attend them."""

    def __init__(self, worker: Worker, layer: Layer, kv_cache_dtype: str) -> None:
        shape = layer.shape
        self.worker = worker
        self.num_heads, self.num_kv_heads = shape.num_q_heads, shape.num_kv_heads
        self.head_size, self.scale = shape.head_dim, shape.scale
        self.kv_cache_dtype = kv_cache_dtype
        self.is_owner = layer.owner is None  # of the keys and values that it attends to
        self.sinks = layer.sinks

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: IceCacheMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Query, output [N, Hq, D], key, value [N, Hkv, D], or None where the layer attends to what
        it or another has; `kv_cache` is not read.

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
        # vLLM profiles memory with calls like this one: they have no metadata, or come before the
        # store knows its layers. Nothing is attended then.
        if attn_metadata is None or store is None or not store.layers:
            return output.zero_()
        if batch.tokens < output.shape[0]:
            output.zero_()
        if not self.is_owner:
            key = value = None
        if self.sinks is None:
            store.attend(layer.layer_name, query, key, value, output, batch)
            return output
        # A sink is one more token in the softmax, with a value of 0.
        lse = query.new_zeros(output.shape[:2], dtype=torch.float32)
        store.attend(layer.layer_name, query, key, value, output, batch, lse)
        output *= torch.sigmoid(lse - self.sinks)[..., None].to(output.dtype)
        return output

    def do_kv_cache_update(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: forward() hands the tokens to the engine."""


class IceCacheMetadataBuilder(AttentionMetadataBuilder[IceCacheMetadata]):  # type: ignore[misc]
    """Reads the form of a batch."""

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Steps of one token a request, or of one and as many drafts, where the cache is on a CUDA
        device.

        vLLM's V2 runner takes the last token of a prompt in chunks for such a step, too, and a
        prompt's attention is not in the graph. In the V1 runner the connector sees to that.
        """
        chunks = vllm_config.scheduler_config.enable_chunked_prefill
        if device_of(vllm_config) is None or (vllm_config.use_v2_model_runner and chunks):
            return AttentionCGSupport.NEVER
        if vllm_config.speculative_config is not None:
            return AttentionCGSupport.UNIFORM_BATCH
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
        metadata = IceCacheMetadata(starts, blocks)
        if self.worker.seat_layer in self.layer_names:  # blocks of other groups name nobody
            self.worker.metadata = metadata
        return metadata


@cache
def offering(name: str) -> Any:
    """In place of vLLM's backend of this name, for a model that is configured for IceCache.

    Its classes are subclasses of vLLM's, which vLLM may derive from (cross attention, chunked
    attention, ...): what is derived is as if derived from vLLM's.
    """
    stock: Any = stock_backend(name)
    stock_impl: Any = stock.get_impl_cls()

    class Impl(stock_impl):  # type: ignore[misc]
        """What vLLM calls to make a layer's implementation: the stock one."""

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            if cls is not Impl:
                return super().__new__(cls, *args, **kwargs)
            made = stock_impl(*args, **kwargs)
            # vLLM remembers backends: this may be another model, with the same kind of attention.
            if is_wanted(get_current_vllm_config()):
                given = inspect.signature(stock_impl.__init__).bind(made, *args, **kwargs)
                given.apply_defaults()
                _offer(**given.arguments)
            return made

    class Backend(stock):  # type: ignore[misc]
        @classmethod
        def get_impl_cls(cls) -> Any:
            """vLLM's, but where it is asked for a layer of this very backend."""
            return Impl if cls is Backend else stock_impl

        @classmethod
        def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
            """Asked for the first layer of this backend, it takes over all that the engine serves.

            The first one is of those if its spec is full attention's.
            """
            worker = current_worker()
            if cls is not Backend or worker is None or not worker.offers:
                return super().customize_spec(spec)
            take_over(worker)
            return worker.spec_of(spec) if _is_served(spec) else super().customize_spec(spec)

    # vLLM hands classes on by their names.
    _OFFERING[_named(Backend, "icecache.vllm.plugin", name)] = name
    return Backend


_OFFERING: dict[Any, str] = {}  # backends by offering(), and the names of vLLM's


@cache
def _drafting(name: str) -> Any:
    """The backend of layers that draft: vLLM's of this name, with a spec of ours."""

    class Backend(stock_backend(name)):  # type: ignore[misc]
        @classmethod
        def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
            """As many blocks a request as it has tokens for."""
            worker = current_worker()
            assert worker is not None
            return worker.spec_of(spec)

    return _named(Backend, __name__, name + _DRAFTS)


@cache
def _serving(name: str) -> Any:
    """The backend of layers that the engine serves, in place of vLLM's of this name."""

    class Backend(stock_backend(name)):  # type: ignore[misc]
        @staticmethod
        def get_impl_cls() -> Any:
            return IceCacheAttention

        @staticmethod
        def get_builder_cls() -> Any:
            return IceCacheMetadataBuilder

        @classmethod
        def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
            """One block a request."""
            worker = current_worker()
            assert worker is not None
            return worker.spec_of(spec)

    return _named(Backend, __name__, name)


_DRAFTS = "_DRAFTS"  # ends the names of backends by _drafting()


def __getattr__(name: str) -> Any:
    if name in BACKENDS:
        return _serving(name)
    if name.removesuffix(_DRAFTS) in BACKENDS:
        return _drafting(name.removesuffix(_DRAFTS))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _named(made: type, module: str, name: str) -> type:
    made.__module__, made.__name__, made.__qualname__ = module, name, name
    return made


def _offer(self: Any, **given: Any) -> None:
    """Notes what the engines may serve: full attention of a decoder over its own tokens.

    The arguments are those of vLLM's implementation `self`. Raises InvalidArgument for full
    attention of a kind that the engines do not compute.
    """
    kind = given.pop("attn_type")
    if given.pop("sliding_window") is not None or getattr(kind, "value", kind) != "decoder":
        return
    shape = CacheShape(
        1,
        given.pop("num_heads"),
        given.pop("num_kv_heads"),
        given.pop("head_size"),
        scale=float(given.pop("scale")),
        logit_softcap=float(given.pop("logits_soft_cap") or 0.0),
    )
    owner, sinks = given.pop("kv_sharing_target_layer_name"), given.pop("sinks", None)
    others = given.pop("kwargs", {})  # where vLLM's takes more than it names
    alibi_slopes, kv_cache_dtype = given.pop("alibi_slopes"), given.pop("kv_cache_dtype")
    check_attention(
        alibi_slopes=alibi_slopes, kv_cache_dtype=kv_cache_dtype, others={**given, **others}
    )
    # Its name and dtype are known once the layer is made.
    layer = Layer("", shape, owner=owner, sinks=sinks)
    worker_for(get_current_vllm_config()).offers[self] = layer


def _is_served(spec: Any) -> bool:
    return type(spec) is FullAttentionSpec and not getattr(spec, "non_causal", False)


def take_over(worker: Worker) -> None:
    """Gives each layer that was offered and has full attention's spec to the engine, and all others
    of our backends back to vLLM's.

    Where layers draft, the served ones take their blocks from the first of these: in vLLM's words
    they share its cache, which they do not touch.
    """
    offers, worker.offers = worker.offers, {}
    ours: dict[str, str] = {}
    for layer_name, layer in worker.registered.items():
        name = _OFFERING.get(getattr(layer, "attn_backend", None))
        if name is not None:
            ours[layer_name] = name
            layer.attn_backend = stock_backend(name)
    _take_drafters(worker, ours)
    for layer_name, name in ours.items():
        layer = worker.registered[layer_name]
        spec = layer.get_kv_cache_spec(worker.vllm_config)
        if not _is_served(spec):
            _check_left(layer_name, layer)
            continue
        if layer.impl not in offers:
            raise InvalidArgument(
                f"IceCache does not serve full attention of {type(layer).__name__} ({layer_name}): "
                "serve this model with stock vLLM"
            )
        check_head_dims(spec.head_size, spec.head_size_v)
        offer = offers[layer.impl]
        # In eight bits the spec has the type of vLLM's blocks, which hold nothing of this layer.
        eight_bits = layer.kv_cache_dtype in EIGHT_BITS
        dtype = worker.vllm_config.model_config.dtype if eight_bits else spec.dtype
        served = replace(offer, name=layer_name, shape=replace(offer.shape, dtype=dtype))
        worker.add_layer(served, spec)
        layer.impl = IceCacheAttention(worker, served, layer.kv_cache_dtype)
        layer.attn_backend = _serving(name)
        if worker.drafters:
            layer.kv_sharing_target_layer_name = worker.drafters[0]


def _check_left(layer_name: str, layer: Any) -> None:
    """Raises InvalidArgument for a layer that vLLM could not compute in its cache's type."""
    supported = layer.attn_backend.supported_kv_cache_dtypes
    check_stock_layer(layer_name, layer.kv_cache_dtype, supported)


def _take_drafters(worker: Worker, ours: dict[str, str]) -> None:
    """Moves layers that draft from `ours` to worker.drafters. `ours`: names of vLLM's backends by
    layer."""
    if not drafts_by_layers(worker.vllm_config):
        return
    drafters = {
        name: layer
        for name, layer in worker.registered.items()
        if hasattr(layer, "get_attn_backend")
        # vLLM marks them from 0.33 on.
        and (getattr(layer, "is_draft_layer", False) or is_draft_layer(name, worker.vllm_config))
    }
    specs = [layer.get_kv_cache_spec(worker.vllm_config) for layer in drafters.values()]
    full = [name in ours and _is_served(spec) for name, spec in zip(drafters, specs, strict=True)]
    check_drafters([*ours], [*drafters], all(full) and all(spec == specs[0] for spec in specs))
    worker.seat, worker.drafters = specs[0], [*drafters]
    for name, layer in drafters.items():
        _check_left(name, layer)
        layer.attn_backend = _drafting(ours.pop(name))
