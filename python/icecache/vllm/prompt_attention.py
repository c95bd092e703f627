"""Attention over a prompt, on a device: vLLM's FlashAttention where it serves, else torch's."""

from __future__ import annotations

from functools import partial

import torch

from icecache.prompt_attention import attend_prompt
from icecache.shape import CacheShape
from icecache.vllm.names import FLASH_ATTENTION, get_flash_attn_version, resolve_obj_by_qualname


class PromptAttention:
    """attend_prompt() of one model.

    On CUDA devices, in float16 and bfloat16, by the version of FlashAttention that vLLM itself
    takes there. Otherwise by torch.
    """

    def __init__(self, shape: CacheShape, device: torch.device) -> None:
        self._torchs = partial(attend_prompt, scale=shape.scale)
        flash = device.type == "cuda" and shape.dtype in (torch.float16, torch.bfloat16)
        # None where vLLM has none for the device.
        version = get_flash_attn_version(head_size=shape.head_dim) if flash else None
        self._flash = None
        if version is not None:
            function = resolve_obj_by_qualname(FLASH_ATTENTION)
            self._flash = partial(
                function, softmax_scale=shape.scale, causal=True, fa_version=version
            )

    def __call__(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        outputs: torch.Tensor,
    ) -> None:
        """As attend_prompt()."""
        if self._flash is None:
            self._torchs(queries, keys, values, outputs)
            return
        count, length = len(queries), keys.shape[1]
        first = torch.tensor([[0, count], [0, length]], dtype=torch.int32)
        of_queries, of_keys = first.to(queries.device)
        self._flash(
            q=queries,
            k=keys.transpose(0, 1),
            v=values.transpose(0, 1),
            out=outputs,
            cu_seqlens_q=of_queries,
            max_seqlen_q=count,
            cu_seqlens_k=of_keys,
            max_seqlen_k=length,
        )
