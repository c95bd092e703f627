"""Torch operators: attention over pages, and merging of attention states.

They are registered as `torch.ops.icecache.*` on LibTorch's stable ABI, with fake kernels, so that
`torch.compile(fullgraph=True)` works through them. CPU tensors; no autograd. Errors are
RuntimeError naming the argument, what was expected and what came.

B sequences, Hq query heads, Hkv KV heads, D head dim, S page size.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch

from icecache.fakes import require_one_device

# Also defines icecache_torch_parallel_for: include/icecache/parallel.h on torch's own threads.
LIBRARY = str(Path(__file__).with_name("_ops.so"))
torch.ops.load_library(LIBRARY)


def paged_attention(
    queries: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    slot_masks: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query per head over the chosen slots of the chosen pages.

    Args:
        queries: [B, Hq, D], float32, bfloat16 or float16; D a multiple of 8 up to 512.
        pages: [P, 2, S, D] in the dtype of queries: S key rows, then S value rows; S 8, 16 or 32.
        block_table: [B, Hkv, N] int32: pages of each sequence and KV head, -1 for none.
        slot_masks: [B, Hkv, N] int32: bit s stands for slot s of that page.
        scale: multiplies q.k before the softmax.

    Returns:
        out [B, Hq, D] in the dtype of queries, zeros where nothing is attended, and
        lse [B, Hq] float32: log of the sum of exp(scale q.k), -inf where nothing is attended.
        Logits that leave the range of float32 are computed in double; their lse is infinite. A
        query with NaN or Inf gives NaN.
    """
    result = torch.ops.icecache.paged_attention(queries, pages, block_table, slot_masks, scale)
    return cast("tuple[torch.Tensor, torch.Tensor]", result)


def merge_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint sets of tokens from the attention over each.

    out [B, Hq, D] and lse [B, Hq] float32 as paged_attention() returns them; so is the result. A
    float32 holds an lse to |lse| / 2^24: the weights of the two are right to that factor, 1e-5 at
    logits of some hundreds, 6 % at 10^6, and nothing can be said from 10^8 on. Two infinite ones
    count alike.
    """
    result = torch.ops.icecache.merge_states(out_a, lse_a, out_b, lse_b)
    return cast("tuple[torch.Tensor, torch.Tensor]", result)


@torch.library.register_fake("icecache::paged_attention")  # type: ignore[untyped-decorator]
def _(
    queries: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    slot_masks: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    require_one_device(queries=queries, pages=pages, block_table=block_table, slot_masks=slot_masks)
    lse = queries.new_empty(queries.shape[:2], dtype=torch.float32)
    return torch.empty_like(queries), lse


@torch.library.register_fake("icecache::merge_states")  # type: ignore[untyped-decorator]
def _(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    require_one_device(out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    return torch.empty_like(out_a), torch.empty_like(lse_a)
