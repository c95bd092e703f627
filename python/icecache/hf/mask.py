"""Attention masks of full-attention layers, kept as their description until someone needs them.

transformers drops the 2-D padding mask where an attention implementation has no mask function, and
a dense `[B, 1, T, L]` mask costs more than a decode step. A `LazyMask` carries what rows need.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import causal_mask_function, sdpa_mask


class LazyMask:
    """Causal mask with padding over `kv_length` tokens for the last `q_length` of them.

    `padding` is bool `[B, >= q_offset + q_length]`, True where a token is real, or None where all
    are. `is_causal` is False where the model asked for any other pattern.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        q_length: int,
        q_offset: int,
        padding: torch.Tensor | None,
        is_causal: bool,
        build: Callable[[], torch.Tensor | None],
    ) -> None:
        self.batch_size = batch_size
        self.q_length = q_length
        self.q_offset = q_offset
        self.padding = padding
        self.is_causal = is_causal
        self._build: Callable[[], torch.Tensor | None] | None = build
        self._dense: torch.Tensor | None = None

    def dense(self) -> torch.Tensor | None:
        """The mask stock sdpa would have got: bool `[B, 1, T, L]`, or None for plain causal."""
        if self._build is not None:
            self._dense = self._build()
            self._build = None
        return self._dense


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

    def build() -> torch.Tensor | None:
        mask: torch.Tensor | None = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            **kwargs,
        )
        return mask

    if local_size is not None:
        return build()
    return LazyMask(
        batch_size=batch_size,
        q_length=q_length,
        q_offset=q_offset,
        padding=attention_mask,
        is_causal=mask_function is causal_mask_function and kv_offset == 0,
        build=build,
    )
