"""IceCache: transformers' cache interface over one engine."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    get_layer_types_and_kwargs,
)

from icecache import InvalidArgument
from icecache.hf.engine_handle import EngineFactory, EngineHandle
from icecache.hf.forward_call import DUMMY_LAYERS, ForwardCall, replaces_tensors
from icecache.hf.model_stats import ModelStats, collect
from icecache.hf.new_tokens import NewTokens
from icecache.hf.rows import Rows
from icecache.hf.support import (
    CACHE,
    check_config,
    check_prefill_budget,
    full_attention_layers,
)


class IceLayer(CacheLayerMixin):
    """A full-attention layer whose tokens live in the engine.

    `update` only passes the new tokens on; the attention function appends them and attends. Layers
    that share them attend, too.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False
    supports_early_init = False

    def __init__(self, cache: IceCache, model_layer: int, engine_layer: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Weak: a cycle would keep the pages of a dropped cache until the garbage collector runs.
        self._cache = weakref.ref(cache)
        self.model_layer = model_layer
        self.engine_layer = engine_layer
        self.seen = 0  # columns of the batch, padding included
        self.is_pending = False  # the newest tokens wait for attention to append them

    @property
    def cache(self) -> IceCache:
        """The cache this layer is part of."""
        cache = self._cache()
        if cache is None:
            raise InvalidArgument(f"{CACHE}: the IceCache of this layer is gone")
        return cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tags keys and values `[B, Hkv, T, D]` of the new tokens with this layer."""
        self.is_initialized = self.is_pending = True
        self.seen += key_states.shape[-2]
        return NewTokens.wrap(key_states, self), NewTokens.wrap(value_states, self)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    @property
    def keys(self) -> Any:
        """Refuses models that look into the cache themselves."""
        raise _refusal_of_access("reads")

    @keys.setter
    def keys(self, value: Any) -> None:
        if value is not None:
            raise _refusal_of_access("replaces")

    values = keys

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise _refusal_of_access("copies")

    # The tokens belong to the cache as a whole, which moves them once for all layers.
    def reset(self) -> None:
        self.cache.reset()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        raise InvalidArgument("reorder_cache: call it on the IceCache, not on one of its layers")

    def crop(self, tokens_to_remove: int) -> None:
        raise InvalidArgument("crop: call it on the IceCache, not on one of its layers")


def _refusal_of_access(verb: str) -> InvalidArgument:
    return InvalidArgument(
        f"model: it {verb} single layers of its cache, whose tokens are in IceCache's engine. Use "
        "the model without IceCache"
    )


@dataclass(frozen=True)
class Savepoint:
    """A state of an IceCache that it can go back to."""

    columns: int  # of the rows
    stock: dict[int, dict[str, Any]]  # what stock layers hold, by layer


class IceCache(Cache):
    """KV cache of a model that runs IceCache attention, for its `cache` argument.

    (`past_key_values` before transformers 5.24.)

    Full-attention layers share one engine; sliding, chunked and recurrent layers keep transformers'
    own. A batch row is one engine sequence without its padding. Sequences are released with the
    cache. `fork` and `copy.deepcopy` share pages until one side writes.
    Threads: one forward call at a time, as for any Cache; caches that share an engine are
    independent.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        engine_class: EngineFactory | None = None,
        handle: EngineHandle | None = None,
        **config_fields: Any,
    ) -> None:
        """`config` is the model's; `config_fields` are those of `icecache.Config`.

        With `handle` the cache shares that engine and takes no fields. Raises InvalidArgument for
        models that are not supported and for unknown fields.
        """
        text_config = config.get_text_config(decoder=True)
        check_config(config)
        model_layers = full_attention_layers(text_config)
        if handle is None:
            handle = EngineHandle(model_layers, config_fields, engine_class)
            if handle.attends_prompts:
                check_prefill_budget(text_config)
        elif config_fields or engine_class is not None:
            raise InvalidArgument(
                "handle: an engine that is shared is already configured, got "
                f"{', '.join(sorted(config_fields)) or 'engine_class'} too"
            )
        self.handle = handle
        self.rows = Rows()
        self.call = ForwardCall()
        self.is_exact = handle.is_lossless  # every call attends to all tokens
        # Tokens of each row at the end of a prompt that comes in several calls. None: each call of
        # more than decode_tokens tokens is the end of one.
        self.prompt_lengths: list[int] | None = None
        self.failed: str | None = None
        self._seen_before = 0  # columns of the rows before the call in progress
        layer_types, layer_kwargs = get_layer_types_and_kwargs(text_config)
        if isinstance(layer_kwargs, dict):  # one for all layers, before transformers 5.24
            layer_kwargs = [layer_kwargs] * len(layer_types)
        super().__init__(
            layers=[
                IceLayer(self, index, model_layers.index(index))
                if index in model_layers
                else DYNAMIC_LAYER_TYPE_MAPPING[layer_type](**kwargs)
                for index, (layer_type, kwargs) in enumerate(
                    zip(layer_types, layer_kwargs, strict=True)
                )
            ]
        )

    @property
    def ice_layers(self) -> list[IceLayer]:
        """The layers whose tokens live in the engine."""
        return [layer for layer in self.layers if isinstance(layer, IceLayer)]

    @property
    def is_initialized(self) -> bool:
        """Whether tokens have come; models that see the first chunk in another way ask for it."""
        return self.rows.seen > 0

    def stats(self) -> ModelStats:
        """What the engine of this cache did; other caches that share it included.

        Raises InvalidArgument before the first forward call.
        """
        found = collect(self.handle)
        if found is None:
            raise InvalidArgument(f"{CACHE}: the cache was not used yet, it has no engine")
        return found

    def check_usable(self) -> None:
        """Raises InvalidArgument after a failure that could not be undone, or was not noticed."""
        if self.failed is None and not self.call.is_complete(self.layers):
            self.take_back("it did not reach all layers")
            if self.failed is None:
                raise InvalidArgument(
                    f"{CACHE}: an earlier forward call was interrupted. The cache is again as it "
                    "was before that call; repeat that call, then this one"
                )
        if self.failed is not None:
            raise InvalidArgument(
                f"{CACHE}: an earlier forward call failed ({self.failed}) and could not be "
                "undone in every layer of this cache; call reset() and start again"
            )

    def take_back(self, reason: str) -> None:
        """Undoes the forward call in progress, which failed for `reason`.

        Layers with a recurrent state have overwritten it: a cache that has some is refused until
        `reset`.
        """
        if self.call.is_empty:
            return
        if self.rows.seen != self._seen_before:
            self.rows.undo(self.rows.seen)
        for layer in self.ice_layers:
            layer.seen = self.rows.seen
        if not self.call.put_back(self.layers):
            self.failed = reason

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stock layers: all keys and values they hold; others: the new ones, for the engine."""
        self._reach(layer_idx, "update")
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def get_conv_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """Models update the state that they get in place."""
        self._reach(layer_idx, f"get_conv_state {args}{kwargs}")
        return super().get_conv_state(layer_idx, *args, **kwargs)

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """As in stock."""
        self._reach(layer_idx, f"update_conv_state {state_idx}")
        return super().update_conv_state(conv_states, layer_idx, state_idx, **kwargs)

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """As in stock."""
        self._reach(layer_idx, f"update_recurrent_state {state_idx}")
        return super().update_recurrent_state(recurrent_states, layer_idx, state_idx, **kwargs)

    def _reach(self, layer: int, access: str) -> None:
        """Called before the layer is changed. Raises InvalidArgument as `check_usable` does."""
        if self.call.has_made(layer, access):
            self.check_usable()
            self.call.forget()
        if self.failed is not None:
            self.check_usable()
        if self.call.is_empty:
            self._seen_before = self.rows.seen
        reached: Any = self.layers[layer]
        self.call.record(layer, access, None if isinstance(reached, IceLayer) else reached)

    def reset(self) -> None:
        """Forgets all tokens; the engine and its settings stay."""
        self.rows.clear()
        self.call.forget()
        self.failed = None
        for layer in self.layers:
            if isinstance(layer, IceLayer):
                layer.seen = 0
            else:
                layer.reset()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i continues old row `beam_idx[i]`."""
        self._arrange(beam_idx.tolist())
        for layer in self.stock_layers().values():
            layer.reorder_cache(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens of every row (as in stock, below 1)."""
        tokens_to_remove = int(tokens_to_remove)  # a tensor from generate() before 5.24
        if tokens_to_remove > 0:
            raise InvalidArgument(
                f"crop: expected minus the number of tokens to remove, got {tokens_to_remove}"
            )
        self.check_usable()
        self.rows.check_crop(-tokens_to_remove)
        stock_crop = ForwardCall()  # undone where one of the layers refuses
        try:
            for index, layer in self.stock_layers().items():
                stock_crop.record(index, "crop", layer)
                layer.crop(tokens_to_remove)
        except BaseException:
            stock_crop.put_back(self.layers)
            raise
        self._drop_columns(-tokens_to_remove)

    def savepoint(self) -> Savepoint:
        """The state between two forward calls, for `restore`. Takes no memory worth mentioning.

        Raises InvalidArgument for models with recurrent layers, which overwrite their state.
        """
        self.check_usable()
        stock = {}
        for index, layer in self.stock_layers().items():
            if not replaces_tensors(layer):
                raise InvalidArgument(
                    f"{CACHE}: layer {index} overwrites its state with every token, and cannot "
                    "take tokens back; enable the model without lossless and refresh_every"
                )
            stock[index] = dict(layer.__dict__)
        return Savepoint(self.rows.seen, stock)

    def restore(self, savepoint: Savepoint) -> None:
        """Takes back what came after `savepoint`; nothing may have been taken back before it."""
        self.check_usable()
        self._drop_columns(self.rows.seen - savepoint.columns)
        for index, state in savepoint.stock.items():
            self.layers[index].__dict__ = dict(state)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, next to each other."""
        self._arrange([row for row in range(len(self.rows.sequences)) for _ in range(repeats)])
        for layer in self.stock_layers().values():
            layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows `indices` (integers or a bool mask over rows)."""
        rows = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        self._arrange(rows.tolist())
        for layer in self.stock_layers().values():
            layer.batch_select_indices(indices)

    def fork(self, tokens: int | None = None) -> IceCache:
        """A cache with the same tokens, or the first `tokens` of every row, padding included.

        Both share segments and pages until one of them writes. Raises InvalidArgument for more
        tokens than there are, and where a layer of transformers' own takes no tokens back.
        """
        if tokens is not None and not 0 <= tokens <= self.rows.seen:
            raise InvalidArgument(f"tokens: expected 0 to {self.rows.seen}, got {tokens}")
        other = copy.deepcopy(self)
        if tokens is not None and tokens < self.rows.seen:
            other.crop(tokens - self.rows.seen)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> IceCache:
        self.check_usable()
        other = copy.copy(self)
        memo[id(self)] = other
        other.call = ForwardCall()
        other.rows = self.rows.copy()
        other.layers = []
        for layer in self.layers:
            if isinstance(layer, IceLayer):
                twin = IceLayer(other, layer.model_layer, layer.engine_layer)
                twin.seen, twin.is_initialized = layer.seen, layer.is_initialized
                other.layers.append(twin)
            else:
                other.layers.append(copy.deepcopy(layer, memo))
        return other

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InvalidArgument(
            f"{CACHE}: an IceCache cannot be pickled; its tokens live in the engine"
        )

    def __copy__(self) -> IceCache:
        other = self.__class__.__new__(self.__class__)
        other.__dict__.update(self.__dict__)
        return other

    def _drop_columns(self, count: int) -> None:
        """Removes the last `count` columns from all layers whose tokens are in the engine."""
        self.rows.crop(count)
        self.call.forget()
        for layer in self.ice_layers:
            layer.seen -= count

    def _arrange(self, order: Sequence[int]) -> None:
        self.check_usable()
        self.rows.arrange(order)
        self.call.forget()

    def stock_layers(self) -> dict[int, Any]:
        """The layers of transformers' own that hold something."""
        return {
            index: layer
            for index, layer in enumerate(self.layers)
            if not isinstance(layer, IceLayer) and not isinstance(layer, DUMMY_LAYERS)
        }
