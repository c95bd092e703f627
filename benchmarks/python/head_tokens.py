"""Keys and queries of one KV head to search in: made up, or of a real model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from icecache.bench.decoder import Decoder
from icecache.bench.prompts import pydoc_text
from icecache.bench.step import synthetic

RECENT = 256  # queries that shape the metric of an index


@dataclass(frozen=True)
class HeadTokens:
    """L keys of one KV head and the queries of its group, post-RoPE, in bfloat16."""

    keys: torch.Tensor  # [L, D]
    recent: torch.Tensor  # [G, 256, D]: of the last tokens
    queries: torch.Tensor  # [n, G, D]: of the tokens that follow

    @property
    def length(self) -> int:
        return self.keys.shape[0]


def synthetic_head(length: int, queries: int, head_dim: int = 128, group: int = 4) -> HeadTokens:
    """Drifting clusters with noise of full rank, of which no low-rank sketch can tell much."""
    first = length - RECENT
    rows = synthetic(group, RECENT + queries, head_dim, first, 100).to(torch.bfloat16)
    return HeadTokens(
        synthetic(1, length, head_dim, 0, 0)[0].to(torch.bfloat16),
        rows[:, :RECENT].contiguous(),
        rows[:, RECENT:].transpose(0, 1).contiguous(),
    )


class _Reached(Exception):
    """The layer that is asked for has been computed; those above it need not be."""


@torch.inference_mode()
def model_heads(
    model: Any, tokens: torch.Tensor, queries: int, layer: int, chunk: int = 1024
) -> Iterator[HeadTokens]:
    """Every KV head of one full-attention layer over `tokens` [L + queries].

    Positions run through all of the text, attention below `layer` stays within a chunk: a text of
    any length is read in time that grows with the length alone, and beyond the model's context.
    """
    decoder = Decoder(model)
    kept_keys: list[torch.Tensor] = []
    kept_queries: list[torch.Tensor] = []

    def attend(
        at: int, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        if at == layer:
            kept_keys.append(keys[0].to(torch.bfloat16))
            kept_queries.append(rows[0].to(torch.bfloat16))
            del kept_queries[: -1 - (RECENT + queries) // chunk - 1]
            raise _Reached
        return F.scaled_dot_product_attention(rows, keys, values, is_causal=True, enable_gqa=True)

    for start in range(0, tokens.shape[0], chunk):
        with suppress(_Reached):
            decoder.begin(start).run(tokens[None, start : start + chunk], attend)
    keys = torch.cat(kept_keys, 1)[:, : tokens.shape[0] - queries]
    rows = torch.cat(kept_queries, 1)[:, -RECENT - queries :]
    for head, of_group in enumerate(rows.chunk(decoder.num_kv_heads)):
        yield HeadTokens(
            keys[head].contiguous(),
            of_group[:, :RECENT].contiguous(),
            of_group[:, RECENT:].transpose(0, 1).contiguous(),
        )


def text_tokens(tokenizer: Any, count: int) -> torch.Tensor:
    """`count` tokens of Python's reference, over again where it is too short."""
    text = pydoc_text()[: 8 * count]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    tokens: torch.Tensor = ids.repeat(-(-count // ids.shape[0]))[:count]
    return tokens
