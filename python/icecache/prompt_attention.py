"""Attention over a prompt on a device, by torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

# Queries, keys, values and outputs of attend_prompt(), the outputs written.
AttendPrompt: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


def attend_prompt(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    outputs: torch.Tensor,
    *,
    scale: float | None = None,
) -> None:
    """Causal attention of the last tokens of a prompt over all of it, on the current stream.

    Queries and outputs [T', Hq, D] of the last T' <= T tokens, keys and values [Hkv, T, D].
    Elements of a row lie together; other strides are free.
    """
    count, length = len(queries), keys.shape[1]
    mask = None if count == length else causal_lower_right(count, length)
    attended = F.scaled_dot_product_attention(
        queries.transpose(0, 1)[None].contiguous(),
        keys[None],
        values[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=True,
    )
    outputs.copy_(attended[0].transpose(0, 1))
