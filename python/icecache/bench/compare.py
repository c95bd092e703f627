"""Many methods on one prompt after a single exact prefill, but for those with a prefill_budget.

Every method is fed full attention's own answer, all rows in one batch: KL, agreement, mass. As long
as a row's most likely token is full attention's, its own answer is the same, so it needs no second
run; where it first differs its session is forked, and the forks write on alone. Another fork is fed
the right answer, for its likelihood, and a third sees full attention's own queries, for the error
of the output.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from icecache.bench.decoder import Decoder
from icecache.bench.engine_session import branch_of, start_of
from icecache.bench.methods import Method
from icecache.bench.oracles import FullSession
from icecache.bench.prefill import Prefill
from icecache.bench.quality import first_tokens, kl_divergence, row_by_row, token_nll
from icecache.bench.runs import Branch
from icecache.bench.session import Session
from icecache.bench.writing import IsEnd, Manner, Writer, greedy, write_on

ERROR_STEPS = 4  # decode steps in which the error of the output is measured


@dataclass
class Outcome:
    """One method at one budget on one prompt; T decode steps along full attention's answer."""

    method: str
    budget: int
    kl: list[float] = field(default_factory=list)  # [T] nats, KL(full || method)
    agrees: list[bool] = field(default_factory=list)  # [T]: full attention's most likely token
    mass: float = 1.0  # share of attention that was exact: mean over steps, layers, heads
    bytes_read: float = 0.0  # of a step, all layers and heads
    answer: list[int] = field(default_factory=list)  # what it writes by itself
    gold_nll: float | None = None  # of a token of the right answer, nats; None where there is none
    output_error: list[list[float]] = field(default_factory=list)  # [layers][Hq], relative L2
    open_s: float = 0.0  # seconds to fill and index its cache; with a prefill_budget, to prefill
    step_s: float = 0.0  # seconds of attention of a step, all layers


def compare(
    decoder: Decoder,
    prefill: Prefill,
    methods: Sequence[Method],
    budgets: Sequence[int],
    gold: Sequence[int],
    most: int,
    is_end: IsEnd,
) -> list[Outcome]:
    """Full attention's outcome, then those of `methods` at each of `budgets`.

    `gold`: tokens of the right answer, maybe none. Answers have at most `most` tokens and end as
    `prefill.continuation` did, where `is_end(answer so far)`. A budget that is too small for a
    method raises InvalidArgument.
    """
    full = Outcome("full", 0, answer=prefill.continuation.tolist())
    full.kl, full.agrees = [0.0] * prefill.steps, [True] * prefill.steps
    outcomes: list[Outcome] = [full]
    sessions: list[Session] = []
    truth = FullSession(prefill, prefill.length, decoder.scale)
    for method in methods:
        if method.name == "full":
            continue
        for budget in budgets:
            start = time.perf_counter()
            sessions.append(method.open(decoder, prefill, budget))
            outcomes.append(Outcome(method.label, budget, open_s=time.perf_counter() - start))
    try:
        _fill_gold(decoder, prefill, outcomes, [truth, *sessions], gold)
        _fill_errors(decoder, prefill, outcomes[1:], truth, sessions)
        _fill_answers(decoder, prefill, outcomes[1:], sessions, most, is_end)
    finally:
        for session in (truth, *sessions):
            session.close()
    return outcomes


def _fill_answers(
    decoder: Decoder,
    prefill: Prefill,
    outcomes: list[Outcome],
    sessions: list[Session],
    most: int,
    is_end: IsEnd,
) -> None:
    """Along full attention's answer, then each row along its own where that is another."""
    if not sessions:
        return
    answer = prefill.continuation.tolist()
    before = [session.bytes_read() for session in sessions]
    timer = _Timed(sessions)
    left: set[int] = set()
    groups: list[_Group] = []
    branch = branch_of(decoder, prefill, sessions)

    def leave(rows: list[int]) -> None:
        """They write on by themselves, from the end of their answers."""
        left.update(rows)
        forks = [sessions[row].fork() for row in rows]
        groups.append(_Group(branch.fork(rows), [outcomes[row] for row in rows], forks))

    first = first_tokens(prefill, sessions).tolist()
    others = [row for row, token in enumerate(first) if token != answer[0]]
    for row in others:
        outcomes[row].answer = [first[row]]
    if others:
        leave(others)
    for step in range(prefill.steps):
        tokens = torch.tensor(answer[step]).expand(len(sessions), 1)
        logits = branch.run(tokens, timer.attend)
        leaving: list[int] = []
        kl = kl_divergence(prefill.logits[step].expand_as(logits), logits).tolist()
        for row, (outcome, token) in enumerate(
            zip(outcomes, logits.argmax(-1).tolist(), strict=True)
        ):
            outcome.kl.append(kl[row])
            outcome.agrees.append(token == answer[step + 1])
            if row not in left and token != answer[step + 1]:
                leaving.append(row)
                outcome.answer = [*answer[: step + 1], token]
        if leaving:
            leave(leaving)
    for row, (outcome, session) in enumerate(zip(outcomes, sessions, strict=True)):
        outcome.mass = session.mass() if prefill.steps else 1.0
        steps = max(1, prefill.steps)
        outcome.bytes_read = (session.bytes_read() - before[row]) / steps
        outcome.step_s = timer.seconds[row] / steps
        if row not in left:
            outcome.answer = answer
    if decoder.can_join and groups:
        groups = [_Group.joined(groups)]
    for group in groups:
        group.write_on(most, is_end)


