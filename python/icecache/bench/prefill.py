"""What full attention makes of a prompt: the cache to decode from and the truth to compare with."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from icecache.bench.decoder import Decoder

QUERIES = 256


@dataclass(frozen=True)
class Prefill:
    """One prompt under full attention. L prompt tokens, T continuation tokens; keys post-RoPE."""

    tokens: torch.Tensor  # [L] int64
    keys: torch.Tensor  # [layers, Hkv, L, D]
    values: torch.Tensor  # [layers, Hkv, L, D]
    queries: torch.Tensor  # [layers, Hq, min(L, 256), D]: of the last tokens
    continuation: torch.Tensor  # [T + 1] int64: greedy tokens; the first follows from the prompt
    logits: torch.Tensor  # [T, V]: of the tokens after continuation[0], ..., continuation[T - 1]

    @property
    def length(self) -> int:
        return self.tokens.shape[0]

    @property
    def steps(self) -> int:
        return self.logits.shape[0]


def prefill(decoder: Decoder, tokens: torch.Tensor, steps: int, end: int | None) -> Prefill:
    """Runs full attention over `tokens` [L], then `steps` greedy steps.

    The token `end` is never chosen, so that there are `steps` steps of text; the logits are as the
    model gave them.
    """
    shape = (decoder.num_layers, decoder.num_kv_heads, tokens.shape[0] + steps, decoder.head_dim)
    keys = torch.zeros(shape, dtype=decoder.dtype)
    values = torch.zeros(shape, dtype=decoder.dtype)
    kept: list[torch.Tensor] = []

    def attend(
        layer: int, queries: torch.Tensor, new_keys: torch.Tensor, new_values: torch.Tensor
    ) -> torch.Tensor:
        end_of_new = start + queries.shape[2]
        keys[layer, :, start:end_of_new] = new_keys[0]
        values[layer, :, start:end_of_new] = new_values[0]
        if start == 0:
            kept.append(queries[0, :, -QUERIES:].clone())
        return F.scaled_dot_product_attention(
            queries,
            keys[None, layer, :, :end_of_new],
            values[None, layer, :, :end_of_new],
            is_causal=start == 0,
            enable_gqa=True,
        )

    start = 0
    logits = decoder.run(tokens[None], start, attend)
    continuation = [_greedy(logits[0], end)]
    later: list[torch.Tensor] = []
    for step in range(steps):
        start = tokens.shape[0] + step
        logits = decoder.run(torch.tensor([continuation[-1:]]), start, attend)
        later.append(logits[0].clone())
        continuation.append(_greedy(logits[0], end))
    length = tokens.shape[0]
    return Prefill(
        tokens=tokens.clone(),
        keys=keys[:, :, :length].contiguous(),
        values=values[:, :, :length].contiguous(),
        queries=torch.stack(kept),
        continuation=torch.tensor(continuation),
        logits=torch.stack(later),
    )


def _greedy(logits: torch.Tensor, end: int | None) -> int:
    if end is None:
        return int(logits.argmax())
    allowed = logits.clone()
    allowed[end] = -torch.inf
    return int(allowed.argmax())


def save(made: Prefill, path: Path) -> None:
    """Writes `made` as safetensors; a reader never sees a part of the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    save_file({name: tensor.contiguous() for name, tensor in vars(made).items()}, str(partial))
    partial.replace(path)


def load(path: Path) -> Prefill:
    return Prefill(**load_file(str(path)))
