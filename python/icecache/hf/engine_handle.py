"""The engine behind one model or one cache, made when the shape of the attention is known."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Protocol, TypeAlias

import torch

import icecache
from icecache import Config, InvalidArgument
from icecache.engine import Phase
from icecache.hf.support import CACHE
from icecache.shape import CacheShape

_HEAD_DIMS = range(8, 513, 8)  # the engine's; refused here with what to do instead


class EngineLike(Protocol):
    """What this front end needs of `icecache.Engine`; the ReferenceEngine has it too."""

    def new_sequence(self) -> int: ...
    def fork(self, seq: int) -> int: ...
    def retain(self, seq: int) -> None: ...
    def contains(self, seq: int) -> bool: ...
    def truncate(self, seq: int, length: int) -> None: ...
    def release(self, seq: int) -> None: ...
    def append(self, seqs: Sequence[int], layer: int, keys: Any, values: Any) -> None: ...
    def attend(
        self, seqs: Sequence[int], layer: int, queries: Any, phase: Phase = ..., lse: Any = ...
    ) -> Any: ...
    def step(
        self,
        seqs: Sequence[int],
        layer: int,
        queries: Any,
        keys: Any,
        values: Any,
        phase: Phase = ...,
        lse: Any = ...,
    ) -> torch.Tensor: ...
    def observe(self, seqs: Sequence[int], layer: int, queries: Any) -> None: ...
    def stats(self, layer: int, kv_head: int) -> Any: ...
    def memory(self) -> Any: ...


# Parameters that say how prompts are attended to.
_OF_PROMPTS = frozenset(["prefill_budget", "exact", "decode_tokens"])

# Called with the keyword arguments of `icecache.Engine`, `config` aside.
EngineFactory: TypeAlias = Callable[..., EngineLike]


class EngineHandle:
    """Owns one engine for the full-attention layers of a model. Thread-safe."""

    def __init__(
        self,
        model_layers: Sequence[int],
        config_fields: Mapping[str, Any],
        engine_class: EngineFactory | None = None,
    ) -> None:
        """`model_layers[i]` is the model's index of engine layer i.

        Raises InvalidArgument where `dense_layers` names a layer that is not among them, and for
        settings of prompts that are no settings.
        """
        self.model_layers = tuple(model_layers)
        self.is_enabled = False  # icecache.enable set it: the model is known to ask for IceCache
        self.is_lossless = False  # so did it: attention is exact, but for drafts
        self._fields = dict(config_fields)
        if "dense_layers" in self._fields:
            self._fields["dense_layers"] = self._engine_layers(self._fields["dense_layers"])
        # The engine attends to whole prompts itself, within `prefill_budget`.
        prompts = Config(**{name: self._fields[name] for name in _OF_PROMPTS & self._fields.keys()})
        self.attends_prompts = prompts.prompt_block > 1
        self.decode_tokens: int = prompts.decode_tokens
        self._engine_class: EngineFactory = (
            icecache.Engine if engine_class is None else engine_class
        )
        self._engine: EngineLike | None = None
        self._shape: CacheShape | None = None
        self._lock = threading.Lock()  # guards _engine and _shape

    @property
    def engine(self) -> EngineLike | None:
        """None until `bind` was called."""
        return self._engine

    @property
    def shape(self) -> CacheShape | None:
        """None until `bind` was called."""
        return self._shape

    def bind(self, shape: CacheShape) -> EngineLike:
        """The engine for `shape`, made on the first call.

        Raises InvalidArgument where the engine holds sequences of another shape: all
        full-attention layers of a model must be alike.
        """
        with self._lock:
            if self._engine is not None and self._shape == shape:
                return self._engine
            if self._engine is not None and self._engine.memory().sequences:
                raise InvalidArgument(
                    f"{CACHE}: a full-attention layer has {shape}, but this cache holds "
                    f"tokens of layers with {self._shape}. IceCache needs full-attention layers "
                    "that are alike; run such a model without IceCache"
                )
            if shape.head_dim not in _HEAD_DIMS:
                raise InvalidArgument(
                    f"model: expected a head_dim that is a multiple of 8 up to 512, got "
                    f"{shape.head_dim}. Use the model without IceCache"
                )
            self._engine = self._engine_class(**vars(shape), **self._fields)
            self._shape = shape
            return self._engine

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise InvalidArgument(
            "model: an enabled model cannot be copied, its engine holds the tokens; call "
            "icecache.disable(model) first, copy, and enable both"
        )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise InvalidArgument(
            "model: an enabled model cannot be pickled; call icecache.disable(model) first"
        )

    def _engine_layers(self, dense_layers: str | Sequence[int]) -> str:
        if isinstance(dense_layers, str):
            names = [name.strip() for name in dense_layers.split(",") if name.strip()]
        else:
            names = [str(layer) for layer in dense_layers]
        mapped = []
        for name in names:
            if not name.isdigit() or int(name) not in self.model_layers:
                raise InvalidArgument(
                    f"dense_layers: expected full-attention layers of the model "
                    f"({_ranges(self.model_layers)}), got {name!r}"
                )
            mapped.append(str(self.model_layers.index(int(name))))
        return ",".join(mapped)


def _ranges(layers: Sequence[int]) -> str:
    """(0, 1, 2, 3, 5) as "0-3, 5"."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][1] + 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)