@dataclass
class _Group:
    """Rows that go on together, each with a session that is a fork of its own."""

    branch: Branch
    outcomes: list[Outcome]
    sessions: list[Session]

    @classmethod
    def joined(cls, groups: Sequence[_Group]) -> _Group:
        first, *others = groups
        return cls(
            first.branch.joined(other.branch for other in others),
            [outcome for group in groups for outcome in group.outcomes],
            [session for group in groups for session in group.sessions],
        )

    def write_on(self, most: int, is_end: IsEnd) -> None:
        """Greedily, each row from where it is; closes their sessions."""
        pairs = zip(self.outcomes, self.sessions, strict=True)
        rows = [Writer(outcome.answer, session) for outcome, session in pairs]
        write_on(self.branch, rows, Manner(most, is_end, greedy))
        for session in self.sessions:
            session.close()


def _fill_gold(
    decoder: Decoder,
    prefill: Prefill,
    outcomes: list[Outcome],
    sessions: list[Session],
    gold: Sequence[int],
) -> None:
    """Mean negative log likelihood of the tokens of `gold`."""
    if not gold:
        return
    forks = [session.fork() for session in sessions]
    starts = [start_of(session, prefill).first_logits for session in forks]
    nll = token_nll(torch.stack(starts), gold[0])
    attend, branch = row_by_row(forks), branch_of(decoder, prefill, forks)
    for token, following in pairwise(gold):
        tokens = torch.tensor(token).expand(len(forks), 1)
        nll += token_nll(branch.run(tokens, attend), following)
    for outcome, fork, total in zip(outcomes, forks, nll.tolist(), strict=True):
        outcome.gold_nll = total / len(gold)
        fork.close()


def _fill_errors(
    decoder: Decoder,
    prefill: Prefill,
    outcomes: list[Outcome],
    truth: Session,
    sessions: list[Session],
) -> None:
    """Relative L2 distance of every head's output to full attention's, for the same queries."""
    steps = min(ERROR_STEPS, prefill.steps)
    if not steps or not sessions:
        return
    forks = [session.fork() for session in (truth, *sessions)]
    total = torch.zeros(len(sessions), decoder.num_layers, decoder.num_q_heads)

    def attend(
        layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        outputs = [fork.attend(layer, queries[0], keys[0], values[0])[:, 0] for fork in forks]
        norm = outputs[0].norm(dim=-1).clamp_min(1e-12)
        for row, output in enumerate(outputs[1:]):
            total[row, layer] += (output - outputs[0]).norm(dim=-1) / norm
        return outputs[0][None, :, None]

    branch = prefill.branch(decoder, 1)
    for step in range(steps):
        branch.run(prefill.continuation[step].reshape(1, 1), attend)
    for outcome, error, fork in zip(outcomes, total / steps, forks[1:], strict=True):
        outcome.output_error = [[round(one, 5) for one in layer] for layer in error.tolist()]
        fork.close()
    forks[0].close()


class _Timed:
    """Attention of a batch with one session a row, and the seconds of each row."""

    def __init__(self, sessions: Sequence[Session]) -> None:
        self._sessions = sessions
        self.seconds = [0.0] * len(sessions)

    def attend(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        outputs = []
        for row, session in enumerate(self._sessions):
            start = time.perf_counter()
            outputs.append(session.attend(layer, queries[row], keys[row], values[row]))
            self.seconds[row] += time.perf_counter() - start
        return torch.stack(outputs)
