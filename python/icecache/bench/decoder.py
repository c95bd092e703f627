"""Runs a transformers model with an attention function of the caller's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

from icecache import InvalidArgument

IMPLEMENTATION = "icecache_bench"


# Attention of one layer over the new tokens and whatever the callee keeps: (layer, queries
# [B, Hq, T, D], keys and values [B, Hkv, T, D], post-RoPE) -> [B, Hq, T, D].
Attention = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _dispatch(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    attend: Attention,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' form of an attention function; the result is [B, T, Hq, D]."""
    usual = query.shape[-1] ** -0.5
    if abs(scaling - usual) > 1e-6:
        raise InvalidArgument(f"scaling: expected head_dim ** -0.5 = {usual:g}, got {scaling:g}")
    layer: Any = module.layer_idx
    return attend(int(layer), query, key, value).transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, _dispatch)


class Decoder:
    """A model whose every attention call goes to a given function. The function keeps the cache.

    The model is used as it is, in its dtype and on its device; between calls it has its own
    attention implementation. Not thread-safe.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config
        self.model = model.eval()
        self.num_layers = int(config.num_hidden_layers)
        self.num_q_heads = int(config.num_attention_heads)
        self.num_kv_heads = int(config.num_key_value_heads)
        head_dim = getattr(config, "head_dim", None)
        self.head_dim = int(head_dim or config.hidden_size // self.num_q_heads)
        self.scale = self.head_dim**-0.5
        self.dtype: torch.dtype = model.dtype

    @torch.inference_mode()
    def run(
        self, tokens: torch.Tensor, start: int | torch.Tensor, attend: Attention
    ) -> torch.Tensor:
        """Logits of the last of T new tokens: [B, T] int64 at positions start.. -> [B, V].

        `start` is one for all rows, or [B] int64.
        """
        positions = torch.as_tensor(start).reshape(-1, 1) + torch.arange(tokens.shape[1])
        with self._routed():
            output = self.model(
                input_ids=tokens,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=1,
                attend=attend,
            )
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    @contextmanager
    def _routed(self) -> Iterator[None]:
        config = self.model.config
        own = config._attn_implementation
        config._attn_implementation = IMPLEMENTATION
        try:
            yield
        finally:
            config._attn_implementation = own
