"""The tensor that travels from `IceCache.update` to the attention function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves

from icecache import InvalidArgument
from icecache.hf.support import CACHE

if TYPE_CHECKING:
    from icecache.hf.cache import IceLayer


# Questions about a tensor, not about its elements.
_FORM = frozenset(
    [
        getattr(torch.Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda")
    ]
    + [torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.stride]
)


class NewTokens(torch.Tensor):
    """Keys or values `[B, Hkv, T, D]` of the T tokens of one forward call, with their cache layer.

    Earlier tokens live in the engine, so attention that takes this tensor for the whole cache
    would silently forget them: every operation on it raises, except questions about its form.
    """

    layer: IceLayer

    @classmethod
    def wrap(cls, tensor: torch.Tensor, layer: IceLayer) -> NewTokens:
        """The same storage, tagged with `layer`."""
        tagged = tensor.as_subclass(cls)
        tagged.layer = layer
        return tagged

    def plain(self) -> torch.Tensor:
        """The same storage as an ordinary tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(torch.Tensor)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _FORM:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        layer = next(tensor.layer for tensor in tree_leaves((args, kwargs)) if type(tensor) is cls)
        if layer.cache.handle.is_enabled:
            raise InvalidArgument(
                f"model: layer {layer.model_layer} computes with its cached keys and values itself "
                f"(by {name}) and not in transformers' attention interface, where IceCache could "
                "take its place. Use the model without IceCache"
            )
        raise InvalidArgument(
            f"{CACHE}: an IceCache reached attention that is not IceCache's "
            f"({name} was called on its keys or values). Call icecache.enable(model) first, or "
            'load the model with attn_implementation="icecache"; for stock attention pass a '
            "DynamicCache"
        )
