"""Full-attention layers of a transformers cache, attended by the model itself or by a method.

Sliding-window, chunked, linear and recurrent layers are transformers' own. A model reaches these
here through an attention implementation that asks the keys which layer they come from; keys of
other layers go to the model's own implementation.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from icecache import InvalidArgument

# Attention of one layer over the new tokens and whatever the callee keeps: (index of the layer
# among the full-attention layers, queries [B, Hq, T, D], keys and values [B, Hkv, T, D], post-RoPE)
# -> [B, Hq, T, D].
Attention = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_LAYER = "icecache_bench_layer"  # attribute of the keys that a layer returns


@dataclass(frozen=True)
class AttentionCall:
    """A call of transformers' attention function; L tokens of keys, the last T of them new."""

    own: Callable[..., tuple[torch.Tensor, Any]]  # the model's own function
    module: torch.nn.Module
    query: torch.Tensor  # [B, Hq, T, D]
    key: torch.Tensor  # [B, Hkv, L, D]
    value: torch.Tensor
    mask: Any
    arguments: Mapping[str, Any]

    def result(self) -> tuple[torch.Tensor, Any]:
        """Of the model's own function: [B, T, Hq, D], and weights or None."""
        given = (self.module, self.query, self.key, self.value, self.mask)
        return self.own(*given, **self.arguments)


class FullLayer(CacheLayerMixin):
    """The layer at place `index` among the full-attention layers of the model."""

    is_sliding = False
    is_croppable = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, index: int, seen: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.index = index
        self.seen = seen  # tokens
        self.is_attended = False  # since the last update

    @abstractmethod
    def keep(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the attention function is called with, for new keys and values [B, Hkv, T, D]."""

    @abstractmethod
    def attend(self, call: AttentionCall) -> tuple[torch.Tensor, Any]:
        """The result of the call."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.is_initialized, self.is_attended = True, False
        self.seen += key_states.shape[-2]
        keys, values = self.keep(key_states, value_states)
        setattr(keys, _LAYER, self)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1


class TakenLayer(FullLayer):
    """A layer whose attention is `attention`, which keeps keys and values."""

    def __init__(self, index: int, seen: int) -> None:
        super().__init__(index, seen)
        self.attention: Attention | None = None

    def keep(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return keys, values

    def attend(self, call: AttentionCall) -> tuple[torch.Tensor, None]:
        assert self.attention is not None
        output = self.attention(self.index, call.query, call.key, call.value)
        return output.transpose(1, 2).contiguous(), None


def check_attended(layers: Sequence[FullLayer], model_layers: tuple[int, ...]) -> None:
    """Raises InvalidArgument where a layer's keys did not reach its attention in a forward call."""
    for layer in layers:
        if not layer.is_attended:
            raise InvalidArgument(
                f"model: the keys that layer {model_layers[layer.index]} adds to its cache do not "
                "reach its attention, so that no method can attend to them (layers that share or "
                "change keys, or attention of the model's own)"
            )


@contextmanager
def routed(config: PreTrainedConfig) -> Iterator[None]:
    """Attention of the text model of `config` goes by the cache's layers, meanwhile."""
    own = config._attn_implementation or "sdpa"
    name = f"icecache_bench_{own}"
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, partial(_attention, own))
        if own in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[own])
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = own


def _attention(
    own: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **arguments: Any,
) -> tuple[torch.Tensor, Any]:
    """The attention function of `routed`; `own` names the model's own one."""
    # Each model file has its own eager attention, under this name.
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(own, eager)
    if function is None:
        raise InvalidArgument(
            f"model: {type(module).__name__} has no eager attention in its file; load the model "
            'with attn_implementation="sdpa"'
        )
    call = AttentionCall(function, module, query, key, value, attention_mask, arguments)
    layer: FullLayer | None = getattr(key, _LAYER, None)
    if layer is None:
        return call.result()
    layer.is_attended = True
    return layer.attend(call)
