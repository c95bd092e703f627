"""What methods write by themselves after the same prompt, and what full attention makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from icecache.bench.decoder import Decoder
from icecache.bench.engine_session import branch_of, start_of
from icecache.bench.growth import FullLogits
from icecache.bench.methods import Method
from icecache.bench.oracles import FullSession
from icecache.bench.prefill import Prefill
from icecache.bench.quality import token_nll
from icecache.bench.runs import OwnRun
from icecache.bench.session import Session
from icecache.bench.writing import Choose, Manner, Writer, write_on

NGRAM = 4  # tokens, of which repetition is counted


@dataclass
class FreeText:
    """One method at one budget after one prompt."""

    method: str
    budget: int
    ended: bool = False  # by a stop token, which is one of the tokens
    nll: float = 0.0  # mean of the tokens under full attention, nats
    repetition: float = 0.0  # share of n-grams that were there before
    written: list[int] = field(default_factory=list)


def write_freely(
    decoder: Decoder,
    made: Prefill,
    run: OwnRun,
    methods: Sequence[Method],
    budgets: Sequence[int],
    manner: Manner,
) -> list[FreeText]:
    """Full attention's text, then those of `methods` at each of `budgets`.

    `run` holds the prompt of `made` and stays as it is.
    """
    texts = [FreeText("full", 0)]
    sessions: list[Session] = [FullSession(made, made.length, decoder.scale)]
    try:
        for budget in budgets:
            for method in methods:
                if method.name != "full":
                    sessions.append(method.open(decoder, made, budget))
                    texts.append(FreeText(method.label, budget))
        logits = torch.stack([start_of(session, made).first_logits for session in sessions])
        first = manner.choose(logits, [0] * len(texts))
        for text, token in zip(texts, first, strict=True):
            text.written.append(token)
        writers = [Writer(*pair) for pair in zip((t.written for t in texts), sessions, strict=True)]
        write_on(branch_of(decoder, made, sessions), writers, manner)
    finally:
        for session in sessions:
            session.close()
    for text in texts:
        text.ended = manner.is_end(text.written)
        text.repetition = repetition(text.written)
        text.nll = _nll(run.fork(), made, text.written)
    return texts


def own_text(
    run: OwnRun, first: torch.Tensor, count: int, ends: Sequence[int], choose: Choose
) -> list[int]:
    """`count` tokens that full attention writes after the tokens of `run`, none of `ends`.

    `first`: the logits [V] after them.
    """
    logits, made = first.clone(), list[int]()
    while True:
        logits[list(ends)] = -torch.inf
        made += choose(logits[None], [len(made)])
        if len(made) >= count:
            return made
        logits = run.run(torch.tensor(made[-1:]))


def repetition(tokens: Sequence[int]) -> float:
    """Share of the n-grams of `tokens` that an equal one precedes; 0 where there is none."""
    grams = [tuple(tokens[at : at + NGRAM]) for at in range(len(tokens) - NGRAM + 1)]
    return 1 - len({*grams}) / len(grams) if grams else 0.0


def _nll(run: OwnRun, made: Prefill, written: Sequence[int]) -> float:
    """Mean over the tokens `written` after the prompt that `run` holds."""
    tokens = torch.cat([made.tokens, torch.tensor(written)])
    full, total = FullLogits(run, tokens), 0.0
    logits = made.first_logits
    for at, token in enumerate(written):
        total += float(token_nll(logits, token))
        if at + 1 < len(written):
            logits = full.after(made.length + at)
    return total / len(written)
