"""The torch operators against torch's own attention."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from icecache import ops

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def case(
    dtype: torch.dtype = torch.float32,
    batch: int = 2,
    kv_heads: int = 2,
    group: int = 3,
    dim: int = 32,
    page_size: int = 16,
) -> dict[str, Any]:
    """Arguments of paged_attention over random slots of random pages."""
    generator = torch.Generator().manual_seed(dim + group)
    total, chosen = 9, 5
    slots = torch.randint(0, 2, (batch, kv_heads, chosen, page_size), generator=generator)
    bits = (slots.long() << torch.arange(page_size)).sum(-1)
    masks = torch.where(bits >= 2**31, bits - 2**32, bits)
    table = torch.stack(
        [torch.randperm(total, generator=generator)[:chosen] for _ in range(batch * kv_heads)]
    ).reshape(batch, kv_heads, chosen)
    table[0, 0, 0] = -1
    return {
        "queries": torch.randn(batch, kv_heads * group, dim, generator=generator).to(dtype),
        "pages": torch.randn(total, 2, page_size, dim, generator=generator).to(dtype),
        "block_table": table.int(),
        "slot_masks": masks.int(),
        "scale": 1 / math.sqrt(dim),
    }


def expected(arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in float64, token by token."""
    queries, pages = arguments["queries"].double(), arguments["pages"].double()
    table, masks = arguments["block_table"], arguments["slot_masks"]
    group = queries.shape[1] // table.shape[1]
    outs, lses = torch.zeros_like(queries), torch.zeros(queries.shape[:2], dtype=torch.float64)
    for b in range(queries.shape[0]):
        for head in range(queries.shape[1]):
            rows = [
                (pages[page, 0, slot], pages[page, 1, slot])
                for page, mask in zip(
                    table[b, head // group].tolist(), masks[b, head // group].tolist(), strict=True
                )
                for slot in range(pages.shape[2])
                if page >= 0 and mask >> slot & 1
            ]
            keys, values = (torch.stack(part) for part in zip(*rows, strict=True))
            logits = arguments["scale"] * (keys @ queries[b, head])
            lses[b, head] = torch.logsumexp(logits, 0)
            outs[b, head] = torch.softmax(logits, 0) @ values
    return outs, lses


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [8, 16, 32])
@pytest.mark.parametrize(("group", "dim"), [(1, 8), (3, 64), (16, 256)])
def test_paged_attention(dtype: torch.dtype, page_size: int, group: int, dim: int) -> None:
    arguments = case(dtype, group=group, dim=dim, page_size=page_size)
    out, lse = ops.paged_attention(**arguments)
    want_out, want_lse = expected(arguments)
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), want_out, atol=DTYPES[dtype], rtol=DTYPES[dtype])
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-4, rtol=1e-4)


def test_nothing_attended_is_zero() -> None:
    arguments = case()
    arguments["slot_masks"][1] = 0
    arguments["block_table"][0, 1] = -1
    arguments["pages"][:] = torch.nan
    arguments["slot_masks"][:] = 0
    out, lse = ops.paged_attention(**arguments)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_is_attention_over_the_union(dtype: torch.dtype) -> None:
    arguments = case(dtype)
    left, right = dict(arguments), dict(arguments)
    left["slot_masks"] = arguments["slot_masks"] & 0x0F0F0F0F
    right["slot_masks"] = arguments["slot_masks"] & ~0x0F0F0F0F
    merged, lse = ops.merge_states(*ops.paged_attention(**left), *ops.paged_attention(**right))
    out, want_lse = ops.paged_attention(**arguments)
    torch.testing.assert_close(merged, out, atol=DTYPES[dtype], rtol=DTYPES[dtype])
    torch.testing.assert_close(lse, want_lse, atol=1e-4, rtol=1e-4)


def test_merge_never_reads_an_empty_state() -> None:
    out = torch.full((1, 2, 8), torch.nan)
    lse = torch.full((1, 2), -torch.inf)
    other, other_lse = torch.randn(1, 2, 8), torch.randn(1, 2)
    for a, b in (((out, lse), (other, other_lse)), ((other, other_lse), (out, lse))):
        merged, merged_lse = ops.merge_states(*a, *b)
        torch.testing.assert_close(merged, other)
        torch.testing.assert_close(merged_lse, other_lse)
    merged, merged_lse = ops.merge_states(out, lse, out, lse)
    assert torch.equal(merged, torch.zeros_like(merged))
    assert torch.equal(merged_lse, lse)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    arguments = case(dtype)
    torch.library.opcheck(torch.ops.icecache.paged_attention.default, tuple(arguments.values()))
    state = ops.paged_attention(**arguments)
    torch.library.opcheck(torch.ops.icecache.merge_states.default, (*state, *state))


def test_compile_fullgraph() -> None:
    def attend(**arguments: Any) -> torch.Tensor:
        out, lse = ops.paged_attention(**arguments)
        merged, _ = ops.merge_states(out * 1.0, lse, out, lse)
        return merged + 1

    arguments = case()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**arguments), attend(**arguments))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("queries", lambda x: x.double(), "queries must be float32, bfloat16 or float16"),
        ("queries", lambda x: x[..., :12], "multiple of 8 up to 512, got 12"),
        ("queries", lambda x: x[:, :5].contiguous(), "heads as block_table"),
        ("queries", lambda x: x[0], r"queries must be \[\*, \*, \*\], got \[6, 32\]"),
        ("pages", lambda x: x.half(), "pages must be Float, got Half"),
        ("pages", lambda x: x[:, :, :12].contiguous(), "page size of 8, 16 or 32, got 12"),
        ("pages", lambda x: x[:4].contiguous(), "block_table must hold pages from 0 to 3"),
        ("pages", lambda x: x.transpose(2, 3).contiguous().transpose(2, 3), "contiguous"),
        ("block_table", lambda x: x.long(), "block_table must be Int, got Long"),
        ("block_table", lambda x: x - 2, "or -1 for none, got -"),
        ("slot_masks", lambda x: x[:, :1].contiguous(), "slot_masks must be"),
        ("slot_masks", lambda x: x | 1 << 16, "no bit past the page size 16"),
        ("scale", lambda x: float("nan"), "scale must be finite"),
    ],
)
def test_bad_input_is_refused(name: str, change: Any, message: str) -> None:
    arguments = case()
    arguments[name] = change(arguments[name])
    if name == "queries" and "multiple" in message:
        arguments["queries"] = arguments["queries"].contiguous()
    with pytest.raises(RuntimeError, match=message):
        ops.paged_attention(**arguments)


def test_one_tensor_of_another_device_is_refused() -> None:
    arguments = case()
    for name in ("queries", "pages", "block_table", "slot_masks"):
        mixed = arguments | {name: arguments[name].to("meta")}
        with pytest.raises(RuntimeError, match=r"must be on the device of queries \("):
            ops.paged_attention(**mixed)
    out, lse = torch.randn(2, 1, 2, 8), torch.randn(2, 1, 2)
    with pytest.raises(
        RuntimeError, match=r"lse_b must be on the device of out_a \(cpu\), got meta"
    ):
        ops.merge_states(out[0], lse[0], out[1], lse[1].to("meta"))
    whole = ops.merge_states(*(x.to("meta") for x in (out[0], lse[0], out[1], lse[1])))
    assert all(x.is_meta for x in whole)
