"""Runs the demo: full attention first, then every method along full attention's own answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from icecache import InvalidArgument
from icecache.bench.decoder import Decoder
from icecache.bench.engine_session import EngineSession
from icecache.bench.prefill import Prefill, finish
from icecache.bench.quality import decode_freely, kl_divergence, teacher_forced
from icecache.bench.runs import OwnRun
from icecache.demo.document import Document, Needle
from icecache.demo.lossless import LosslessModel
from icecache.demo.methods import Contender

STEPS = 24  # decoded tokens per question

# Called with what is being done, steps done and steps in all.
Progress = Callable[[str, int, int], None]


@dataclass
class Row:
    """One method over all questions."""

    name: str
    budget: int | None  # None: full attention
    note: str
    answers: list[str] = field(default_factory=list)  # decoded freely
    found: list[bool] = field(default_factory=list)
    agreement: float = 1.0  # share of steps with full attention's most likely token
    kl: float = 0.0  # KL(full || method), mean over steps, nats
    tokens: int = 0  # decoded, of batch 1 by the whole model
    seconds: float = 0.0  # of them
    bytes_per_step: float = 0.0  # of keys, values, sketches and summaries
    device_bytes: float = 0.0  # held where attention runs
    mass: float | None = None  # share of attention attended exactly; None where nobody estimates it

    def take_mean(self, questions: int) -> None:
        """Turns sums over questions into means."""
        self.agreement /= questions
        self.kl /= questions
        self.bytes_per_step /= questions
        if self.mass is not None:
            self.mass /= questions

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class Question:
    """Full attention's answer: what the other methods are measured against."""

    needle: Needle
    prefill: Prefill
    seconds: float


def answer_in_full(
    decoder: Decoder, document: OwnRun, needle: Needle, shared: torch.Tensor, end: int | None
) -> Question:
    """Asks one question after the shared document, whose run is `document`, with full attention."""
    run = document.fork()
    first = run.run(needle.question)
    tokens = torch.cat([shared, needle.question])
    prefill = finish(decoder, run, tokens, first, lambda made: len(made) > STEPS, end)
    return Question(needle, prefill, run.step_s)


def run_demo(
    decoder: Decoder,
    tokenizer: Any,
    document: Document,
    methods: list[Contender],
    progress: Progress,
    on_question: Callable[[int, Question], None] | None = None,
) -> list[Row]:
    """One row for full attention and one for each method. `on_question` sees each question."""
    if decoder.sinks:
        raise InvalidArgument(
            "model: its attention has learned sinks, which the report of the demo does not show; "
            "expected a model without"
        )
    lossless_budget = methods[0].budget
    total = 2 + len(document.needles) * (2 + len(methods))
    progress("prefill with full attention", 0, total)
    full = OwnRun(decoder)
    full.run(document.tokens)
    progress("prefill for lossless decoding", 1, total)
    end = tokenizer.eos_token_id
    lossless = _lossless_model(decoder, document, lossless_budget, end)
    first = Row("full attention", None, "every token", mass=1.0)
    exact = Row("IceCache lossless", lossless_budget, "the budget drafts, exact attention verifies")
    rows = [Row(method.name, method.budget, method.note) for method in methods]
    every = [first, *([exact] if lossless else []), *rows]
    for row in every[1:]:
        row.agreement = 0.0
    done = 2
    for number, needle in enumerate(document.needles):
        progress(f"question {number + 1}: full attention", done, total)
        question = answer_in_full(decoder, full, needle, document.tokens, end)
        text = tokenizer.decode(question.prefill.continuation, skip_special_tokens=True)
        _note_answer(first, text, needle)
        first.seconds += question.seconds
        first.tokens += STEPS
        progress(f"question {number + 1}: lossless", done + 1, total)
        if lossless is not None:
            _run_lossless(lossless, tokenizer, question, exact)
        done += 2
        for method, row in zip(methods, rows, strict=True):
            progress(f"question {number + 1}: {method.name} at {method.budget}", done, total)
            _run_method(decoder, tokenizer, question, method, row)
            done += 1
        if on_question is not None:
            on_question(number, question)
    progress("done", total, total)

    cell = 2 * decoder.head_dim * decoder.dtype.itemsize * decoder.num_kv_heads * decoder.num_layers
    length = document.tokens.shape[0] + document.longest_question
    first.bytes_per_step = first.device_bytes = exact.device_bytes = float(cell * length)
    for row in every[1:]:
        row.take_mean(len(document.needles))
    for row, method in zip(rows, methods, strict=True):
        if method.method.session is not None:  # which holds the budget and no more
            row.bytes_per_step = row.device_bytes = float(cell * method.budget)
    return every


def _lossless_model(
    decoder: Decoder, document: Document, budget: int, end: int | None
) -> LosslessModel | None:
    """None for a model that cannot take tokens back."""
    try:
        return LosslessModel(decoder, document.tokens, budget, end)
    except InvalidArgument:
        return None


def _run_lossless(model: LosslessModel, tokenizer: Any, question: Question, row: Row) -> None:
    """Adds one question to `row`."""
    prefill = question.prefill
    made = model.answer(prefill)
    _compare(row, prefill.logits, made.logits)
    row.seconds += made.seconds
    row.tokens += len(made.tokens)
    row.bytes_per_step += made.bytes_read / len(made.tokens)
    row.mass = (row.mass or 0.0) + 1.0
    text = tokenizer.decode(made.tokens, skip_special_tokens=True)
    _note_answer(row, text, question.needle)


def _run_method(
    decoder: Decoder, tokenizer: Any, question: Question, method: Contender, row: Row
) -> None:
    """Adds one question to `row`."""
    session = method.open(decoder, question.prefill)
    free = session.fork()
    start = time.perf_counter()
    logits = teacher_forced(decoder, question.prefill, [session])[0]
    row.seconds += time.perf_counter() - start
    row.tokens += STEPS
    _compare(row, question.prefill.logits, logits)
    if isinstance(session, EngineSession):
        # Without a far field an index estimates only what it has searched.
        if session.engine.config.tail == "on":
            row.mass = (row.mass or 0.0) + session.mass()
        row.bytes_per_step += session.bytes_read() / question.prefill.steps
    chosen = logits.argmax(-1)
    if torch.equal(chosen[:-1], question.prefill.continuation[1:-1]):
        # It was led along what it would have written.
        tokens = torch.cat([question.prefill.continuation[:1], chosen])
    else:
        tokens = decode_freely(decoder, question.prefill, [free])[0]
    _note_answer(row, tokenizer.decode(tokens, skip_special_tokens=True), question.needle)
    free.close()
    if isinstance(session, EngineSession):
        row.device_bytes = max(row.device_bytes, float(session.engine.memory().device_bytes))
    session.close()


def _compare(row: Row, truth: torch.Tensor, logits: torch.Tensor) -> None:
    """Adds how near `logits` are to those of full attention, both [T, V]."""
    row.kl += float(kl_divergence(truth, logits).mean())
    row.agreement += float((truth.argmax(-1) == logits.argmax(-1)).float().mean())


def _note_answer(row: Row, text: str, needle: Needle) -> None:
    row.answers.append(text.strip())
    row.found.append(needle.answer in text)
