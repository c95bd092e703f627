"""How near a method's next-token distributions stay to full attention's.

All methods decode in the same batch, one row each: the same weights, the same positions, and with
teacher forcing the same tokens; only attention differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from icecache.bench.cache_layers import Attention
from icecache.bench.decoder import Decoder
from icecache.bench.engine_session import branch_of, start_of
from icecache.bench.methods import Method
from icecache.bench.prefill import Prefill
from icecache.bench.session import Session


@dataclass(frozen=True)
class DecodeStats:
    """One method at one budget on one prompt; T decode steps, from the second token behind it on.

    The first token is the prompt's: methods differ in it only where they have a prefill_budget.
    """

    prompt: str
    method: Method
    budget: int
    kl: torch.Tensor  # [T] double: KL(full || method) of each step, nats
    agrees: torch.Tensor  # [T] bool: the same most likely token as full attention
    mass: float  # share of attention that was exact: mean over steps, layers and heads
    found: bool | None  # the needle; None where the prompt has none


@dataclass(frozen=True)
class Subject:
    """What methods are compared on: a prompt's prefill, and when its needle counts as found.

    With `needle` = (tokenizer, answer) every method decodes by itself, too, from the prompt's end
    on, and has found it where its text contains the answer. With `is_answer` the continuation is
    one token and the right answer, and a method has found it where each of its tokens is the
    method's most likely one.
    """

    name: str
    prefill: Prefill
    needle: tuple[Any, str] | None = None
    is_answer: bool = False


def decode_stats(
    decoder: Decoder, subject: Subject, methods: Sequence[Method], budget: int
) -> list[DecodeStats]:
    """Every method over the continuation of the subject's prefill."""
    prefill = subject.prefill
    sessions = [method.open(decoder, prefill, budget) for method in methods]
    free = [session.fork() for session in sessions] if subject.needle else []
    logits = teacher_forced(decoder, prefill, sessions)
    masses = [session.mass() for session in sessions]
    found: list[bool | None] = [None] * len(methods)
    if subject.needle:
        tokenizer, answer = subject.needle
        texts = tokenizer.batch_decode(decode_freely(decoder, prefill, free))
        found = [answer in text for text in texts]
    if subject.is_answer:
        right = logits.argmax(-1) == prefill.continuation[1:]
        found = right.all(-1).tolist()
    for session in [*free, *sessions]:
        session.close()
    return [
        DecodeStats(
            prompt=subject.name,
            method=method,
            budget=budget,
            kl=kl_divergence(prefill.logits, logits[row]),
            agrees=logits[row].argmax(-1) == prefill.logits.argmax(-1),
            mass=masses[row],
            found=found[row],
        )
        for row, method in enumerate(methods)
    ]


def teacher_forced(decoder: Decoder, prefill: Prefill, sessions: Sequence[Session]) -> torch.Tensor:
    """Logits [B, T, V] of each session fed with the prefill's continuation."""
    attend, rows = row_by_row(sessions), branch_of(decoder, prefill, sessions)
    steps = [
        rows.run(prefill.continuation[step].expand(len(sessions), 1), attend)
        for step in range(prefill.steps)
    ]
    return torch.stack(steps, 1)


def decode_freely(decoder: Decoder, prefill: Prefill, sessions: Sequence[Session]) -> torch.Tensor:
    """Greedy tokens [B, T + 1] of each session fed with its own.

    The first is the prefill's, or what comes of the prompt where the session ran over it itself.
    """
    attend, rows = row_by_row(sessions), branch_of(decoder, prefill, sessions)
    tokens = first_tokens(prefill, sessions)[:, None]
    for _ in range(prefill.steps):
        logits = rows.run(tokens[:, -1:], attend)
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    return tokens


def first_tokens(prefill: Prefill, sessions: Sequence[Session]) -> torch.Tensor:
    """The token [B] that each session writes right behind the prompt."""
    starts = [start_of(session, prefill) for session in sessions]
    own = [
        prefill.continuation[0] if s is prefill.start else s.first_logits.argmax() for s in starts
    ]
    return torch.stack(own)


def kl_divergence(truth: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(softmax(truth) || softmax(other)) over the last dimension, in double, nats."""
    log_p = torch.log_softmax(truth.double(), -1)
    log_q = torch.log_softmax(other.double(), -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def token_nll(logits: torch.Tensor, token: int) -> torch.Tensor:
    """Negative log likelihood of `token` under logits [..., V] -> [...], nats."""
    return -torch.log_softmax(logits.float(), -1)[..., token]


def row_by_row(sessions: Sequence[Session]) -> Attention:
    """Attention of a batch with one session a row."""

    def attend(
        layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        rows = [
            session.attend(layer, queries[row], keys[row], values[row])
            for row, session in enumerate(sessions)
        ]
        return torch.stack(rows)

    return attend
