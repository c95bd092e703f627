"""How much memory a request takes."""

from __future__ import annotations

import torch

# What a request takes of host memory beside its tokens, as a share and in tokens: full pages split
# while tokens are inserted, and sinks and window begin pages of their own.
_SLACK, _ENDS = 1.25, 64


def slot_bytes(num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of a token's keys and values in all layers and KV heads of a worker."""
    return 2 * num_layers * num_kv_heads * head_dim * dtype.itemsize


def slots_needed(tokens: int, step: int = 0) -> int:
    """Token slots, of every layer and KV head, that a request of `tokens` takes.

    With `step` on a CUDA device, where room grows by steps of so many tokens; else on the CPU.
    """
    return -(-tokens // step) * step if step else int(tokens * _SLACK) + _ENDS
