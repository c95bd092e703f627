"""CacheShape: what the attention layers of one model look like."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CacheShape:
    """As CacheShape of include/icecache/types.h; its fields are arguments of every cache's class.

    `scale` multiplies q.k before the softmax; None: 1 / sqrt(head_dim). A `logit_softcap` c makes
    c tanh(logit / c) of each logit; 0: none.
    """

    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.float32
    scale: float | None = None
    logit_softcap: float = 0.0

    @property
    def softmax_scale(self) -> float:
        """`scale`, or its default."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def token_bytes(self) -> int:
        """Bytes of a token, keys and values in all layers and KV heads, in the model's type."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def stored_bytes(self, kv_dtype: str) -> int:
        """The same in the pages of an index, by `Config.kv_dtype`: "auto" or "int8"."""
        if kv_dtype != "int8":
            return self.token_bytes
        return 2 * self.num_layers * self.num_kv_heads * (self.head_dim + torch.float32.itemsize)

    def __str__(self) -> str:
        scale = "" if self.scale is None else f", scale {self.scale:g}"
        softcap = "" if not self.logit_softcap else f", logit_softcap {self.logit_softcap:g}"
        return (
            f"{self.num_q_heads} query heads, {self.num_kv_heads} KV heads, "
            f"head_dim {self.head_dim}, {self.dtype}{scale}{softcap}"
        )
