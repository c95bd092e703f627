"""Attention sinks that are parameters: one more logit per query head in every softmax (gpt-oss).

Such a logit s is what a token with value 0 contributes whose key has inner product s / scale with
every query. One more coordinate makes it so: queries end in s / scale, keys in 0, and the token in
front of a sequence has key (0, ..., 0, 1). The engine always attends to the first tokens, so the
sink takes part exactly, at every budget.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_EXTRA = 8  # head_dim stays a multiple of 8


def widen_queries(query: torch.Tensor, logits: torch.Tensor, scale: float) -> torch.Tensor:
    """`[B, Hq, T, D]` and `[Hq]` to `[B, Hq, T, D + 8]`."""
    wide = F.pad(query, (0, _EXTRA))
    wide[..., query.shape[-1]] = (logits.to(query.dtype) / scale)[None, :, None]
    return wide


def widen_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """Keys or values `[..., T, D]` to `[..., T, D + 8]`."""
    return F.pad(tokens, (0, _EXTRA))


def narrow(output: torch.Tensor) -> torch.Tensor:
    """`[..., D + 8]` to `[..., D]`."""
    return output[..., :-_EXTRA]


def with_sink_token(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Widened keys and values `[..., T, D + 8]` behind the sink token: `[..., T + 1, D + 8]`."""
    sink = torch.zeros_like(key[..., :1, :])
    sink[..., key.shape[-1] - _EXTRA] = 1
    return torch.cat([sink, key], -2), torch.cat([torch.zeros_like(sink), value], -2)


def attend_with_sinks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    logits: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention over all given tokens: query `[B, Hq, T, D]`, key and value `[B, Hkv, L, D]`,
    mask bool `[B, 1, T, L]` or None for causal attention of the last T tokens. `[B, Hq, T, D]`.
    """
    new, length = query.shape[2], key.shape[2]
    if mask is None:
        mask = torch.ones(new, length, dtype=torch.bool, device=query.device).tril(length - new)
    keys, values = with_sink_token(widen_tokens(key), widen_tokens(value))
    output = F.scaled_dot_product_attention(
        widen_queries(query, logits, scale),
        keys,
        values,
        attn_mask=F.pad(mask, (1, 0), value=True),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return narrow(output)
