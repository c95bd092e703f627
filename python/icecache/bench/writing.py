"""Rows that write on by themselves, each under a method, to the ends of what they write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from icecache.bench.quality import row_by_row
from icecache.bench.runs import Branch
from icecache.bench.session import Session

IsEnd = Callable[[list[int]], bool]

# The next token of each row: from logits [B, V] and how many tokens each row has written so far.
Choose = Callable[[torch.Tensor, Sequence[int]], list[int]]


@dataclass(frozen=True)
class Writer:
    """One row. `written`: its tokens so far, the last of which its session has not seen."""

    written: list[int]
    session: Session


@dataclass(frozen=True)
class Manner:
    """How rows write. A row ends with `most` tokens, or where `is_end(written)`."""

    most: int
    is_end: IsEnd
    choose: Choose


def greedy(logits: torch.Tensor, written: Sequence[int]) -> list[int]:
    """A Choose: the most likely token."""
    tokens: list[int] = logits.argmax(-1).tolist()
    return tokens


def sampled(temperature: float, seed: int) -> Choose:
    """A Choose at this temperature; greedy at 0.

    The noise depends on the seed and the number of tokens written alone: methods whose logits are
    equal choose the same tokens, and those that differ do so because of their logits.
    """
    if temperature == 0:
        return greedy

    def choose(logits: torch.Tensor, written: Sequence[int]) -> list[int]:
        tokens = []
        for row, count in zip(logits, written, strict=True):
            chance = torch.Generator().manual_seed(seed * 1_000_003 + count)
            uniform = torch.rand(row.shape, generator=chance, dtype=torch.float64)
            gumbel = -torch.log(-torch.log(uniform.clamp(min=1e-300)))
            tokens.append(int((row.double() / temperature + gumbel).argmax()))
        return tokens

    return choose


def write_on(branch: Branch, writers: Sequence[Writer], manner: Manner) -> None:
    """Adds to what the rows of `branch` have written; rows leave as they end."""
    rows = list(writers)
    while True:
        going = [
            at
            for at, row in enumerate(rows)
            if len(row.written) < manner.most and not manner.is_end(row.written)
        ]
        if not going:
            return
        if len(going) < len(rows):
            rows, branch = [rows[at] for at in going], branch.fork(going)
        tokens = torch.tensor([row.written[-1:] for row in rows])
        logits = branch.run(tokens, row_by_row([row.session for row in rows]))
        following = manner.choose(logits, [len(row.written) for row in rows])
        for row, token in zip(rows, following, strict=True):
            row.written.append(token)
