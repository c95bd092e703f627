"""How near methods stay to full attention along a text that they are fed token by token.

The prompt is short: what a method's index holds is what it grew by, not what a prefill gave it.
At checkpoints an index is built anew over the same keys and values, and followed beside the grown
one for some steps: what growing itself costs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

import torch

from icecache.bench.decoder import Decoder
from icecache.bench.engine_session import EngineSession, branch_of
from icecache.bench.generation_plan import BLOCK, Checkpoints
from icecache.bench.methods import Method
from icecache.bench.oracles import FullSession
from icecache.bench.prefill import Prefill
from icecache.bench.quality import kl_divergence, row_by_row, token_nll
from icecache.bench.runs import QUERIES, OwnRun
from icecache.bench.session import Session

_CHANGES_EVERY = 16  # steps between looks at how often an engine changed its indexes


class FullLogits:
    """Full attention's logits along a text, made in chunks as they are asked for."""

    def __init__(self, run: OwnRun, tokens: torch.Tensor) -> None:
        """`run` holds the first of `tokens` [L], and is this object's own from here on."""
        self._run = run
        self._tokens = tokens
        self._chunks: list[tuple[int, torch.Tensor]] = []  # the last two, with their first position

    def after(self, position: int) -> torch.Tensor:
        """Logits [V] after the token at `position`, at most BLOCK before the last one asked for."""
        while position >= self._run.length:
            start = self._run.length
            made = self._run.run_all(self._tokens[start : start + BLOCK])
            self._chunks = [*self._chunks[-1:], (start, made)]
        start, logits = next(one for one in reversed(self._chunks) if one[0] <= position)
        return logits[position - start]


@dataclass(frozen=True)
class Text:
    """What methods are fed: `tokens` [L], of which the first are the prompt of `made`."""

    tokens: torch.Tensor
    made: Prefill
    full: FullLogits  # begins where the prompt ends


@dataclass(frozen=True)
class Checkpoint:
    """Mean KL to full attention over the steps from `at` tokens on, nats.

    `rebuilt`: of an index built at that moment over the keys and values that the grown one holds.
    `exact`: of full attention over them; what it differs by came in with earlier tokens.
    """

    at: int
    grown: float
    rebuilt: float
    exact: float


@dataclass
class Growth:
    """One method at one budget along a text; T decode steps from the prompt's end on."""

    method: str
    budget: int
    kl: list[float] = field(default_factory=list)  # [T] nats, KL(full || method)
    agrees: list[bool] = field(default_factory=list)  # [T]: full attention's most likely token
    nll: float = 0.0  # mean of the text's tokens, nats
    mass: float = 1.0  # share of attention that was exact: mean over steps, layers, heads
    bytes_read: float = 0.0  # of a step, all layers and heads
    # [position, seals, merges] of all heads since the entry before; none where none is counted.
    changes: list[list[int]] = field(default_factory=list)
    checkpoints: list[Checkpoint] = field(default_factory=list)

    def add(self, kl: float, agrees: bool, nll: float) -> None:
        """One step. Until all are there, `nll` is a sum."""
        self.kl.append(round(kl, 7))
        self.agrees.append(agrees)
        self.nll += nll


def grow(
    decoder: Decoder,
    text: Text,
    methods: Sequence[Method],
    budgets: Sequence[int],
    checkpoints: Checkpoints,
    tick: Callable[[], None] = lambda: None,
) -> list[Growth]:
    """Full attention's growth, then those of `methods` at each of `budgets`.

    `tick` is called after each step. A budget that is too small for a method raises
    InvalidArgument.
    """
    rows: list[_Row] = []
    try:
        for budget in budgets:
            for method in methods:
                if method.name != "full":
                    rows.append(_Row(decoder, text.made, method, budget))
        course = _Course(decoder, text, rows, checkpoints)
        course.run(tick)
        course.full.nll /= max(1, len(course.full.kl) - 1)
        return [course.full, *(row.finish() for row in rows)]
    finally:
        for row in rows:
            row.session.close()


class _Row:
    """A method at a budget under way."""

    def __init__(self, decoder: Decoder, made: Prefill, method: Method, budget: int) -> None:
        self.method, self.budget = method, budget
        self.growth = Growth(method.label, budget)
        self.session: Session = method.open(decoder, made, budget)
        self._read = self.session.bytes_read()
        self._changes = self._counts()

    def note_changes(self, position: int) -> None:
        now = self._counts()
        if now != self._changes:
            made = [count - before for count, before in zip(now, self._changes, strict=True)]
            self.growth.changes.append([position, *made])
            self._changes = now

    def finish(self) -> Growth:
        """The growth, with what is known at its end."""
        steps = len(self.growth.kl)
        self.growth.nll /= max(1, steps - 1)  # nothing follows the last token
        self.growth.mass = self.session.mass()
        self.growth.bytes_read = (self.session.bytes_read() - self._read) / max(1, steps)
        return self.growth

    def _counts(self) -> list[int]:
        return self.session.changes() if isinstance(self.session, EngineSession) else []


