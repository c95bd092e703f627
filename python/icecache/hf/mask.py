"""Attention masks of full-attention layers, kept as their description until someone needs them.

transformers drops the 2-D padding mask where an attention implementation has no mask function, and
a dense `[B, 1, T, L]` mask costs more than a decode step. A `LazyMask` carries what rows need.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from transformers.masking_utils import causal_mask_function, sdpa_mask

_NEVER_NONE = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}

_ROWS = 512  # of a mask that are compared at once


class LazyMask:
    """Causal mask with padding over `shape[3]` tokens for the last `q_length` of them.

    It stands for a bool tensor `[B, 1, T, L]`, the mask stock sdpa would get. Models hand masks on
    and look at their form, which costs nothing. A model that computes with one gets that tensor,
    and attention over the engine then refuses what came of it.

    `padding` is bool `[B, >= q_offset + q_length]`, True where a token is real, or None where all
    are.
    """

    ndim = 4
    dtype = torch.bool

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        *,
        device: torch.device | str,
        q_offset: int,
        padding: torch.Tensor | None,
        find_causal: Callable[[], bool],
        build: Callable[[bool], torch.Tensor | None],
    ) -> None:
        """`build(allow_none)` makes the tensor, or None for a mask that is causal and no more."""
        self.shape = torch.Size(shape)
        self.device = torch.device(device)
        self.q_length = shape[2]
        self.q_offset = q_offset
        self.padding = padding
        self._find_causal = find_causal
        self._build = build
        self._dense: list[torch.Tensor | None] = []

    @functools.cached_property
    def is_causal(self) -> bool:
        """Whether this is the causal mask with padding, however the model describes it."""
        return self._find_causal()

    def dense(self) -> torch.Tensor | None:
        """The mask stock sdpa would have got: bool `[B, 1, T, L]`, or None for plain causal."""
        if not self._dense:
            self._dense.append(self._build(True))
        return self._dense[0]

    def tensor(self) -> torch.Tensor:
        """The mask for whoever computes with it."""
        mask = self._build(False)
        assert mask is not None
        return mask

    def dim(self) -> int:
        """As of the tensor."""
        return self.ndim

    def to(self, *args: Any, **kwargs: Any) -> LazyMask:
        """The same: it is on no device before it is made."""
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    @property
    def whole(self) -> LazyMask:
        """The mask of all new tokens; this one may be of the last of them."""
        return self

    def __getitem__(self, index: Any) -> Any:
        """A LazyMask where the last query tokens are asked for, as layers that make no keys do."""
        if isinstance(index, tuple) and len(index) == self.ndim:
            *others, rows = (*index[:2], index[3], index[2])
            if all(part == slice(None) for part in others) and isinstance(rows, slice):
                start, stop, step = rows.indices(self.q_length)
                if stop == self.q_length and step == 1 and start < stop:
                    return self.last(stop - start)
        return self.tensor()[index]

    def last(self, count: int) -> LazyMask:
        """The mask of the last `count` query tokens."""
        return self if count == self.q_length else _Rows(self, count)

    def __invert__(self) -> torch.Tensor:
        return ~self.tensor()

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Runs a torch function on the tensors that masks among its arguments stand for."""
        args, kwargs = tree_map_only(LazyMask, LazyMask.tensor, (args, dict(kwargs or {})))
        return func(*args, **kwargs)


class _Rows(LazyMask):
    """The last query tokens of another mask."""

    def __init__(self, whole: LazyMask, count: int) -> None:
        super().__init__(
            (whole.shape[0], 1, count, whole.shape[3]),
            device=whole.device,
            q_offset=whole.q_offset + whole.q_length - count,
            padding=whole.padding,
            find_causal=lambda: whole.is_causal,
            build=lambda allow_none: whole.tensor()[:, :, -count:],
        )
        self._whole = whole

    @property
    def whole(self) -> LazyMask:
        return self._whole

    def last(self, count: int) -> LazyMask:
        return self._whole.last(count)


def icecache_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> LazyMask | torch.Tensor | None:
    """Mask function of `attn_implementation="icecache"` for transformers' AttentionMaskInterface.

    Layers with a window (`local_size`) stay stock and get the stock mask.
    """

    if isinstance(attention_mask, LazyMask):
        return attention_mask  # an outer model has made it; as stock does with a 4-D mask

    make = functools.partial(
        sdpa_mask,
        batch_size=batch_size,
        kv_length=kv_length,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        local_size=local_size,
    )

    def build(allow_none: bool) -> torch.Tensor | None:
        options = kwargs if allow_none else {**kwargs, **_NEVER_NONE}
        mask: torch.Tensor | None = make(
            q_length=q_length, q_offset=q_offset, mask_function=mask_function, **options
        )
        return mask

    def find_causal() -> bool:
        """Models may describe it otherwise: as causal, or within an image, and there is none."""
        if mask_function is causal_mask_function or kv_offset:
            return kv_offset == 0
        for start in range(0, q_length, _ROWS):
            rows = functools.partial(
                make,
                q_length=min(_ROWS, q_length - start),
                q_offset=q_offset + start,
                **{**kwargs, **_NEVER_NONE},
            )
            wanted, causal = rows(mask_function=mask_function), rows()
            assert wanted is not None and causal is not None
            if not torch.equal(wanted, causal):
                return False
        return True

    if local_size is not None:
        return build(True)
    return LazyMask(
        (batch_size, 1, q_length, kv_length),
        device=kwargs.get("device", "cpu"),
        q_offset=q_offset,
        padding=attention_mask,
        find_causal=find_causal,
        build=build,
    )
