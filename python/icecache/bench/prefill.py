"""What full attention makes of a prompt: the cache to decode from and the truth to compare with."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from icecache.bench.decoder import Decoder

QUERIES = 256
_ROOM = 256  # tokens of an answer that a cache grows by


@dataclass(frozen=True)
class Prefill:
    """One prompt under full attention. L prompt tokens, T continuation tokens; keys post-RoPE."""

    tokens: torch.Tensor  # [L] int64
    keys: torch.Tensor  # [layers, Hkv, L, D]
    values: torch.Tensor  # [layers, Hkv, L, D]
    queries: torch.Tensor  # [layers, Hq, min(L, 256), D]: of the last tokens
    first_logits: torch.Tensor  # [V]: after the prompt
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
    return _run(decoder, tokens, lambda made: len(made) > steps, end)


def prefill_with_answer(
    decoder: Decoder, tokens: torch.Tensor, most: int, is_end: Callable[[list[int]], bool]
) -> Prefill:
    """Runs full attention over `tokens` [L], then greedily to the end of the answer.

    The answer, `continuation`, has at most `most` tokens, and ends with the first for which
    `is_end(the answer so far)`.
    """
    return _run(decoder, tokens, lambda made: len(made) >= most or is_end(made), None)


def _run(
    decoder: Decoder, tokens: torch.Tensor, is_done: Callable[[list[int]], bool], never: int | None
) -> Prefill:
    length = tokens.shape[0]
    cache = _Cache(decoder, length)
    logits = decoder.run(tokens[None], 0, cache.attend)
    first = logits[0].clone()
    continuation = [_greedy(first, never)]
    later: list[torch.Tensor] = []
    while not is_done(continuation):
        logits = decoder.run(torch.tensor([continuation[-1:]]), length + len(later), cache.attend)
        later.append(logits[0].clone())
        continuation.append(_greedy(logits[0], never))
    return Prefill(
        tokens=tokens.clone(),
        keys=cache.keys[:, :, :length].contiguous(),
        values=cache.values[:, :, :length].contiguous(),
        queries=torch.stack(cache.queries),
        first_logits=first,
        continuation=torch.tensor(continuation),
        logits=torch.stack(later) if later else first.new_empty(0, first.shape[0]),
    )


class _Cache:
    """Full attention over what it was given so far; grows as it must."""

    def __init__(self, decoder: Decoder, length: int) -> None:
        shape = (decoder.num_layers, decoder.num_kv_heads, length + _ROOM, decoder.head_dim)
        self.keys = torch.zeros(shape, dtype=decoder.dtype)
        self.values = torch.zeros(shape, dtype=decoder.dtype)
        self.queries: list[torch.Tensor] = []  # of each layer, those of the prompt's last tokens
        self._lengths = [0] * decoder.num_layers

    def attend(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        start = self._lengths[layer]
        end = self._lengths[layer] = start + queries.shape[2]
        if end > self.keys.shape[2]:
            self.keys, self.values = (F.pad(x, (0, 0, 0, _ROOM)) for x in (self.keys, self.values))
        self.keys[layer, :, start:end] = keys[0]
        self.values[layer, :, start:end] = values[0]
        if start == 0:
            self.queries.append(queries[0, :, -QUERIES:].clone())
        rows = self.keys[None, layer, :, :end], self.values[None, layer, :, :end]
        if queries.shape[2] > 1:
            return F.scaled_dot_product_attention(queries, *rows, is_causal=True, enable_gqa=True)
        # The heads of a group as one head's queries: torch else copies keys and values for each.
        grouped = queries.reshape(1, keys.shape[1], -1, queries.shape[3])
        return F.scaled_dot_product_attention(grouped, *rows).reshape(queries.shape)


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


def load(path: Path) -> Prefill | None:
    """What save() wrote; None for a file of another form."""
    tensors = load_file(str(path))
    return Prefill(**tensors) if set(tensors) == {f.name for f in fields(Prefill)} else None
