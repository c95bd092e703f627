"""What full attention makes of a prompt: the cache to decode from and the truth to compare with."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from icecache import InvalidArgument
from icecache.bench.decoder import Decoder
from icecache.bench.runs import Branch, OwnRun, Start, start_rows

CHUNK = 1024  # tokens of a long prompt that run at once


@dataclass(frozen=True)
class Prefill:
    """One prompt under full attention. L prompt tokens, T continuation tokens; keys post-RoPE.

    Layers are those of full attention. What the model's other layers hold after the prompt is in
    `stock_layers`.
    """

    tokens: torch.Tensor  # [L] int64
    keys: torch.Tensor  # [layers, Hkv, L, D]
    values: torch.Tensor  # [layers, Hkv, L, D]
    queries: torch.Tensor  # [layers, Hq, min(L, 256), D]: of the last tokens
    first_logits: torch.Tensor  # [V]: after the prompt
    continuation: torch.Tensor  # [T + 1] int64: greedy tokens, or given ones, after the prompt
    logits: torch.Tensor  # [T, V]: of the tokens after continuation[0], ..., continuation[T - 1]
    sinks: torch.Tensor  # [layers, Hq]: a logit in every softmax that adds nothing; else [0]
    stock_layers: Sequence[Any] = ()  # as in Decoder.stock_layers, one row each

    @property
    def length(self) -> int:
        return self.tokens.shape[0]

    @property
    def steps(self) -> int:
        return self.logits.shape[0]

    @cached_property
    def start(self) -> Start:
        """Where rows start to decode whose method attended to the prompt exactly."""
        return Start(self.length, self.first_logits, self.stock_layers)

    def branch(self, decoder: Decoder, rows: int) -> Branch:
        """So many rows that start to decode."""
        return start_rows(decoder, [self.start] * rows)


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
    run = OwnRun(decoder)
    return finish(decoder, run, tokens, run.run(tokens), is_done, never)


def finish(
    decoder: Decoder,
    run: OwnRun,
    tokens: torch.Tensor,
    first: torch.Tensor,
    is_done: Callable[[list[int]], bool],
    never: int | None,
) -> Prefill:
    """The model's own greedy answer after the prompt `tokens`, which `run` holds.

    `first`: the logits after the prompt. The answer ends where `is_done(answer so far)`; the token
    `never` is not in it.
    """
    made = _of_prompt(decoder, run, tokens, first)
    continuation = [_greedy(first, never)]
    later: list[torch.Tensor] = []
    while not is_done(continuation):
        later.append(run.run(torch.tensor(continuation[-1:])))
        continuation.append(_greedy(later[-1], never))
    logits = torch.stack(later) if later else made.logits
    return replace(made, continuation=torch.tensor(continuation), logits=logits)


def followed(
    decoder: Decoder,
    run: OwnRun,
    tokens: torch.Tensor,
    first: torch.Tensor,
    following: torch.Tensor,
) -> Prefill:
    """As finish(), with the continuation `following` [T + 1] in place of the model's own."""
    made = _of_prompt(decoder, run, tokens, first)
    logits = run.run_all(following[:-1]) if len(following) > 1 else made.logits
    return replace(made, continuation=following.clone(), logits=logits)


def run_in_chunks(run: OwnRun, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [V] after the `tokens` [L], of which `run` holds the first.

    In chunks attention of a sliding window costs no more than its window, and no mask is L x L.
    """
    logits = torch.empty(0)
    for part in tokens[run.length :].split(CHUNK):
        logits = run.run(part)
    return logits


def _of_prompt(decoder: Decoder, run: OwnRun, tokens: torch.Tensor, first: torch.Tensor) -> Prefill:
    """The prompt `tokens` that `run` holds, without a continuation."""
    return Prefill(
        tokens=tokens.clone(),
        keys=torch.stack([layer.keys for layer in run.held]),
        values=torch.stack([layer.values for layer in run.held]),
        queries=torch.stack(run.queries),
        first_logits=first,
        continuation=torch.empty(0, dtype=torch.int64),
        logits=first.new_empty(0, first.shape[0]),
        sinks=torch.stack(decoder.sinks) if decoder.sinks else torch.empty(0),
        stock_layers=run.stock_layers(),
    )


def _greedy(logits: torch.Tensor, end: int | None) -> int:
    if end is None:
        return int(logits.argmax())
    allowed = logits.clone()
    allowed[end] = -torch.inf
    return int(allowed.argmax())


_TENSORS = tuple(field.name for field in fields(Prefill) if field.name != "stock_layers")
_LAYERS = "layers"  # in a file: how many the model has


def save(made: Prefill, path: Path) -> None:
    """Writes `made` as safetensors; a reader never sees a part of the file.

    Raises InvalidArgument for a model with layers that keep a cache of transformers' own.
    """
    if any(layer is not None for layer in made.stock_layers):
        raise InvalidArgument(
            "prefill: expected one of a model whose layers all attend to the whole context; those "
            "of other models cannot be kept in files"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    held = {name: getattr(made, name).contiguous() for name in _TENSORS}
    save_file({**held, _LAYERS: torch.tensor(len(made.stock_layers))}, str(partial))
    partial.replace(path)


def load(path: Path) -> Prefill | None:
    """What save() wrote; None for a file of another form."""
    tensors = load_file(str(path))
    if set(tensors) != {*_TENSORS, _LAYERS}:
        return None
    layers = int(tensors.pop(_LAYERS))
    return Prefill(**tensors, stock_layers=[None] * layers)
