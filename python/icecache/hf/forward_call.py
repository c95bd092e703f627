"""What the forward call in progress has changed in a cache, so that it can be undone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import cache_utils
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

# Layers of a cache that hold nothing, and that no call reaches: those without attention, or that
# share the tokens of others. Older versions have none.
DUMMY_LAYERS: Any = getattr(cache_utils, "DummyLayer", ())


def replaces_tensors(stock: Any) -> bool:
    """Whether a stock layer makes new tensors with every call, and leaves the earlier ones."""
    return isinstance(stock, DynamicLayer) and not isinstance(stock, LinearAttentionCacheLayerMixin)


class ForwardCall:
    """Layers that the latest forward call of a cache has reached, and what stock ones held before.

    A cache is not told when a call begins or ends. It sees accesses to its layers, each of them
    once a call: the second one of a kind means that another call has begun. If the earlier call
    had not reached all layers by then, it was interrupted, and layers disagree about the tokens.
    """

    def __init__(self) -> None:
        self._accesses: set[tuple[int, str]] = set()
        self._reached: set[int] = set()
        self._before: dict[int, dict[str, Any] | None] = {}  # None: the state cannot be put back

    @property
    def is_empty(self) -> bool:
        """Whether the call has changed nothing so far."""
        return not self._accesses

    def is_complete(self, layers: Sequence[Any]) -> bool:
        """Whether the call has reached all of `layers`, or none of them."""
        return self.is_empty or all(
            index in self._reached or isinstance(layer, DUMMY_LAYERS)
            for index, layer in enumerate(layers)
        )

    def has_made(self, layer: int, access: str) -> bool:
        """Whether the call has made this access already."""
        return (layer, access) in self._accesses

    def record(self, layer: int, access: str, stock: Any | None) -> None:
        """Notes an access that is about to be made; `stock` is the layer if it is a stock one."""
        self._accesses.add((layer, access))
        if stock is not None and layer not in self._reached:
            self._before[layer] = dict(stock.__dict__) if replaces_tensors(stock) else None
        self._reached.add(layer)

    def put_back(self, layers: Sequence[Any]) -> bool:
        """Gives stock layers the state back that they had before. Says whether all could be."""
        could_all = True
        for index, state in self._before.items():
            if state is None:
                could_all = False
            else:
                layers[index].__dict__ = state
        self.forget()
        return could_all

    def forget(self) -> None:
        """The call is over."""
        self._accesses.clear()
        self._reached.clear()
        self._before.clear()