class _Course:
    """All rows along one text."""

    def __init__(
        self,
        decoder: Decoder,
        text: Text,
        rows: Sequence[_Row],
        checkpoints: Checkpoints,
    ) -> None:
        self.full = Growth("full", 0)
        self._decoder, self._rows = decoder, rows
        self._made, self._logits, self._tokens = text.made, text.full, text.tokens
        self._checkpoints = checkpoints
        sessions = [row.session for row in rows]
        self._branch = (
            branch_of(decoder, text.made, sessions) if rows else text.made.branch(decoder, 1)
        )
        grown = [at for at, row in enumerate(rows) if isinstance(row.session, EngineSession)]
        self._recent = _RecentQueries(text.made, grown if checkpoints.every else [])

    def run(self, tick: Callable[[], None]) -> None:
        """1. An index built anew where a checkpoint is.  2. One token to every row.  3. What came
        of it beside full attention."""
        start, length = self._made.length, self._tokens.shape[0]
        places = self._checkpoints.places(start, length)
        attend_rows = row_by_row([row.session for row in self._rows])

        def attend(
            layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
        ) -> torch.Tensor:
            self._recent.add(layer, queries)
            return attend_rows(layer, queries, keys, values)

        rebuilt: list[tuple[_Row, int, tuple[float, float]]] = []
        for position in range(start, length):
            if position in places:
                rebuilt += [(row, position, kl) for row, kl in self._rebuilt(position)]
            logits = None
            if self._rows:
                tokens = self._tokens[position].expand(len(self._rows), 1)
                logits = self._branch.run(tokens, attend)
            self._note(position, logits)
            tick()
        for row, place, (again, exact) in rebuilt:
            first = place - start
            grown = fmean(row.growth.kl[first : first + self._checkpoints.steps])
            row.growth.checkpoints.append(Checkpoint(place, grown, again, exact))

    def _note(self, position: int, logits: torch.Tensor | None) -> None:
        """Step 3 for all rows; `logits` [B, V]."""
        truth = self._logits.after(position)
        last = position + 1 == len(self._tokens)
        following = None if last else int(self._tokens[position + 1])
        every = truth[None] if logits is None else torch.cat([truth[None], logits])
        kl = kl_divergence(truth.expand_as(every), every).tolist()
        agrees = (every.argmax(-1) == truth.argmax(-1)).tolist()
        nll = [0.0] * len(every) if following is None else token_nll(every, following).tolist()
        growths = [self.full, *(row.growth for row in self._rows)]
        for growth, *step in zip(growths, kl, agrees, nll, strict=True):
            growth.add(*step)
        if last or position % _CHANGES_EVERY == 0:
            for row in self._rows:
                row.note_changes(position)

    def _rebuilt(self, place: int) -> Iterator[tuple[_Row, tuple[float, float]]]:
        """Step 1: of each row with an engine, KL of an index built anew and of full attention."""
        steps = range(place, place + self._checkpoints.steps)
        for at in self._recent.rows:
            row = self._rows[at]
            assert isinstance(row.session, EngineSession)
            held = [row.session.held(layer) for layer in range(self._decoder.num_layers)]
            again = replace(
                self._made,
                tokens=self._tokens[:place],
                keys=torch.stack([keys for keys, _ in held]),
                values=torch.stack([values for _, values in held]),
                queries=self._recent.of(at),
            )
            loaded = row.method.with_fields({"prefill_budget": 0})  # over what is held
            sessions = [
                loaded.open(self._decoder, again, row.budget),
                FullSession(again, place, self._decoder.scale),
            ]
            branch, kl = self._branch.fork([at, at]), torch.zeros(2, dtype=torch.float64)
            for position in steps:
                logits = branch.run(self._tokens[position].expand(2, 1), row_by_row(sessions))
                kl += kl_divergence(self._logits.after(position).expand_as(logits), logits)
            for session in sessions:
                session.close()
            again_kl, exact_kl = (kl / len(steps)).tolist()
            yield row, (again_kl, exact_kl)


class _RecentQueries:
    """The last queries of some rows, which an index that is built anew learns from."""

    def __init__(self, made: Prefill, rows: Sequence[int]) -> None:
        self.rows = list(rows)
        self._prompt = made.queries  # [layers, Hq, n, D]
        layers = made.queries.shape[0]
        # Of each step [rows, Hq, D].
        self._steps = [deque[torch.Tensor](maxlen=QUERIES) for _ in range(layers)]

    def add(self, layer: int, queries: torch.Tensor) -> None:
        """Of one step, [B, Hq, 1, D]."""
        if self.rows:
            self._steps[layer].append(queries[self.rows, :, 0])

    def of(self, row: int) -> torch.Tensor:
        """[layers, Hq, n, D]; n is QUERIES, or less where not so many tokens were seen."""
        at = self.rows.index(row)
        made = []
        for layer, steps in enumerate(self._steps):
            parts = [self._prompt[layer]]
            if steps:
                parts.append(torch.stack([queries[at] for queries in steps], 1))
            made.append(torch.cat(parts, 1)[:, -QUERIES:])
        return torch.stack(made)
